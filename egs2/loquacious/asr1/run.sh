#!/usr/bin/env bash
# Loquacious (arXiv 2505.21578), with the systems of arXiv 2603.15045 (see README.md):
#
#   ./run.sh [--loquacious DIR] [--subset small|medium|large|clean] [--system NAME] [--llm LLM] [OPTION ...]
#   ./run.sh --mini true          the same on synthetic speech in the same layout, in minutes
#
#   --loquacious DIR     local copy of speechbrain/LoquaciousSet; without it it is downloaded from the
#                        Hugging Face Hub (to --download_dir)
#   --subset NAME        250 h (small), 2,500 h (medium), 25,000 h (large), or clean
#   --system transducer      CTC model, factorized transducer, with --llm: the LLM swapped in
#   --system speech_llm      CTC model, speech LLM with --llm, decoded alone and jointly with CTC
#   --system aed             CTC + attention decoder, by ESPnet itself
#   --system combination     CTC, and CTC + AED (--aed_config), with --llm in every way, in one table
#   --llm LLM            Hugging Face directory or hub id; adapted to the pieces, fine-tuned on
#   --lm_text FILE       sentences, one a line (librispeech-lm-norm.txt.gz); `none`: the transcripts
#   --ctc_config, --asr_config, --lm_config, --tune_config FILE     (--ctc_config none: no CTC model;
#                        --lm_config none: the LLM is adapted to the pieces, but not fine-tuned)
#   --units adapted|native   a speech LLM over the pieces, or over the tokens of --llm
#   --finetune_config FILE   continues the swapped model, e.g. conf/transducer/finetune_mwer.yaml
#                        (--mini: conf/loquacious/mini/finetune_mwer.yaml; none: no such step),
#   --finetune_model NAME    and the checkpoint of it to decode (default: valid.loss.ave.pth)
#
# All other options are those of asr_llm.sh, e.g. --ngpu 1 --stage 10:

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "$0")"
. ../../TEMPLATE/asr1/transducer_llama.sh

loquacious=none download_dir=downloads subset=small lm_text=none
read_options "${shared_options} loquacious download_dir subset lm_text" "$@"
defaults loquacious

common=(--train_set "train_${subset}" --valid_set dev --test_sets "dev test")
data_options="--subset ${subset}"
if [ "${mini}" = true ]; then
    common+=(--nbpe 200 --inference_nj 1)
    data_options+=" --mini_dir ${datadir}/corpus"
    lm_train_text=${datadir}/lm_train/text
else
    common+=(--nbpe "${num_pieces}")
    data_options+=" --loquacious ${loquacious} --download_dir ${download_dir} --lm_text ${lm_text}"
    [ "${lm_text}" = none ] || lm_train_text=${datadir}/lm_train/text
fi

data "${data_options}"
[ "${mini}" = false ] || [ -n "${llm}" ] || [ "${system}" = aed ] ||
    small_llm "conf/loquacious/mini/${small_llama}.yaml" 300 "${lm_train_text}"
system
