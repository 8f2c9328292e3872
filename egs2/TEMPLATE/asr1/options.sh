# shellcheck shell=bash
# Sourced by the recipes: options of the form `--name value`, their errors and --help.

die() {
    echo "error: $*" >&2
    exit 2
}

# The comment at the top of a script, as text.
comment_of() { sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$1"; }

# What --help prints; the script's directory is the working directory.
usage() { comment_of "$(basename "$0")"; }

# `read_options "NAME ..." "$@"` sets the variable NAME for each `--NAME value`. Other options are
# refused, unless the script has an array `forwarded`, which then gets them.
read_options() {
    local names=" ${1//$'\n'/ } " name
    shift
    while [ $# -gt 0 ]; do
        name=${1#--}
        name=${name//-/_}
        case $1 in
            -h | --help) usage; exit 0 ;;
            --*)
                [[ ${names} == *" ${name} "* ]] || declare -p forwarded > /dev/null 2>&1 ||
                    die "unknown option $1; see $0 --help"
                ;;
            *) die "expected an option, got '$1'; see $0 --help" ;;
        esac
        [ $# -ge 2 ] || die "option $1 needs a value"
        if [[ ${names} == *" ${name} "* ]]; then
            printf -v "${name}" '%s' "$2"
        else
            forwarded+=("$1" "$2")
        fi
        shift 2
    done
}

# Scales that tuning found (best.yaml), as options of training.
scales_of() {
    sed -nE -e 's/^alpha:/ --decoder_conf lm_scale=/p' -e 's/^(beta|label_bonus):/ --decoder_conf \1=/p' \
        "$1" | sed 's/= */=/' | tr -d '\n'
}
