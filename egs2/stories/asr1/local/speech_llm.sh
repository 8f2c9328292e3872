# shellcheck shell=bash
# Sourced by run.sh: LLMs that can copy, and the speech LLMs of local/speech_llm_rows.txt.
# shellcheck disable=SC2034,SC2154  # run.sh sets the options, models.sh the functions; describe sets
# variables of its callers

# --- LLMs -----------------------------------------------------------------------------------------
# copy: from scratch, over the recognisers' pieces. copy_own: over pieces of its own, as an LLM from
# elsewhere has them. copy_adapted: copy_own adapted to the recognisers' pieces, then fine-tuned.
copy_args="" least_copying=0.8
[ "${size}" != tiny ] || copy_args="--max_epoch 1 --num_iters_per_epoch 20" least_copying=0
own_pieces=(--token_listdir "${data}/token_list_own" --nbpe 400
    --bpe_train_text "${data}/lm_train/text")
copying_lm() {
    local from_scratch=(--lm_config "$(config train_copy_llama)")
    case $1 in
        copy) lm "$1" "${from_scratch[@]}" --lm_args "${copy_args}" ;;
        copy_own)
            recipe "${name}_own_pieces" --stage 5 --stop_stage 5 "${own_pieces[@]}"
            lm "$1" "${from_scratch[@]}" "${own_pieces[@]}" --lm_args "${copy_args}"
            native_llm
            ;;
        copy_adapted)
            train_lm copy_own
            lm "$1" --llm "${exp}/lm_copy_own/native" --lm_args "${copy_args}" \
                --lm_config "$(config finetune_copy_llama)"
            ;;
    esac
    local figures=${exp}/lm_$1/copying.json
    [ "${figures}" -nt "${exp}/lm_$1/llm/config.json" ] ||
        tool copy_accuracy --llm "${exp}/lm_$1/llm" --text "dump/${name}/raw/dev/text" \
            --output "${figures}" --require "acc_copy=${least_copying}"
}
# What is left of an exported LLM without the files about our token list is an LLM from elsewhere;
# the recognisers' token list with its tokens.
native_llm() {
    local from=${exp}/lm_copy_own/llm native=${exp}/lm_copy_own/native
    (
        flock 9
        if ! [ "${native}/.done" -nt "${from}/config.json" ]; then
            mkdir -p "${native}"
            cp "${from}"/{*.json,*.safetensors} "${native}"
            touch "${native}/.done"
        fi
    ) 9> "exp/locks/${name}_native"
    recipe "${name}_native_tokens" --stage 5 --stop_stage 5 "${native_tokens[@]:0:4}"
}
native_tokens=(--token_type hugging_face --llm "${exp}/lm_copy_own/native"
    --asr_stats_dir "${exp}/asr_stats_native")
llm_of() { # LM
    if [ "$1" = copy_own ]; then echo "${exp}/lm_copy_own/native"; else echo "${exp}/lm_$1/llm"; fi
}

# --- speech LLMs ----------------------------------------------------------------------------------
# All differ from sl_lora8 in one thing.
describe_speech_llm() {
    local adapter="stack=2 projection=mlp match_text_scale=true"
    settings=train_speech_llm lm=copy
    case $1 in
        sl_lora8) ;;
        sl_frozen) options="--decoder_conf tuning=frozen" ;;
        sl_lora32) options="--decoder_conf lora_conf.r=32 --decoder_conf lora_conf.alpha=64" ;;
        sl_full) options="--decoder_conf tuning=full" ;;
        sl_two_stage) settings=train_speech_llm_two_stage ;;
        sl_stack1) adapter=${adapter/stack=2/stack=1} ;;
        sl_stack4) adapter=${adapter/stack=2/stack=4} ;;
        sl_compression)
            adapter=${adapter/stack=2/threshold=0.9} options="--decoder_conf adapter=ctc_compression"
            ;;
        sl_mask) options="--model_conf text_mask=0.25" ;;
        sl_bidirectional) options="--decoder_conf interface_conf.mask=bidirectional" ;;
        sl_merged) options="--decoder_conf interface=merged" ;;
        sl_cross) options="--decoder_conf interface=cross_attention" ;;
        sl_native) lm=copy_own ;;
        sl_adapted) lm=copy_adapted ;;
        sl_ctc_embedding) adapter="stack=2" options="--decoder_conf adapter=ctc_embedding" ;;
        sl_no_copying) lm=stories ;;
    esac
    local option
    for option in ${adapter}; do options+=" --decoder_conf adapter_conf.${option}"; done
}
# Nats per token by which another utterance's audio is worse: about 0, and the LLM ignores the audio.
report_gap() { # experiment
    local gap=""
    [ ! -f "$1/train.log" ] || gap=$(sed -nE 's/.*epoch results:.*shuffled_gap=([^,]+).*/\1/p' "$1/train.log" | tail -n 1)
    echo "=== $1: shuffled-audio gap ${gap:-unknown}$(awk -v gap="${gap}" 'BEGIN {
        if (gap !~ /^-?[0-9]/) print " (see train.log)"
        else if (gap < 0.3) print ": it IGNORES THE AUDIO"
        else if (gap < 2) print ": it hardly uses the audio"}')"
}
