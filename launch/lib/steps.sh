# Steps of the job: one srun for each kind of role. Sourced; uses the table `plan` that launch/lib/plan.py answered with.

role_command() { # KIND COMMAND...: fills `command` with the srun that runs a command once for each task of a kind
    local kind=$1 hosts=${plan[$1_hosts]} each=${plan[$1_each]} environment=$1
    shift
    [ "$kind" = controller ] && environment=trainer
    srun_command "$kind" "$environment" "$hosts" "$each" "$@"
}

srun_command() { # KIND ENVIRONMENT HOSTS EACH COMMAND...
    local kind=$1 environment=$2 hosts=$3 each=$4 list nodes cpus=${SLURM_CPUS_ON_NODE:-1} group='' flags=()
    shift 4
    if [ -n "${SLURM_HET_SIZE:-}" ]; then
        group=$([ "$kind" = rollout ] && echo 1 || echo 0)
        cpus=SLURM_JOB_CPUS_PER_NODE_HET_GROUP_$group
        cpus=${!cpus%%[!0-9]*}
    fi
    list=${hosts//,/ }
    nodes=$(wc -w <<<"$list")
    cpus=$((cpus / each))
    # srun takes what is not said here from the batch job: SLURM_NTASKS and its like. So everything is said.
    command=(srun "--job-name=$kind" "--nodes=$nodes" "--ntasks=$((nodes * each))" "--ntasks-per-node=$each" "--nodelist=$hosts"
        "--cpus-per-task=$((cpus > 0 ? cpus : 1))" --overlap --kill-on-bad-exit=1 --input=none)
    [ -z "$group" ] || command+=("--het-group=$group")
    [ "$each" = 1 ] || command+=(--label)
    mapfile -t flags < <(container_of "$environment")
    command+=("${flags[@]}" "$@")
}

start_role() { # KIND: in the background; its pid goes into `step`
    local kind=$1 environment=$1 command
    [ "$kind" = controller ] && environment=trainer
    role_command "$kind" "$(python_of "$environment")" -m launch.lib.task "$attempt" "$kind"
    # srun's own words (which task of which node ended, and how) apart from the tasks' output: they name the culprit.
    "${command[@]:0:1}" "--output=$attempt/$kind-%N.log" "${command[@]:1}" >"$attempt/srun-$kind.txt" 2>&1 &
    step[$kind]=$!
}

in_trainer() { # ARGUMENTS...: Python with these, once, on the first node, in the trainer's environment
    local command
    if [ -n "${GSPO_IMAGE:-}" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        srun_command trainer trainer "${hosts[0]}" 1 "$(python_of trainer)" "$@"
        "${command[@]}"
    else
        # A drawing, on a login node, is made without the image.
        local GSPO_IMAGE=''
        need_python trainer
        "$(python_of trainer)" "$@"
    fi
}

# What must be there before any Python can say what is wrong; runs on the node, so it is text and no file.
# shellcheck disable=SC2016
look='fail() { echo "$SLURMD_NODENAME: $*" >&2; sleep 1; exit 2; } # srun drops what a task says in its last moment
cd "$1" 2>/dev/null || fail "$1 is not there; put the checkout on a file system that all nodes share"
command -v "$2" >/dev/null || fail "$2 is not there; run make setup, or set GSPO_VENV or GSPO_IMAGE in the site file"
[ -w "$3" ] || fail "$3 is not there or not writable; mount it, or give another run.directory"
exec "$2" -m launch.lib.probe "$3" "$4"'

preflight() { # one short step on every node; returns 2 with a sentence for each fault
    local kinds=(trainer) kind python command pids=() pid running failed=0
    # Two environments on one node are both looked at; one is looked at once.
    if [ "${plan[colocated]}" = False ] || [ "$(container_of trainer)" != "$(container_of rollout)" ] ||
        [ "$(python_of trainer)" != "$(python_of rollout)" ]; then
        kinds+=(rollout)
    fi
    export GSPO_PROBES=0
    for kind in "${kinds[@]}"; do GSPO_PROBES=$((GSPO_PROBES + $(tr ',' '\n' <<<"${plan[${kind}_hosts]}" | wc -l))); done
    for kind in "${kinds[@]}"; do
        python=$(python_of "$kind")
        srun_command "$kind" "$kind" "${plan[${kind}_hosts]}" 1 bash -c "$look" look "$home" "$python" "$attempt" "$kind"
        "${command[@]}" >"$attempt/preflight/$kind.txt" 2>&1 &
        pids+=($!)
    done
    while [ ${#pids[@]} -gt 0 ]; do
        sleep 0.2
        running=()
        for pid in "${pids[@]}"; do
            if kill -0 "$pid" 2>/dev/null; then
                running+=("$pid")
            elif ! wait "$pid"; then
                failed=2
            fi
        done
        pids=(${running[@]+"${running[@]}"})
        # The nodes wait for each other; the one that failed has said why.
        [ "$failed" = 0 ] || [ ${#pids[@]} = 0 ] || kill -TERM "${pids[@]}" 2>/dev/null || true
    done
    if [ "$failed" != 0 ]; then
        grep -hvE '^(srun|slurmstepd)' "$attempt"/preflight/*.txt >&2 || cat "$attempt"/preflight/*.txt >&2
        return 2
    fi
    in_trainer -m launch.lib.plan judge "$attempt" || return 2
    [ "$gpus" = 0 ] || reduce_over_network
}

reduce_over_network() { # a small all-reduce over all trainer nodes, one GPU of each
    local command
    srun_command trainer trainer "${plan[trainer_hosts]}" 1 "$(python_of trainer)" tools/check_network.py "$attempt/plan.json"
    "${command[@]}" || { echo "gspo: the trainer nodes cannot all-reduce over their network (see above)" >&2; return 2; }
}
