#!/usr/bin/env bash
# A run of a recipe on this machine, all roles of it: launch/local.sh [RECIPE] [key=value ...]; `make train` calls it.
# The roles, their order and their commands are those of a job (gspo_megatron/cluster/hosts.py).
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "$BASH" "$home/launch/lib/site.sh" "$home" "$home/launch/lib/start.sh" local "$home" "$PWD" "$@"
