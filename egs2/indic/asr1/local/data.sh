#!/usr/bin/env bash
# Stage 1: Kaldi data directories of FLEURS's ten Indic languages.
#
#   local/data.sh [--fleurs DIR] [--mini_dir DIR] [--datadir DIR] [--nj N] [OPTION OF prepare_fleurs ...]
#                 --langs LANGUAGE ...
#
# --mini_dir makes a synthetic corpus in FLEURS's layout there, and takes that. --langs comes last.
# Writes <datadir>/{train,dev,test} with utt2lang, and <datadir>/balanced_text for the token list.
set -euo pipefail

fleurs="" mini_dir="" datadir=data nj=4 langs=() options=()
while [ $# -gt 0 ]; do
    case $1 in
        --fleurs | --mini_dir | --datadir | --nj) printf -v "${1#--}" '%s' "$2" ;;
        --langs) langs=("${@:2}"); break ;;
        --*) options+=("$1" "$2") ;;
        *) echo "error: expected an option, got $1" >&2; exit 2 ;;
    esac
    shift 2
done
tool() { "${python:-python3}" -m "espnet_llm_plugin.bin.$1" "${@:2}"; }

if [ -n "${mini_dir}" ]; then
    tool make_mini_corpus fleurs "${mini_dir}" --nj "${nj}" --langs "${langs[@]}"
    fleurs=${mini_dir}
fi
tool prepare_fleurs --fleurs "${fleurs}" --output_dir "${datadir}" --nj "${nj}" "${options[@]}" \
    --langs "${langs[@]}"
