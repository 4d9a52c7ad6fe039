#!/usr/bin/env bash
# A run of a recipe on this machine, all roles of it: launch/local.sh [RECIPE] [key=value ...]; `make train` calls it.
# The roles, their order and their commands are those of a job (gspo_megatron/cluster/hosts.py).
# Without what the user's shell exports: see gspo_moe.sh.
[[ $- == *p* ]] || exec env -u SHELLOPTS -u BASHOPTS -u POSIXLY_CORRECT -u CDPATH "$BASH" -p "${BASH_SOURCE[0]}" "$@"
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "$BASH" "$home/launch/lib/site.sh" "$home" "$home/launch/lib/start.sh" local "$home" "$PWD" "$@"
