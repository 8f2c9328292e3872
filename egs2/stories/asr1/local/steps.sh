# shellcheck shell=bash
# Sourced by run.sh: rows of the experiment's table, their selection, and the table itself.
# shellcheck disable=SC2034,SC2154  # run.sh sets the options; a unit of work sets encoder, epochs and
# seed; describe (models.sh) sets variables of its callers, of which some need only some

# shellcheck source-path=SCRIPTDIR/..
. ../../TEMPLATE/asr1/rows.sh
case ${experiment} in
    transducer) rows_file=local/rows.txt first_lm=stories part="" ;;
    speech_llm) rows_file=local/speech_llm_rows.txt first_lm=copy part=_speech_llm ;;
    combination) rows_file=local/combination_rows.txt first_lm=stories part=_combination ;;
    *) die "--experiment is '${experiment}'; expected transducer, speech_llm or combination" ;;
esac
archive=results.tar.xz
[ "${size}" = full ] || archive=${exp}/results.tar.xz
restore_results() { [ ! -f "${archive}" ] || tool results_archive --archive "${archive}" --restore; }
for encoder in ${encoders}; do
    [[ " offline 80 160 320 640 " == *" ${encoder} "* ]] ||
        die "--encoders has '${encoder}'; expected some of offline 80 160 320 640"
done
# The rows of --rows; what cannot be run is noticed before hours of work.
select_rows() {
    local selected
    selected=$(rows_of "$@") || exit
    [ -n "${llm_source}" ] || [ "${size}" = tiny ] || ! grep -q other <<< "${selected}" ||
        die "rows with another LLM (set mismatch) need --llm_source: without it the LLM of all" \
            "rows is the small LLaMA that they compare with"
    echo "${selected}"
}
field() { # row, column: model, use (of an LLM in decoding), scales or title
    local column
    case $2 in model) column=3 ;; use) column=4 ;; scales) column=5 ;; title) column=6 ;; esac
    column_of "$1" "${column}"
}
tag_of() { # row
    local tag use
    use=$(field "$1" use)
    tag=decode${use:+_${use/ /_}}
    # The same row of two experiments has two grids, two beams.
    [ "${experiment} $(field "$1" scales)" != "combination tuned" ] || tag+=_combination
    [ "$(field "$1" scales)" = tuned ] || tag+=_$(field "$1" scales | tr ' ' _ | tr -d =)
    [ "${encoder}" = offline ] || tag+=_${encoder}ms
    echo "${tag}"
}
decoding_of() { echo "$(place "$(field "$1" model)")/asr_$(field "$1" model)/$(tag_of "$1")"; }
# Trains what a row needs, tunes, decodes and scores it.
run_row() {
    local model use scales settings lm from options decoding="" given=()
    model=$(field "$1" model)
    use=$(field "$1" use)
    scales=$(field "$1" scales)
    train_model "${model}"
    describe "${model}"
    case ${use} in
        swap*) given=(--swap_llm "${exp}/lm_${use#* }/llm") ;;
        fusion*) given=(--use_lm true --lm_exp "${exp}/lm_${use#* }") ;;
    esac
    case ${use} in
        "") ;;
        llm*) train_own_llm "${use#* }" ;;
        *) train_lm "${use#* }" ;;
    esac
    [[ ${scales} != *prior* ]] || estimate_prior "$(place "${model}")/asr_${model}"
    [[ ${scales} != *ngram* ]] || estimate_ngram "$(place "${model}")/asr_${model}"
    [ -z "${from}" ] || given+=(--inference_asr_model valid.mwer_expected_errors.ave.pth)
    local grid=tune tuner=tune_fusion decode=decode
    if [ "${experiment}" = combination ]; then
        grid+=_combination decode+=_combination
    elif [ "${scales}" != tuned ]; then
        grid+=_${scales}
    fi
    [ "${size}" != tiny ] || grid=tune_tiny
    [[ ${model} != sl_* ]] || grid=${grid/tune/tune_speech_llm} tuner=tune_scales decode=decode_speech_llm
    [[ $1 != *_joint ]] || given+=(--alone_tag "$(tag_of "${1%_joint}")") # for the diagnosis
    decoding=$(tag_of "$1")
    asr "${model}" "${settings}" --skip_train true --inference_tag "${decoding}" "${given[@]}" \
        --tune_tool "${tuner}" --tune_config "$(settings_of "${grid}" "$1")" \
        --inference_config "$(settings_of "${decode}" "$1")"
}
# A configuration of tuning or decoding, with what a row and the encoder's chunk add.
settings_of() { # name, row
    local settings lines=""
    settings=$(config "$1")
    [ "${experiment}" != combination ] || lines=$(fusion_settings "$2")
    [ "${encoder}" = offline ] || lines+=$'\n'"chunk_ms: ${encoder}"
    if [ -n "${lines}" ]; then
        local base=${settings} without='^$'
        [[ ${lines} != *beam_size* ]] || without='^beam_size:'
        settings=${exp}/conf/$1_${2}_${encoder}.yaml
        mkdir -p "${exp}/conf"
        { grep -v "${without}" "${base}" && echo "${lines}"; } > "${settings}.$$.${BASHPID}"
        mv "${settings}.$$.${BASHPID}" "${settings}"
    fi
    echo "${settings}"
}

