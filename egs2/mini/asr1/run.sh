#!/usr/bin/env bash
# From nothing to a table of word error rates on a synthetic corpus, on two CPU cores:
# CTC; RNN-T; RNN-T + LLM shallow fusion; factorized transducer (FT) with a weak LM; the same model
# with the LLM swapped in; FT trained directly with the LLM.
#
#   ./run.sh [--size mini|tiny] [--seed N] [--stage N] [--stop_stage N]     (stages: asr_llm.sh)

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "$0")"
. ../../TEMPLATE/asr1/path.sh
. ../../TEMPLATE/asr1/cmd.sh
. ../../TEMPLATE/asr1/options.sh

size=mini seed=0 stage=1 stop_stage=13
read_options "size seed stage stop_stage" "$@"
case ${size} in
    mini) short="" nj=2 tune=conf/mini/tune.yaml eval_dev=true ;;
    # checks the machinery, learns little
    tiny) short="--max_epoch 1" nj=1 tune=conf/mini/tune_tiny.yaml eval_dev=false ;;
    *) die "--size is '${size}'; expected mini or tiny" ;;
esac
data=data/${size} exp=exp/${size} llm=exp/${size}/lm_llama_adapted
export OMP_NUM_THREADS=1 # two systems at a time, one thread each: the fastest use of two cores
. local/steps.sh

# The LLM: a small LLaMA with its own tokenizer stands in for a downloaded one; then what a user
# does with any LLM: adapt its vocabulary to the recognisers' pieces and fine-tune it.
llms() {
    lm llama train_llama "${llm_tokens[@]}"
    lm llama_adapted finetune_llama --llm "${exp}/lm_llama/llm"
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
prepare_data
start_job llms
train ctc
wait "${job_pids[-1]}"
start_job factorized
lean train rnnt --ctc_init "${exp}/asr_ctc"
wait "${job_pids[-1]}"
start_job other_rows
rows_with_llm
wait "${job_pids[-1]}"
[ "${stop_stage}" -lt 13 ] || table
