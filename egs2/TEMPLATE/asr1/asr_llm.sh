#!/usr/bin/env bash
# Recognisers with LLMs, stage by stage, with the stage numbers, options and directories of ESPnet's
# asr.sh; needs no Kaldi, no Perl and no ESPnet checkout. Run it from a recipe directory.
#
#   stage  1  prepare data            local/data.sh -> <datadir>/<set>/{wav.scp,text,utt2spk}
#   stage  2  speed perturbation      <datadir>/<train_set>_sp
#   stage  3  format the audio        dump/raw/<set>
#   stage  4  filter by length        dump/raw/<set>
#   stage  5  token list              <token_listdir>/<token_type>
#   stage  6  adapt the LLM's vocabulary to the token list; LM statistics; what of the test
#             transcripts is in the LM's text (<lm_exp>/contamination)
#   stage  7  train or fine-tune the LM, export it as a Hugging Face directory <lm_exp>/llm
#   stage  8  perplexity of the LM; of an LLM that of words, before and after fine-tuning
#   stage 10  ASR statistics
#   stage 11  train the recogniser
#   stage 12  decode (with scales tuned on the valid set if --tune_config is given)
#   stage 13  score; likelihood of the valid set; use of the audio by a speech LLM; diagnosis
#             (<decoding>/diagnosis.md)
#
# A finished stage leaves a mark and is not redone; a killed one continues when it is run again.
# Changed options make cheap stages run again, and are refused for trained models: give another tag.
# Differs from asr.sh: --use_lm is false by default; stages 9, 14-15 and options of theirs are absent.
#
# Options (`--name value`), with their defaults:
# OPTIONS
stage=1                   # First stage to run
stop_stage=13             # Last stage to run
skip_data_prep=false      # Leave out stages 1-5
skip_train=false          # Leave out stages 6-11
skip_eval=false           # Leave out stages 12-13
ngpu=0                    # GPUs of a node for training (0: CPU); decoding uses one if this is not 0
num_nodes=1               # Nodes for training; more than one needs --cmd_backend slurm
cmd_backend=local         # Where jobs run: local, or slurm (by submitit)
slurm_conf=conf/slurm.yaml  # Options of jobs of Slurm
nj=4                      # Parallel jobs for preparing data and collecting statistics
inference_nj=4            # Parallel decoding jobs
jobs_per_gpu=1            # Of these at once on a GPU of this machine (docs/cluster.md)
datadir=data              # Kaldi data directories
dumpdir=dump              # Formatted data
expdir=exp                # Models, logs, results
python=python3            # Python that has espnet_llm_plugin installed
train_set=train           # Name of the training set
valid_set=dev             # Name of the validation set
test_sets="test"          # Names of the evaluation sets
eval_valid_set=false      # Decode and score the validation set too
local_data_opts=          # Options passed to local/data.sh
speed_perturb_factors=    # Speed factors, e.g. "0.9 1.0 1.1"; empty: none
audio_format=flac         # flac or wav
fs=16000                  # Sampling rate in Hz
min_wav_duration=0.1      # Shorter training utterances are dropped (seconds)
max_wav_duration=30       # Longer training utterances are dropped (seconds)
drop_bad=false            # Drop broken utterances, counting and listing them, instead of stopping
token_type=bpe            # bpe, char or word; hugging_face: the tokens of --llm (speech_llm)
nbpe=500                  # Pieces of the bpe token list
bpemode=unigram           # unigram or bpe
bpe_char_cover=1.0        # Character coverage of the bpe token list
bpe_nlsyms=               # Symbols that are pieces by themselves, separated by commas
bpe_input_sentence_size=100000000  # Most sentences to train the pieces on
bpe_normalization=nmt_nfkc  # Normalisation of the pieces: nmt_nfkc (ESPnet's), nfkc, identity
bpe_train_text=           # Text to train the pieces on (default: the training transcripts)
nlsyms_txt=none           # File of symbols that are one token (char)
cleaner=none              # ESPnet's text cleaner
g2p=none                  # ESPnet's grapheme-to-phoneme method
token_listdir=            # Where token lists are kept (default: <datadir>/token_list)
use_lm=false              # Run stages 6-8, and fuse the LM in stage 12
lm_tag=                   # Name of the LM experiment (default: from lm_config)
lm_exp=                   # Directory of the LM experiment (default: <expdir>/lm_<lm_tag>)
lm_stats_dir=             # Its statistics (default: <expdir>/lm_stats_<lm_tag>)
lm_config=                # LM training configuration; empty: the adapted LLM is used as it is
lm_args=                  # More options for espnet2.bin.lm_train
lm_token_type=            # hugging_face: the LM keeps the tokens of --llm, to rescore with (default: the same)
lm_lowercase=false        # Train the LM on text in lower case
num_splits_lm=1           # Parts of the LM's training text, read one after the other to save memory
lm_train_text=            # LM training texts, `id sentence` lines (default: training transcripts)
lm_dev_text=              # LM validation text (default: transcripts of the valid set)
lm_test_text=             # Text for the perplexity (default: the same as lm_dev_text)
llm=                      # Pretrained LLM to adapt (or that has the tokens): directory or hub id
oov_init=mean             # Rows of unmatched pieces: mean, length_weighted_mean, first, random
exact_match=true          # Pieces that are tokens of the LLM take their rows; false: as unmatched ones
asr_tag=                  # Name of the ASR experiment (default: from asr_config)
asr_exp=                  # Directory of the ASR experiment (default: <expdir>/asr_<asr_tag>)
asr_config=               # ASR training configuration; empty: stages 10-13 are left out
asr_args=                 # More options for espnet2.bin.asr_train
asr_stats_dir=            # Feature statistics (default: <expdir>/asr_stats_raw_<token list>)
feats_normalize=global_mvn  # global_mvn, utterance_mvn or none
ctc_init=                 # Trained CTC experiment directory to start from
pretrained_model=         # More initial values, in ESPnet's --init_param form, after those of asr_config
ignore_init_mismatch=false  # Passed to ESPnet
inference_config=         # Decoding configuration
inference_args=           # More options for espnet_llm_plugin.bin.asr_inference
inference_tag=            # Name of the decoding (default: from the configuration and arguments)
inference_asr_model=valid.loss.ave.pth  # ASR checkpoint to decode
inference_lm=valid.loss.ave.pth  # LM checkpoint to fuse if --use_lm is true
swap_llm=                 # Hugging Face directory that replaces the predictor (LM swap)
swap_dtype=               # Its precision: float32, bfloat16, float16, auto (default: bfloat16 if ngpu > 0)
tune_config=              # Grid of scales to try on the valid set; what inference_config sets wins
tune_tool=tune_scales     # tune_scales: the whole grid; tune_fusion: from n-best lists, for fine grids
alone_tag=                # inference_tag of the LLM alone, to compare with in the diagnosis (speech_llm)
inference_lang=utt2lang   # Languages in decoding (soft_prompt: per_language): utt2lang, predicted, unk or a code
diagnose_args=            # More options for espnet_llm_plugin.bin.diagnose, e.g. --weak DIR
# END
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR
. "${here}/options.sh"
options() { sed -n '/^# OPTIONS/,/^# END/{/^#/!p;}' "${BASH_SOURCE[0]}"; }
usage() {
    comment_of "${BASH_SOURCE[0]}" | grep -vx OPTIONS
    options | sed -E 's/^([a-z0-9_]+)=("[^"]*"|[^ ]*) *# (.*)/--\1 [\2]|\3/' |
        awk -F '|' '{printf "  %-42s %s\n", $1, $2}'
}
log() { echo "$(date '+%Y-%m-%dT%H:%M:%S') ($(basename "$0")) $*"; }

