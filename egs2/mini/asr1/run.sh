#!/usr/bin/env bash
# From nothing to a table of word error rates on a synthetic corpus, on two CPU cores:
# CTC; RNN-T; RNN-T + LLM shallow fusion; factorized transducer (FT) with a weak LM; the same model
# with the LLM swapped in; FT trained directly with the LLM.
#
#   ./run.sh [--size mini|tiny] [--seed N] [--stage N] [--stop_stage N]     (stages: asr_llm.sh)
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source-path=SCRIPTDIR
. ../../TEMPLATE/asr1/path.sh
# shellcheck source-path=SCRIPTDIR
. ../../TEMPLATE/asr1/cmd.sh

size=mini seed=0 stage=1 stop_stage=13
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set/p' "$0" | sed -e '$d' -e 's/^# \{0,1\}//'; exit 0 ;;
        --size | --seed | --stage | --stop_stage) printf -v "${1#--}" '%s' "${2?$1 needs a value}" ;;
        *) echo "error: unknown option $1; see ./run.sh --help" >&2; exit 2 ;;
    esac
    shift 2
done
case ${size} in
    mini) short="" nj=2 tune=conf/mini/tune.yaml eval_dev=true ;;
    # checks the machinery, learns little
    tiny) short="--max_epoch 1" nj=1 tune=conf/mini/tune_tiny.yaml eval_dev=false ;;
    *) echo "error: --size is '${size}'; expected mini or tiny" >&2; exit 2 ;;
esac
data=data/${size} exp=exp/${size} llm=exp/${size}/lm_llama_adapted
export OMP_NUM_THREADS=1 # two systems at a time, one thread each: the fastest use of two cores

recipe() {
    ../../TEMPLATE/asr1/asr_llm.sh --stage "${stage}" --stop_stage "${stop_stage}" --nj "${nj}" \
        --inference_nj 1 --nbpe 300 --datadir "${data}" --expdir "${exp}" --dumpdir "dump/${size}" "$@"
}
lm() {
    recipe --skip_data_prep true --use_lm true --lm_train_text "${data}/lm_train/text" \
        --lm_test_text "dump/${size}/raw/test/text" --lm_args "${short}" "$@"
}
asr() { # name, options
    recipe --skip_data_prep true --asr_tag "$1" --asr_config "conf/mini/train_$1.yaml" \
        --asr_args "${short}" "${@:2}"
}
train() { asr "$@" --skip_eval true; }
decode() { # name, tag, options
    asr "$1" --skip_train true --inference_tag "$2" --tune_config "${tune}" \
        --inference_config conf/mini/decode.yaml --eval_valid_set "${eval_dev}" "${@:3}"
}

# Speech and a larger text-only set; pieces of the recognisers, and of the LLM.
llm_tokens=(--token_listdir "${data}/token_list_llm" --nbpe 400
    --bpe_train_text "${data}/lm_train/text")
recipe --skip_train true --local_data_opts "--size ${size} --seed ${seed} --nj 2 --output_dir ${data}"
recipe --skip_train true --stage 5 "${llm_tokens[@]}"

# The LLM: a small LLaMA with its own tokenizer stands in for a downloaded one; then what a user
# does with any LLM: adapt its vocabulary to the recognisers' pieces and fine-tune it.
llms() {
    lm --lm_tag llama --lm_config conf/mini/train_llama.yaml "${llm_tokens[@]}"
    lm --lm_tag llama_adapted --lm_config conf/mini/finetune_llama.yaml --llm "${exp}/lm_llama/llm"
}
factorized() {
    train ft_weak --ctc_init "${exp}/asr_ctc"
    train ft_llm --ctc_init "${exp}/asr_ctc" \
        --asr_args "${short} --decoder_conf predictor_conf.llm=${llm}/llm"
}
rows_with_llm() {
    decode ft_weak decode_swap --swap_llm "${llm}/llm"
    decode ft_llm decode
}
other_rows() {
    decode ctc decode
    decode rnnt decode
    decode rnnt decode_fusion --use_lm true --lm_exp "${llm}"
    decode ft_weak decode
}
start_job llms
train ctc
wait "${job_pids[-1]}"
start_job factorized
train rnnt --ctc_init "${exp}/asr_ctc"
wait "${job_pids[-1]}"
start_job other_rows
rows_with_llm
wait "${job_pids[-1]}"

if [ "${stop_stage}" -ge 13 ]; then
    results=$([ "${size}" = mini ] && echo RESULTS.md || echo "${exp}/RESULTS.md")
    sed -e "s#exp/mini#${exp}#g" -e "$("${eval_dev}" || echo '/^ *dev: /d')" conf/mini/results.yaml \
        > "${exp}/results.yaml"
    python3 -m espnet_llm_plugin.bin.results_table --config "${exp}/results.yaml" \
        --output "${results}" --plot "${exp}/wer.png"
fi
