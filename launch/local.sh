#!/usr/bin/env bash
# A run of a recipe on this machine, all roles of it: launch/local.sh [RECIPE] [key=value ...]; `make train` calls it.
# The roles, their order and their commands are those of a job (gspo_megatron/cluster/hosts.py).
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/lib/site.sh
. "$home/launch/lib/site.sh"
load_site
# Images are srun's business; in one that was entered by hand, GSPO_VENV names the environment in it.
GSPO_IMAGE='' GSPO_ROLLOUT_IMAGE=''
set_environment
[ $# -gt 0 ] || set -- "$home/recipes/tiny_moe.yaml"
[ ! -f "$1" ] || set -- "$(realpath -s "$1")" "${@:2}"
# Relative paths of the recipe keys are the caller's, those of the site file the checkout's.
for name in GSPO_VENV GSPO_ROLLOUT_VENV; do
    case ${!name} in /*) ;; *) printf -v "$name" %s "$home/${!name}" ;; esac
done
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
for venv in "$GSPO_VENV" "$GSPO_ROLLOUT_VENV"; do need_python "$venv/bin/python"; done
GSPO_ROLLOUT_PYTHON=$GSPO_ROLLOUT_VENV/bin/python exec "$GSPO_VENV/bin/python" -m gspo_megatron.cli train "$@"