run_args="$*"
read_options "$(options | sed 's/=.*//')" "$@"
log "$0 ${run_args}"
export python

# shellcheck source-path=SCRIPTDIR
. "${here}/path.sh"
# shellcheck source-path=SCRIPTDIR
. "${here}/cmd.sh"
plugin() { "${python}" -m espnet_llm_plugin "$@"; }
tool() {
    local name=$1
    shift
    "${python}" -m "espnet_llm_plugin.bin.${name}" "$@"
}

[ "${tune_tool}" = tune_scales ] || [ "${tune_tool}" = tune_fusion ] ||
    die "--tune_tool is '${tune_tool}'; expected tune_scales or tune_fusion"
case ${swap_dtype} in
    "") swap_dtype=$([ "${ngpu}" -gt 0 ] && echo bfloat16 || echo float32) ;;
    float32 | bfloat16 | float16 | auto) ;;
    *) die "--swap_dtype is '${swap_dtype}'; expected float32, bfloat16, float16 or auto" ;;
esac
[ "${cmd_backend}" = local ] || [ "${cmd_backend}" = slurm ] ||
    die "--cmd_backend is '${cmd_backend}'; expected local or slurm"
[[ ${jobs_per_gpu} =~ ^[1-9][0-9]*$ ]] || die "--jobs_per_gpu is '${jobs_per_gpu}'; expected 1 or more"
[ "${num_nodes}" -eq 1 ] || [ "${cmd_backend}" = slurm ] ||
    die "--num_nodes ${num_nodes} needs --cmd_backend slurm; docs/cluster.md has other ways"
for name in use_lm eval_valid_set skip_data_prep skip_train skip_eval drop_bad ignore_init_mismatch \
    lm_lowercase; do
    [ "${!name}" = true ] || [ "${!name}" = false ] ||
        die "--${name} is '${!name}'; expected true or false"
done
# Whether stage $1 was asked for.
runs() {
    [ "${stage}" -le "$1" ] && [ "${stop_stage}" -ge "$1" ] || return 1
    if [ "$1" -le 5 ]; then
        [ "${skip_data_prep}" = false ]
    elif [ "$1" -le 8 ]; then
        [ "${use_lm}" = true ] && [ "${skip_train}" = false ]
    elif [ "$1" -le 11 ]; then
        [ -n "${asr_config}" ] && [ "${skip_train}" = false ]
    else
        [ -n "${asr_config}" ] && [ "${skip_eval}" = false ]
    fi
}

# --- marks of finished work -------------------------------------------------------------------
# A mark holds a checksum of what the work was made from: files by content, options by value.
checksum() {
    local argument
    for argument in "$@"; do
        if [ ! -f "${argument}" ]; then
            echo "${argument}"
        elif [ "${argument%.yaml}" != "${argument}" ]; then
            sed '/^ *#/d' "${argument}" # comments change nothing
        else
            cat "${argument}"
        fi
    done | sha256sum | cut -d ' ' -f 1
}
is_done() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }
mark_done() { echo "$2" > "$1.partial" && mv "$1.partial" "$1"; }
# A Hugging Face directory, by its configuration and by name, size and 256 blocks of its weights: quick
# for any size, and the same for a copy elsewhere.
llm_mark() {
    [ -d "$1" ] || return 0
    checksum "$1/config.json" "$(python3 - "$1" << 'PYTHON'
import hashlib, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("*")):
    if path.suffix in (".safetensors", ".bin"):
        size, digest = path.stat().st_size, hashlib.sha256()
        with path.open("rb") as weights:
            for block in range(256):
                weights.seek(block * size // 256)
                digest.update(weights.read(4096))
        print(path.name, size, digest.hexdigest())
PYTHON
    )"
}
# The speech of a formatted data directory.
audio_mark() { checksum "$1/wav.scp" "$1/utt2num_samples" "${fs}"; }
# A trained model that was made from something else is never overwritten silently.
refuse_other() {
    if [ -f "$1/.begun" ] && [ "$(cat "$1/.begun")" != "$2" ] && compgen -G "$1/*.pth" > /dev/null; then
        die "$1 was trained with other options, configuration or data." \
            "Give another $3, or remove the directory to train it again"
    fi
    mkdir -p "$1"
    mark_done "$1/.begun" "$2"
}
# No more jobs than the smallest of the given lists has lines.
jobs_for() {
    local jobs=${nj} list lines
    for list in "$@"; do
        lines=$(wc -l < "${list}")
        jobs=$((jobs < lines ? jobs : lines))
    done
    echo "${jobs}"
}
# Seconds of training in <directory>/time.json, of the clock and of the CPU (which does not count
# what else the machine does). Those of killed runs are included, both by the clock. Beside them the
# peak memory of the largest process that the log knows, resident and of the GPU.
cpu_seconds() { # of the processes that this shell (not a subshell) has waited for: `cpu_used`
    times > "$1/.times"
    cpu_used=$(awk -F '[ms ]+' 'END {printf "%.0f", 60 * ($1 + $3) + $2 + $4}' "$1/.times")
    rm "$1/.times"
}
start_clock() {
    local before=0
    [ ! -f "$1/.seconds" ] || before=$(cat "$1/.seconds")
    if [ -f "$1/.started" ] && [ -f "$1/train.log" ]; then # an earlier run was killed
        before=$((before + $(stat -c %Y "$1/train.log") - $(stat -c %Y "$1/.started")))
        echo "${before}" > "$1/.seconds"
    fi
    touch "$1/.started"
    cpu_seconds "$1"
    cpu_before=${cpu_used}
}
peak_memory() { # log of a training
    [ -f "$1" ] || return 0
    awk '
        function more(most, value) { return value > most ? value : most }
        match($0, /peak resident memory: [0-9]+/) {
            resident = more(resident, substr($0, RSTART + 22, RLENGTH - 22) + 0)
        }
        match($0, /gpu_max_cached_mem_GB=[0-9.]+/) { # the statistics of an epoch
            gpu = more(gpu, substr($0, RSTART + 22, RLENGTH - 22) * 1073741824)
        }
        END {
            if (resident) printf ", \"memory_bytes\": %.0f", resident
            if (gpu) printf ", \"gpu_memory_bytes\": %.0f", gpu
        }' "$1"
}
stop_clock() {
    local before=0
    cpu_seconds "$1"
    [ ! -f "$1/.seconds" ] || before=$(cat "$1/.seconds")
    printf '{"seconds": %d, "cpu_seconds": %d%s}\n' \
        $((before + $(date +%s) - $(stat -c %Y "$1/.started"))) \
        $((before + cpu_used - cpu_before)) "$(peak_memory "$1/train.log")" > "$1/time.json"
    rm -f "$1/.started" "$1/.seconds"
}
# Training may print for hours: keep all of it in a log, and show the end of it on failure.
logged() { # options of run_jobs, LOG, COMMAND
    local file
    local -a resources=(--append_log true)
    while [[ $1 == --* ]]; do
        resources+=("$1" "$2")
        shift 2
    done
    file=$1
    shift
    log "log: ${file}"
    if [ "${cmd_backend}" = slurm ]; then
        run_jobs "${resources[@]}" 1 "${file}" "$@"
    elif ! "$@" >> "${file}" 2>&1; then
        echo "error: $* failed; the end of ${file}:" >&2
        tail -n 15 "${file}" >&2
        return 2
    fi
}

