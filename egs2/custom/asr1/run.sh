#!/usr/bin/env bash
# Train a recogniser on your own Kaldi data directories (wav.scp, text, utt2spk; see README.md):
#
#   ./run.sh --train_dir D --valid_dir D --test_dirs "D ..." [--llm HF_DIRECTORY] [OPTION ...]
#
# A CTC model, then a factorized transducer that starts from it. With --llm, the LLM's vocabulary
# is adapted, it is fine-tuned on the transcripts, and it replaces the transducer's predictor.
# All other options are those of asr_llm.sh (--help), e.g. --stage 10 --token_type bpe --nbpe 500.
set -euo pipefail
cd "$(dirname "$0")"

train_dir="" valid_dir="" test_dirs="" llm="" drop_bad=false nj=4
ctc_config=conf/custom/train_ctc.yaml
asr_config=conf/custom/train_ft.yaml
lm_config=conf/lm/finetune_causal_llm.yaml
options=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set/p' "$0" | sed -e '$d' -e 's/^# \{0,1\}//'
            ../../TEMPLATE/asr1/asr_llm.sh --help
            exit 0
            ;;
        --train_dir | --valid_dir | --test_dirs | --llm | --drop_bad | --nj | \
            --ctc_config | --asr_config | --lm_config)
            printf -v "${1#--}" '%s' "${2?option $1 needs a value}"
            ;;
        *) options+=("$1" "${2?option $1 needs a value}") ;;
    esac
    shift 2
done
for name in train_dir valid_dir test_dirs; do
    [ -n "${!name}" ] || { echo "error: --${name} is missing; see ./run.sh --help" >&2; exit 2; }
done
test_sets=""
for directory in ${test_dirs}; do test_sets+="$(basename "${directory}") "; done

data_opts="--train ${train_dir} --valid ${valid_dir} --drop_bad ${drop_bad} --nj ${nj}"
for directory in ${test_dirs}; do data_opts+=" --test ${directory}"; done
recipe() {
    ../../TEMPLATE/asr1/asr_llm.sh --test_sets "${test_sets% }" --nj "${nj}" --token_type char \
        --drop_bad "${drop_bad}" "${options[@]}" "$@"
}
ft() { recipe --asr_tag ft --asr_config "${asr_config}" --ctc_init exp/asr_ctc "$@"; }

recipe --asr_tag ctc --asr_config "${ctc_config}" --local_data_opts "${data_opts}"
ft --skip_data_prep true
if [ -n "${llm}" ]; then
    lm=(--use_lm true --llm "${llm}" --lm_config "${lm_config}" --lm_tag llm)
    recipe "${lm[@]}" --skip_data_prep true --skip_train true --skip_eval true
    ft --skip_data_prep true --swap_llm exp/lm_llm/llm
fi
