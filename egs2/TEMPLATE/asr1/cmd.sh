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

# `run_jobs [OPTION VALUE ...] NJ LOG COMMAND ...` runs NJ copies of COMMAND at once, with @JOB@ in
# LOG and COMMAND replaced by 1 ... NJ, and fails, showing the end of a log, when one of them fails.
# OPTIONs (--kind, --ngpu, --num_threads, ...; see bin/run_jobs) are what a job of Slurm asks for.
run_jobs() {
    local nj log job failed=0
    local -a pids=() resources=()
    while [[ $1 == --* ]]; do
        resources+=("$1" "$2")
        shift 2
    done
    nj=$1 log=$2
    shift 2
    if [ "${cmd_backend:-local}" = slurm ]; then
        submit_jobs "${nj}" "${log}" "$@"
        return
    fi
    mkdir -p "$(dirname "${log}")"
    for job in $(seq "${nj}"); do
        start_job "${@//@JOB@/${job}}" > "${log//@JOB@/${job}}" 2>&1
        pids+=("${job_pids[-1]}")
    done
    for job in $(seq "${nj}"); do
        wait "${pids[job - 1]}" || failed=${job}
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