# One COMMAND that uses several CPUs, with its output in the terminal.
on_cpus() { # CPUs, LOG, COMMAND
    if [ "${cmd_backend}" = slurm ]; then
        run_jobs --num_threads "$1" 1 "$2" "${@:3}"
        cat "$2"
    else
        "${@:3}"
    fi
}
# Options of training for --ngpu and --num_nodes, as ESPnet's launcher gives them.
distributed_args() { # directory of the experiment
    echo "--ngpu ${ngpu} --multiprocessing_distributed true"
    [ "${num_nodes}" -gt 1 ] || return 0
    rm -f "$1"/.dist_init_*
    echo "--dist_launcher slurm --dist_init_method file://$(cd "$1" && pwd)/.dist_init_@RUN@"
    [ "${ngpu}" -gt 0 ] || echo "--dist_backend gloo"
}

# Whether the recogniser has soft prompts of languages, which the tables utt2lang are for.
with_languages() {
    [[ ${asr_args} != *soft_prompt=per_language* ]] || return 0
    [ -f "${asr_config}" ] && grep -qE '^ +soft_prompt: *per_language' "${asr_config}"
}
# A language for every utterance of the training and the valid set.
prepare_languages() {
    local name directory
    with_languages || return 0
    for name in train valid; do
        directory=asr_${name}_dir
        directory=${!directory}
        [ -f "${directory}/utt2lang" ] ||
            die "there is no ${directory}/utt2lang: soft prompts of languages need the language of every utterance"
        tool prepare_languages --utt2lang "${directory}/utt2lang" --key_file "${directory}/wav.scp" \
            --config "${asr_config}" --asr_args="${asr_args}" --output "${asr_exp}/utt2lang/${name}"
    done
}
# Options of decoding and evaluation for the languages of a set.
language_args() { # set
    with_languages || return 0
    case ${inference_lang} in
        predicted) ;;
        utt2lang)
            [ -f "${data_feats}/$1/utt2lang" ] ||
                die "there is no ${data_feats}/$1/utt2lang: give --inference_lang predicted, unk or a language"
            echo "--utt2lang ${data_feats}/$1/utt2lang"
            ;;
        *) echo "--lang ${inference_lang}" ;;
    esac
}

# Stages 6 and 10: shapes, and means and variances, of a training and a validation list, by parallel
# jobs on the CPU that run COMMAND.
collect_stats() { # directory, training list, validation list, options to aggregate with, COMMAND
    local directory=$1 train=$2 valid=$3 aggregate=$4 jobs name input_dirs
    shift 4
    jobs=$(jobs_for "${train}" "${valid}")
    for name in train valid; do
        tool split_data --nj "${jobs}" --name ${name} --output_dir "${directory}/logdir" \
            "${!name}" > /dev/null
    done
    run_jobs "${jobs}" "${directory}/logdir/stats.@JOB@.log" \
        plugin "$@" --collect_stats true --batch_type unsorted --ngpu 0 \
        --train_shape_file "${directory}/logdir/train.@JOB@.scp" \
        --valid_shape_file "${directory}/logdir/valid.@JOB@.scp" \
        --output_dir "${directory}/logdir/stats.@JOB@"
    input_dirs=$(seq -f "--input_dir ${directory}/logdir/stats.%g" "${jobs}")
    # shellcheck disable=SC2086
    plugin -m espnet2.bin.aggregate_stats_dirs ${aggregate} ${input_dirs} --output_dir "${directory}"
    for name in train valid; do
        sed "s/\$/,$(wc -l < "${token_list}")/" "${directory}/${name}/text_shape" \
            > "${directory}/${name}/text_shape.${token_type}"
    done
}

inference_gpu=$((ngpu > 0 ? 1 : 0))

# --- names ------------------------------------------------------------------------------------
data_feats=${dumpdir}/raw
token_listdir=${token_listdir:-${datadir}/token_list}
[ -z "${speed_perturb_factors}" ] || train_set_sp=${train_set}_sp
train_set_sp=${train_set_sp:-${train_set}}
case ${token_type} in
    bpe)
        token_dir=${token_listdir}/bpe_${bpemode}${nbpe}
        bpemodel=${token_dir}/bpe.model
        token_name=bpe${nbpe}
        ;;
    char | word)
        token_dir=${token_listdir}/${token_type}
        bpemodel=none
        token_name=${token_type}
        ;;
    hugging_face)
        [ -n "${llm}" ] || die "--token_type hugging_face needs --llm, whose tokens it is"
        [ "${use_lm}" = false ] || lm_token_type=hugging_face # an LM over these tokens is the LLM itself
        token_name=$(basename "${llm}")
        token_dir=${token_listdir}/hugging_face_${token_name}
        bpemodel=${llm} # as ESPnet calls it
        ;;
    *) die "--token_type is '${token_type}'; expected bpe, char, word or hugging_face" ;;