# --- all that was asked for -----------------------------------------------------------------------
# Units of work: first what others need, so that two workers begin with different things.
units_of() {
    local encoder epochs seed row
    for encoder in ${encoders}; do
        for seed in ${seeds}; do
            echo "model ctc ${encoder} 0 ${seed}"
            [ "${encoder} ${seed}" != "${encoders%% *} ${seeds%% *}" ] || echo "lm ${first_lm}"
        done
    done
    for encoder in ${encoders}; do
        for epochs in ${epochs_list}; do
            for seed in ${seeds}; do
                for row in "$@"; do echo "row ${row} ${encoder} ${epochs} ${seed}"; done
            done
        done
    done
}
run_unit() { # words of a unit
    local encoder=${3:-} epochs=${4:-} seed=${5:-} decoding=""
    case $1 in
        lm) train_lm "$2" ;;
        model) train_model "$2" ;;
        row)
            if ! decodable "$2" && compgen -G "$(decoding_of "$2")/test/scores.json" > /dev/null; then
                echo "row $2 was finished elsewhere: it is in ${archive}"
                return
            fi
            mkdir -p "${exp}/${encoder}_e${epochs}_s${seed}"
            touch "${exp}/${encoder}_e${epochs}_s${seed}/.${experiment}" # its table has this condition
            run_row "$2"
            ;;
    esac
}
# Whether the model of a row is here, or at least begun.
decodable() {
    local model
    model=$(field "$1" model)
    [ -f "$(place "${model}")/asr_${model}/.begun" ]
}
run_selected() {
    local selected
    # shellcheck disable=SC2086
    selected=$(select_rows ${rows})
    prepare_data
    [ "${stop_stage}" -le 5 ] || run_rows "${selected}"
}

# --- streaming, sample by sample --------------------------------------------------------------------
stream_rows() {
    local row epochs seed encoder=320
    [ -n "${stream}" ] || return 0
    # shellcheck disable=SC2086
    rows_of ${stream} > /dev/null
    for epochs in ${epochs_list}; do
        for seed in ${seeds}; do
            # shellcheck disable=SC2086
            for row in $(rows_of ${stream}); do stream_row "${row}"; done
        done
    done
}
# Error rate, delays (against the alignment of the CTC model) and compute time of a fourth of test,
# one utterance at a time.
stream_row() { # row
    local model use directory decoded file subset=${exp}/stream/test given=()
    local settings lm from options best=valid.loss.ave.pth ctc
    run_row "$1"
    ctc=$(place ctc)/asr_ctc
    model=$(field "$1" model)
    use=$(field "$1" use)
    describe "${model}"
    [ -z "${from}" ] || best=valid.mwer_expected_errors.ave.pth
    directory=$(place "${model}")/asr_${model}
    decoded=$(decoding_of "$1")
    case ${use} in
        "") ;;
        swap*) given=(--predictor llm --predictor_conf "llm=${exp}/lm_${use#* }/llm") ;;
        *) die "--stream ${1}: rows with an LM in fusion have no report; expected one without, or a swap" ;;
    esac
    mkdir -p "${subset}"
    for file in wav.scp text; do
        awk 'NR % 4 == 1' "dump/${name}/raw/test/${file}" > "${subset}/${file}"
    done
    tool streaming_report --asr_train_config "${directory}/config.yaml" \
        --asr_model_file "${directory}/${best}" --config "${decoded}/tune/best.yaml" \
        --beam_size "$(sed -n 's/^beam_size: *//p' "$(config decode)")" \
        --align_asr_train_config "${ctc}/config.yaml" --align_asr_model_file "${ctc}/valid.loss.ave.pth" \
        --data_path_and_name_and_type "${subset}/wav.scp,speech,sound" --text "${subset}/text" \
        --output_dir "${decoded}_stream" "${given[@]}"
}

