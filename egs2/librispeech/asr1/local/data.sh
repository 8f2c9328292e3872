#!/usr/bin/env bash
# Stage 1: Kaldi data directories of LibriSpeech.
#
#   local/data.sh --train_set NAME [--librispeech DIR|none] [--download_dir DIR]
#       [--lm_text FILE|download|none] [--mini_dir DIR] [--datadir DIR] [--nj N]
#
# --mini_dir makes a synthetic corpus in LibriSpeech's layout there, and takes that.
# Writes <datadir>/{<train_set>,dev,dev_clean,dev_other,test_clean,test_other} and
# <datadir>/lm_train/text.
set -euo pipefail

train_set="" librispeech=none download_dir=downloads lm_text=none mini_dir="" datadir=data nj=4
while [ $# -gt 0 ]; do
    case $1 in
        --train_set | --librispeech | --download_dir | --lm_text | --mini_dir | --datadir | --nj)
            printf -v "${1#--}" '%s' "$2"
            ;;
        *) echo "error: unknown option $1" >&2; exit 2 ;;
    esac
    shift 2
done
tool() { "${python:-python3}" -m "espnet_llm_plugin.bin.$1" "${@:2}"; }

if [ -n "${mini_dir}" ]; then
    tool make_mini_corpus librispeech "${mini_dir}" --nj "${nj}"
    librispeech=${mini_dir} lm_text=${mini_dir}/librispeech-lm-norm.txt.gz
fi
arguments=()
[ "${librispeech}" = none ] || arguments+=(--librispeech "${librispeech}")
[ "${lm_text}" = none ] || arguments+=(--lm_text "${lm_text}")
tool prepare_librispeech --output_dir "${datadir}" --download_dir "${download_dir}" --nj "${nj}" \
    --sets "${train_set}" dev dev_clean dev_other test_clean test_other "${arguments[@]}"
