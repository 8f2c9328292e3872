# shellcheck shell=bash
# Sourced by transducer_llama.sh, for `--system combination` of LibriSpeech and Loquacious: CTC, or CTC
# and an attention decoder, combined with an LLM in the ways of arXiv 2603.15045. egs2/stories shares
# the first three functions.
#
#   fusion_lines HOW PRIOR NGRAM    lines of a configuration for the words of a row
#   estimate_prior_of MODEL SET     the prior of a CTC model, once
#   estimate_ngram_of MODEL TEXTS FILE  an n-gram of LM texts in a model's tokens, once
#   combination_defaults CORPUS     what the user did not give, according to --mini
#   combination                     CTC model, its prior; the LLM fine-tuned in its own tokens and in
#                                   the pieces; CTC + AED -> rows of combination_rows.txt, each tuned
#                                   on the valid set -> one table, <expdir>/RESULTS_combination.md
# shellcheck disable=SC2034,SC2154  # transducer_llama.sh has the options and functions

fusion_lines() { # how, files of the prior and the n-gram
    local word
    for word in $1; do
        case ${word} in
            tuned | label) ;;
            rescore) echo "fusion: rescore" ;;
            delayed=*) printf 'fusion: delayed\nfusion_interval: %d\n' "${word#*=}" ;;
            shortest | every_word) printf 'fusion: delayed\nfusion_policy: %s\n' "${word}" ;;
            prior) echo "prior_file: $2" ;;
            ngram) echo "fusion_ngram: $3" ;;
            beam=*) echo "beam_size: ${word#*=}" ;;
            *) die "a row of combinations has an unknown word '${word}' in '$1'" ;;
        esac
    done
}

estimate_prior_of() { # directory of the model, data directory
    [ -f "$1/prior.json" ] || tool estimate_prior --asr_train_config "$1/config.yaml" \
        --asr_model_file "$1/valid.loss.ave.pth" --output "$1/prior.json" \
        --data_path_and_name_and_type "$2/wav.scp,speech,sound" "${@:3}"
}

estimate_ngram_of() { # directory of the model, texts, file
    local text new=""
    for text in $2; do
        [ "$3" -nt "${text}" ] || new=yes
    done
    # shellcheck disable=SC2086
    [ -z "${new}" ] || tool estimate_ngram --asr_train_config "$1/config.yaml" --text $2 --output "$3"
}

combination_defaults() { # name of the corpus
    num_pieces=10000
    if [ "${mini}" = true ]; then
        : "${aed_config:=conf/$1/mini/train_aed.yaml}"
        : "${tune_config:=conf/$1/mini/tune_combination.yaml}"
        : "${tune_aed_config:=conf/librispeech/mini/tune_aed.yaml}"
    elif [ "$1" = loquacious ]; then
        : "${ctc_config:=conf/loquacious/train_ctc.yaml}" "${aed_config:=conf/loquacious/train_aed.yaml}"
    elif [ "$1" = librispeech ]; then
        : "${ctc_config:=conf/speech_llm/train_ctc_60ms.yaml}"
        : "${aed_config:=conf/ctc/train_aed_conformer.yaml}"
    else
        die "--system combination has no configurations for $1; give another --system"
    fi
    : "${tune_config:=conf/librispeech/tune_combination.yaml}"
    : "${tune_aed_config:=conf/librispeech/tune_aed.yaml}"
    : "${inference_config:=conf/librispeech/decode_combination.yaml}"
    : "${combinations:=all}"
    select_combinations > /dev/null
}

