"""job.sh by itself: what it makes of its arguments and of SLURM's variables. SLURM's programs are stand-ins here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

SCRIPT = ROOT / "job.sh"

# Each stand-in writes down how it was called. srun also shows the environment of its processes, and may train.
STAND_INS = {
    "sbatch": 'printf "%s\\n" "$@" > sbatch.txt; echo "$SBATCH_PARTITION" > partition.txt',
    "scontrol": 'if [[ $1 == show ]]; then printf "n1\\nn2\\n"; else printf "%s " "$@" >> scontrol.txt; fi',
    "scancel": 'printf "%s " "$@" >> scancel.txt',
    "srun": 'printf "%s\\n" "$@" > srun.txt; env > environment.txt; eval "${TRAINING:-:}"',
    "python": ":",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the checkout, with the stand-ins in `bin`."""
    (tmp_path / "train.py").touch()
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    shutil.copy(SCRIPT, tmp_path / "spool_copy")  # SLURM runs a copy
    return tmp_path


def run_job(
    checkout: Path, *arguments: str, in_job: bool = True, **variables: object
) -> subprocess.CompletedProcess[str]:
    """Run the script as the batch script of a job of two nodes."""
    job = {
        "SLURM_JOB_ID": 41234,
        "SLURM_JOB_NUM_NODES": 2,
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_CPUS_PER_NODE": "16(x2)",
    }
    clean = {name: value for name, value in os.environ.items() if not re.match("SLURM|SBATCH|OMP_|PYTHON|SITE", name)}
    clean["PATH"] = f"{checkout / 'bin'}:{clean['PATH']}"
    settings = (job if in_job else {}) | variables
    return subprocess.run(
        ["bash", "spool_copy", *arguments],
        cwd=checkout,
        env=clean | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )


def trained(checkout: Path) -> list[str]:
    """The arguments that training was started with."""
    words = (checkout / "srun.txt").read_text().splitlines()
    return words[words.index("train") + 1 :]


def step(checkout: Path) -> dict[str, str]:
    """The options that srun was started with."""
    words = (checkout / "srun.txt").read_text().splitlines()
    return dict(word[2:].split("=") for word in words[: words.index("bash")])


