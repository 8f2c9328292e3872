# shellcheck shell=bash
# Sourced by run.sh: LLMs in their own vocabulary, and the ways of local/combination_rows.txt to combine
# an LLM with a CTC model or a transducer.
# shellcheck disable=SC2154  # run.sh sets the options, models.sh the functions
# shellcheck source-path=SCRIPTDIR/..
. ../../TEMPLATE/asr1/combination.sh

# An LLM in its own vocabulary. native: fine-tuned on the same text as the LLM in the pieces.
own_llm() { # name: native or raw
    if [ "$1" = raw ]; then echo "${llm}"; else echo "${exp}/lm_$1/llm"; fi
}
train_own_llm() { # name
    if [ "$1" = native ]; then
        lm native --llm "${llm}" --lm_token_type hugging_face --lm_config "$(config finetune_llm)"
    fi
    mkdir -p "${exp}/lm_$1"
    [ -f "${exp}/lm_$1/perplexity.json" ] || tool llm_perplexity --llm "$(own_llm "$1")" \
        --text "dump/${name}/raw/dev/text" --output "${exp}/lm_$1/perplexity.json"
}
estimate_prior() { # directory of a CTC model
    (
        flock 9
        estimate_prior_of "$1" "dump/${name}/raw/train"
    ) 9> "exp/locks/${name}_$(basename "$(dirname "$1")")_prior"
}
estimate_ngram() { # directory of a model
    train_lm stories # whose text it is
    (
        flock 9
        estimate_ngram_of "$1" "${exp}/lm_stats_stories/lm_train.txt" "${exp}/lm_stories/ngram4.npz"
    ) 9> "exp/locks/${name}_ngram"
}
# Lines of a configuration of tuning or decoding that say how a row combines.
fusion_settings() { # row
    local use
    use=$(field "$1" use)
    if [[ ${use} = llm* ]]; then
        echo "fusion_llm: $(own_llm "${use#* }")"
        # it was trained on whole stories: an utterance is no end for it
        [ "${use}" != "llm raw" ] || echo "lm_eos: none"
    fi
    fusion_lines "$(field "$1" scales)" "$(place "$(field "$1" model)")/asr_$(field "$1" model)/prior.json" \
        "${exp}/lm_stories/ngram4.npz"
}
