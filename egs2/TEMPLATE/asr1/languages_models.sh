# shellcheck shell=bash
# Sourced by languages.sh: what a model's name says, and its training.
# shellcheck disable=SC2034,SC2154  # languages.sh sets the options; describe sets variables of its
# callers

# Few words occur, so that pieces can be long (16 a sentence): unigram pieces would not, and CTC needs
# as many embeddings of the audio.
# `stages LOCK ...` is asr_llm.sh. Who needs the same thing at the same time waits for the lock and
# then finds it finished.
stages() {
    mkdir -p exp/locks
    flock "exp/locks/$1" ../../TEMPLATE/asr1/asr_llm.sh --nj 1 --inference_nj 1 \
        --bpemode bpe --nbpe "${nbpe}" --bpe_train_text "${data}/balanced_text" --bpe_normalization nfkc \
        --datadir "${data}" --dumpdir "${dump}" --expdir "${exp}" "${@:2}"
}
tool() { python3 -m "espnet_llm_plugin.bin.$1" "${@:2}"; }
config() { echo "conf/${recipe}/experiment/$1.yaml"; }

# --- data -----------------------------------------------------------------------------------------
prepare_data() {
    # shellcheck disable=SC2086
    tool make_mini_corpus "${corpus}" "${data}/corpus" ${sizes} --nj "${jobs}"
    stages "${size}_data" --stop_stage 5 --nj "${jobs}" --local_data_opts "--${corpus} ${data}/corpus
            --datadir ${data} --nj ${jobs} --langs ${langs}"
    local train=${dump}/raw/train low=${dump}/raw/train_low
    # Every tenth utterance of some languages, all of the others.
    awk -v less="${less_of}" 'BEGIN {split(less, names, " "); for (i in names) few[names[i]] = 1}
        !($2 in few) || n[$2]++ % 10 == 0' "${train}/utt2lang" > "${train}/utt2lang_low"
    tool subset_data_dir "${train}" "${low}" --utt_list "${train}/utt2lang_low"
}
set_of() { # model
    if [[ $1 == *_low ]]; then echo train_low; else echo train; fi
}

# --- LLMs that can copy ---------------------------------------------------------------------------
train_lm() { # copy or copy_small
    local settings=train_copy_llama figures=${exp}/lm_$1/copying.json least_copying=0.8
    [ "${size}" != tiny ] || least_copying=0
    [ "$1" = copy ] || settings+=_small
    stages "${size}_$1" --skip_data_prep true --use_lm true --lm_tag "$1" --lm_args "${lm_args}" \
        --lm_config "$(config "${settings}")"
    [ "${figures}" -nt "${exp}/lm_$1/llm/config.json" ] ||
        tool copy_accuracy --llm "${exp}/lm_$1/llm" --text "${dump}/raw/dev/text" \
            --output "${figures}" --require "acc_copy=${least_copying}"
}

