#!/usr/bin/env bash
# Does a transducer loss on the speech prefix make a speech LLM better, and do prompts of languages
# (arXiv 2406.14701)? A table of systems on synthetic speech of ten Indic languages; see README.md.
#
#   ./experiment.sh [--size full|tiny] [--rows "main"] [--epochs 8] [--seeds "1 2 3"] [--jobs 1]
#                   [--stop_stage 5]
#
#   --size        full: 240 training utterances of the larger languages, 40 test utterances of each;
#                 tiny: checks the machinery, learns nothing
#   --rows        rows or sets of them (local/experiment_rows.txt), or all; none: just the table
#   --epochs      of the speech LLMs
#   --jobs        rows at a time, each with one thread; --stop_stage 5: data only
#
# What is finished is not done again: a long experiment can be run in pieces, several at a time, or
# elsewhere, since results.tar.xz has what the table of full is made of.

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "$0")"
. ../../TEMPLATE/asr1/path.sh
. ../../TEMPLATE/asr1/cmd.sh
. ../../TEMPLATE/asr1/options.sh
. ../../TEMPLATE/asr1/rows.sh

size=full rows=main epochs="" seeds=1 jobs=1 stop_stage=13
read_options "size rows epochs seeds jobs stop_stage" "$@"
# Utterances of train (of the four largest languages, then a half, then a third), dev and test.
# shellcheck disable=SC2034  # used by the steps
case ${size} in
    full) sizes="--train 240 --dev 10 --test 40" nbpe=1100 ctc_epochs=12 lm_args="" ;;
    tiny)
        sizes="--train 12 --dev 2 --test 2" nbpe=600 ctc_epochs=1
        epochs=${epochs:-1} lm_args="--max_epoch 1 --num_iters_per_epoch 10"
        ;;
    *) die "--size is '${size}'; expected full or tiny" ;;
esac
epochs=${epochs:-8}
rows_file=local/experiment_rows.txt
data=data/experiment_${size} exp=exp/experiment_${size} dump=dump/experiment_${size}
archive=results.tar.xz
[ "${size}" = full ] || archive=${exp}/results.tar.xz
export OMP_NUM_THREADS=1
. local/experiment_models.sh
. local/experiment_steps.sh

[ ! -f "${archive}" ] || tool results_archive --archive "${archive}" --restore
if [ "${rows}" != none ]; then
    # shellcheck disable=SC2086
    selected=$(rows_of ${rows})
    prepare_data
    [ "${stop_stage}" -le 5 ] || run_rows "${selected}"
fi
[ "${stop_stage}" -lt 13 ] || table