# --- rows -----------------------------------------------------------------------------------------
row_names() { awk -F ' *[|] *' '!/^#/ {print $1}' "${template}/combination_rows.txt"; }
cell() { # row, column: 2 model, 3 LLM, 4 how, 5 title
    awk -F ' *[|] *' -v row="$1" -v column="$2" '$1 == row {print $column}' \
        "${template}/combination_rows.txt"
}
# Those of --combinations; without --aed_config none of aed.
select_combinations() {
    local row names=${combinations}
    [ "${names}" != all ] || names=$(row_names)
    for row in ${names}; do
        row_names | grep -qx -- "${row}" ||
            die "--combinations has '${row}'; expected all, or some of $(row_names | paste -sd ' ')"
        [ "${aed_config}" = none ] && [ "$(cell "${row}" 2)" = aed ] || echo "${row}"
    done
}
# A configuration with more lines.
with_lines() { # configuration, name of the new one, lines
    local target=${expdir}/conf/$2.yaml
    mkdir -p "${expdir}/conf"
    { cat "$1" && echo "$3"; } > "${target}.partial"
    mv "${target}.partial" "${target}"
    echo "${target}"
}

# --- models and decodings -------------------------------------------------------------------------
combination() {
    [ -n "${llm}" ] || die "--system combination needs --llm"
    local tag=${llm_tag:-$(basename "${llm}")} native row rows
    local ctc aed pieces=${expdir}/lm_${tag} valid
    ctc=${expdir}/asr_$(tag_of "${ctc_config}")
    aed=${expdir}/asr_$(tag_of "${aed_config}")
    valid=${dumpdir}/raw/$(option valid_set dev)
    rows=$(select_combinations)
    asr "${ctc_config}" --skip_eval true
    lm "${tag}" --llm "${llm}" --lm_config "${lm_config#none}"
    [ "${llm_tag}" != small ] || [ ! -f "${llm}/config.json" ] || as_native # speech_llm.sh
    native=${llm}
    if [ "${lm_config}" != none ]; then
        lm "${tag}_native" --llm "${llm}" --lm_config "${lm_config}" --lm_token_type hugging_face
        native=${expdir}/lm_${tag}_native/llm
    fi
    if [[ ${rows} = *aed* ]]; then
        asr_aed --skip_eval true
    fi
    if [[ ${rows} = *prior* ]] && asked_for 12; then
        estimate_prior_of "${ctc}" "${dumpdir}/raw/$(training_set)" --ngpu "$(decoding_gpus)"
    fi
    if [[ ${rows} = *ngram* ]] && asked_for 12; then
        estimate_ngram_of "${ctc}" "${lm_train_text:-${dumpdir}/raw/$(option train_set train)/text}" \
            "${pieces}/ngram4.npz"
    fi
    if [[ ${rows} = *mini_lstm* ]] && asked_for 12; then
        train_mini_lstm
    fi
    for row in ${rows}; do
        "combine_$(cell "${row}" 2)" "${row}"
    done
    ! asked_for 13 || combination_table
}

asr_aed() { # options
    asr "${aed_config}" --inference_asr_model valid.acc.ave.pth "$@"
}

train_mini_lstm() {
    local model=${aed}/valid.acc.ave.pth
    [ "${aed}/mini_lstm.pth" -nt "${model}" ] || tool train_ilm --output "${aed}/mini_lstm.pth" \
        --asr_train_config "${aed}/config.yaml" --asr_model_file "${model}" \
        --text "${dumpdir}/raw/$(option train_set train)/text" --valid_text "${valid}/text" \
        --ngpu "$(decoding_gpus)"
}

combine_ctc() { # row
    local options=() lines
    lines=$(fusion_lines "$(cell "$1" 4)" "${ctc}/prior.json" "${pieces}/ngram4.npz")
    case $(cell "$1" 3) in
        native) lines+=$'\n'"fusion_llm: ${native}" ;;
        pieces) options=(--use_lm true --lm_exp "${pieces}") ;;
    esac
    asr "${ctc_config}" --skip_train true --inference_tag "combine_$1" "${options[@]}" \
        --tune_tool tune_fusion --tune_config "$(with_lines "${tune_config}" "tune_$1" "${lines}")"
}