esac
token_list=${token_dir}/tokens.txt
# The LM's tokens: the recogniser's, or the LLM's own.
lm_token_name=${token_name}
lm_token_list=${token_list}
lm_bpemodel=${bpemodel}
case ${lm_token_type} in
    "") lm_token_type=${token_type} ;;
    hugging_face)
        [ -n "${llm}" ] || die "--lm_token_type hugging_face needs --llm, whose tokens it is"
        lm_token_name=$(basename "${llm}")
        lm_token_list=${token_listdir}/hugging_face_${lm_token_name}/tokens.txt
        lm_bpemodel=${llm}
        ;;
    *) die "--lm_token_type is '${lm_token_type}'; expected hugging_face or nothing" ;;
esac
lm_sources=${lm_train_text:-${data_feats}/${train_set_sp}/text}
lm_dev_text=${lm_dev_text:-${data_feats}/${valid_set}/text}
lm_test_text=${lm_test_text:-${lm_dev_text}}
# An LM that keeps its own tokens cannot join the search.
fuse_lm=${use_lm}
[ "${lm_token_type}" != hugging_face ] || fuse_lm=false
config_name() { basename "${1%.yaml}"; }
if [ -z "${lm_tag}" ]; then
    lm_tag=$(config_name "${lm_config:-adapted.yaml}")_${lm_token_name}
fi
lm_exp=${lm_exp:-${expdir}/lm_${lm_tag}}
lm_stats_dir=${lm_stats_dir:-${expdir}/lm_stats_${lm_tag}}
lm_train_text=${lm_stats_dir}/lm_train.txt
lm_eval_sources="${lm_dev_text} ${lm_test_text}"
if [ "${lm_lowercase}" = true ]; then
    lm_dev_text=${lm_stats_dir}/lm_dev.txt
    lm_test_text=${lm_stats_dir}/lm_test.txt
fi
if [ -z "${asr_tag}" ]; then
    asr_tag=$(config_name "${asr_config:-default.yaml}")_raw_${token_name}
    [ -z "${speed_perturb_factors}" ] || asr_tag=${asr_tag}_sp
fi
asr_exp=${asr_exp:-${expdir}/asr_${asr_tag}}
if [ -z "${asr_stats_dir}" ]; then
    asr_stats_dir=${expdir}/asr_stats_raw_${token_name}
    [ -z "${speed_perturb_factors}" ] || asr_stats_dir=${asr_stats_dir}_sp
fi
if [ -z "${inference_tag}" ]; then
    inference_tag=decode
    [ -z "${inference_config}" ] || inference_tag+=_$(config_name "${inference_config}")
    [ -z "${inference_args}" ] ||
        inference_tag+=$(echo "${inference_args}" | sed -e 's/--/_/g' -e 's/[ |=/]//g')
    [ "${fuse_lm}" = false ] || inference_tag+=_lm_$(basename "${lm_exp}")
    [ -z "${swap_llm}" ] || inference_tag+=_swap
fi

# --- data ---------------------------------------------------------------------------------------
if runs 1; then
    log "stage 1: data preparation"
    # shellcheck disable=SC2086
    local/data.sh ${local_data_opts}
fi

if runs 2 && [ -n "${speed_perturb_factors}" ]; then
    log "stage 2: speed perturbation by ${speed_perturb_factors}"
    # shellcheck disable=SC2086
    tool perturb_speed --factors ${speed_perturb_factors} \
        "${datadir}/${train_set}" "${datadir}/${train_set_sp}"
fi

if runs 3; then
    log "stage 3: format the audio into ${data_feats}"
    for name in $(echo "${train_set_sp} ${valid_set} ${test_sets}" | tr ' ' '\n' | awk '!seen[$0]++'); do
        [ -d "${datadir}/${name}" ] || die "there is no ${datadir}/${name}: run stage 1, or give its name right"
        target=${data_feats}/org/${name}
        [ "${name}" = "${train_set_sp}" ] || [ "${name}" = "${valid_set}" ] ||
            target=${data_feats}/${name}
        on_cpus "${nj}" "${data_feats}/logdir/format_${name}.log" \
            tool format_wav_scp --fs "${fs}" --audio_format "${audio_format}" --nj "${nj}" \
            --drop_bad "${drop_bad}" "${datadir}/${name}" "${target}"
    done
fi

if runs 4; then
    log "stage 4: filter by length: ${min_wav_duration} to ${max_wav_duration} s"
    for name in "${train_set_sp}" "${valid_set}"; do
        tool filter_data_dir --fs "${fs}" --min_wav_duration "${min_wav_duration}" \
            --max_wav_duration "${max_wav_duration}" \
            "${data_feats}/org/${name}" "${data_feats}/${name}"
    done
fi

if runs 5; then
    log "stage 5: token list ${token_list}"
    text=${bpe_train_text:-${data_feats}/${train_set_sp}/text}
    [ "${token_type}" = hugging_face ] || [ -f "${text}" ] ||
        die "there is no ${text} to make tokens from: run the earlier stages"
    if [ "${token_type}" = hugging_face ]; then
        mark=$(checksum "${llm}" "$(llm_mark "${llm}")")
    else
        mark=$(checksum "${text}" "${token_type}" "${nbpe}" "${bpemode}" "${bpe_char_cover}" \
            "${bpe_nlsyms}" "${bpe_input_sentence_size}" "${bpe_normalization}" "${nlsyms_txt}" \
            "${cleaner}")
    fi
    if is_done "${token_dir}/.done" "${mark}"; then
        log "already done"
    elif [ "${token_type}" = hugging_face ]; then
        tool make_token_list --token_type hugging_face --llm "${llm}" --output_dir "${token_dir}"
        mark_done "${token_dir}/.done" "${mark}"
    else
        tool make_token_list --token_type "${token_type}" --nbpe "${nbpe}" \
            --bpemode "${bpemode}" --bpe_char_cover "${bpe_char_cover}" \
            --bpe_nlsyms "${bpe_nlsyms}" --bpe_input_sentence_size "${bpe_input_sentence_size}" \
            --bpe_normalization "${bpe_normalization}" \
            --nlsyms_txt "${nlsyms_txt}" --cleaner "${cleaner}" \
            --text "${text}" --output_dir "${token_dir}"
        mark_done "${token_dir}/.done" "${mark}"
    fi
