#!/usr/bin/env bash
# Train on a SLURM cluster, on all nodes and GPUs of the job:
#
#     sbatch job.sh --config yaml_files/sudoku_puma.yaml [key=value ...] [--run-dir DIR]
#     sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 job.sh --config yaml_files/tinygsm_puma.yaml
#     sbatch --array=0-1 job.sh --config yaml_files/sudoku_puma.yaml --config yaml_files/sudoku_baseline.yaml
#     sbatch --array=1-5 job.sh --config yaml_files/sudoku_puma.yaml training.seed=%a
#     bash job.sh [sbatch options --] ...     # the same, after reading site.sh for partition and account
#
# Submit from the checkout. The log is slurm-puma-<job>.log. Before its time limit and on preemption the job saves a
# checkpoint, is requeued and continues in the same run directory, at most MAX_RESTARTS times. It is also requeued if
# training fails after it has written a checkpoint, since a GPU or a node may have failed.
# Task n of an array takes --config number n (from 0, modulo their count); %a in any argument is replaced by n.
# Settings of a cluster go into site.sh (see site.example.sh) or into sbatch options.

#SBATCH --job-name=puma
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#SBATCH --signal=B:USR1@300
# GPUs and CPUs are per node; --gpus-per-node=0 trains on CPUs. The log is in no folder: if the folder did not exist, the
# job would fail without a message. --signal sends USR1 to this script five minutes before the time limit.

set -euo pipefail

die() {
    echo "job.sh: $*" >&2
    exit 2
}

# -- Site ------------------------------------------------------------------------------------------------------------
# SLURM runs a copy of this file in the folder of submission, so paths are relative to that folder, not to $0.
[[ -f train.py ]] || die "no train.py in $PWD: submit from the checkout, or give sbatch --chdir"
site=${SITE:-site.sh}
if [[ -f $site ]]; then
    set +u # scripts of conda and modules use unset variables
    # shellcheck disable=SC1090
    source "$site"
    set -u
elif [[ -n ${SITE:-} ]]; then
    die "SITE=$SITE: no such file"
fi

if [[ -z ${SLURM_JOB_ID:-} ]]; then # on a login node
    options=()
    if [[ " $* " == *" -- "* ]]; then
        while [[ $1 != -- ]]; do
            options+=("$1")
            shift
        done
        shift
    fi
    exec sbatch ${options[@]+"${options[@]}"} job.sh "$@"
fi

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python # made by `make`
fi
type -P "$PYTHON" > /dev/null || die "no program $PYTHON: run make, or set PYTHON or activate an environment in $site"
export PYTHON

# -- What to train ---------------------------------------------------------------------------------------------------
configs=() others=() run_dir=
while (($#)); do
    case $1 in
        --config | --run-dir) (($# > 1)) || die "$1 needs a value" ;;&
        --config) configs+=("$2") && shift 2 ;;
        --config=*) configs+=("${1#*=}") && shift ;;
        --run-dir) run_dir=$2 && shift 2 ;;
        --run-dir=*) run_dir=${1#*=} && shift ;;
        *) others+=("$1") && shift ;;
    esac
