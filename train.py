"""Train a model: read one YAML file, build, loop, close.

    python train.py --config yaml_files/sudoku_puma.yaml [key=value ...] [--run-dir DIR]
    torchrun --nproc-per-node=8 train.py --config yaml_files/sudoku_puma.yaml

The run directory is the run's identity: the same command again continues from the newest checkpoint.
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

    signals.listen()  # SLURM's warnings count from here on; importing torch takes seconds
    # Idle threads spin for some microseconds, then sleep. Spinning on makes steps many times slower on a CPU that other
    # programs use too; sleeping at once makes the mini Sudoku model's 1.5 times slower on two idle cores.
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
from runtime.config_file import changed_settings, dump_config, flatten, read_config
from runtime.distributed import from_main, main_first, start_world, stop_world
from runtime.lock import lock_run
from runtime.metrics import Recorder
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


def train(run: Run, data: DataSet, recorder: Recorder | None, vote: StopVote) -> Evaluation | Signals:
    """Train to the end, from wherever `run` stands; record, evaluate and save on the way.

    Returns:
        The last evaluation, or the signal that the run stopped for, saved, before its end.

    Raises:
        TrainingDiverged: the loss is no longer finite; nothing is saved then.
    """
    training, validation = run.config.training, run.config.validation
    updater = Updater(run)
    evaluation, saved, figures = None, run.step, "loss ?"
    with tqdm(total=run.n_steps, initial=run.step, unit="step", disable=recorder is None) as bar:
        before = time.perf_counter()
        while run.step < run.n_steps:
            if stopped := vote.stop():
                check_finite(run)
                run.seconds += time.perf_counter() - before
                if run.step > saved:
                    save_run(run, None)
                return stopped
            updater.step()
            bar.update()
            last = run.step == run.n_steps
            log, measure, save = (
                last or run.step % every == 0
                for every in (training.log_every, training.eval_every, training.save_every)
            )
            if not (log or measure or save):
                continue
            check_finite(run)  # waits for the device, so the clock below is right
            run.seconds += time.perf_counter() - before
            values = progress_metrics(run)
            if log:
                values |= interval_metrics(run)
                start_interval(run)
                figures = f"loss {values['train/loss']:.4f}, lr {values['train/learning_rate']:.1e}"
            if measure:
                n_examples = (last and validation.n_final_examples) or validation.n_examples
                evaluation = evaluate(run.evaluated_model(), run.config, data, run.world, n_examples)
                values |= evaluation.metrics()
                if recorder:
                    bar.write(f"step {run.step}: {evaluation.table().splitlines()[1]}")
            bar.set_postfix_str(figures + (f", solved {100 * evaluation.accuracy:.1f}%" if evaluation else ""))
            if recorder and (log or measure):
                recorder.write(values)
            if recorder and measure and evaluation and evaluation.samples:
                recorder.table("samples", evaluation.samples, run.step)
            if save:
                save_run(run, evaluation.accuracy if measure and evaluation else None)
                saved = run.step
            before = time.perf_counter()
    n_examples = validation.n_final_examples or validation.n_examples
    return evaluation or evaluate(run.evaluated_model(), run.config, data, run.world, n_examples)


def finish(run: Run, evaluation: Evaluation, recorder: Recorder) -> None:
    """Write final.json, with which the run is complete, and the picture of the curves."""
    best = evaluation.samplers[0]
    final = {
        "accuracy": best.accuracy,
        "n": best.n,
        "nfe": best.nfe,
        "train_seconds": round(run.seconds, 3),
        "steps": run.step,
        "evaluation": as_json(evaluation),
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
    """Say where the run stands, which is saved. Only Ctrl-C gives a status that stops a script as well."""
    if recorder is not None:
        print(f"stopped by {stopped.name} at step {run.step:,}; the same command goes on from there", flush=True)
        recorder.close()
    if stopped == SIGINT:
        sys.exit(130)


def start(config: Config, run_dir: Path) -> tuple[Run, DataSet]:
    """Load the data and build the run, at its newest checkpoint if it has one.

    Raises:
        ValueError: bad data, settings that do not fit the machine or the checkpoint, or the run is in progress.
        OSError: the run directory cannot be written.
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
    data = main_first(world, lambda: config.open_data().load())
    for key in config.validation.model_fields_set & {"n_examples", "n_final_examples"}:
        check_n_examples(getattr(config.validation, key) or 0, data, f"validation.{key}")
    run = build_run(config, world, run_dir, data.train, resuming=checkpoint is not None)
    if checkpoint is not None:
        restore_run(run, checkpoint)
    if world.is_main:
        write_text(run_dir / "config.yaml", dump_config(config))
        for warning in (*([ignored] if ignored else []), *data.warnings()):
            warnings.warn(warning, stacklevel=2)
        print(start_message(run), flush=True)
    return run, data


def print_result(config: Config, run_dir: Path) -> None:
    """The last line of a finished run."""
    questions = config.open_data().questions
    final = json.loads((run_dir / FINAL_FILE).read_text(encoding="utf-8"))
    print(f"solved {100 * final['accuracy']:.1f}% of {final['n']} unseen {questions}")


def check_unchanged(config: Config, run_dir: Path) -> None:
    """Refuse to continue a run with settings that would change its result (ValueError with the difference)."""
    if not (run_dir / "config.yaml").exists() or not any((run_dir / "checkpoints").glob("step_*")):
        return  # nothing to lose
    differences = changed_settings(read_config(run_dir / "config.yaml"), config)
    if differences:
        raise ValueError(
            f"{run_dir} was started with other settings; give another --run-dir, or restore them:\n"
            + "\n".join(f"  {line}" for line in differences)
        )


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
            check_unchanged(config, run_dir)
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
            finish(run, outcome, recorder)
            print(outcome.table())
            print_result(config, run_dir)
            recorder.close()  # last, since wandb may wait for its network
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
