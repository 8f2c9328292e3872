# shellcheck shell=bash
# Sourced by run.sh: the steps that its systems are made of, as calls of asr_llm.sh.
# shellcheck disable=SC2154  # run.sh sets the options, data, exp, nj, short, tune and eval_dev

recipe() {
    ../../TEMPLATE/asr1/asr_llm.sh --stage "${stage}" --stop_stage "${stop_stage}" --nj "${nj}" \
        --inference_nj 1 --nbpe 300 --datadir "${data}" --expdir "${exp}" --dumpdir "dump/${size}" "$@"
}

# Speech and a larger text-only set; pieces of the recognisers, and of the LLM.
llm_tokens=(--token_listdir "${data}/token_list_llm" --nbpe 400
    --bpe_train_text "${data}/lm_train/text")
prepare_data() {
    recipe --skip_train true \
        --local_data_opts "--size ${size} --seed ${seed} --nj 2 --output_dir ${data}"
    recipe --skip_train true --stage 5 "${llm_tokens[@]}"
}

lm() { # name, configuration, options
    recipe --skip_data_prep true --use_lm true --lm_tag "$1" --lm_config "conf/mini/$2.yaml" \
        --lm_train_text "${data}/lm_train/text" --lm_test_text "dump/${size}/raw/test/text" \
        --lm_args "${short}" "${@:3}"
}

asr() { # name, options
    recipe --skip_data_prep true --asr_tag "$1" --asr_config "conf/mini/train_$1.yaml" \
        --asr_args "${short}" "${@:2}"
}
train() { asr "$@" --skip_eval true; }
# Give the memory of large tensors back at once: glibc would keep it, in pieces that the next batch's
# sizes do not fit. 1.4 instead of 1.9 GB for the RNN-T, which takes 15 % longer.
lean() { MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=8000000 MALLOC_TRIM_THRESHOLD_=100000000 "$@"; }
decode() { # name, tag, options
    asr "$1" --skip_train true --inference_tag "$2" --tune_config "${tune}" \
        --inference_config conf/mini/decode.yaml --eval_valid_set "${eval_dev}" "${@:3}"
}

# The comparison: only the full corpus's goes into the repository.
table() {
    local results=${exp}/RESULTS.md
    [ "${size}" != mini ] || results=RESULTS.md
    sed -e "s#exp/mini#${exp}#g" -e "$("${eval_dev}" || echo '/^ *dev: /d')" conf/mini/results.yaml \
        > "${exp}/results.yaml"
    python3 -m espnet_llm_plugin.bin.results_table --config "${exp}/results.yaml" \
        --output "${results}" --plot "${exp}/wer.png"
}
