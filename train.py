"""Train a model: read one YAML file, build the run, train, evaluate.

    python train.py --config yaml_files/sudoku_puma.yaml [key=value ...] [--run-dir DIR]
    torchrun --nproc-per-node=8 train.py --config yaml_files/sudoku_puma.yaml

The run directory identifies the run: the same command again continues from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from signal import SIGINT, Signals
from typing import NoReturn

if __name__ == "__main__":
    from runtime import signals

    signals.listen()  # before torch is imported, which takes seconds
    # Idle threads spin for some microseconds, then sleep. Spinning longer makes steps many times slower on a CPU shared
    # with other programs; sleeping at once makes the mini Sudoku model 1.5 times slower on two idle cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from tqdm import tqdm

from config import Config
from data.dataset import DataSet
from data.files import WriteError, write_text
from eval.evaluate import Evaluation, as_json, check_n_examples, evaluate
from model.hub import check_init_from
from report.curves import AXES, draw_curves
from runtime.checkpoint import latest_checkpoint
from runtime.command import shell_command
from runtime.config_file import changed_settings, dump_config, flatten, read_config
from runtime.distributed import from_main, main_first, start_world, stop_world
from runtime.lock import lock_run
from runtime.metrics import METRICS_FILE, Recorder
from runtime.signals import StopVote
from training.run import (
    Run,
    build_run,
    interval_metrics,
    progress_metrics,
    restore_run,
    save_run,
    start_interval,
    start_message,
)
from training.update import TrainingDiverged, Updater, check_finite, check_graph

FINAL_FILE = "final.json"


def start(config: Config, run_dir: Path) -> tuple[Run, DataSet]:
    """Load the data and build the run; restore its newest checkpoint if there is one.

    Raises:
        ValueError: bad data, settings that do not fit the machine or the checkpoint, or the run is in use.
        OSError: the run directory is not writable.
    """
    world = start_world(config.training.device)
    ignored = check_graph(config, world)
    run_dir.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        lock_run(run_dir)
    checkpoint = from_main(latest_checkpoint(run_dir) if world.is_main else None)
    if config.model.init_from is not None and checkpoint is None:
        check_init_from(config.model.init_from)  # before work on the data
    if world.is_main:
        print(f"data: {config.data.describe()}", flush=True)
    data = main_first(world, lambda: config.open_data().load(train=True))
    for key in ("n_examples", "n_final_examples"):
        if not config.validation.is_default(key):  # the default is for large tests
            check_n_examples(getattr(config.validation, key), data, f"validation.{key}")
    run = build_run(config, world, run_dir, data.train, resuming=checkpoint is not None)
    if checkpoint is not None:
        restore_run(run, checkpoint)
    if world.is_main:
        write_text(run_dir / "config.yaml", dump_config(config))
        for warning in (*([ignored] if ignored else []), *data.warnings()):
            warnings.warn(warning, stacklevel=2)
        print(start_message(run), flush=True)
    return run, data


def train(run: Run, data: DataSet, recorder: Recorder | None, vote: StopVote) -> Evaluation | Signals:
    """Train from the current step of `run` to its end; record, evaluate and save when each is due.

    Args:
        recorder: None on all ranks but the main one.

    Returns:
        The last evaluation, or the signal that stopped the run before its end; the run is saved then.

    Raises:
        TrainingDiverged: the loss or the gradient is not finite; the run is not saved then.
    """
    training, validation = run.config.training, run.config.validation
    n_final = validation.n_final_examples or validation.n_examples
    updater = Updater(run)
    evaluation: Evaluation | None = None
    saved_step, status = run.step, "loss ?"
    with tqdm(total=run.n_steps, initial=run.step, unit="step", disable=recorder is None) as bar:
        started = time.perf_counter()
        while run.step < run.n_steps:
            if stopped := vote.stop():
                check_finite(run)
                run.seconds += time.perf_counter() - started
                if run.step > saved_step:
                    save_run(run, None)
                return stopped

            updater.step()
            bar.update()
            last = run.step == run.n_steps
            log = last or run.step % training.log_every == 0
            measure = last or run.step % training.eval_every == 0
            save = last or run.step % training.save_every == 0
            if not (log or measure or save):
                continue

            check_finite(run)  # a host sync, so the time below includes all work on the device
            run.seconds += time.perf_counter() - started
            metrics = progress_metrics(run)
            if log:
                metrics |= interval_metrics(run)
                start_interval(run)
                status = f"loss {metrics['train/loss']:.4f}, lr {metrics['train/learning_rate']:.1e}"
            if measure:
                n_examples = n_final if last else validation.n_examples
                evaluation = evaluate(run.evaluated_model(), run.config, data, run.world, n_examples)
                metrics |= evaluation.metrics()
            if recorder and (log or measure):
                recorder.write(metrics)
            if recorder and measure and evaluation:
                bar.write(f"step {run.step}: {evaluation.table().splitlines()[1]}")
                if evaluation.samples:
                    recorder.table("samples", evaluation.samples, run.step)
            bar.set_postfix_str(status + (f", solved {100 * evaluation.accuracy:.1f}%" if evaluation else ""))
            if save:
                save_run(run, evaluation.accuracy if measure and evaluation else None)
                saved_step = run.step
            started = time.perf_counter()
    return evaluation or evaluate(run.evaluated_model(), run.config, data, run.world, n_final)


def finish(run: Run, data: DataSet, evaluation: Evaluation, recorder: Recorder) -> None:
    """Write final.json, which marks the run as complete, and plot the curves."""
    headline = evaluation.samplers[0]
    final = {
        "accuracy": headline.accuracy,
        "n": headline.n,
        "nfe": headline.nfe,
        "train_seconds": round(run.seconds, 3),
        "steps": run.step,
        "evaluation": as_json(evaluation),
        "example": data.example(),
    }
    write_text(run.run_dir / FINAL_FILE, json.dumps(final, indent=1) + "\n")
    for axis in AXES:
        picture = run.run_dir / f"curves_{axis}.png"
        try:
            draw_curves([run.run_dir], axis, picture)
        except OSError as error:
            warnings.warn(f"{picture} cannot be written ({error.strerror})", RuntimeWarning, stacklevel=2)
        recorder.picture(f"curves/{axis}", picture)


def stop_early(run: Run, stopped: Signals, recorder: Recorder | None) -> None:
    """Report the step at which the run was saved. Only Ctrl-C exits with a status that stops a calling script too."""
    if recorder is not None:
        print(f"stopped by {stopped.name} at step {run.step:,}; the same command continues from there", flush=True)
        recorder.close()
    if stopped == SIGINT:
        sys.exit(130)


def print_result(config: Config, run_dir: Path) -> None:
    """Print the accuracy of a complete run, what it has written, and a command that samples from it."""
    data = config.open_data()
    final = json.loads((run_dir / FINAL_FILE).read_text(encoding="utf-8"))
    print(f"solved {100 * final['accuracy']:.1f}% of {final['n']} unseen {data.questions}")
    if "example" in final:  # not in older runs
        question = (f"--{data.question_option}", final["example"])
        command = shell_command("sampling.py", "--checkpoint", run_dir, *question)
        print(f"wrote {run_dir} ({FINAL_FILE}, {METRICS_FILE}, curves_*.png, checkpoints/), next: {command}")


def check_unchanged(config: Config, run_dir: Path, options: argparse.Namespace) -> None:
    """Refuse to continue a run with settings that change its result (ValueError with the differences)."""
    if not (run_dir / "config.yaml").exists() or not any((run_dir / "checkpoints").glob("step_*")):
        return
    before = read_config(run_dir / "config.yaml")
    differences = changed_settings(before, config)
    if not differences:
        return
    listed = "\n".join(f"  {line}" for line in differences)
    length_only = all(line.startswith(("training.max_steps", "training.num_epochs")) for line in differences)
    lengths = [(getattr(before.training, key), getattr(config.training, key)) for key in ("max_steps", "num_epochs")]
    longer = all(old == new or (old is not None and new is not None and new > old) for old, new in lengths)
    if length_only and longer and (run_dir / FINAL_FILE).exists():
        arguments = ["--config", options.config, "--run-dir", f"{run_dir}_longer", *options.overrides]
        arguments += [f"model.init_from={run_dir}"] + ["model.shifted=false"] * (not config.shifted)
        raise ValueError(
            f"{run_dir} is complete and cannot be made longer: its learning-rate schedule has ended.\n{listed}\n"
            "Give another --run-dir to train that long from the start, or start a new run from its weights:\n"
            f"  {shell_command('train.py', *arguments)}"
        )
    raise ValueError(f"{run_dir} was started with other settings; give another --run-dir, or restore them:\n{listed}")


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = argparse.ArgumentParser(description="Train a masked diffusion model.")
    parser.add_argument("--config", required=True, type=Path, help="YAML file with all settings")
    parser.add_argument("--run-dir", type=Path, help="what the run writes; by default runs/<name of the config>")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. training.seed=1")
    options = parser.parse_intermixed_args(arguments)
    run_dir = options.run_dir or Path("runs") / options.config.stem
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        try:
            config = read_config(options.config, options.overrides)
            check_unchanged(config, run_dir, options)
            if (run_dir / FINAL_FILE).exists():
                print(f"{run_dir} is complete; give another --run-dir to train again")
                print_result(config, run_dir)
                return
            run, data = start(config, run_dir)
            recorder = Recorder(run_dir, config.wandb, flatten(config), run.step) if run.world.is_main else None
        except (ValueError, OSError) as error:
            fail(str(error), status=2)
        with StopVote(run.world) as vote:
            outcome = train(run, data, recorder, vote)
        if isinstance(outcome, Signals):
            stop_early(run, outcome, recorder)
        elif recorder is not None:
            finish(run, data, outcome, recorder)
            print(outcome.table())
            print_result(config, run_dir)
            recorder.close()  # last, since wandb may wait for the network
    except TrainingDiverged as error:
        fail(str(error), status=1)
    except WriteError as error:
        fail(f"{error}; with more disk, the same command continues from the newest checkpoint in {run_dir}", status=1)
    except KeyboardInterrupt:
        fail(f"interrupted; the same command continues from the newest checkpoint in {run_dir}", status=130)
    finally:
        stop_world()


def fail(message: str, status: int) -> NoReturn:
    """End with one message."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
