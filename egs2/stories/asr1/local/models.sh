# shellcheck shell=bash
# Sourced by run.sh: language models and recognisers, each trained when something needs it first.
# shellcheck disable=SC2034,SC2154  # run.sh sets the options; a unit of work sets encoder, epochs and
# seed; describe sets variables of its callers, of which some need only some

# `recipe LOCK ...` is asr_llm.sh. Who needs the same thing at the same time waits for the lock and
# then finds it finished: several runs share one directory.
recipe() {
    flock "exp/locks/$1" ../../TEMPLATE/asr1/asr_llm.sh --nj 1 --inference_nj 1 --nbpe "${nbpe}" \
        --datadir "${data}" --dumpdir "dump/${name}" --expdir "${exp}" "${@:2}"
}
tool() { python3 -m "espnet_llm_plugin.bin.$1" "${@:2}"; }
config() { echo "conf/stories/$1.yaml"; }

# --- data -----------------------------------------------------------------------------------------
counts() { echo "--num_train $1 --num_dev $2 --num_test $3 --num_lm $4"; }
sample() { # directory, options
    # shellcheck disable=SC2046,SC2086
    flock "exp/locks/$(basename "$1")" python3 -m espnet_llm_plugin.bin.sample_text \
        --output_dir "$1" $(counts ${text_size}) ${sample_args} "${@:2}"
}
# A small LLaMA with pieces of its own, trained on the sentences of a grammar.
small_llama() {
    local text=data/grammar_${texts} pieces
    pieces=(--token_listdir "${text}/token_list" --nbpe 400 --bpe_train_text "${text}/lm/text")
    sample "${text}"
    recipe "small_llama_${texts}" "${pieces[@]}" --stage 5 --stop_stage 5
    recipe "small_llama_${texts}" "${pieces[@]}" --stage 6 --stop_stage 7 --skip_data_prep true \
        --use_lm true --lm_exp "${small_llama}" --lm_stats_dir "${small_llama}_stats" \
        --lm_config "$(config train_llama)" --lm_args "${lm_args}" \
        --lm_train_text "${text}/lm/text" --lm_dev_text "${text}/dev/text"
}
prepare_data() {
    mkdir -p exp/locks "${exp}"
    [ -n "${llm_source}" ] || small_llama
    sample "data/text_${texts}_${source}" --llm "${llm}"
    # shellcheck disable=SC2086
    recipe "${name}_data" --skip_train true --stop_stage 5 --nj "${jobs}" \
        --bpe_train_text "${data}/lm_train/text" --local_data_opts \
        "--text data/text_${texts}_${source} $(counts ${sizes}) --nj ${jobs} --output_dir ${data}"
    [ "${stop_stage}" -le 5 ] || encoder=offline epochs=1 seed=1 decoding=stats \
        asr ctc train_ctc --stage 10 --stop_stage 10
}

# --- language models ------------------------------------------------------------------------------
transcripts="dump/${name}/raw/train/text"
lm_text="${data}/lm_train/text ${transcripts}"
lm() { # name, options
    recipe "${name}_lm_$1" --skip_data_prep true --use_lm true --lm_tag "$1" --lm_args "${lm_args}" \
        --lm_train_text "${lm_text}" "${@:2}"
}
train_lm() {
    local finetune=(--lm_config "$(config finetune_llm)")
    case $1 in
        stories) lm "$1" --llm "${llm}" "${finetune[@]}" ;;
        adapted) lm "$1" --llm "${llm}" ;; # neither trained nor fine-tuned
        weighted) lm "$1" --llm "${llm}" "${finetune[@]}" --oov_init length_weighted_mean ;;
        first | random) lm "$1" --llm "${llm}" "${finetune[@]}" --oov_init "$1" ;;
        other | transcripts) # another domain: pretrained on the grammar; fine-tuned on it, or not
            local text=data/grammar_${texts}/lm/text
            [ "$1" = other ] || text=${transcripts}
            small_llama
            lm "$1" --llm "${small_llama}/llm" "${finetune[@]}" --lm_train_text "${text}"
            ;;
        lstm) lm "$1" --lm_config "$(config train_lstm_lm)" ;;
        copy*) copying_lm "$1" ;; # speech_llm.sh
    esac
    local out=${exp}/lm_$1/perplexity.json
    if [ "$1" = lstm ]; then
        out=${exp}/lm_lstm/predictor.pth
        [ "${out}" -nt "${exp}/lm_lstm/.done" ] || tool lstm_predictor \
            --lm_file "${exp}/lm_lstm/valid.loss.ave.pth" --output "${out}"
    elif ! [ "${out}" -nt "${exp}/lm_$1/llm/config.json" ]; then
        tool llm_perplexity --llm "${exp}/lm_$1/llm" --text "dump/${name}/raw/dev/text" \
            --output "${out}"
    fi
}

