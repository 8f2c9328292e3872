#!/usr/bin/env bash
# Stage 1: make the synthetic corpus.
#
#   local/data.sh [--size tiny|mini] [--seed N] [--nj N]
#
# Writes data/{train,dev,test}/{wav.scp,text,utt2spk,spk2utt}, data/lm_train/text (with ids) and
# data/lm_train.txt. A corpus that is complete is not made again.
set -euo pipefail

exec "${python:-python3}" -m espnet_llm_plugin.bin.make_synthetic_corpus --output_dir data "$@"