fi

# --- language model -----------------------------------------------------------------------------
need_tokens() { [ -f "${token_list}" ] || die "there is no ${token_list}: run stage 5"; }
lm_common="--token_type ${lm_token_type} --bpemodel ${lm_bpemodel} --token_list ${lm_token_list}
    --use_preprocessor true --non_linguistic_symbols ${nlsyms_txt} --cleaner ${cleaner} --g2p ${g2p}"
lm_llm_args=""
if [ "${lm_token_type}" = hugging_face ]; then
    lm_llm_args="--lm_conf llm=${llm}"
elif [ -n "${llm}" ]; then
    lm_llm_args="--lm_conf llm=${lm_exp}/adapted"
fi

if runs 6; then
    if [ "${lm_lowercase}" = true ]; then
        read -r dev_source test_source <<< "${lm_eval_sources}"
        tool prepare_lm_text --text "${dev_source}" --lowercase true --output "${lm_dev_text}"
        tool prepare_lm_text --text "${test_source}" --lowercase true --output "${lm_test_text}"
    fi
    if [ "${lm_token_type}" = hugging_face ]; then
        [ -f "${lm_token_list}" ] || tool make_token_list --token_type hugging_face --llm "${llm}" \
            --output_dir "$(dirname "${lm_token_list}")"
    else
        need_tokens
    fi
    if [ "${lm_token_type}" != hugging_face ] && [ -n "${llm}" ]; then
        log "stage 6: adapt ${llm} to ${token_list}"
        mark=$(checksum "${token_list}" "${llm}" "$(llm_mark "${llm}")" \
            "${oov_init}${exact_match#true}") # the default leaves the marks as they were
        if is_done "${lm_exp}/.adapted" "${mark}"; then
            log "already done"
        else
            mkdir -p "${lm_exp}"
            rm -rf "${lm_exp}/adapted"
            adapt_args=""
            [ "${bpemodel}" = none ] || adapt_args="--bpemodel ${bpemodel}"
            # shellcheck disable=SC2086
            tool adapt_vocabulary --llm "${llm}" --token_list "${token_list}" ${adapt_args} \
                --oov_init "${oov_init}" --exact_match "${exact_match}" --text "${lm_dev_text}" --text_has_ids true \
                --output_dir "${lm_exp}/adapted"
            mark_done "${lm_exp}/.adapted" "${mark}"
        fi
    fi
    if [ -n "${lm_config}" ]; then
        log "stage 6: LM statistics in ${lm_stats_dir}"
        # shellcheck disable=SC2086
        mark=$(checksum ${lm_sources} "${lm_dev_text}" "${lm_token_list}" \
            "${lm_token_type}${lm_lowercase#false}")
        if is_done "${lm_stats_dir}/.done" "${mark}"; then
            log "already done"
        else
            # shellcheck disable=SC2086
            tool prepare_lm_text --text ${lm_sources} --output "${lm_train_text}" \
                --lowercase "${lm_lowercase}" --eval_text ${lm_eval_sources}
            test_texts=""
            for name in ${test_sets}; do
                [ ! -f "${data_feats}/${name}/text" ] || test_texts+=" ${data_feats}/${name}/text"
            done
            # shellcheck disable=SC2086
            [ -z "${test_texts}" ] || tool check_contamination --text "${lm_train_text}" \
                --eval_text ${test_texts} --output_dir "${lm_exp}/contamination"
            # shellcheck disable=SC2086
            token_list=${lm_token_list} token_type=${lm_token_type} \
                collect_stats "${lm_stats_dir}" "${lm_train_text}" "${lm_dev_text}" --skip_sum_stats \
                -m espnet2.bin.lm_train ${lm_common} ${lm_llm_args} \
                --train_data_path_and_name_and_type "${lm_train_text},text,text" \
                --valid_data_path_and_name_and_type "${lm_dev_text},text,text" \
                --config "${lm_config}" ${lm_args} --batch_size 512 \
                --model_conf extract_feats_in_collect_stats=false
            mark_done "${lm_stats_dir}/.done" "${mark}"
        fi
    fi
fi

if runs 7; then
    [ "${lm_token_type}" = hugging_face ] || need_tokens
    if [ -z "${lm_config}" ]; then
        [ -n "${llm}" ] || die "stage 7 needs --lm_config to train an LM, or --llm to use one as it is"
        log "stage 7: no --lm_config: the adapted LLM is used without fine-tuning"
        mkdir -p "${lm_exp}"
        if [ "${lm_token_type}" = hugging_face ]; then
            die "stage 7: --lm_token_type hugging_face without --lm_config: the LM is ${llm} itself"
        fi
        ln -sfn adapted "${lm_exp}/llm"
    else
        log "stage 7: LM training in ${lm_exp}"
        adapted_mark=$(cat "${lm_exp}/.adapted" 2> /dev/null || true)
        mark=$(checksum "${lm_config}" "${lm_args}" "${lm_train_text}" "${lm_dev_text}" \
            "${lm_token_list}" "${adapted_mark}")
        if is_done "${lm_exp}/.done" "${mark}"; then
            log "already done"
        else
            refuse_other "${lm_exp}" "${mark}" --lm_tag
            train_part=${lm_train_text}
            train_shape=${lm_stats_dir}/train/text_shape.${lm_token_type}
            split_args=""
            if [ "${num_splits_lm}" -gt 1 ]; then
                splits=${lm_stats_dir}/splits${num_splits_lm}
                if ! is_done "${splits}/.done" "${mark}"; then
                    plugin -m espnet2.bin.split_scps --scps "${train_part}" "${train_shape}" \
                        --num_splits "${num_splits_lm}" --output_dir "${splits}"
                    mark_done "${splits}/.done" "${mark}"
                fi
                train_part=${splits}/$(basename "${train_part}")
                train_shape=${splits}/$(basename "${train_shape}")
                split_args="--multiple_iterator true"
            fi
            start_clock "${lm_exp}"
            # shellcheck disable=SC2046,SC2086
            logged --kind train --ngpu "${ngpu}" --num_nodes "${num_nodes}" "${lm_exp}/train.log" \
                plugin -m espnet2.bin.lm_train ${lm_common} \
                ${lm_llm_args} $(distributed_args "${lm_exp}") --resume true ${split_args} \
                --train_data_path_and_name_and_type "${train_part},text,text" \
                --valid_data_path_and_name_and_type "${lm_dev_text},text,text" \
                --train_shape_file "${train_shape}" \
                --valid_shape_file "${lm_stats_dir}/valid/text_shape.${lm_token_type}" \
                --fold_length 150 --output_dir "${lm_exp}" --config "${lm_config}" ${lm_args}
            if grep -q '^lm: causal_llm$' "${lm_exp}/config.yaml"; then # not ESPnet's own LMs
                rm -rf "${lm_exp}/llm"
                tool export_llm --lm_train_config "${lm_exp}/config.yaml" \
                    --lm_file "${lm_exp}/valid.loss.ave.pth" --output_dir "${lm_exp}/llm"
            fi
            stop_clock "${lm_exp}"
            mark_done "${lm_exp}/.done" "${mark}"
        fi
    fi