# --- recognisers ----------------------------------------------------------------------------------
# Everything of a condition is in one directory. The CTC model does not depend on the epochs, and one
# streaming model is trained with chunks of all sizes, which are a matter of decoding.
place() { # model
    local trained=offline condition
    [ "${encoder}" = offline ] || trained=streaming
    condition=${trained}_e${epochs}_s${seed}
    [ "$1" != ctc ] || condition=${trained}_s${seed}
    echo "${exp}/${condition}"
}
asr() { # model, configuration, options; `decoding` names what others need not wait for
    local directory tokens=()
    [ "${1#sl_native}" = "$1" ] || tokens=("${native_tokens[@]}")
    directory=$(place "$1")
    recipe "${name}_$(basename "${directory}")_$1_${decoding:-train}" --skip_data_prep true --expdir "${directory}" \
        --asr_stats_dir "${exp}/asr_stats" --asr_tag "$1" --asr_config "$(config "$2")" "${tokens[@]}" "${@:3}"
}
# Sets `settings` (configuration), `lm` (its LM), `from` (row whose model and scales it starts with)
# and `options` (of training) of a model.
describe() {
    settings="" lm="" from="" options=""
    case $1 in
        ctc) settings=train_ctc ;;
        ctc_more) settings=train_ctc_more ;;
        rnnt) settings=train_rnnt ;;
        ft_weak) settings=train_ft_weak ;;
        ft_weak_lstm) settings=train_ft_lstm ;;
        ft_lstm) settings=train_ft_lstm lm=lstm options="--freeze_param decoder.predictor" ;;
        ft_llm) settings=train_ft_llm lm=stories ;;
        ft_other) settings=train_ft_llm lm=other ;;
        sl_*) describe_speech_llm "$1" ;; # speech_llm.sh
        *_rnnt_loss) from=${1%_rnnt_loss} options="--model_conf mwer_weight=0" ;;
        *_mwer) from=${1%_mwer} ;;
        *_mwer_n2) from=${1%_mwer_n2} options="--model_conf mwer_conf.nbest=2" ;;
        *_mwer_n8)
            from=${1%_mwer_n8}
            options="--model_conf mwer_conf.nbest=8 --model_conf mwer_conf.beam_size=8"
            ;;
    esac
    [ -n "${from}" ] || return 0
    settings=finetune_mwer lm=stories
    [ "${from}" != weak ] || lm="" options+=" --decoder_conf predictor=stateless"
}
# Options of the scheduler: one cosine over the whole training, a tenth of it to warm up.
schedule() { # epochs
    local steps=$(($1 * ((train_utts + 15) / 16)))
    echo "--max_epoch $1 --scheduler_conf first_cycle_steps=${steps}" \
        "--scheduler_conf warmup_steps=$((steps / 10))"
}
train_model() {
    local settings lm from options start=() count=${epochs} first
    case $1 in
        ctc) count=${ctc_epochs} ;;
        *) train_model ctc ;;
    esac
    describe "$1"
    [ -z "${lm}" ] || train_lm "${lm}"
    if [ -n "${from}" ]; then
        # one model for all chunk sizes continues with the scales of the middle one
        [ "${encoder}" = offline ] || local encoder=320
        run_row "${from}" # trains what this model starts from, and tunes its scales
        describe "$1"
        first=$(place "$(field "${from}" model)")/asr_$(field "${from}" model)/valid.loss.ave.pth
        [[ $(field "${from}" use) != swap* ]] || first+=":::decoder.predictor" # without the weak LM
        start=(--pretrained_model "${first}")
        options+=$(scales_of "$(decoding_of "${from}")/tune/best.yaml")
        count=${finetune_epochs}
    elif [ "$1" = ctc_more ]; then
        start=(--pretrained_model "$(place ctc)/asr_ctc/valid.loss.ave.pth")
    elif [ "$1" = sl_native ]; then # its CTC has other labels
        start=(--pretrained_model "$(place ctc)/asr_ctc/valid.loss.ave.pth:encoder:encoder")
    elif [ "$1" != ctc ]; then
        start=(--ctc_init "$(place ctc)/asr_ctc")
    fi
    if [[ $1 = sl_* ]]; then
        options+=" --decoder_conf llm=$(llm_of "${lm}")"
    elif [ "${lm}" = lstm ]; then
        start+=(--pretrained_model
            "${exp}/lm_lstm/predictor.pth:decoder.predictor:decoder.predictor")
    elif [ -n "${lm}" ]; then
        options+=" --decoder_conf predictor_conf.llm=${exp}/lm_${lm}/llm"
    fi
    [ "${encoder}" = offline ] || # and look ahead by 40 ms, as the paper
        options+=" --encoder_conf chunk_size=32 --encoder_conf dynamic_chunk_sizes=[8,16,32,64]
            --encoder_conf right_context=4"
    asr "$1" "${settings}" --skip_eval true --stop_stage 11 "${start[@]}" \
        --asr_args "$(schedule "${count}") --seed ${seed} ${options}"
    [[ $1 != sl_* ]] || report_gap "$(place "$1")/asr_$1"
}