# By ESPnet's search.
combine_aed() { # row
    local options=() lines=""
    case $(cell "$1" 3) in
        native) lines="fusion_llm: ${native}" ;;
        pieces) options=(--use_lm true --lm_exp "${pieces}") ;;
    esac
    case $(cell "$1" 4) in
        *zero_context) lines+=$'\n'"ilm: zero_context" ;;
        *ngram) lines+=$'\n'"fusion_ngram: ${pieces}/ngram4.npz" ;;
        *mini_lstm) lines+=$'\n'"ilm: mini_lstm"$'\n'"ilm_file: ${aed}/mini_lstm.pth" ;;
    esac
    # decoded with what was tuned, and nothing else
    asr_aed --skip_train true --inference_tag "combine_$1" "${options[@]}" --inference_config "" \
        --tune_tool tune_fusion --tune_config "$(with_lines "${tune_aed_config}" "tune_$1" "${lines}")"
}

# --- the table ------------------------------------------------------------------------------------
sets_of() { # decoding directory
    local test_set
    for test_set in $(option test_sets test); do echo "${test_set}: $1/${test_set}"; done | paste -sd , |
        sed 's/,/, /g; s/.*/{&}/'
}
times_of() { # directories of models
    local directory
    for directory in "$@"; do echo "${directory}/time.json"; done | paste -sd ,
}
entry_of() { # row
    local decoded models=() lm=""
    case $(cell "$1" 2) in ctc) models=("${ctc}") ;; aed) models=("${aed}") ;; esac
    decoded=${models[0]}/combine_$1
    case $(cell "$1" 3) in
        native) lm=${native%/llm} ;;
        pieces) lm=${pieces} ;;
    esac
    [ -z "${lm}" ] || [ ! -f "${lm}/time.json" ] || models+=("${lm}")
    cat << ENTRY
-   name: "$(cell "$1" 5)"
    test: $(sets_of "${decoded}")
    scales: ${decoded}/tune/scales.json
    rtf: ${decoded}/$(option test_sets test | cut -d ' ' -f 1)/logdir/output.*/rtf.json
    time: [$(times_of "${models[@]}")]
ENTRY
    [ -z "${lm}" ] || echo "    perplexity: ${lm}/perplexity_test/words_tuned.json"
}
# Speech LLMs of `--system speech_llm` that have been scored.
speech_llms() {
    local config directory how
    for config in "${expdir}"/asr_*/config.yaml; do
        grep -qs '^model: speech_llm$' "${config}" || continue
        directory=$(dirname "${config}")
        for how in alone joint; do
            [ -f "${directory}/decode_${how}/$(option test_sets test | cut -d ' ' -f 1)/scores.json" ] ||
                continue
            cat << ENTRY
-   name: "speech LLM ${directory##*/asr_}, ${how/joint/jointly with CTC}"
    test: $(sets_of "${directory}/decode_${how}")
    rtf: ${directory}/decode_${how}/$(option test_sets test | cut -d ' ' -f 1)/logdir/output.*/rtf.json
    time: [$(times_of "${directory}")]
ENTRY
            [ ! -f "${directory}/decode_${how}/tune/scales.json" ] ||
                echo "    scales: ${directory}/decode_${how}/tune/scales.json"
        done
    done
}
combination_table() {
    local row
    {
        echo "command: ./run.sh --system combination$([ "${mini}" = false ] || echo " --mini true")"
        echo 'baseline: [CTC, "CTC + LLM in the pieces, label-wise"]'
        echo "unfinished: true"
        [ "$(decoding_gpus)" = 1 ] || echo "cpu_time: true"
        echo "systems:"
        for row in $(combinations=all select_combinations); do entry_of "${row}"; done
        speech_llms
    } > "${expdir}/results_combination.yaml"
    tool results_table --config "${expdir}/results_combination.yaml" \
        --output "${expdir}/RESULTS_combination.md" --plot "${expdir}/wer_combination.png" \
        --speed_plot "${expdir}/speed_combination.png"
}
