# shellcheck shell=bash
# Sourced by transducer_llama.sh, for `--system speech_llm` of LibriSpeech, MLS, Indic and Loquacious:
# speech LLMs (arXiv 2307.11795, 2603.15045).
#
#   speech_llm_defaults CORPUS      what the user did not give, according to --mini
#   speech_llm                      CTC model -> with `--units adapted` the LLM adapted to the pieces
#                                   and fine-tuned -> speech LLM, decoded alone and jointly with CTC
#
# The recipe's languages (`langs`) and the CTC model's pieces are filled into the configuration.
# shellcheck disable=SC2034,SC2154  # transducer_llama.sh has the options and functions

speech_llm_defaults() { # name of the corpus
    local units_of_paper=native
    [ "$1" = mls ] || [ "$1" = indic ] || units_of_paper=adapted
    : "${units:=${units_of_paper}}"
    [ "${units}" = native ] || [ "${units}" = adapted ] ||
        die "--units is '${units}'; expected native or adapted"
    if [ "${mini}" = true ]; then
        : "${asr_config:=conf/$1/mini/train_speech_llm.yaml}"
        : "${tune_config:=conf/$1/mini/tune_speech_llm.yaml}"
    elif [ "$1" = indic ]; then
        : "${ctc_config:=conf/speech_llm/train_ctc_80ms.yaml}"
        : "${asr_config:=conf/speech_llm/train_bloom560m_240ms.yaml}"
    elif [ "$1" = mls ]; then
        num_pieces=1500
        : "${ctc_config:=conf/speech_llm/train_ctc_80ms.yaml}"
        : "${asr_config:=conf/speech_llm/train_llama7b_240ms.yaml}"
    elif [ "$1" = loquacious ]; then
        num_pieces=10000
        : "${ctc_config:=conf/loquacious/train_ctc.yaml}"
        : "${asr_config:=conf/loquacious/train_qwen2_0.5b_spm10k.yaml}"
    else
        num_pieces=10000
        : "${ctc_config:=conf/speech_llm/train_ctc_60ms.yaml}"
        : "${asr_config:=conf/speech_llm/train_qwen2_0.5b_spm10k.yaml}"
    fi
    : "${tune_config:=conf/librispeech/tune_speech_llm.yaml}"
    : "${inference_config:=conf/$1/decode_speech_llm.yaml}"
}

# An exported LLM without the files about our token list has a vocabulary of its own.
as_native() {
    local native=${llm%/llm}/native
    if ! [ "${native}/.done" -nt "${llm}/config.json" ]; then
        mkdir -p "${native}"
        cp "${llm}"/{*.json,*.safetensors} "${native}"
        touch "${native}/.done"
    fi
    llm=${native}
}

speech_llm() {
    [ -n "${llm}" ] || die "--system speech_llm needs --llm"
    local vocabulary='^ *ctc_vocabulary:' tag=${llm_tag:-$(basename "${llm}")} ctc values name
    local tokens=() start=() fill=(--langs "${langs:-}") filled="" path=${llm}
    name=$(tag_of "${asr_config}")_${tag}
    values=$(tool ctc_init --config "${asr_config}")
    if tr ' ' '\n' <<< "${values}" | grep -q '^[^:]\+$'; then
        # It goes on from all of a trained speech LLM (as what bin.add_languages writes): encoder,
        # languages and vocabularies are that model's, and the data may be others.
        fill=() start=(--asr_stats_dir "${expdir}/asr_stats_${name}")
        [ "${units}" = native ] || path=""
    else
        asr "${ctc_config}" --inference_config ""
        ctc=${expdir}/asr_$(tag_of "${ctc_config}")
        start=(--ctc_init "${ctc}")
        # Vocabularies beside the LLM's own tokens are the pieces of the CTC model.
        [ ! -f "${ctc}/config.yaml" ] || fill+=(--ctc_config "${ctc}/config.yaml")
    fi
    if [ "${units}" = native ]; then
        tokens=(--token_type hugging_face --llm "${llm}")
        recipe --stage 5 --stop_stage 5 "${tokens[@]}"
    elif [ -n "${path}" ]; then
        lm "${tag}" --llm "${llm}" --lm_config "${lm_config#none}"
        path=${expdir}/lm_${tag}/llm
    fi
    # What the user gives in --asr_args comes later and wins.
    [ ${#fill[@]} -eq 0 ] ||
        filled=$(tool speech_llm_options --config "${asr_config}" --asr_args="${asr_args}" "${fill[@]}")
    local model=("${asr_config}" "${tokens[@]}" --asr_tag "${name}" "${start[@]}"
        --asr_args "${filled:+${filled} }${asr_args}${path:+ --decoder_conf llm=${path}}")
    asr "${model[@]}" --inference_tag decode_alone
    # Jointly where the CTC has the decoder's tokens: CTC's weight and the token bonus tuned on dev.
    if [ "${units}" = adapted ] && ! grep -q "${vocabulary}" "${asr_config}" && grep -qE '^ +ctc_weight: *(0\.0*[1-9]|[1-9])' "${asr_config}"; then
        asr "${model[@]}" --skip_train true --tune_config "${tune_config}" \
            --inference_config conf/librispeech/decode_speech_llm_joint.yaml \
            --inference_tag decode_joint --alone_tag decode_alone
    fi
}
