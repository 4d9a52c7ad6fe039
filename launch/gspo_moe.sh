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
# Without the functions (a `cd` that prints), options, CDPATH and POSIX mode that the user's shell exports.
[[ $- == *p* ]] || exec env -u SHELLOPTS -u BASHOPTS -u POSIXLY_CORRECT -u CDPATH "$BASH" -p "${BASH_SOURCE[0]}" "$@"
set -Eeuo pipefail
trap 'echo "gspo: gspo_moe.sh, line $LINENO: \`$BASH_COMMAND\` failed; correct the cause and submit the same command again" >&2' ERR

describe_job() { # waits for a slurmctld that restarts, 15 minutes at most
    local tries
    for tries in {450..0}; do
        scontrol show job "$SLURM_JOB_ID" && return
        [ "$tries" = 0 ] || sleep 2
    done
    return 1
}

find_home() { # the checkout; SLURM runs a copy of this file from its spool directory, where its neighbours are missing
    local record prefix
    home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [ ! -f "$home/launch/lib/site.sh" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        prefix=$SLURM_SUBMIT_DIR
        if command -v scontrol >/dev/null; then
            record=$(describe_job)
            # At the start of a line: a job's name may hold these words too.
            prefix=${record##*$'\n   Command='}
            prefix=${prefix%%/launch/gspo_moe.sh*}
        fi # the site file may still say where SLURM's commands are
        home=$SLURM_SUBMIT_DIR
        [ -f "$prefix/launch/lib/site.sh" ] && home=$prefix
    fi
    if [ ! -f "$home/launch/lib/site.sh" ]; then
        echo "gspo: $home/launch/lib is not there; submit from the checkout, and from a file system that the nodes share" >&2
        exit 2
    fi
}

find_home
exec "$BASH" "$home/launch/lib/site.sh" "$home" "$home/launch/lib/start.sh" job "$home" "$PWD" "$@"
