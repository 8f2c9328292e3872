#!/usr/bin/env bash
# Stage 1: Kaldi data directories of Loquacious.
#
#   local/data.sh --subset NAME [--loquacious DIR|none] [--download_dir DIR] [--lm_text FILE|none]
#       [--mini_dir DIR] [--datadir DIR] [--nj N]
#
# --mini_dir makes a synthetic corpus in Loquacious's layout there, and takes that.
# Writes <datadir>/{train_<subset>,dev,test} and <datadir>/lm_train/text.
set -euo pipefail

subset="" loquacious=none download_dir=downloads lm_text=none mini_dir="" datadir=data nj=4
while [ $# -gt 0 ]; do
    case $1 in
        --subset | --loquacious | --download_dir | --lm_text | --mini_dir | --datadir | --nj)
            printf -v "${1#--}" '%s' "$2"
            ;;
        *) echo "error: unknown option $1" >&2; exit 2 ;;
    esac
    shift 2
done
tool() { "${python:-python3}" -m "espnet_llm_plugin.bin.$1" "${@:2}"; }

if [ -n "${mini_dir}" ]; then
    tool make_mini_corpus loquacious "${mini_dir}" --nj "${nj}"
    loquacious=${mini_dir} lm_text=${mini_dir}/lm-text.txt.gz
fi
arguments=()
[ "${loquacious}" = none ] || arguments+=(--loquacious "${loquacious}")
[ "${lm_text}" = none ] || arguments+=(--lm_text "${lm_text}")
tool prepare_loquacious --subset "${subset}" --output_dir "${datadir}" \
    --download_dir "${download_dir}" --nj "${nj}" "${arguments[@]}"
