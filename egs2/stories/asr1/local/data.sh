#!/usr/bin/env bash
# Stage 1: speak the sampled sentences.
#
#   local/data.sh --text DIR --num_train N --num_dev N --num_test N --num_lm N --output_dir DIR
#
# Writes <output_dir>/{train,dev,test}/{wav.scp,text,utt2spk,spk2utt} and lm_train/text (with ids).
# A corpus that is complete is not made again.
set -euo pipefail

exec "${python:-python3}" -m espnet_llm_plugin.bin.make_synthetic_corpus "$@"
