# Settings of a site. Copy to launch/site.sh (git ignores it) and keep the lines that apply; README.md explains each.
# It is sourced by every job, and may be sourced before sbatch too, for the first three lines. ${NAME:-value} keeps a value
# that was set outside, so that one job can differ: GSPO_INTERFACE=eth1 sbatch launch/gspo_moe.sh

# What sbatch reads from the environment. It does so before the job exists: `. launch/site.sh` in the shell you submit from.
#export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-project}
#export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}
#export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-24:00:00}

# Modules that the programs below need. `module` is a shell function, which a batch job may not have: define it first. A
# command that is missing ends the job with a sentence; another one that fails is a warning (`|| true` = meant so).
#type module >/dev/null 2>&1 || . /etc/profile.d/modules.sh    # Lmod: /etc/profile.d/lmod.sh
#module load cuda

# Either virtual environments: one for all roles (made by `make setup`), or another one for the vLLM servers.
#GSPO_VENV=${GSPO_VENV:-.venv}
#GSPO_ROLLOUT_VENV=${GSPO_ROLLOUT_VENV:-/shared/vllm-venv}

# Or container images, through pyxis (srun --container-image). The checkout is mounted by itself; name what else is needed:
# the model, and the run directory when it lies outside the checkout.
#GSPO_IMAGE=${GSPO_IMAGE:-/shared/images/gspo.sqsh}
#GSPO_ROLLOUT_IMAGE=${GSPO_ROLLOUT_IMAGE:-/shared/images/vllm.sqsh}
#GSPO_MOUNTS=${GSPO_MOUNTS:-/shared/models:/shared/models:ro,/shared/runs}

# The network interface over which the nodes reach each other (`ip -br addr`), where a node's own name does not name it.
#GSPO_INTERFACE=${GSPO_INTERFACE:-eth0}

# More options of every srun: they override ours (launch/SITES.md). GPUs of a node where SLURM does not count them.
#GSPO_SRUN_ARGS=${GSPO_SRUN_ARGS:---mpi=pmix}
#GSPO_GPUS_PER_NODE=${GSPO_GPUS_PER_NODE:-8}

# A directory on each node's own disk, for compile caches. The default is what SLURM or /tmp gives.
#export TMPDIR=/local/$USER

# How a run is brought back: crashes after which it starts again by itself, and seconds for a checkpoint before the limit.
#GSPO_MAX_RESTARTS=${GSPO_MAX_RESTARTS:-3}
#GSPO_GRACE=${GSPO_GRACE:-240}
