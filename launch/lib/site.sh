# Settings of the site, and the environment that every role gets. Sourced; `home` is the checkout.

# The site file: $GSPO_SITE, else launch/site.sh of the checkout, else none. What it sets, sbatch's environment may override
# only if it says so itself, with ${NAME:-value} as the example does.
load_site() {
    # `sbatch --export=NONE` leaves the job without these; the PATH that bash takes then may end in the present directory.
    export PATH=${PATH%:.} HOME=${HOME:-~}
    local name
    # Not local: bash leaves its functions before it runs the EXIT trap.
    site_file=${GSPO_SITE:-$home/launch/site.sh}
    if [ -e "$site_file" ]; then
        source_site_file
    elif [ -n "${GSPO_SITE:-}" ]; then
        refuse "GSPO_SITE=$site_file does not exist; correct it, or unset it"
    fi
    GSPO_ROLLOUT_IMAGE=${GSPO_ROLLOUT_IMAGE:-${GSPO_IMAGE:-}}
    GSPO_VENV=${GSPO_VENV:-.venv}
    GSPO_ROLLOUT_VENV=${GSPO_ROLLOUT_VENV:-$GSPO_VENV}
    for name in "${!GSPO_@}"; do export "${name?}"; done
}

source_site_file() { # without -eu: what a module system does is not written for them
    local fault
    site_line=1
    fault=$(bash -n "$site_file" 2>&1) ||
        refuse "the site file cannot be read: ${fault%%$'\n'*}; correct that line (launch/site.example.sh shows the form)"
    set +eu -T
    # Within the EXIT trap bash counts lines from 1 again.
    trap '[[ ${BASH_SOURCE[0]-} != "$site_file" || $LINENO -lt $site_line ]] || site_line=$LINENO' DEBUG
    trap 'site_command_failed $? "$LINENO" "$BASH_COMMAND"' ERR
    trap site_file_ended EXIT
    # shellcheck source=/dev/null
    . "$site_file"
    trap - DEBUG ERR EXIT
    set -eu +T
}

site_command_failed() { # STATUS LINE COMMAND: a program that is missing is an error, another failure may be meant
    local where="the site file $site_file, line $2: \`$3\`"
    # shellcheck disable=SC2016
    [ "$3" != '. "$site_file"' ] || return 0 # its last line has failed and was reported
    if [ "$1" = 127 ]; then
        trap - DEBUG ERR EXIT
        refuse "$where: command not found; define it there first (for module: see launch/site.example.sh), or remove the line"
    fi
    echo "gspo: $where ended with $1 and the job goes on; correct the line, or add \`|| true\` if that is expected" >&2
}

site_file_ended() { # `exit`, or bash itself, as for ${NAME:?}
    trap - DEBUG ERR EXIT
    refuse "the site file $site_file, line $site_line, ended the script; correct the line (bash's own message, if any, is above), and use no exit"
}

refuse() { # one sentence, exit 2
    echo "gspo: $*" >&2
    exit 2
}

set_environment() { # why each is set: launch/README.md
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=
    if [ -n "${GSPO_INTERFACE:-}" ]; then
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$GSPO_INTERFACE} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$GSPO_INTERFACE}
    fi
    local scratch=${TMPDIR:-/tmp}/gspo-$(id -un)
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}
    export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$scratch/vllm}
}

need_python() { # PYTHON: refuses with a sentence where it is missing
    command -v "$1" >/dev/null || refuse "$1 is not there; run make setup, or set GSPO_VENV in the site file"
}
