#!/usr/bin/env bash
# start.sh job|local HOME DIRECTORY ARGUMENTS...: sets the environment that every role gets and becomes Python.
# launch/lib/site.sh calls it; DIRECTORY is where the command was called.
set -Eeuo pipefail
trap 'echo "gspo: launch/lib/start.sh, line $LINENO: \`$BASH_COMMAND\` failed; correct the cause and start it again" >&2' ERR

refuse() { # one sentence, exit 2
    echo "gspo: $*" >&2
    exit 2
}

refuse_relative() { # NAMES of variables with a path: the processes of a run do not start in one directory
    local name
    for name; do
        case ${!name:-/} in /*) ;; *) refuse "$name=${!name} is not an absolute path; correct it in the site file or the environment" ;; esac
    done
}

set_environment() { # why each is set: launch/README.md
    refuse_relative TMPDIR TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR VLLM_CACHE_ROOT FLASHINFER_WORKSPACE_BASE HF_HOME
    GSPO_ROLLOUT_IMAGE=${GSPO_ROLLOUT_IMAGE:-${GSPO_IMAGE:-}}
    GSPO_VENV=${GSPO_VENV:-.venv}
    GSPO_ROLLOUT_VENV=${GSPO_ROLLOUT_VENV:-$GSPO_VENV}
    export GSPO_ROLLOUT_IMAGE GSPO_VENV GSPO_ROLLOUT_VENV
    # Python's switches in the user's shell are meant for another Python: PYTHONHOME, PYTHONSAFEPATH, PYTHONINSPECT, ...
    local name
    for name in "${!PYTHON@}"; do
        case $name in PYTHONPATH | PYTHONHASHSEED | PYTHONPYCACHEPREFIX | PYTHONMALLOC) ;; *) unset "$name" ;; esac
    done
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=
    if [ -n "${GSPO_INTERFACE:-}" ]; then
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$GSPO_INTERFACE} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$GSPO_INTERFACE}
    fi
    local scratch=${TMPDIR:-/tmp}/gspo-$(id -un)
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}
    export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$scratch/vllm} FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$scratch/flashinfer}
}

need_python() { # PYTHON: refuses with a sentence where it is missing or does not start
    local said
    command -v "$1" >/dev/null || refuse "$1 is not there; run make setup, or set GSPO_VENV in the site file"
    said=$("$1" -c '' 2>&1) ||
        refuse "$1 does not start (${said##*$'\n'}); run make setup, or set GSPO_VENV in the site file"
}

raise_limits() { # soft limits of the shell that submitted the job, or of the site file, to what the node allows
    local limit
    for limit in f n t v; do ulimit -S "-$limit" "$(ulimit -H "-$limit")"; done
}

become_job() { # launch/job.py, under the interpreter of the trainer or, with an image, the batch node's own, which knows srun
    local python=$GSPO_VENV/bin/python
    cd "$home"
    if [ -z "${GSPO_IMAGE:-}" ] || [ -z "${SLURM_JOB_ID:-}" ]; then
        need_python "$python"
    else
        python=python3
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null ||
            refuse "python3 of $(hostname -s) is missing or older than 3.9; load a newer one in the site file (the script itself runs outside the image)"
    fi
    # A stop request that comes before Python can act on it must not end the job.
    [ -z "${SLURM_JOB_ID:-}" ] || trap '' USR1
    exec "$python" -m launch.job "$called_in" "$@"
}

become_local() { # gspo train, where the command was called
    cd "$called_in"
    # Images are srun's business; in one that was entered by hand, GSPO_VENV names the environment in it.
    GSPO_IMAGE='' GSPO_ROLLOUT_IMAGE=''
    [ $# -gt 0 ] || set -- "$home/recipes/tiny_moe.yaml"
    [ ! -f "$1" ] || set -- "$(realpath -s "$1")" "${@:2}"
    # Relative paths of the recipe keys are the caller's, those of the site file the checkout's.
    local name venv
    for name in GSPO_VENV GSPO_ROLLOUT_VENV; do
        case ${!name} in /*) ;; *) printf -v "$name" %s "$home/${!name}" ;; esac
    done
    export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
    for venv in "$GSPO_VENV" "$GSPO_ROLLOUT_VENV"; do need_python "$venv/bin/python"; done
    GSPO_ROLLOUT_PYTHON=$GSPO_ROLLOUT_VENV/bin/python exec "$GSPO_VENV/bin/python" -m gspo_megatron.cli train "$@"
}

kind=$1 home=$2 called_in=$3
set_environment
raise_limits
"become_$kind" "${@:4}"
