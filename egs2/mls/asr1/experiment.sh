#!/usr/bin/env bash
# Does a transducer loss on the speech prefix make a speech LLM better, and do prompts of languages
# (arXiv 2406.14701)? A table of systems on synthetic speech of the eight languages of MLS; see README.md.
#
#   ./experiment.sh [--size full|tiny] [--rows "main"] [--epochs 8] [--seeds "1 2 3"] [--jobs 1]
#                   [--stop_stage 5]
#
#   --size        full: 600 training utterances of English down to 75 of Polish, 50 test utterances each;
#                 tiny: checks the machinery, learns nothing
#   --rows        rows or sets of them (../../TEMPLATE/asr1/languages_rows.txt), or all; none: just the
#                 table
#   --epochs      of the speech LLMs
#   --jobs        rows at a time, each with one thread; --stop_stage 5: data only
#
# What is finished is not done again: a long experiment can be run in pieces, several at a time, or
# elsewhere, since results.tar.xz has what the table of full is made of.

# shellcheck source-path=SCRIPTDIR
# shellcheck disable=SC2034  # used by the experiment
set -euo pipefail
cd "$(dirname "$0")"
. ../../TEMPLATE/asr1/languages.sh

recipe=mls corpus=mls langs="en de nl fr es it pt pl" less_of="de fr it"
# Utterances of train (of English; a half, a third, ... of the others), dev and test.
sizes_of() { # size
    case $1 in
        full) sizes="--train 600 --dev 12 --test 50" nbpe=500 ;;
        tiny) sizes="--train 16 --dev 2 --test 2" nbpe=200 ;;
    esac
}
languages_experiment "$@"
