# shellcheck shell=bash
# Sourced by the recipes: background jobs on this machine.

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

# `run_jobs NJ LOG COMMAND ...` runs NJ copies of COMMAND at once, with @JOB@ in LOG and COMMAND
# replaced by 1 ... NJ, and fails, showing the end of a log, when one of them fails.
run_jobs() {
    local nj=$1 log=$2 job failed=0
    shift 2
    local -a pids=()
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