# --- the table ------------------------------------------------------------------------------------
run_command() { # row
    local origin=""
    [ -z "${llm_source}" ] || origin="--llm_source LLM "
    [ "${experiment}" = transducer ] || origin="--experiment ${experiment} ${origin}"
    echo "./run.sh ${origin}--size ${size} --rows $1 --encoders ${encoder} --epochs ${epochs}"
}
# Files with the seconds of all trainings that a row needs, LLMs' pretraining apart.
times_of_model() {
    local settings lm from options
    describe "$1"
    echo "$(place "$1")/asr_$1/time.json"
    [ -z "${lm}" ] || echo "${exp}/lm_${lm}/time.json"
    if [ -n "${from}" ]; then
        times_of "${from}"
    elif [ "$1" != ctc ]; then
        times_of_model ctc
    fi
}
times_of() { # row
    local use
    times_of_model "$(field "$1" model)"
    use=$(field "$1" use)
    [[ -z ${use} || ${use} =~ ^(swap|fusion)\ adapted$ || ${use} = "llm raw" ]] ||
        echo "${exp}/lm_${use#* }/time.json"
}
entry() { # row
    local seed="{seed}" model use decoded perplexity
    model=$(field "$1" model)
    use=$(field "$1" use)
    decoded=$(decoding_of "$1")
    perplexity=${decoded}/nll/nll.json # of the predictor
    [[ ! ${use} =~ ^(fusion|llm) ]] || perplexity=${exp}/lm_${use#* }/perplexity.json
    cat << ENTRY
-   name: "$(field "$1" title)"
    group: "${encoder}, ${epochs} epochs"
    command: $(run_command "$1")
    test: ${decoded}/test
    scales: ${decoded}/tune/scales.json
    rtf: ${decoded}/test/logdir/output.1/rtf.json
    time: [$(times_of "$1" | sort -u | sed 's/.*/"&"/' | paste -sd ,)]
ENTRY
    # The likelihood is that of the model's own chunk.
    [[ ! ${encoder} =~ ^(offline|320)$ ]] || echo "    dev_nll: ${decoded}/nll/nll.json"
    # Neither CTC nor the RNN-T has a language model of its own; a speech LLM has no other.
    [[ ${model} =~ ^(ctc|ctc_more|rnnt|sl_.*)$ && -z ${use} ]] || echo "    perplexity: ${perplexity}"
    [[ ${model} != sl_* ]] || echo "    train_log: $(place "${model}")/asr_${model}/train.log"
}
# One table for each encoder and number of epochs that there is. Rows of main are always in it, the
# others if they were run, and in the first table.
table() {
    local encoder epochs row first=true conditions condition
    conditions=$(find "${exp}" -maxdepth 1 -name '*_e*_s*' ! -name 'streaming_*' -printf '%f\n')
    [ "${experiment}" = transducer ] || conditions=$(
        while read -r condition; do
            [ ! -f "${exp}/${condition}/.${experiment}" ] || echo "${condition}"
        done <<< "${conditions}"
    )
    {
        cat "$(config "results${part}")"
        echo "seeds: [$(sed -E 's/.*_s//' <<< "${conditions}" | sort -nu | paste -sd ,)]"
        echo "systems:"
        while read -r encoder epochs; do
            for row in $(rows_of all); do
                if "${first}" || rows_of main | grep -qx "${row}" || was_run "${row}"; then
                    entry "${row}"
                fi
            done
            if [ "${experiment}" = combination ]; then
                experiment=transducer rows_file=local/rows.txt entries_if_run swap swap_mwer
                experiment=speech_llm rows_file=local/speech_llm_rows.txt \
                    entries_if_run lora8 lora8_joint
            fi
            first=false
        done < <(sed -E 's/^(.*)_e(.*)_s.*$/\1 \2/' <<< "${conditions}" | sort -u |
            awk '{print ($1 != "offline"), $0}' | sort -k1,1n -k2,2n -k3,3n | cut -d ' ' -f 2-)
    } > "${exp}/results${part}.yaml"
    local results=RESULTS${part}.md
    [ "${size}" = full ] || results=${exp}/${results}
    tool results_archive --archive "${archive}" --collect "${exp}/results${part}.yaml"
    tool results_table --config "${exp}/results${part}.yaml" --output "${results}" \
        --plot "${exp}/wer${part}.png" --speed_plot "${exp}/speed${part}.png"
}
entries_if_run() { # rows
    local row
    for row in "$@"; do ! was_run "${row}" || entry "${row}"; done
}
was_run() { # row, for any seed
    local seed="*"
    compgen -G "$(decoding_of "$1")/test/scores.json" > /dev/null
}
