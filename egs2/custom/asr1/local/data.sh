#!/usr/bin/env bash
# Stage 1: check the user's Kaldi data directories and copy their lists (no audio).
#
#   local/data.sh --train DIR --valid DIR --test DIR [--test DIR ...] [--datadir DIR]
#       [--drop_bad true|false] [--nj N]
set -euo pipefail

train="" valid="" tests=() datadir=data drop_bad=false nj=4
while [ $# -gt 0 ]; do
    case $1 in
        --train) train=$2 ;;
        --valid) valid=$2 ;;
        --test) tests+=("$2") ;;
        --datadir) datadir=$2 ;;
        --drop_bad) drop_bad=$2 ;;
        --nj) nj=$2 ;;
        *) echo "error: unknown option $1" >&2; exit 2 ;;
    esac
    shift 2
done

check() { # source directory, name
    "${python:-python3}" -m espnet_llm_plugin.bin.validate_data_dir --nj "${nj}" \
        --drop_bad "${drop_bad}" --utt_as_spk true --output_dir "${datadir}/$2" "$1"
}
check "${train}" train
check "${valid}" dev
for directory in "${tests[@]}"; do
    check "${directory}" "$(basename "${directory}")"
done