fi

if runs 8 && [ -n "${lm_config}" ]; then
    log "stage 8: perplexity of ${lm_test_text}"
    [ -f "${lm_exp}/.done" ] || die "${lm_exp} is not a finished training: run stage 7"
    mark=$(checksum "${lm_test_text}" "$(cat "${lm_exp}/.done")")
    if is_done "${lm_exp}/perplexity_test/.done" "${mark}"; then
        log "already done"
    else
        # shellcheck disable=SC2086
        run_jobs --kind decode --ngpu "${inference_gpu}" \
            1 "${lm_exp}/perplexity_test/lm_calc_perplexity.@JOB@.log" \
            plugin -m espnet2.bin.lm_calc_perplexity --ngpu "${inference_gpu}" --batch_size 64 \
            --data_path_and_name_and_type "${lm_test_text},text,text" \
            --train_config "${lm_exp}/config.yaml" --model_file "${lm_exp}/valid.loss.ave.pth" \
            --output_dir "${lm_exp}/perplexity_test"
        if [ -d "${lm_exp}/llm" ] && [ -n "${llm}" ]; then # fine-tuned
            for name in native adapted tuned; do
                case ${name} in
                    native) directory=${llm} ;;
                    adapted) directory=${lm_exp}/adapted ;;
                    tuned) directory=${lm_exp}/llm ;;
                esac
                [ "${name}" = native ] || [ -d "${directory}" ] || continue
                tool llm_perplexity --llm "${directory}" --text "${lm_test_text}" \
                    --output "${lm_exp}/perplexity_test/words_${name}.json"
            done > "${lm_exp}/perplexity_test/words"
        fi
        mark_done "${lm_exp}/perplexity_test/.done" "${mark}"
    fi
    log "perplexity per token: $(cat "${lm_exp}/perplexity_test/ppl")"
    [ ! -f "${lm_exp}/perplexity_test/words" ] || cat "${lm_exp}/perplexity_test/words"
fi

# --- recogniser ---------------------------------------------------------------------------------
asr_train_dir=${data_feats}/${train_set_sp}
asr_valid_dir=${data_feats}/${valid_set}
asr_common="--use_preprocessor true --token_type ${token_type} --bpemodel ${bpemodel}
    --token_list ${token_list} --non_linguistic_symbols ${nlsyms_txt} --cleaner ${cleaner} --g2p ${g2p}
    --train_data_path_and_name_and_type ${asr_train_dir}/wav.scp,speech,sound
    --train_data_path_and_name_and_type ${asr_train_dir}/text,text,text
    --valid_data_path_and_name_and_type ${asr_valid_dir}/wav.scp,speech,sound
    --valid_data_path_and_name_and_type ${asr_valid_dir}/text,text,text"
if with_languages; then
    asr_common+=" --preprocessor multilingual --allow_variable_data_keys true
        --train_data_path_and_name_and_type ${asr_exp}/utt2lang/train,lang,text
        --valid_data_path_and_name_and_type ${asr_exp}/utt2lang/valid,lang,text"
fi

if runs 10; then
    need_tokens
    log "stage 10: ASR statistics in ${asr_stats_dir}"
    frontend_args=""
    [[ ${asr_args} != *--frontend* ]] || frontend_args=${asr_args}
    frontend=$(checksum "$(awk '/^[^ ]/ {keep = /^frontend/} keep' "${asr_config}")" "${frontend_args}")
    [ ! -f "${asr_stats_dir}/.frontend" ] || [ "$(cat "${asr_stats_dir}/.frontend")" = "${frontend}" ] ||
        die "${asr_stats_dir} holds statistics of another frontend; give another --asr_stats_dir"
    mark=$(checksum "$(audio_mark "${asr_train_dir}")" "$(audio_mark "${asr_valid_dir}")" \
        "${asr_train_dir}/text" "${asr_valid_dir}/text" "${token_list}" "${frontend}")
    if is_done "${asr_stats_dir}/.done" "${mark}"; then
        log "already done"
    else
        prepare_languages
        # shellcheck disable=SC2086
        collect_stats "${asr_stats_dir}" "${asr_train_dir}/wav.scp" "${asr_valid_dir}/wav.scp" "" \
            -m espnet2.bin.asr_train ${asr_common} --config "${asr_config}" ${asr_args} --batch_size 16
        mark_done "${asr_stats_dir}/.frontend" "${frontend}"
        mark_done "${asr_stats_dir}/.done" "${mark}"
    fi
fi

