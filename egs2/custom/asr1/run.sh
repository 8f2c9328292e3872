#!/usr/bin/env bash
# Train a recogniser on your own Kaldi data directories (wav.scp, text, utt2spk; see README.md):
#
#   ./run.sh --train_dir D --valid_dir D --test_dirs "D ..." [--llm HF_DIRECTORY] [OPTION ...]
#
# A CTC model, then a factorized transducer that starts from it. With --llm, the LLM's vocabulary
# is adapted, it is fine-tuned on the transcripts, and it replaces the transducer's predictor, with
# scales tuned on the validation set. Configurations: --ctc_config, --asr_config, --lm_config.
# All other options are those of asr_llm.sh (--help), e.g. --stage 10 --token_type bpe --nbpe 500.

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "$0")"
. ../../TEMPLATE/asr1/options.sh
usage() {
    comment_of run.sh
    ../../TEMPLATE/asr1/asr_llm.sh --help
}

train_dir="" valid_dir="" test_dirs="" llm="" drop_bad=false nj=4 expdir=exp datadir=data
inference_config=""
ctc_config=conf/custom/train_ctc.yaml
asr_config=conf/custom/train_ft.yaml
lm_config=conf/custom/finetune_llm.yaml
tune_config=conf/custom/tune.yaml
forwarded=() # to asr_llm.sh
read_options "train_dir valid_dir test_dirs llm drop_bad nj expdir datadir
    inference_config ctc_config asr_config lm_config tune_config" "$@"
for name in train_dir valid_dir test_dirs; do
    [ -n "${!name}" ] || die "--${name} is missing; see ./run.sh --help"
done

# A test set is called as its directory.
test_sets="" data_opts="--train ${train_dir} --valid ${valid_dir} --drop_bad ${drop_bad} --nj ${nj}"
for directory in ${test_dirs}; do
    name=$(basename "${directory}")
    [[ " train dev ${test_sets} " != *" ${name} "* ]] || die "--test_dirs has ${directory}, but" \
        "there is already a set called '${name}'; rename the directory"
    test_sets="${test_sets:+${test_sets} }${name}"
    data_opts+=" --test ${directory}"
done

decoding=(--inference_config "${inference_config:-conf/custom/decode.yaml}")
[ -n "${inference_config}" ] || decoding+=(--inference_tag decode)
recipe() {
    ../../TEMPLATE/asr1/asr_llm.sh --test_sets "${test_sets}" --nj "${nj}" --token_type char \
        --drop_bad "${drop_bad}" --expdir "${expdir}" --datadir "${datadir}" "${decoding[@]}" \
        "${forwarded[@]}" "$@"
}
ft() {
    recipe --asr_tag ft --asr_config "${asr_config}" --ctc_init "${expdir}/asr_ctc" \
        --skip_data_prep true "$@"
}
recipe --asr_tag ctc --asr_config "${ctc_config}" \
    --local_data_opts "${data_opts} --datadir ${datadir}"
ft
if [ -n "${llm}" ]; then
    recipe --skip_data_prep true --use_lm true --llm "${llm}" --lm_config "${lm_config}" --lm_tag llm
    ft --skip_train true --swap_llm "${expdir}/lm_llm/llm" --tune_config "${tune_config}" \
        --inference_tag decode_swap
fi