done
((${#configs[@]})) || configs=(yaml_files/sudoku_puma.yaml)
job=$SLURM_JOB_ID
if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
    ((${#configs[@]} == 1)) || die "${#configs[@]} configs need an array: sbatch --array=0-$((${#configs[@]} - 1)) job.sh ..."
    config=${configs[0]}
    run_dir=${run_dir:-runs/$(basename "$config" .yaml)}
else
    # The first task's job ID is that of the whole array: SLURM would signal or requeue all tasks.
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    task=$SLURM_ARRAY_TASK_ID count=${#configs[@]}
    [[ "${configs[*]} ${others[*]-}" == *%a* ]] || ((task < count)) || die "array task $task of $count configs would repeat another" \
        "task: number the tasks from 0 to $((count - 1)), or use %a in a setting, as in training.seed=%a"
    config=${configs[task % count]}
    name=$(basename "$config" .yaml)
    [[ $name == *%a* ]] || name+=_%a
    run_dir=${run_dir:-runs/$name}
    [[ $run_dir == *%a* ]] || die "--run-dir $run_dir: each task of an array needs its own; put %a into its name"
    config=${config//%a/$task}
    run_dir=${run_dir//%a/$task}
    others=(${others[@]+"${others[@]//%a/$task}"})
fi

# -- Where to train --------------------------------------------------------------------------------------------------
nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-0}
per_node=$((gpus ? gpus : ${PROCS_PER_NODE:-1})) # one process for each GPU
cpus=$(tr ',' '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | sed -n 1p) # of the node with the fewest
per_process=$((cpus / per_node ? cpus / per_node : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$per_process}
export PYTHONUNBUFFERED=1
((gpus == 0 || per_process >= 4)) || echo "job.sh: warning: $per_process of a node's $cpus cores for each of its $gpus GPUs may" \
    "slow training down; ask for more, as in sbatch --cpus-per-task=$((8 * gpus))" >&2
((gpus == 0)) || export PUMA_GPUS=$gpus # training.device=auto then refuses to train on the CPUs
# The name of the first node in SLURM, which all nodes resolve and can reach; a port that depends on the job ID and is
# below the range of ephemeral ports.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE=$per_node
# The options below describe the step completely. The job's options, which srun would also apply, can contradict them:
# another number of GPUs with --gres, one CPU per process with --cpus-per-gpu.
unset SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK
unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_DISTRIBUTION
step=(--nodes="$nodes" --ntasks=$((nodes * per_node)) --ntasks-per-node="$per_node" --cpus-per-task="$per_process")
step+=(--distribution=block:block) # neighbouring ranks on one socket, as neighbouring GPUs are
step+=(--export=ALL)               # also in a job that was submitted with --export=NONE
step+=(--kill-on-bad-exit=1)
step+=(--wait=0) # the first process draws the curves and the page when the others have ended
((gpus == 0)) || step+=(--gpus-per-node="$gpus" --gpu-bind=none) # each process sees all of its node, for peer access

# -- Train -----------------------------------------------------------------------------------------------------------
restarts=${SLURM_RESTART_COUNT:-0} max_restarts=${MAX_RESTARTS:-50}
((restarts <= max_restarts)) || die "restarted $restarts times, MAX_RESTARTS is $max_restarts: submit again to continue"
echo "job.sh: $(date '+%F %T') job $job, restart $restarts, $nodes x $per_node processes on $SLURM_JOB_NODELIST, $run_dir"

# The step of the newest checkpoint; nothing if there is none.
newest_step() {
    compgen -G "$run_dir/checkpoints/step_[0-9]*" | grep -o 'step_[0-9]*$' | sort | tail -n 1 || true
}

requeue() {
    if ((restarts >= max_restarts)); then
        echo "job.sh: ${1:-stopped}, MAX_RESTARTS=$max_restarts is used up: submit the same command again to continue" >&2
        return 1
    fi
    echo "job.sh: $(date '+%F %T') ${1:-stopped}, requeued"
    scontrol requeue "$job" || {
        echo "job.sh: this cluster does not requeue jobs: submit the same command again to continue" >&2
        return 1
    }
}

# SIGUSR1 is sent repeatedly, since a process that is still starting ignores it. If training does not end (a slow
# disk, a rank that hangs), the job is requeued before the time limit and continues from its last checkpoint.
save_and_stop() {
    [[ -z $stopping ]] || return 0
    stopping=1
    (
        trap '' USR1
        for ((second = 0; second < ${SAVE_SECONDS:-240}; second += 3)); do
            scancel --signal=USR1 "$job" 2> /dev/null || true # to the processes of the step, not to this script
            sleep 3
        done
        requeue
    ) &
    reminder=$!
}

stopping='' ending='' reminder='' newest_before=$(newest_step)
trap save_and_stop USR1
trap 'ending=1' TERM # preempted, requeued or cancelled; the processes get SIGTERM too and save within SLURM's KillWait

# One task per process instead of torchrun: SLURM sends signals to the tasks, not to their child processes.
# shellcheck disable=SC2016
srun "${step[@]}" bash -c '
    trap "" USR1 # until train.py has its handlers
    if [[ $SLURM_NTASKS != 1 ]]; then
        export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    fi
    exec "$PYTHON" train.py "$@" 2>&1 # one stream keeps the lines of the log in order
' train --config "$config" --run-dir "$run_dir" ${others[@]+"${others[@]}"} < /dev/null &
training=$!
while kill -0 $training 2> /dev/null; do
    wait $training || true # a signal ends `wait` too, so its status is not the program's
done
wait $training && status=0 || status=$?
[[ -z $reminder ]] || kill "$reminder" 2> /dev/null || true

if [[ -n $ending ]]; then
    exit 143 # SLURM decides whether to requeue
elif [[ -f $run_dir/final.json ]]; then
    exit "$status"
elif [[ -n $stopping ]] || { ((status == 0)) && [[ -n $(newest_step) ]]; }; then
    # Stopped on request; without a checkpoint it was not training that ended, but --help, say.
    requeue && exit 0
    exit 1
elif ((status == 0)); then
    echo "job.sh: training ended without a checkpoint; not requeued" >&2
    exit 0
elif ((status != 2)) && [[ $(newest_step) > $newest_before ]]; then # 2: refused before the first step
    # A GPU, a node or the file system may have failed. What fails again before the next checkpoint is not tried again.
    requeue "training failed with status $status after a new checkpoint" && exit 0
    exit "$status"
fi
echo "job.sh: training failed with status $status; not requeued" >&2
exit "$status"
