# What job.sh needs to know about this cluster. Copy to site.sh (git ignores it) and keep the lines that apply.
# It is read inside the job, and by `bash job.sh` before submission.

# Options of sbatch. Plain `sbatch job.sh` sees them only if this file was sourced first; what stands on its command
# line wins. Any SBATCH_* variable of sbatch's manual does.
export SBATCH_PARTITION=gpu
export SBATCH_ACCOUNT=my_project
export SBATCH_TIMELIMIT=12:00:00

# The environment with PyTorch: modules, conda, or nothing where `make` has made .venv in the checkout.
module load cuda
source "$(conda info --base)/etc/profile.d/conda.sh" # conda activate works only after its hook
conda activate puma
PYTHON=python

# The network between nodes, only if the libraries choose the wrong one. gloo carries what the CPUs exchange.
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0

# How often a job may come back, and how long it may take to save after its warning: less than the seconds that
# --signal grants (300), or that a preempted job is left.
MAX_RESTARTS=50
SAVE_SECONDS=240

# Processes per node where GPUs do not say it, for training on CPUs with --gpus-per-node=0.
# PROCS_PER_NODE=4
