# shellcheck shell=bash
# Sourced by the recipes: how many processes share this machine, and how they are started.
#
# `run_jobs NJ LOG COMMAND ...` runs NJ copies of COMMAND at once, with JOB in LOG and COMMAND
# replaced by 1 ... NJ, and fails, showing the end of a log, when one of them fails.

run_jobs() {
    local nj=$1 log=$2 job failed=0
    shift 2
    local -a pids=()
    mkdir -p "$(dirname "${log}")"
    for job in $(seq "${nj}"); do
        "${@//JOB/${job}}" > "${log//JOB/${job}}" 2>&1 &
        pids+=($!)
    done
    for job in $(seq "${nj}"); do
        if ! wait "${pids[job - 1]}"; then
            failed=${job}
        fi
    done
    if [ "${failed}" -ne 0 ]; then
        echo "error: $* failed; the end of ${log//JOB/${failed}}:" >&2
        tail -n 15 "${log//JOB/${failed}}" >&2
        return 1
    fi
}