if runs 11; then
    need_tokens
    log "stage 11: ASR training in ${asr_exp}"
    init_args=""
    init_marks=""
    if [ -n "${ctc_init}${pretrained_model}" ]; then
        # ESPnet's --init_param replaces that of the configuration: all are given, later ones win.
        [[ ${asr_args} != *--init_param* ]] ||
            die "--asr_args has --init_param, which would replace --ctc_init and --pretrained_model:" \
                "give its files as --pretrained_model, or leave out the others"
        if [ -n "${ctc_init}" ]; then
            [ -f "${ctc_init}/.done" ] || die "--ctc_init ${ctc_init} is not a finished training"
            init_args="--ctc ${ctc_init}/valid.loss.ave.pth"
            init_marks=$(cat "${ctc_init}/.done")
        fi
        # shellcheck disable=SC2086
        init_args=$(tool ctc_init ${init_args} --config "${asr_config}" --asr_args="${asr_args}")
        [ -z "${pretrained_model}" ] || init_args+=" ${pretrained_model}"
        init_args="--init_param ${init_args}"
    fi
    normalize_args="--normalize ${feats_normalize}"
    [ "${feats_normalize}" != global_mvn ] ||
        normalize_args+=" --normalize_conf stats_file=${asr_stats_dir}/train/feats_stats.npz"
    [ -f "${asr_stats_dir}/.done" ] || die "there are no statistics in ${asr_stats_dir}: run stage 10"
    llm_marks=""
    for word in ${asr_args}; do
        [[ ${word} != *llm=* ]] || llm_marks+=$(llm_mark "${word#*llm=}")
    done
    prepare_languages
    if with_languages; then
        init_marks+=$(checksum "${asr_exp}/utt2lang/train" "${asr_exp}/utt2lang/valid")
    fi
    mark=$(checksum "${asr_config}" "${asr_args}" "${llm_marks}" "${init_args}" "${init_marks}" \
        "${normalize_args}" "$(cat "${asr_stats_dir}/.done")")
    if is_done "${asr_exp}/.done" "${mark}"; then
        log "already done"
    else
        refuse_other "${asr_exp}" "${mark}" --asr_tag
        start_clock "${asr_exp}"
        # shellcheck disable=SC2046,SC2086
        logged --kind train --ngpu "${ngpu}" --num_nodes "${num_nodes}" "${asr_exp}/train.log" \
            plugin -m espnet2.bin.asr_train ${asr_common} \
            ${normalize_args} $(distributed_args "${asr_exp}") --resume true \
            --ignore_init_mismatch "${ignore_init_mismatch}" ${init_args} \
            --train_shape_file "${asr_stats_dir}/train/speech_shape" \
            --train_shape_file "${asr_stats_dir}/train/text_shape.${token_type}" \
            --valid_shape_file "${asr_stats_dir}/valid/speech_shape" \
            --valid_shape_file "${asr_stats_dir}/valid/text_shape.${token_type}" \
            --fold_length 80000 --fold_length 150 \
            --output_dir "${asr_exp}" --config "${asr_config}" ${asr_args}
        stop_clock "${asr_exp}"
        mark_done "${asr_exp}/.done" "${mark}"
    fi
fi

asr_model_args="--asr_train_config ${asr_exp}/config.yaml
    --asr_model_file ${asr_exp}/${inference_asr_model}"
swap_conf=""
[ "${swap_dtype}" = float32 ] || swap_conf=" --predictor_conf dtype=${swap_dtype}" # not the default
[ -z "${swap_llm}" ] || asr_model_args+=" --predictor llm --predictor_conf llm=${swap_llm}${swap_conf}"
model_args=${asr_model_args}
lm_files=""
if [ "${fuse_lm}" = true ]; then
    if [ -f "${lm_exp}/config.yaml" ]; then
        lm_files="${lm_exp}/config.yaml ${lm_exp}/${inference_lm}"
    else # adapted, not trained
        lm_files="${lm_exp}/llm/espnet_lm.yaml ${lm_exp}/llm/espnet_lm.pth"
    fi
    model_args+=" --lm_train_config ${lm_files% *} --lm_file ${lm_files#* }"
fi
decode_dir=${asr_exp}/${inference_tag}
decode_lang=""
if with_languages; then decode_lang=${inference_lang}; fi
eval_sets=${test_sets}
[ "${eval_valid_set}" = false ] || eval_sets="${valid_set} ${test_sets}"
configured() { # key: its value in the configurations of decoding and tuning
    local file
    for file in "${inference_config}" "${tune_config}"; do
        [ ! -f "${file}" ] || sed -nE "s/^$1: *//p" "${file}"
    done | tail -n 1
}
decode_mark() {
    local fused ngram # an LLM in its own vocabulary; what stands in for it
    fused=$(configured fusion_llm)
    ngram=$(configured fusion_ngram)
    [ ! -f "${ngram}" ] || ngram=$(cksum < "${ngram}")
    checksum "${asr_exp}/.done" "${inference_asr_model}" "${inference_config}" "${inference_args}" \
        "${lm_files}" "${lm_exp}/.done" "${swap_llm:+${swap_llm}${swap_conf}}" \
        "$(llm_mark "${swap_llm}")$(llm_mark "${fused}")${ngram}" \
        "${tune_config}" "${tune_tool}${decode_lang}" "$@"
}

