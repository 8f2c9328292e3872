#!/usr/bin/env bash
# LibriSpeech, in the steps of Transducer-Llama (arXiv 2412.16464; see README.md):
#
#   ./run.sh [--librispeech DIR] [--llm HF_DIRECTORY_OR_HUB_ID] [OPTION ...]
#   ./run.sh --mini true          the same on synthetic speech in the same layout, in minutes
#
#   --librispeech DIR    local copy; without it the parts are downloaded (to --download_dir)
#   --train_set NAME     train_960, train_460 or train_clean_100
#   --llm LLM            adapted to the pieces, fine-tuned on the LM text and swapped in
#   --lm_text FILE       librispeech-lm-norm.txt.gz; `download`, or `none`: the transcripts
#   --ctc_config, --asr_config, --lm_config, --tune_config FILE     (--ctc_config none: no CTC model;
#                        --lm_config none: the LLM is adapted to the pieces, but not fine-tuned)
#   --system speech_llm      a speech LLM in place of transducers: --asr_config of conf/speech_llm, over
#   --units adapted|native   the pieces, which --llm is adapted to, or over the tokens of --llm
#   --system aed             CTC + attention decoder, trained and decoded by ESPnet itself
#   --system combination     CTC, and CTC + AED (--aed_config), with --llm in every way, in one table
#   --finetune_config FILE   continues the swapped model, e.g. conf/transducer/finetune_mwer.yaml
#                        (--mini: conf/librispeech/mini/finetune_mwer.yaml; none: no such step),
#   --finetune_model NAME    and the checkpoint of it to decode (default: valid.loss.ave.pth)
#
# All other options are those of asr_llm.sh, e.g. --ngpu 1 --stage 10:

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "$0")"
. ../../TEMPLATE/asr1/transducer_llama.sh

librispeech=none download_dir=downloads train_set=train_960 lm_text=download
read_options "${shared_options} librispeech download_dir train_set lm_text" "$@"
defaults librispeech

data_options="--train_set ${train_set}"
common=(--train_set "${train_set}" --valid_set dev
    --test_sets "dev_clean dev_other test_clean test_other")
if [ "${mini}" = true ]; then
    common+=(--nbpe 200 --inference_nj 1)
    data_options+=" --mini_dir ${datadir}/corpus"
else
    common+=(--nbpe "${num_pieces}")
    data_options+=" --librispeech ${librispeech} --download_dir ${download_dir}"
    [ -z "${llm}" ] || data_options+=" --lm_text ${lm_text}"
fi
[ "${lm_text}" = none ] || lm_train_text=${datadir}/lm_train/text

data "${data_options}"
[ "${mini}" = false ] || [ -n "${llm}" ] || [ "${system}" = aed ] ||
    small_llm "conf/librispeech/mini/${small_llama}.yaml" 300 "${lm_train_text}"
system
