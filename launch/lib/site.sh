# Settings of the site, and the environment that every role gets. Sourced; `home` is the checkout.

# The site file: $GSPO_SITE, else launch/site.sh of the checkout, else none. What it sets, sbatch's environment may override
# only if it says so itself, with ${NAME:-value} as the example does.
load_site() {
    local file=${GSPO_SITE:-$home/launch/site.sh}
    if [ -e "$file" ]; then
        # shellcheck source=/dev/null
        . "$file"
    elif [ -n "${GSPO_SITE:-}" ]; then
        refuse "GSPO_SITE=$file does not exist; correct it, or unset it"
    fi
    GSPO_ROLLOUT_IMAGE=${GSPO_ROLLOUT_IMAGE:-${GSPO_IMAGE:-}}
    GSPO_VENV=${GSPO_VENV:-.venv}
    GSPO_ROLLOUT_VENV=${GSPO_ROLLOUT_VENV:-$GSPO_VENV}
}

refuse() { # one sentence, exit 2
    echo "gspo: $*" >&2
    exit 2
}

set_environment() { # why each is set: launch/README.md
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=
    if [ -n "${GSPO_INTERFACE:-}" ]; then
        export GSPO_INTERFACE
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$GSPO_INTERFACE} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$GSPO_INTERFACE}
    fi
    local scratch=${TMPDIR:-/tmp}/gspo-$(id -un)
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}
    export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$scratch/vllm}
}

python_of() { # ROLE -> the interpreter of its environment; in an image it is the one on the PATH
    local image=${GSPO_IMAGE:-} venv=$GSPO_VENV
    [ "$1" = rollout ] && image=$GSPO_ROLLOUT_IMAGE venv=$GSPO_ROLLOUT_VENV
    if [ -n "$image" ]; then echo python3; else echo "$venv/bin/python"; fi
}

need_python() { # ROLE: refuses with a sentence where its interpreter is missing
    local python
    python=$(python_of "$1")
    command -v "$python" >/dev/null || refuse "$python is not there; run make setup, or set GSPO_VENV in the site file"
}

container_of() { # ROLE -> pyxis' flags, one a line; nothing without an image, because srun would not know them
    local image=${GSPO_IMAGE:-} mounts=$home:$home
    [ "$1" = rollout ] && image=$GSPO_ROLLOUT_IMAGE
    [ -n "$image" ] || return 0
    [ -n "${GSPO_MOUNTS:-}" ] && mounts+=,$GSPO_MOUNTS
    printf '%s\n' "--container-image=$image" "--container-mounts=$mounts" "--container-workdir=$home" --no-container-mount-home
}
