# shellcheck shell=bash
# Sourced by languages.sh: the rows of the table, and the table itself.
# shellcheck disable=SC2034,SC2154  # languages.sh sets the options; a unit of work sets seed; describe
# sets variables of its callers

model_of() { column_of "$1" 3; }
title_of() {
    local title
    title=$(column_of "$1" 5)
    echo "${title//LESS/${less_of// /, }}"
}
decoding_of() { # row
    local model languages tag=decode
    model=$(model_of "$1")
    languages=$(column_of "$1" 4)
    [ "${languages}" = utt2lang ] || tag+=_${languages}
    echo "$(place "${model}")/asr_${model}/${tag}"
}
run_row() {
    local model given=(--inference_config "$(config decode_ctc)")
    model=$(model_of "$1")
    train_model "${model}"
    # The options of training say that there are soft prompts of languages.
    [[ ${model} = ctc* ]] || given=(--inference_config "$(config decode)"
        --inference_asr_model valid.ce_per_token.ave.pth --asr_args "$(training_of "${model}")")
    asr "${model}" "$(basename "$(decoding_of "$1")")" --skip_train true "${given[@]}" \
        --inference_lang "$(column_of "$1" 4)" --inference_tag "$(basename "$(decoding_of "$1")")"
}
units_of() { # rows
    local seed row
    for seed in ${seeds}; do
        echo "ctc ${seed}"
        [ "${seed}" != "${seeds%% *}" ] || [ "$*" = ctc ] || echo "lm"
        for row in "$@"; do echo "row ${seed} ${row}"; done
    done
}
run_unit() { # words of a unit
    local seed=${2:-}
    case $1 in
        ctc) train_model ctc ;;
        lm) train_lm copy ;;
        row)
            if [ -f "$(decoding_of "$3")/test/scores.json" ] &&
                [ ! -f "$(dirname "$(decoding_of "$3")")/.begun" ]; then
                echo "row $3 was finished elsewhere: it is in ${archive}"
            else
                run_row "$3"
            fi
            ;;
    esac
}

# --- the table ------------------------------------------------------------------------------------
entry() { # row
    local seed="{seed}" model decoded times lm options
    model=$(model_of "$1")
    decoded=$(decoding_of "$1")
    times="\"$(place "${model}")/asr_${model}/time.json\""
    if [[ ${model} != ctc* ]]; then
        describe "${model}"
        times+=", \"${exp}/lm_${lm}/time.json\""
        times+=", \"$(place ctc)/asr_ctc$([[ ${model} != *_low ]] || echo _low)/time.json\""
    fi
    cat << ENTRY
-   name: "$(title_of "$1")"
    command: ./experiment.sh --size ${size} --rows $1 --epochs ${epochs}
    test: ${decoded}/test
    rtf: ${decoded}/test/logdir/output.1/rtf.json
    time: [${times}]
    dev_nll: ${decoded}/nll/nll.json
ENTRY
    [[ ${model} = ctc* ]] || echo "    train_log: $(place "${model}")/asr_${model}/train.log"
}
table() {
    local row found results=RESULTS_experiment.md
    [ "${size}" = full ] || results=${exp}/${results}
    found=$(find "${exp}" -maxdepth 1 -name "e${epochs}_s*" | sed 's/.*_s//' | sort -n | paste -sd ,)
    mkdir -p "${exp}"
    {
        cat "$(config results)"
        echo "utt2lang: {test: ${dump}/raw/test/utt2lang}"
        echo "seeds: [${found:-1}]"
        echo "systems:"
        for row in $(rows_of all); do entry "${row}"; done
    } > "${exp}/results.yaml"
    tool results_archive --archive "${archive}" --collect "${exp}/results.yaml"
    tool results_table --config "${exp}/results.yaml" --output "${results}"
}
