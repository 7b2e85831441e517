# Settings of job.sh for a cluster. Copy to site.sh (ignored by git) and keep the lines that apply.
# job.sh reads it inside the job; `bash job.sh` reads it before submission too.

# Options of sbatch, as SBATCH_* variables (see its manual). Options on the command line take precedence. Plain
# `sbatch job.sh` uses these variables only if this file was sourced before.
export SBATCH_PARTITION=gpu
export SBATCH_ACCOUNT=my_project
export SBATCH_TIMELIMIT=12:00:00

# The environment with PyTorch: modules or conda; not needed if `make` has made .venv in the checkout.
module load cuda
source "$(conda info --base)/etc/profile.d/conda.sh" # `conda activate` needs this
conda activate puma
PYTHON=python

# The network interface between nodes, if the libraries choose a wrong one. gloo is used for messages between CPUs.
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0

# How often a job is requeued, and how many seconds it may take to save after SIGUSR1: fewer than --signal gives (300).
MAX_RESTARTS=50
SAVE_SECONDS=240

# Processes per node for training on CPUs with --gpus-per-node=0; with GPUs it is one process per GPU.
# PROCS_PER_NODE=4
