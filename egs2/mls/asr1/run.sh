#!/usr/bin/env bash
# Multilingual LibriSpeech, in the steps of Transducer-Llama (arXiv 2412.16464; see README.md):
#
#   ./run.sh --mls DIR [--langs "en de nl fr es it pt pl"] [--llm HF_DIRECTORY_OR_HUB_ID] [OPTION ...]
#   ./run.sh --mini true          the same on synthetic speech in the same layout, in minutes
#
#   --mls DIR            directory with mls_german, mls_french_opus, ... (https://www.openslr.org/94)
#   --balance B          a language with a share p of the audio is drawn in proportion to p^B
#                        (0: all alike; 1: as they are; none: every utterance once an epoch)
#   --llm LLM            adapted to the pieces, fine-tuned on the transcripts and swapped in
#   --lm_train_text "FILE ..."     other text for it, lines `id sentence`
#   --ctc_config, --asr_config, --lm_config, --tune_config FILE     (--ctc_config none: no CTC model;
#                        --lm_config none: the LLM is adapted to the pieces, but not fine-tuned)
#   --system speech_llm      a speech LLM in place of transducers: --asr_config of conf/speech_llm, over
#   --units adapted|native   the pieces, which --llm is adapted to, or over the tokens of --llm
#   --finetune_config FILE   continues the swapped model, e.g. conf/transducer/finetune_mwer.yaml
#                        (--mini: conf/mls/mini/finetune_mwer.yaml; none: no such step),
#   --finetune_model NAME    and the checkpoint of it to decode (default: valid.loss.ave.pth)
#
# All other options are those of asr_llm.sh, e.g. --ngpu 1 --stage 10:

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "$0")"
. ../../TEMPLATE/asr1/transducer_llama.sh

mls="" langs="en de nl fr es it pt pl" balance=0.5 stop_stage=13
read_options "${shared_options} mls langs balance lm_train_text stop_stage" "$@"
defaults mls
common=(--stop_stage "${stop_stage}" --bpe_train_text "${datadir}/balanced_text")
if [ "${mini}" = true ]; then
    common+=(--nbpe 200 --inference_nj 1)
    data_options="--mini_dir ${datadir}/corpus"
elif [ -n "${mls}" ]; then
    common+=(--nbpe "${num_pieces}")
    data_options="--mls ${mls}"
else
    die "--mls is missing; see ./run.sh --help"
fi
[ "${balance}" = none ] ||
    asr_args+=" --iterator_type category --batch_type catpow --upsampling_factor ${balance}
        --valid_iterator_type sequence --valid_batch_type numel"

data "${data_options} --langs ${langs}"
[ "${mini}" = false ] || [ -n "${llm}" ] ||
    small_llm "conf/mls/mini/${small_llama}.yaml" 300 "${dumpdir}/raw/train/text"
system
if [ "${stop_stage}" -ge 13 ]; then
    python3 -m espnet_llm_plugin.bin.score_languages "${expdir}"/asr_*/decode*/test \
        --utt2lang "${dumpdir}/raw/test/utt2lang" --output "${expdir}/languages.md"
fi
