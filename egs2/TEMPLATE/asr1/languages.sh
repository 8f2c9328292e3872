# shellcheck shell=bash
# Sourced by experiment.sh of Indic and MLS: what losses on the speech prefix and prompts of languages do
# for a speech LLM (arXiv 2406.14701), on a synthetic corpus of several languages. Rows:
# languages_rows.txt; models: languages_models.sh; decoding and table: languages_steps.sh.
#
# The recipe defines, before `languages_experiment "$@"`,
#   recipe    its name; its configurations are conf/<recipe>/experiment
#   corpus    in whose layout the corpus is made, of make_mini_corpus: fleurs or mls
#   langs     its languages
#   sizes_of  a function of full or tiny that sets `sizes`, numbers of utterances (options of
#             make_mini_corpus), and `nbpe`, that of pieces
#   less_of   languages of which the rows `low` have a tenth
# shellcheck source-path=SCRIPTDIR disable=SC2034  # used by what is sourced

. ../../TEMPLATE/asr1/path.sh
. ../../TEMPLATE/asr1/cmd.sh
. ../../TEMPLATE/asr1/options.sh
. ../../TEMPLATE/asr1/rows.sh
. ../../TEMPLATE/asr1/languages_models.sh
. ../../TEMPLATE/asr1/languages_steps.sh

languages_experiment() { # options of the command line
    size=full rows=main epochs="" seeds=1 jobs=1 stop_stage=13
    read_options "size rows epochs seeds jobs stop_stage" "$@"
    case ${size} in
        full) ctc_epochs=12 lm_args="" ;;
        tiny) ctc_epochs=1 epochs=${epochs:-1} lm_args="--max_epoch 1 --num_iters_per_epoch 10" ;;
        *) die "--size is '${size}'; expected full or tiny" ;;
    esac
    sizes_of "${size}"
    epochs=${epochs:-8}
    rows_file=../../TEMPLATE/asr1/languages_rows.txt
    data=data/experiment_${size} exp=exp/experiment_${size} dump=dump/experiment_${size}
    archive=results.tar.xz
    [ "${size}" = full ] || archive=${exp}/results.tar.xz
    export OMP_NUM_THREADS=1

    [ ! -f "${archive}" ] || tool results_archive --archive "${archive}" --restore
    if [ "${rows}" != none ]; then
        local selected
        # shellcheck disable=SC2086
        selected=$(rows_of ${rows})
        prepare_data
        [ "${stop_stage}" -le 5 ] || run_rows "${selected}"
    fi
    [ "${stop_stage}" -lt 13 ] || table
}