def processes(checkout: Path) -> dict[str, str]:
    """The environment that the processes of training get."""
    lines = (checkout / "environment.txt").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_it_is_valid_and_clean_bash():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    assert os.access(SCRIPT, os.X_OK)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run(["shellcheck", "--exclude=SC2317", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_default_is_the_sudoku_run(checkout):
    result = run_job(checkout)
    assert trained(checkout) == ["--config", "yaml_files/sudoku_puma.yaml", "--run-dir", "runs/sudoku_puma"]
    assert (ROOT / "yaml_files" / "sudoku_puma.yaml").exists()
    assert result.returncode == 0, result.stderr


def test_arguments_reach_training_unchanged(checkout):
    arguments = ["data.train_file=a folder/b.csv", "objective.k_schedule=[[2, 0], [3, 5]]", "wandb.name=$x *"]
    run_job(checkout, "--config=my.yaml", *arguments, "--run-dir=my runs/1")
    assert trained(checkout) == ["--config", "my.yaml", "--run-dir", "my runs/1", *arguments]


def test_one_process_for_each_gpu_shares_the_cpus_of_the_smallest_node(checkout):
    on_cpus: dict[str, Any] = {"PROCS_PER_NODE": 2}  # in site.sh
    run_job(checkout, SLURM_GPUS_ON_NODE=4, SLURM_GPUS_PER_NODE=1, SLURM_JOB_CPUS_PER_NODE="32(x3),16", **on_cpus)
    assert step(checkout) == {
        "nodes": "2",
        "ntasks": "8",
        "ntasks-per-node": "4",
        "cpus-per-task": "4",
        "gpus-per-node": "4",
        "gpu-bind": "none",
        "distribution": "block:block",
        "export": "ALL",
        "kill-on-bad-exit": "1",
        "wait": "0",
    }
    environment = processes(checkout)
    assert environment["OMP_NUM_THREADS"] == "4"
    assert environment["MASTER_ADDR"] == "n1"
    assert environment["MASTER_PORT"] == "11234"
    assert environment["LOCAL_WORLD_SIZE"] == "4"
    assert "SLURM_GPUS_PER_NODE" not in environment, "srun would ask for one GPU of four"
    assert environment["PUMA_GPUS"] == "4", "without this, training would go on without a GPU that torch cannot use"


def test_a_node_without_gpus_trains_on_its_cpus(checkout):
    run_job(checkout, PROCS_PER_NODE=3)
    assert step(checkout)["ntasks-per-node"] == "3"
    assert step(checkout)["cpus-per-task"] == "5"
    assert "gpus-per-node" not in step(checkout)
    assert "PUMA_GPUS" not in processes(checkout)
    run_job(checkout, SLURM_GPUS_ON_NODE=0, SLURM_JOB_CPUS_PER_NODE="2", PROCS_PER_NODE=4, OMP_NUM_THREADS=7)
    assert step(checkout)["cpus-per-task"] == "1"
    assert processes(checkout)["OMP_NUM_THREADS"] == "7", "what the site sets is kept"


@pytest.mark.parametrize(("task", "config"), [(0, "a.yaml"), (1, "b.yaml")])
def test_an_array_takes_the_config_of_its_number(task, config, checkout):
    array: dict[str, Any] = {"SLURM_ARRAY_JOB_ID": 41234, "SLURM_ARRAY_TASK_ID": task}
    result = run_job(checkout, "--config", "x/a.yaml", "--config", "x/b.yaml", "training.seed=3", **array)
    run_dir = f"runs/{config[0]}_{task}"
    assert trained(checkout) == ["--config", f"x/{config}", "--run-dir", run_dir, "training.seed=3"]
    assert f"job 41234_{task}," in result.stdout


def test_an_array_puts_its_number_for_percent_a(checkout):
    array: dict[str, Any] = {"SLURM_ARRAY_JOB_ID": 41230, "SLURM_ARRAY_TASK_ID": 12}
    run_job(checkout, "--config", "a.yaml", "training.seed=%a", "wandb.name=seed %a of %a", **array)
    expected = ["--config", "a.yaml", "--run-dir", "runs/a_12", "training.seed=12", "wandb.name=seed 12 of 12"]
    assert trained(checkout) == expected
    run_job(checkout, "--config", "a.yaml", "training.seed=%a", "--run-dir", "runs/%a/a", **array)
    assert trained(checkout)[3] == "runs/12/a"
    run_job(checkout, "--config", "exp_%a.yaml", **array)
    assert trained(checkout) == ["--config", "exp_12.yaml", "--run-dir", "runs/exp_12"]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--config"], {}, "--config needs a value"),
        (["--config", "a", "--config", "b"], {}, "--array=0-1"),
        (["--config", "a", "--config", "b"], {"SLURM_ARRAY_TASK_ID": 2}, "from 0 to 1"),
        (["--config", "a"], {"SLURM_ARRAY_TASK_ID": 1}, "%a"),
        (["--config", "a", "training.seed=%a", "--run-dir", "r"], {"SLURM_ARRAY_TASK_ID": 1}, "put %a into its name"),
        ([], {"SITE": "nowhere.sh"}, "nowhere.sh: no such file"),
        ([], {"PYTHON": "no_such_python"}, "no_such_python"),
        ([], {"SLURM_RESTART_COUNT": 4, "MAX_RESTARTS": 3}, "MAX_RESTARTS is 3"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(arguments, variables, message, checkout):
    result = run_job(checkout, *arguments, **({"SLURM_ARRAY_JOB_ID": 7} | variables))
    assert result.returncode == 2
    assert message in result.stderr
    assert not (checkout / "srun.txt").exists()


def test_it_must_be_submitted_from_the_checkout(checkout):
    (checkout / "train.py").unlink()
    result = run_job(checkout)
    assert result.returncode == 2
    assert f"no train.py in {checkout}" in result.stderr


def test_python_comes_from_the_site_or_the_checkout_or_the_path(checkout):
    run_job(checkout)
    assert processes(checkout)["PYTHON"] == "python"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout / "bin" / "python", checkout / ".venv" / "bin" / "python")
    run_job(checkout)
    assert processes(checkout)["PYTHON"] == ".venv/bin/python"
    (checkout / "site.sh").write_text("PYTHON=bin/python\nexport NCCL_SOCKET_IFNAME=ib0\necho $not_set\n")
    result = run_job(checkout)
    assert result.returncode == 0, result.stderr
    assert processes(checkout)["PYTHON"] == "bin/python"
    assert processes(checkout)["NCCL_SOCKET_IFNAME"] == "ib0"


def test_outside_a_job_it_submits_itself_with_the_site_in_its_environment(checkout):
    (checkout / "site.sh").write_text("export SBATCH_PARTITION=gpu\n")
    result = run_job(checkout, "--nodes=2", "--qos=a b", "--", "--config", "a.yaml", in_job=False)
    assert result.returncode == 0, result.stderr
    expected = ["--nodes=2", "--qos=a b", "job.sh", "--config", "a.yaml"]
    assert (checkout / "sbatch.txt").read_text().splitlines() == expected
    assert (checkout / "partition.txt").read_text() == "gpu\n"
    run_job(checkout, "--config", "a.yaml", in_job=False)
    assert (checkout / "sbatch.txt").read_text().splitlines() == ["job.sh", "--config", "a.yaml"]


WARNED = "kill -USR1 $PPID; until [[ -s scancel.txt ]]; do sleep 0.05; done"  # training lives until it is told
SAVED = "mkdir -p runs/sudoku_puma/checkpoints/step_00000005"
DONE = "mkdir -p runs/sudoku_puma; touch runs/sudoku_puma/final.json"


@pytest.mark.parametrize(
    ("training", "status", "requeued"),
    [
        (DONE, 0, False),
        ("exit 2", 2, False),  # bad settings
        (f"{SAVED}; exit 134", 0, True),  # NCCL has lost a process
        (f"{SAVED}; exit 2", 2, False),  # another job trains this run, and has written the checkpoint
        (f"mkdir -p {SAVED[9:]}.damaged; exit 1", 1, False),
        (f"{SAVED}; exit 0", 0, True),  # on SIGUSR1 that only the processes got
        ("exit 0", 0, False),  # --help
        (WARNED, 0, True),
        (f"{WARNED}; exit 9", 0, True),  # not in time, but another start may get further
        (f"{WARNED}; {DONE}", 0, False),  # finished in spite of it
        ("kill -TERM $PPID", 143, False),  # cancelled: SLURM knows whether it comes back
    ],
)
def test_a_job_comes_back_only_if_it_was_stopped_or_may_get_further(training, status, requeued, checkout):
    result = run_job(checkout, TRAINING=training)
    assert result.returncode == status, result.stderr
    assert (checkout / "scontrol.txt").exists() == requeued
    if requeued:
        assert (checkout / "scontrol.txt").read_text() == "requeue 41234 "
    if "USR1" in training:
        assert (checkout / "scancel.txt").read_text().startswith("--signal=USR1 41234 ")


def test_a_failure_without_a_new_checkpoint_is_not_tried_again(checkout):
    earlier = checkout / "runs" / "sudoku_puma" / "checkpoints" / "step_00000005"
    earlier.mkdir(parents=True)
    result = run_job(checkout, TRAINING=f"{SAVED}; exit 1")
    assert result.returncode == 1
    assert "status 1; not requeued" in result.stderr
    assert not (checkout / "scontrol.txt").exists()
    result = run_job(checkout, TRAINING=f"mkdir {earlier.with_name('step_00000010')}; exit 1")
    assert result.returncode == 0
    assert "training failed with status 1 after a new checkpoint, requeued" in result.stdout


def test_few_cores_for_each_gpu_give_a_warning(checkout):
    result = run_job(checkout, SLURM_GPUS_ON_NODE=8, SLURM_JOB_CPUS_PER_NODE="8(x2)")
    assert "1 of a node's 8 cores for each of its 8 GPUs" in result.stderr
    assert "--cpus-per-task=64" in result.stderr
    assert "cores" not in run_job(checkout, SLURM_GPUS_ON_NODE=4).stderr


def test_the_last_restart_does_not_requeue(checkout):
    result = run_job(checkout, TRAINING=f"{SAVED}; exit 0", SLURM_RESTART_COUNT=3, MAX_RESTARTS=3)
    assert result.returncode == 1
    assert "submit the same command again" in result.stderr
    assert not (checkout / "scontrol.txt").exists()


def test_training_that_does_not_heed_the_warning_is_requeued_before_its_time_is_up(checkout):
    deaf = "kill -USR1 $PPID; until [[ -s scontrol.txt ]]; do sleep 0.05; done; kill -TERM $PPID"
    result = run_job(checkout, TRAINING=deaf, SAVE_SECONDS=6)
    assert (checkout / "scontrol.txt").read_text() == "requeue 41234 "
    assert (checkout / "scancel.txt").read_text() == "--signal=USR1 41234 " * 2, "sent again: it may come too early"
    assert result.returncode == 143


def test_requeueing_an_array_task_names_the_task(checkout):
    """The number of an array's first job is the array's own."""
    array: dict[str, Any] = {"SLURM_ARRAY_JOB_ID": 41234, "SLURM_ARRAY_TASK_ID": 5}
    run_job(checkout, "training.seed=%a", TRAINING=WARNED, **array)
    assert (checkout / "scontrol.txt").read_text() == "requeue 41234_5 "
    assert (checkout / "scancel.txt").read_text().startswith("--signal=USR1 41234_5 ")


def test_the_header_has_what_a_restart_needs():
    header = [line.split(None, 1)[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@300"} <= set(header)
    output = next(word for word in header if word.startswith("--output="))
    assert "/" not in output, "a folder that is missing ends the job without a word"
    assert "%j" in output


def test_the_example_of_a_site_file_is_valid_bash():
    example = ROOT / "site.example.sh"
    assert subprocess.run(["bash", "-n", example]).returncode == 0
    script = SCRIPT.read_text()
    names = re.findall(r"^(?:# |export )*([A-Z_]+)=", example.read_text(), re.MULTILINE)
    assert {"PYTHON", "MAX_RESTARTS", "SAVE_SECONDS", "PROCS_PER_NODE"} <= set(names)
    for name in names:
        assert name in script or name.startswith(("SBATCH_", "NCCL_", "GLOO_")), f"nothing reads {name}"
