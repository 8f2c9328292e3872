# shellcheck shell=bash
# Sourced by run.sh of LibriSpeech, MLS, Indic and Loquacious: the steps of Transducer-Llama (arXiv
# 2412.16464), and what they share with those of speech LLMs (speech_llm.sh), of CTC + AED (aed.sh) and
# of combinations with an LLM (combination.sh).
#
#   defaults CORPUS      what the user did not give, according to --mini
#   data                 stages 1-5
#   small_llm            (--mini) a small LLaMA with its own pieces stands in for a downloaded LLM
#   system               what --system names: transducer_llama, speech_llm, aed or combination
#   transducer_llama     CTC model -> FT with a weak LM -> with --llm: the LLM adapted to the pieces,
#                        fine-tuned and swapped in, decoded with the LM scales of training and with
#                        tuned ones -> with --finetune_config: trained further so
#
# Experiments are called as their configuration or LLM. The array `common` is the recipe's own
# options of asr_llm.sh.
template=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source-path=SCRIPTDIR
. "${template}/path.sh"
# shellcheck source-path=SCRIPTDIR
. "${template}/options.sh"
# shellcheck source-path=SCRIPTDIR
. "${template}/speech_llm.sh"
# shellcheck source-path=SCRIPTDIR
. "${template}/aed.sh"
# shellcheck source-path=SCRIPTDIR
. "${template}/combination.sh"
common=() forwarded=()
# shellcheck disable=SC2034  # small_llama and num_pieces are for run.sh
system=transducer units="" small_llama=train_llama num_pieces=5000
mini=false llm="" llm_tag="" lm_train_text="" asr_args="" nj=8 datadir="" expdir="" dumpdir=""
ctc_config="" asr_config="" lm_config="" tune_config="" as_trained_config="" inference_config=""
finetune_config="" finetune_model="" aed_config="" tune_aed_config="" combinations=""
# For read_options, beside the recipe's own.
shared_options="mini system units llm asr_args nj datadir expdir dumpdir ctc_config asr_config lm_config"
shared_options+=" tune_config as_trained_config inference_config finetune_config finetune_model"
shared_options+=" aed_config tune_aed_config combinations"

usage() {
    comment_of run.sh
    "${template}/asr_llm.sh" --help
}

defaults() { # name of the corpus
    local conf=conf/$1/mini
    [ "${mini}" = true ] || [ "${mini}" = false ] || die "--mini is '${mini}'; expected true or false"
    # shellcheck disable=SC2034  # small_llama and num_pieces are for run.sh
    case ${system} in
        transducer) ;;
        speech_llm) small_llama=train_copy_llama && speech_llm_defaults "$1" ;;
        aed) aed_defaults "$1" ;;
        combination) combination_defaults "$1" ;;
        *) die "--system is '${system}'; expected transducer, speech_llm, aed or combination" ;;
    esac
    if [ "${mini}" = true ]; then
        : "${datadir:=data/mini}" "${expdir:=exp/mini}" "${dumpdir:=dump/mini}"
        : "${ctc_config:=${conf}/train_ctc.yaml}" "${asr_config:=${conf}/train_ft_weak.yaml}"
        : "${lm_config:=${conf}/finetune_llm.yaml}" "${tune_config:=${conf}/tune.yaml}"
        : "${as_trained_config:=conf/mini/tune_as_trained.yaml}"
        : "${inference_config:=conf/mini/decode.yaml}"
        if [ -z "${finetune_config}" ] && [ -f "${conf}/finetune_mwer.yaml" ]; then
            finetune_config=${conf}/finetune_mwer.yaml
            : "${finetune_model:=valid.mwer_expected_errors.ave.pth}"
        fi
    else
        : "${datadir:=data}" "${expdir:=exp}" "${dumpdir:=dump}"
        : "${ctc_config:=conf/ctc/train_ctc_conformer.yaml}"
        : "${asr_config:=conf/transducer/train_ft_stateless.yaml}"
        : "${lm_config:=conf/lm/finetune_causal_llm.yaml}"
        : "${tune_config:=conf/librispeech/tune.yaml}"
        : "${as_trained_config:=conf/librispeech/tune_as_trained.yaml}"
        : "${inference_config:=conf/librispeech/decode.yaml}"
    fi
    : "${finetune_model:=valid.loss.ave.pth}"
}

recipe() {
    "${template}/asr_llm.sh" --datadir "${datadir}" --expdir "${expdir}" --dumpdir "${dumpdir}" \
        --nj "${nj}" "${common[@]}" "${forwarded[@]}" "$@"
}

data() { # options of local/data.sh
    recipe --local_data_opts "--datadir ${datadir} --nj ${nj} $*"
}

tag_of() { basename "${1%.yaml}"; }

