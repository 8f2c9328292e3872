# shellcheck shell=bash
# Sourced by transducer_llama.sh, for `--system aed` of LibriSpeech and Loquacious: the baseline with
# CTC and an attention decoder (arXiv 2603.15045), trained and decoded by ESPnet itself.
#
#   aed_defaults CORPUS      what the user did not give, according to --mini
#   aed                      CTC + AED -> decoded by the attention decoder alone, and jointly with CTC
# shellcheck disable=SC2034,SC2154  # transducer_llama.sh has the options and functions

aed_defaults() { # name of the corpus
    [ "$1" != mls ] || die "--system aed has no configuration for MLS; give another --system"
    num_pieces=10000
    if [ "${mini}" = true ]; then
        : "${asr_config:=conf/$1/mini/train_aed.yaml}"
    elif [ "$1" = loquacious ]; then
        : "${asr_config:=conf/loquacious/train_aed.yaml}"
    else
        : "${asr_config:=conf/ctc/train_aed_conformer.yaml}"
    fi
    : "${inference_config:=conf/librispeech/decode_aed_joint.yaml}"
}

aed() {
    asr "${asr_config}" --inference_tag decode_joint --inference_asr_model valid.acc.ave.pth
    asr "${asr_config}" --inference_tag decode_alone --inference_asr_model valid.acc.ave.pth \
        --skip_train true --inference_config conf/librispeech/decode_aed.yaml
}
