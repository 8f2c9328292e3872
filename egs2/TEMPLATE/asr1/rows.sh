# shellcheck shell=bash
# Sourced by recipes that are experiments: a file of rows, a line `name | set | ...` each, and workers
# that share the units of work which the rows need.
#
# The recipe defines rows_file; units_of ROW ..., which prints a unit a line; run_unit WORD ..., which
# does what a unit says unless it is done; jobs, the number of workers. It has sourced options.sh and
# cmd.sh.
# shellcheck disable=SC2154  # the recipe's variables

rows_of() { # all, a set, or names of rows
    local word
    for word in "$@"; do
        awk -F ' *[|] *' -v word="${word}" '/^#/ {next} word == "all" || word == $1 || word == $2 {print $1; n++}
            END {exit !n}' "${rows_file}" ||
            die "--rows: there is neither a row nor a set '${word}'; see ${rows_file}"
    done | awk '!seen[$0]++'
}
column_of() { # row, number of a column
    awk -F ' *[|] *' -v row="$1" -v column="$2" '$1 == row {print $column}' "${rows_file}"
}
# Several workers go through the same units and do what no other has begun.
work() {
    local unit words
    while read -r unit; do
        mkdir "${claims}/${unit// /_}" 2> /dev/null || continue
        read -ra words <<< "${unit}"
        echo "=== ${unit}"
        run_unit "${words[@]}" < /dev/null
    done <<< "${units}"
}
run_rows() { # names, a line each
    local units claims worker failed=0 first=${#job_pids[@]}
    # shellcheck disable=SC2086
    units=$(units_of $1)
    claims=$(mktemp -d)
    for worker in $(seq "${jobs}"); do start_job work "${worker}"; done
    for worker in $(seq "${jobs}"); do wait "${job_pids[first + worker - 1]}" || failed=1; done
    rm -r "${claims}"
    [ "${failed}" = 0 ] || die "some rows failed (see above); the same command continues"
}
