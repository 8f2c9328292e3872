# shellcheck shell=bash
# Sourced by the recipes: background jobs, on this machine or by Slurm.

# `start_job COMMAND ...` runs COMMAND in the background, in a process group of its own: when the
# script ends, for whatever reason, the job is stopped with everything that it started.
job_pids=()
start_job() {
    set -m
    "$@" &
    set +m
    job_pids+=($!)
}
stop_jobs() {
    local pid
    for pid in "${job_pids[@]}"; do
        kill -- "-${pid}" 2> /dev/null || true
    done
}
trap stop_jobs EXIT
trap 'exit 130' INT TERM

# GPUs that jobs on this machine may use, one a line: those of CUDA_VISIBLE_DEVICES, or all.
visible_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr , '\n' <<< "${CUDA_VISIBLE_DEVICES}"
    else
        nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null || true
    fi
}

on_gpu() { # GPU, or nothing; COMMAND
    [ -z "$1" ] || export CUDA_VISIBLE_DEVICES=$1
    "${@:2}"
}

# `run_jobs [OPTION VALUE ...] NJ LOG COMMAND ...` runs NJ copies of COMMAND at once, with @JOB@ in
# LOG and COMMAND replaced by 1 ... NJ, and fails, showing the end of a log, when one of them fails.
# OPTIONs (--kind, --ngpu, --num_threads, ...; see bin/run_jobs) are what a job of Slurm asks for.
# On this machine a job with `--ngpu 1` sees one GPU: the jobs take them by turns, and no more run at
# once than there are, times jobs_per_gpu.
run_jobs() {
    local nj log job ngpu=0 slots failed=0
    local -a pids=() resources=() gpus=("")
    while [[ $1 == --* ]]; do
        resources+=("$1" "$2")
        [ "$1" != --ngpu ] || ngpu=$2
        shift 2
    done
    nj=$1 log=$2
    shift 2
    if [ "${cmd_backend:-local}" = slurm ]; then
        submit_jobs "${nj}" "${log}" "$@"
        return
    fi
    mkdir -p "$(dirname "${log}")"
    slots=${nj}
    if [ "${ngpu}" -gt 0 ]; then
        mapfile -t gpus < <(visible_gpus)
        [ "${#gpus[@]}" -gt 0 ] || gpus=("") # the job says itself what is missing
        slots=$((${#gpus[@]} * ${jobs_per_gpu:-1}))
    fi
    for job in $(seq "${nj}"); do
        # A job takes the place of the one that is `slots` before it; none after a failure.
        if [ "${job}" -gt "${slots}" ]; then
            wait "${pids[job - slots - 1]}" || failed=$((job - slots))
            pids[job - slots - 1]=""
            [ "${failed}" -eq 0 ] || break
        fi
        start_job on_gpu "${gpus[(job - 1) % ${#gpus[@]}]}" "${@//@JOB@/${job}}" \
            > "${log//@JOB@/${job}}" 2>&1
        pids+=("${job_pids[-1]}")
    done
    for job in "${!pids[@]}"; do
        [ -z "${pids[job]}" ] || wait "${pids[job]}" || failed=$((job + 1))
    done
    if [ "${failed}" -ne 0 ]; then
        echo "error: $* failed; the end of ${log//@JOB@/${failed}}:" >&2
        tail -n 15 "${log//@JOB@/${failed}}" >&2
        return 1
    fi
}

# The same by Slurm, with OPTIONs in the array `resources`. Other machines know no functions of ours.
submit_jobs() { # NJ LOG COMMAND
    local -a argv=("${@:3}")
    case $3 in
        plugin) argv=("${python:-python3}" -m espnet_llm_plugin "${@:4}") ;;
        tool) argv=("${python:-python3}" -m "espnet_llm_plugin.bin.$4" "${@:5}") ;;
    esac
    start_job "${python:-python3}" -m espnet_llm_plugin.bin.run_jobs "${resources[@]}" \
        --conf "${slurm_conf:-conf/slurm.yaml}" --nj "$1" --log "$2" -- "${argv[@]}"
    wait "${job_pids[-1]}"
}