# What asr_llm.sh gets for an option.
option() { # name, its default
    local words=("${common[@]}" "${forwarded[@]}") n name value=$2
    for ((n = 0; n < ${#words[@]}; n += 2)); do
        name=${words[n]#--}
        [ "${name//-/_}" != "$1" ] || value=${words[n + 1]}
    done
    echo "${value}"
}
# Whether stage 12 or 13 is run.
asked_for() { # stage
    [ "$(option stage 1)" -le "$1" ] && [ "$(option stop_stage 13)" -ge "$1" ] &&
        [ "$(option skip_eval false)" = false ]
}
tool() { "$(option python python3)" -m "espnet_llm_plugin.bin.$1" "${@:2}"; }
decoding_gpus() { if [ "$(option ngpu 0)" -gt 0 ]; then echo 1; else echo 0; fi; }
training_set() {
    if [ -n "$(option speed_perturb_factors "")" ]; then
        echo "$(option train_set train)_sp"
    else
        option train_set train
    fi
}

lm() { # tag, options
    recipe --skip_data_prep true --use_lm true --lm_tag "$1" --lm_train_text "${lm_train_text}" "${@:2}"
}

small_llm() { # configuration, number of pieces, text for them
    local pieces=(--token_listdir "${datadir}/token_list_llm" --nbpe "$2" --bpe_train_text "$3")
    recipe --stage 5 "${pieces[@]}"
    lm "$(tag_of "$1")" --lm_config "$1" "${pieces[@]}"
    llm=${expdir}/lm_$(tag_of "$1")/llm
    llm_tag=small
    [ "${system}" != speech_llm ] || llm_tag=small_copy # another LLM than the transducers'
    [ "${units}" != native ] || [ ! -f "${llm}/config.json" ] || as_native
}

asr() { # configuration, options
    recipe --skip_data_prep true --asr_tag "$(tag_of "$1")" --asr_config "$1" \
        --asr_args "${asr_args}" --inference_config "${inference_config}" --inference_tag decode "${@:2}"
}

# A further system is a file like aed.sh that defines <name>_defaults and <name>, and <name> in `defaults`.
system() {
    case ${system} in
        transducer) transducer_llama ;;
        *) "${system}" ;;
    esac
}

transducer_llama() {
    local init=() weak
    weak=${expdir}/asr_$(tag_of "${asr_config}")
    if [ "${ctc_config}" != none ]; then
        asr "${ctc_config}"
        init=(--ctc_init "${expdir}/asr_$(tag_of "${ctc_config}")")
    fi
    asr "${asr_config}" "${init[@]}" --tune_config "${tune_config}"
    [ -n "${llm}" ] || return 0

    local tag=${llm_tag:-$(basename "${llm}")}
    local adapted=${expdir}/lm_${tag}/llm swapped=decode_swap_${tag}
    lm "${tag}" --llm "${llm}" --lm_config "${lm_config#none}"
    [ "${as_trained_config}" = none ] ||
        asr "${asr_config}" --skip_train true --swap_llm "${adapted}" \
            --tune_config "${as_trained_config}" --inference_tag "${swapped}_as_trained"
    asr "${asr_config}" --skip_train true --swap_llm "${adapted}" --tune_config "${tune_config}" \
        --inference_tag "${swapped}"
    [ -n "${finetune_config#none}" ] || return 0

    # The weak model's predictor is left out of the initial values: the LLM is in its place. The scales
    # are those that were tuned for the swap, unless --asr_args has others.
    local scales="" best=${weak}/${swapped}/tune/best.yaml
    [ ! -f "${best}" ] || scales=$(scales_of "${best}")
    asr "${finetune_config}" --tune_config "${tune_config}" \
        --asr_tag "$(tag_of "${finetune_config}")_${tag}" \
        --pretrained_model "${weak}/valid.loss.ave.pth:::decoder.predictor" \
        --inference_asr_model "${finetune_model}" \
        --asr_args "${scales} ${asr_args} --decoder_conf predictor_conf.llm=${adapted}" \
        --diagnose_args "$(compared "${weak}" "${swapped}" "${adapted}") $(option diagnose_args "")"
}

# Options of bin.diagnose for the page of the model that is trained after the swap: it is compared with the
# weak LM, the swap as trained and the swap tuned, on the first set.
compared() { # directory of the weak model, tag of its decoding with the LLM, the LLM
    local sets first given="" name report=${3%/*}/adapted/vocabulary_report.json
    sets=$(option test_sets test)
    [ "$(option eval_valid_set false)" = false ] || sets="$(option valid_set dev) ${sets}"
    first=${sets%% *}
    [ -f "$1/decode/${first}/scores.json" ] || return 0
    for name in weak:decode "untuned:$2_as_trained" "swapped:$2"; do
        [ ! -f "$1/${name#*:}/${first}/scores.json" ] ||
            given+=" --${name%%:*} $1/${name#*:}/${first}"
    done
    [ ! -f "$1/decode/nll/nll.json" ] || given+=" --weak_nll $1/decode/nll/nll.json"
    [ ! -f "${report}" ] || given+=" --vocabulary_report ${report}"
    echo "${given}"
}
