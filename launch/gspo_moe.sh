#!/usr/bin/env bash
# A run of a recipe over the nodes of one SLURM job: trainer ranks on the first nodes, vLLM servers on the last ones
# (placement.rollout_nodes; 0 = on the same), the controller on the first.
#
#   sbatch --nodes=16 launch/gspo_moe.sh recipes/NAME.yaml trainer.max_steps=200     a job
#   launch/gspo_moe.sh --dry-run --nodes=16 recipes/NAME.yaml                        what it would start, and where
#   launch/gspo_moe.sh recipes/NAME.yaml                                             without SLURM: on this machine
#
# sbatch options override the lines below. What else a site needs goes into launch/site.sh (launch/site.example.sh).
#SBATCH --job-name=gspo
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

FLAGSHIP=recipes/qwen3_30b_a3b_gspo_100k.yaml

find_home() { # the checkout; SLURM runs a copy of this file from its spool directory, where its neighbours are missing
    local record prefix
    home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [ ! -f "$home/launch/lib/site.sh" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        record=$(scontrol show job -o "${SLURM_JOB_ID}")
        prefix=${record#* Command=}
        prefix=${prefix%%/launch/gspo_moe.sh*}
        home=$SLURM_SUBMIT_DIR
        [ -f "$prefix/launch/lib/site.sh" ] && home=$prefix
    fi
    if [ ! -f "$home/launch/lib/site.sh" ]; then
        echo "gspo: $home/launch/lib is not there; submit from the checkout, and from a file system that the nodes share" >&2
        exit 2
    fi
}

default_of() { # OPTION -> what sbatch takes from the lines above
    sed -n "s/^#SBATCH --$1=//p" "$home/launch/gspo_moe.sh"
}

read_arguments() {
    dry_run='' wanted_nodes=$(default_of nodes) wanted_gpus=$(default_of gpus-per-node) recipe='' overrides=()
    while [ $# -gt 0 ]; do
        case $1 in
        --dry-run) dry_run=yes ;;
        --nodes=*) wanted_nodes=${1#*=} ;;
        --gpus-per-node=*) wanted_gpus=${1#*=} ;;
        --help | -h) sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$home/launch/gspo_moe.sh" && exit 0 ;;
        -*) refuse "unknown option $1; sbatch's own options go before the script, recipe keys are written key=value" ;;
        *=*) overrides+=("$1") ;;
        *) [ -z "$recipe" ] || refuse "two recipes, $recipe and $1; give one, and overrides as key=value"
            recipe=$1 ;;
        esac
        shift
    done
    recipe=${recipe:-$FLAGSHIP}
    [[ $recipe = /* || ! -f $PWD/$recipe || $PWD = "$home" ]] || recipe=$PWD/$recipe
}

find_hosts() { # names of the nodes, trainers first; a het job's second component holds the servers
    gpus=${SLURM_GPUS_ON_NODE:-0}
    if [ -n "${SLURM_HET_SIZE:-}" ]; then
        local servers
        mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0")
        mapfile -t servers < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")
        hosts+=("${servers[@]}")
        overrides+=("placement.rollout_nodes=${#servers[@]}")
    elif [ -n "${SLURM_JOB_ID:-}" ]; then
        mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    else
        gpus=$wanted_gpus
        mapfile -t hosts < <(seq -f "node%0${#wanted_nodes}g" "$wanted_nodes")
    fi
}

read_plan() { # PHASE: fills the table `plan` with what launch/lib/plan.py answers; its words go to the log
    local key value said names
    names=$(IFS=,; echo "${hosts[*]}")
    said=$(in_trainer -m launch.lib.plan "$1" --job "${SLURM_JOB_ID:-JOB}" --hosts "$names" \
        --gpus "$gpus" --running "$running" "$recipe" ${overrides[@]+"${overrides[@]}"}) || exit 2
    while IFS='=' read -r key value; do plan[$key]=$value; done <<<"$said"
    run_dir=${plan[run_dir]} gpus=${plan[gpus]}
}

draw_commands() {
    local kind
    attempt=$run_dir/logs/attempt_1
    for kind in rollout controller trainer; do
        role_command "$kind" "$(python_of "$kind")" -m launch.lib.task "$attempt" "$kind"
        echo "${command[*]}"
    done
}

say_how() { # one line each: follow, attach, cancel, resume
    local sized="--nodes=${#hosts[@]}" where=''
    [ "${SLURM_GPUS_ON_NODE:-0}" = 8 ] || sized+=" --gpus-per-node=${SLURM_GPUS_ON_NODE:-0}"
    [[ " ${overrides[*]-} " == *" run.directory="* ]] || where=run.directory=$run_dir
    resume="sbatch $sized launch/gspo_moe.sh $(printf '%q ' "$recipe" ${overrides[@]+"${overrides[@]}"} $where)"
    [ -z "${SLURM_HET_SIZE:-}" ] || resume="the same two components again, with run.directory=$run_dir"
    echo "follow      tail -F $([[ $attempt = /* ]] || echo "$home/")$attempt/trainer-${hosts[0]}.log"
    echo "attach      srun --jobid=$SLURM_JOB_ID --overlap --pty --nodelist=${hosts[0]} bash"
    echo "cancel      scancel $SLURM_JOB_ID; with a checkpoint first: scancel --batch --signal=USR1 $SLURM_JOB_ID"
    echo "resume      $resume"
}

main() {
    declare -A plan=() step=()
    local running='' attempt run_dir started_from first code asked='' resume
    find_hosts
    cd "$home"
    if [ -n "$dry_run" ]; then
        read_plan draw
        draw_commands
        exit 0
    fi
    echo "gspo: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $(hostname -s), $(date -u +%FT%TZ)"
    running=$(squeue --noheader --states=R,CG --format=%A --user="$(id -un)" | tr '\n' ' ')
    read_plan open
    if [ "${plan[done]:-}" = yes ]; then
        echo "gspo: $run_dir holds a finished run (DONE); for another, give another run.directory"
        exit 0
    fi
    attempt=${plan[attempt]}
    say_how
    # The whole script is one attempt: what it started is gone when it ends, and so is the key.
    trap 'rm -f "$attempt/key"' EXIT
    trap on_usr1 USR1
    trap on_term TERM
    preflight || exit 2
    (umask 077 && od -An -tx1 -N16 /dev/urandom | tr -d ' \n' >"$attempt/key")
    started_from=$(newest_checkpoint)
    [ "$started_from" = 0 ] || echo "gspo: goes on after step $started_from"
    local kind
    for kind in rollout controller trainer; do start_role "$kind"; done
    watch_roles
    settle
}

find_home
# shellcheck source=launch/lib/site.sh
. "$home/launch/lib/site.sh"
. "$home/launch/lib/steps.sh"
. "$home/launch/lib/watch.sh"
read_arguments "$@"
load_site
set_environment
if [ -z "${SLURM_JOB_ID:-}" ] && [ -z "$dry_run" ]; then
    exec "$home/launch/local.sh" "$recipe" ${overrides[@]+"${overrides[@]}"}
fi
main