if runs 12; then
    log "stage 12: decoding into ${decode_dir}"
    [ -f "${asr_exp}/.done" ] || die "${asr_exp} is not a finished training: run stage 11"
    config_args=""
    if [ -n "${tune_config}" ]; then
        mark=$(decode_mark "$(audio_mark "${asr_valid_dir}")" "${asr_valid_dir}/text")
        if is_done "${decode_dir}/tune/.done" "${mark}"; then
            log "scales already tuned"
        else
            log "tuning the scales on ${valid_set}"
            mkdir -p "${decode_dir}/tune"
            lang_args=$(language_args "${valid_set}")
            # shellcheck disable=SC2086
            logged --kind decode --ngpu "${inference_gpu}" --num_threads "${inference_nj}" \
                "${decode_dir}/tune/tune.log" tool "${tune_tool}" ${model_args} \
                --config "${tune_config}" --nj "${inference_nj}" --ngpu "${inference_gpu}" \
                --data_path_and_name_and_type "${asr_valid_dir}/wav.scp,speech,sound" \
                --text "${asr_valid_dir}/text" --output_dir "${decode_dir}/tune" ${lang_args}
            mark_done "${decode_dir}/tune/.done" "${mark}"
        fi
        config_args="--config ${decode_dir}/tune/best.yaml"
    fi
    [ -z "${inference_config}" ] || config_args+=" --config ${inference_config}"
    for name in ${eval_sets}; do
        directory=${decode_dir}/${name}
        mark=$(decode_mark "$(audio_mark "${data_feats}/${name}")" "${inference_nj}")
        if is_done "${directory}/.done" "${mark}"; then
            log "${name} already decoded"
            continue
        fi
        # What a killed run has decoded is kept, unless it decoded something else.
        if ! is_done "${directory}/.begun" "${mark}"; then
            rm -rf "${directory}"
            mkdir -p "${directory}"
            mark_done "${directory}/.begun" "${mark}"
        fi
        lang_args=$(language_args "${name}")
        jobs=$(tool split_data --nj "${inference_nj}" --name keys \
            --output_dir "${directory}/logdir" "${data_feats}/${name}/wav.scp")
        # shellcheck disable=SC2086
        run_jobs --kind decode --ngpu "${inference_gpu}" \
            "${jobs}" "${directory}/logdir/asr_inference.@JOB@.log" \
            tool asr_inference ${model_args} ${config_args} --ngpu "${inference_gpu}" ${lang_args} \
            --data_path_and_name_and_type "${data_feats}/${name}/wav.scp,speech,sound" \
            --key_file "${directory}/logdir/keys.@JOB@.scp" \
            --output_dir "${directory}/logdir/output.@JOB@" ${inference_args}
        # shellcheck disable=SC2046
        tool merge_data --output_dir "${directory}" --key_file "${data_feats}/${name}/wav.scp" \
            $(seq -f "${directory}/logdir/output.%g" "${jobs}")
        cp "${directory}"/1best_recog/* "${directory}"
        cat "${directory}"/logdir/asr_inference.*.log | grep -i 'failed' || true
        mark_done "${directory}/.done" "${mark}"
    done
fi

if runs 13; then
    log "stage 13: scoring"
    token_args="--token_list ${token_list} --token_type ${token_type}"
    [ "${token_type}" != bpe ] || token_args+=" --bpemodel ${bpemodel}"
    [ "${token_type}" != hugging_face ] || token_args="" # has no token error rate
    for name in ${eval_sets}; do
        [ -f "${decode_dir}/${name}/.done" ] || die "${decode_dir}/${name} is not decoded: run stage 12"
        # shellcheck disable=SC2086
        tool score --ref "${data_feats}/${name}/text" --hyp "${decode_dir}/${name}/text" \
            --utt2spk "${data_feats}/${name}/utt2spk" ${token_args} \
            --output_dir "${decode_dir}/${name}"
        if [ -f "${decode_dir}/${name}/lang_predicted" ] && [ -f "${data_feats}/${name}/utt2lang" ]; then
            log "predicted languages of ${name}"
            tool score_language_id --utt2lang "${data_feats}/${name}/utt2lang" \
                --hyp "${decode_dir}/${name}/lang_predicted" --output_dir "${decode_dir}/${name}"
        fi
    done
    mark=$(decode_mark "$(audio_mark "${asr_valid_dir}")" "${asr_valid_dir}/text")
    if grep -q '^model: espnet$' "${asr_exp}/config.yaml" &&
        ! grep -qE '^ +ctc_weight: 1(\.0+)?$' "${asr_exp}/config.yaml"; then
        log "a model with a decoder of ESPnet: no likelihood of ${valid_set}"
    elif ! is_done "${decode_dir}/nll/.done" "${mark}"; then
        lang_args=$(language_args "${valid_set}")
        # One by one on the CPU, which gains nothing by batches, and of an RNN-T, whose joint network
        # has a tensor (B, T, U+1, V).
        batch_size=1
        if [ "${inference_gpu}" -gt 0 ] && ! grep -q '^model: transducer$' "${asr_exp}/config.yaml"; then
            batch_size=16
        fi
        # shellcheck disable=SC2086
        run_jobs --kind decode --ngpu "${inference_gpu}" 1 "${decode_dir}/nll/evaluate_nll.@JOB@.log" \
            tool evaluate_nll ${asr_model_args} --output_dir "${decode_dir}/nll" ${lang_args} \
            --ngpu "${inference_gpu}" --batch_size "${batch_size}" \
            --data_path_and_name_and_type "${asr_valid_dir}/wav.scp,speech,sound" \
            --data_path_and_name_and_type "${asr_valid_dir}/text,text,text"
        mark_done "${decode_dir}/nll/.done" "${mark}"
    fi
    first=${eval_sets%% *}
    if compgen -G "${decode_dir}/${first}/logdir/output.*/nbest.jsonl" > /dev/null; then
        inputs="--nll ${decode_dir}/nll/nll.json"
        if grep -q '^model: speech_llm$' "${asr_exp}/config.yaml"; then
            mark=$(decode_mark "$(audio_mark "${data_feats}/${first}")" "${data_feats}/${first}/text")
            if ! is_done "${decode_dir}/audio_use/.done" "${mark}"; then
                lang_args=$(language_args "${first}")
                # shellcheck disable=SC2086
                run_jobs --kind decode --ngpu "${inference_gpu}" \
                    1 "${decode_dir}/audio_use/evaluate_audio_use.@JOB@.log" \
                    tool evaluate_audio_use ${asr_model_args} ${lang_args} --output_dir "${decode_dir}/audio_use" \
                    --data_path_and_name_and_type "${data_feats}/${first}/wav.scp,speech,sound" \
                    --data_path_and_name_and_type "${data_feats}/${first}/text,text,text" \
                    --token_int "${decode_dir}/${first}/token_int" --ngpu "${inference_gpu}"
                mark_done "${decode_dir}/audio_use/.done" "${mark}"
            fi
            inputs+=" --audio_use ${decode_dir}/audio_use/audio_use.json"
            alone=${asr_exp}/${alone_tag}/${first}
            if [ -n "${alone_tag}" ] && [ -f "${alone}/scores.json" ]; then
                inputs+=" --alone ${alone}"
            elif [ -n "${alone_tag}" ]; then
                log "${alone} is not scored: the LLM alone is not compared with"
            fi
        fi
        [ ! -f "${asr_exp}/train.log" ] || inputs+=" --train_log ${asr_exp}/train.log"
        [ -z "${tune_config}" ] || inputs+=" --scales ${decode_dir}/tune/scales.json"
        if [ -n "${swap_llm}" ]; then
            report=${swap_llm%/*}/adapted/vocabulary_report.json # beside <lm_exp>/llm
            weak=${asr_exp}/decode                               # the same model with its own LM
            [ ! -f "${report}" ] || inputs+=" --vocabulary_report ${report}"
            # Scales as trained are what the page of the tuned ones compares with.
            if [ -f "${weak}/${first}/scores.json" ] && [[ ${inference_tag} != *_as_trained ]]; then
                inputs+=" --weak ${weak}/${first}"
                [ ! -f "${weak}/nll/nll.json" ] || inputs+=" --weak_nll ${weak}/nll/nll.json"
                [ ! -f "${decode_dir}_as_trained/${first}/scores.json" ] ||
                    inputs+=" --untuned ${decode_dir}_as_trained/${first}"
            fi
        fi
        scored=""
        for name in ${eval_sets}; do
            scored+=" ${decode_dir}/${name}"
        done
        # shellcheck disable=SC2086
        tool diagnose --scored ${scored} ${inputs} --output_dir "${decode_dir}" ${diagnose_args}
    fi
fi
log "finished"
