#!/usr/bin/env bash
# Sentences sampled from an LLM, spoken by synthetic voices, and three tables: an LLM swapped into a
# transducer (arXiv 2412.16464), speech LLMs (2307.11795), CTC or RNN-T combined with it (2603.15045).
#
#   ./run.sh --llm_source DIR [--size full|less|small|tiny] [--rows "main"] [--encoders "offline"]
#            [--epochs "5 10"] [--seeds "1 2 3"] [--jobs 2] [--stop_stage 5] [--experiment NAME]
#
#   --llm_source  pretrained LLM that writes the sentences and is then the LLM of the systems
#                 (without it: a small LLaMA trained on the sentences of a grammar)
#   --experiment  transducer (local/rows.txt), speech_llm or combination (local/<it>_rows.txt)
#   --rows        rows or sets of them (main, ablation, ...), or all; none: just the table
#   --encoders    offline, or milliseconds of a chunk: 80 160 320 640
#   --epochs      of transducers or speech LLMs, a table each
#   --jobs        rows at a time, each with one thread; --stop_stage 5: data only
#   --stream      rows whose streaming models are then measured as streams: delays, compute time
#
# What is finished is not done again: a long experiment can be run in pieces, several at a time, or
# elsewhere, since results.tar.xz has what the tables of full are made of.

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "$0")"
. ../../TEMPLATE/asr1/path.sh
. ../../TEMPLATE/asr1/cmd.sh
. ../../TEMPLATE/asr1/options.sh

size=small llm_source="" rows=main encoders=offline epochs="" seeds=1 jobs=2 stop_stage=13
experiment=transducer stream=""
read_options "size llm_source rows encoders epochs seeds jobs stop_stage experiment stream" "$@"
# Utterances of train, dev, test and of LM text; small and less speak a part of full's sentences.
texts=full text_size="3000 300 1600 48000" sample_args="" lm_args="" nbpe=300
ctc_epochs=16 finetune_epochs=2 default_epochs=5
case ${size} in
    full) sizes=${text_size} default_epochs="5 10" ;;
    less) sizes="1000 300 1600 48000" default_epochs="5 10" ;; # less audio, the same test set
    small) sizes="3000 250 400 48000" ;;
    tiny) # checks the machinery, learns nothing
        sizes="96 8 8 500" texts=tiny text_size=${sizes} lm_args="--max_epoch 1" nbpe=100
        sample_args="--max_tokens 30 --min_words 1 --min_word_count 1"
        ctc_epochs=1 finetune_epochs=1 default_epochs=1
        ;;
    *) die "--size is '${size}'; expected full, less, small or tiny" ;;
esac
epochs_list=${epochs:-${default_epochs}} train_utts=${sizes%% *}
source=$(basename "${llm_source:-own}") name=${size}_$(basename "${llm_source:-own}")
data=data/${name} exp=exp/${name}
small_llama=exp/small_llama_${texts} llm=${llm_source:-exp/small_llama_${texts}/llm}
export OMP_NUM_THREADS=1
. local/models.sh
. local/speech_llm.sh
. local/combination.sh
. local/steps.sh

restore_results
[ "${rows}" = none ] || run_selected
stream_rows
[ "${stop_stage}" -lt 13 ] || table