# --- recognisers ----------------------------------------------------------------------------------
place() { # model; everything of a seed is in one directory, the CTC does not depend on the epochs
    case $1 in
        ctc*) echo "${exp}/s${seed}" ;;
        *) echo "${exp}/e${epochs}_s${seed}" ;;
    esac
}
# Sets `lm` and `options` of training from the words of a model's name.
describe() {
    local word words loss tap weight=""
    lm=copy options=""
    IFS=_ read -ra words <<< "$1"
    for word in "${words[@]}"; do
        [[ ${word} != w[0-9]* ]] || weight=${word#w}
    done
    for word in "${words[@]}"; do
        case ${word} in
            w[0-9]*) ;; # of the loss
            frozen | lora | full) options+=" --decoder_conf tuning=${word}" ;;
            lora32)
                options+=" --decoder_conf tuning=lora --decoder_conf lora_conf.r=32"
                options+=" --decoder_conf lora_conf.alpha=64"
                ;;
            rnnt* | ctc*)
                loss=${word%-*} tap=llm_prefix
                [[ ${word} != *-* ]] || tap=${word#*-}
                options+=" --model_conf auxiliary=[$(head_of "${loss}" "${tap}" "${weight}")]"
                ;;
            lang)
                options+=" --decoder_conf soft_prompt=per_language"
                options+=" --decoder_conf soft_prompt_conf.languages=[${langs// /,}]"
                ;;
            drop) options+=" --decoder_conf soft_prompt_conf.language_dropout=0.3" ;;
            predict) options+=" --decoder_conf language_prediction=true" ;;
            small) lm=copy_small ;;
            start) ;; # settings of asr
            ownctc) options+=" --model_conf ctc_weight=0.3 --optim_conf groups.ctc.lr_factor=0.2" ;;
            stack*) options+=" --decoder_conf adapter_conf.stack=${word#stack}" ;;
            bidirectional) options+=" --decoder_conf interface_conf.mask=bidirectional" ;;
            merged) options+=" --decoder_conf interface=merged" ;;
            cross) options+=" --decoder_conf interface=cross_attention" ;;
            masked) options+=" --model_conf text_mask=0.25" ;;
            # The LLM's LoRA stays as it is for a quarter of the training.
            stages)
                options+=" --optim_conf groups={\"encoder\":{\"lr_factor\":0.2},"
                options+="\"ctc\":{\"lr_factor\":0.2},\"decoder.llm\":{\"freeze_updates\":$(($(steps_of \
                    "${epochs}" train) / 4))}}"
                ;;
            low) ;; # set_of
            *) die "model '$1' has the unknown word '${word}'" ;;
        esac
    done
}
# An entry of `auxiliary`, as YAML without spaces. The same name everywhere, for the table.
head_of() { # loss, tap, weight unless it is that of the configuration
    local more=${3:+,\"weight\":$3}
    [ "$1" = ctc ] || more+=',"predictor_dim":128,"joint_dim":256'
    echo "{\"loss\":\"$1\",\"tap\":\"$2\",\"name\":\"aux\"${more}}"
}
steps_of() { # epochs, training set
    local utterances
    utterances=$(wc -l < "${dump}/raw/$2/text")
    echo $(($1 * ((utterances + 15) / 16)))
}
# Options of the scheduler: one cosine over the whole training, a tenth of it to warm up.
schedule() { # epochs, training set
    local steps
    steps=$(steps_of "$1" "$2")
    echo "--max_epoch $1 --scheduler_conf first_cycle_steps=${steps}" \
        "--scheduler_conf warmup_steps=$((steps / 10))"
}
training_of() { # model with an LLM: all options of its training
    local lm options
    describe "$1"
    echo "$(schedule "${epochs}" "$(set_of "$1")") --seed ${seed}" \
        "--decoder_conf llm=${exp}/lm_${lm}/llm ${options}"
}
asr() { # model, what is done, options
    local directory set lock settings=train_speech_llm
    directory=$(place "$1")
    set=$(set_of "$1")
    lock=${size}_$(basename "${directory}")_$1_$2
    [ "$2" != stats ] || lock=${size}_stats_${set}
    [[ $1 != ctc* ]] || settings=train_ctc
    [[ $1 != *_start* ]] || settings=train_speech_llm_start
    stages "${lock}" --skip_data_prep true --expdir "${directory}" \
        --train_set "${set}" --asr_stats_dir "${exp}/asr_stats_${set}" --asr_tag "$1" \
        --asr_config "$(config "${settings}")" "${@:3}"
}
train_model() {
    local set ctc=ctc lm options first
    set=$(set_of "$1")
    [ "${set}" = train ] || ctc=ctc_low
    if [[ $1 == ctc* ]]; then
        asr "$1" stats --stage 10 --stop_stage 10 # shared by all seeds
        asr "$1" train --skip_eval true --stop_stage 11 \
            --asr_args "$(schedule "${ctc_epochs}" "${set}") --seed ${seed}"
        return
    fi
    train_model "${ctc}"
    describe "$1"
    train_lm "${lm}"
    first=$(place ctc)/asr_${ctc}/valid.loss.ave.pth
    [[ $1 != *_start* ]] || first="${first}:ctc:ctc ${first}"
    asr "$1" train --skip_eval true --stop_stage 11 --pretrained_model "${first}:encoder:encoder" \
        --asr_args "$(training_of "$1")"
    report_gap "$(place "$1")/asr_$1"
}
# Nats per token by which another utterance's audio is worse: about 0, and the LLM ignores the audio.
report_gap() { # experiment
    [ ! -f "$1/train.log" ] || sed -nE \
        "s|.*epoch results:.*shuffled_gap=([^,]+).*|=== $1: shuffled-audio gap \\1|p" \
        "$1/train.log" | tail -n 1
}
