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
    local model decoding tag=decode
    model=$(model_of "$1")
    decoding=$(column_of "$1" 4)
    [ "${decoding}" = utt2lang ] || tag+=_${decoding}
    echo "$(place "${model}")/asr_${model}/${tag}"
}
run_row() {
    local model decoding given=(--inference_config "$(config decode_ctc)") languages=utt2lang tag
    model=$(model_of "$1")
    decoding=$(column_of "$1" 4)
    tag=$(basename "$(decoding_of "$1")")
    train_model "${model}"
    # The options of training say that there are soft prompts of languages.
    [[ ${model} = ctc* ]] || given=(--inference_config "$(config decode)"
        --inference_asr_model valid.ce_per_token.ave.pth --asr_args "$(training_of "${model}")")
    case ${decoding} in
        joint)
            given+=(--inference_config "$(config decode_joint)" --tune_config "$(grid tune_joint)"
                --alone_tag decode)
            ;;
        fusion)
            train_lm copy
            given+=(--use_lm true --lm_exp "${exp}/lm_copy" --tune_tool tune_fusion
                --tune_config "$(grid tune_fusion)")
            ;;
        *) languages=${decoding} ;;
    esac
    asr "${model}" "${tag}" --skip_train true "${given[@]}" \
        --inference_lang "${languages}" --inference_tag "${tag}"
}
# What is tried on dev; --size tiny only checks the machinery.
grid() { # name
    if [ "${size}" = tiny ]; then config "$1_tiny"; else config "$1"; fi
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
# Rows that are compared with each other.
group_of() { # row
    case $(column_of "$1" 2) in
        start) echo "adapter that starts at the CTC" ;;
        axes) echo "adapter that starts at the CTC, CTC loss, alone and jointly with the CTC" ;;
        small) echo "small LLM" ;;
        low) echo "a tenth of the data of ${less_of// /, }" ;;
        *) echo "adapter that starts at random" ;;
    esac
}
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
    group: "$(group_of "$1")"
    command: ./experiment.sh --size ${size} --rows $1 --epochs ${epochs}
    test: ${decoded}/test
    rtf: ${decoded}/test/logdir/output.1/rtf.json
    time: [${times}]
    dev_nll: ${decoded}/nll/nll.json
ENTRY
    [[ ${model} = ctc* ]] || echo "    train_log: $(place "${model}")/asr_${model}/train.log"
}
was_run() { # row, for any seed
    local seed="*"
    compgen -G "$(decoding_of "$1")/test/scores.json" > /dev/null
}
# Rows of main are always in it, the others if they were run.
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
        for row in $(rows_of all); do
            if rows_of main | grep -qx "${row}" || was_run "${row}"; then entry "${row}"; fi
        done
    } > "${exp}/results.yaml"
    tool results_archive --archive "${archive}" --collect "${exp}/results.yaml"
    tool results_table --config "${exp}/results.yaml" --output "${results}"
}
