#!/usr/bin/env bash
# A run of a recipe on this machine, all roles of it: launch/local.sh [RECIPE] [key=value ...]
# The roles, their order and their commands are those of a job (gspo_megatron/plan/hosts.py).
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/lib/site.sh
. "$home/launch/lib/site.sh"
load_site
set_environment
cd "$home"
exec "$(python_of trainer)" -m gspo_megatron.cli train "${@:-recipes/tiny_moe.yaml}"
