#!/usr/bin/env bash
# Stage 1: Kaldi data directories of Multilingual LibriSpeech.
#
#   local/data.sh [--mls DIR] [--mini_dir DIR] [--datadir DIR] [--nj N] --langs LANGUAGE ...
#
# --mini_dir makes a synthetic corpus in MLS's layout there, and takes that. --langs comes last.
# Writes <datadir>/{train,dev,test} with utt2lang, and <datadir>/balanced_text for the token list.
set -euo pipefail

mls="" mini_dir="" datadir=data nj=4 langs=()
while [ $# -gt 0 ]; do
    case $1 in
        --mls | --mini_dir | --datadir | --nj) printf -v "${1#--}" '%s' "$2" ;;
        --langs) langs=("${@:2}"); break ;;
        *) echo "error: unknown option $1" >&2; exit 2 ;;
    esac
    shift 2
done
tool() { "${python:-python3}" -m "espnet_llm_plugin.bin.$1" "${@:2}"; }

if [ -n "${mini_dir}" ]; then
    tool make_mini_corpus mls "${mini_dir}" --nj "${nj}" --langs "${langs[@]}"
    mls=${mini_dir}
fi
tool prepare_mls --mls "${mls}" --output_dir "${datadir}" --nj "${nj}" --langs "${langs[@]}"
