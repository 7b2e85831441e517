"""Train a model: read one YAML file, build the run, train, evaluate.

    python train.py --config yaml_files/sudoku_puma.yaml [key=value ...] [--run-dir DIR]
    python -m runtime.launch --nproc-per-node=8 train.py --config yaml_files/sudoku_puma.yaml
    python train.py --config yaml_files/text_sorting_puma.yaml --prepare    # only the data, on a login node

The run directory identifies the run: the same command again continues from its newest checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from signal import SIGINT, Signals
from typing import Any

if __name__ == "__main__":
    from runtime import signals

    signals.quit_at_interrupt()  # before torch is imported, which takes seconds
    signals.listen()
    # Idle threads spin for some microseconds, then sleep. Spinning longer makes steps many times slower on a CPU shared
    # with other programs; sleeping at once makes the mini Sudoku model 1.5 times slower on two idle cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from tqdm import tqdm

from base.commands import INTERRUPTED, CommandParser, say
from base.files import WriteError, reported, write_text
from base.text import escape, shorten
from config import Config
from data.dataset import ArrayData, DataSet, DataSettings
from eval.accuracy import check_n_examples, check_questions
from eval.evaluate import Evaluation, as_json, evaluate
from model.hub import check_init_from, check_initial_tokenizer, fetch_initial_weights, initial_data
from model.transformer import Transformer
from report.curves import RUN_AXES, draw_curves
from report.page import PAGE_FILE, TRACES_FILE, write_page
from report.trace import Trace, write_traces
from runtime.checkpoint import Checkpoint, loading_checkpoint, resumable_checkpoint
from runtime.command import shell_command
from runtime.config_file import dump_config, read_config
from runtime.distributed import (
    claim_report,
    fail_once,
    gather,
    leaves_world,
    main_bar,
    main_first,
    on_main,
    only_on_main,
    start_world,
)
from runtime.final import FINAL_FILE, is_complete, load_final
from runtime.history import Session
from runtime.lock import check_shared, lock_run
from runtime.metrics import METRICS_FILE, Recorder
from runtime.signals import StopRequested, StopVote, raise_at_interrupt
from sampling import TrainedModel
from training.resume import check_unchanged, leave_earlier_attempt
from training.run import (
    Run,
    build_run,
    interval_metrics,
    progress_metrics,
    restore_run,
    save_run,
    score_run,
    start_interval,
    start_message,
)
from training.update import TrainingDiverged, Updater, check_finite, check_graph, several_ranks_prevent_graph

N_TRACES = 3  # answers whose course is recorded when a run ends


def build_or_restore(config: Config, run_dir: Path) -> tuple[Run, DataSet]:
    """Load the data and build the run; restore its newest checkpoint if there is one.

    Raises:
        ValueError: bad data, settings that do not fit the machine or the checkpoint, the run is in use, or the
            processes do not share the run directory.
        OSError: the run directory is not writable.
    """
    session = Session()
    world = start_world(config.training.device)
    check_graph(config, world)

    def open_run_dir() -> tuple[str, Checkpoint | None]:
        with reported(run_dir, "give another --run-dir"):
            run_dir.mkdir(parents=True, exist_ok=True)
        with reported(run_dir / ".lock", "give another --run-dir"):
            holder = lock_run(run_dir)
        return holder, resumable_checkpoint(run_dir)

    holder, checkpoint = on_main(open_run_dir)
    check_shared(run_dir, holder, world)
    if config.model.init_from is not None and checkpoint is None:
        check_init_from(config.model.init_from)  # before work on the data
    if world.is_main:
        say(f"data: {escape(config.data.describe())}")
    config = with_resolved_data(config)  # another machine, which reads the run, may have other files
    resumed = None if checkpoint is None else run_dir
    with session.phase("data"):
        data = main_first(world, lambda: open_data(config, resumed).load(train=True))
    if config.model.init_from is not None and checkpoint is None:
        on_main(partial(check_initial_tokenizer, config.model.init_from, data))
        on_main(partial(fetch_initial_weights, config.model.init_from))  # not by all processes at once
    for key in ("n_examples", "n_final_examples"):
        if not config.validation.is_default(key):  # the default is for large tests
            check_n_examples(getattr(config.validation, key), data, f"validation.{key}")
    for rows in (data.train, data.validation):
        if rows.length != config.data.length:
            raise ValueError(
                f"data set {config.data.dataset!r}: rows have {rows.length} tokens, but `length` of its settings is "
                f"{config.data.length}: they must be equal"
            )
        if isinstance(rows, ArrayData):  # files of tokens are checked when they are opened
            rows.check_vocabulary(config.model.vocab_size)
    check_questions(config, data)
    run = build_run(config, world, run_dir, data.train, resuming=checkpoint is not None)
    run.session = session
    if checkpoint is None:
        on_main(partial(leave_earlier_attempt, config, run_dir))
        on_main(partial(data.keep_tokenizer, run_dir))
    else:
        with loading_checkpoint(checkpoint.path):
            restore_run(run, checkpoint)
    on_main(lambda: write_text(run_dir / "config.yaml", dump_config(config)))
    if world.is_main:
        if config.training.cuda_graph is True and world.device.type != "cuda":
            warnings.warn("training.cuda_graph is ignored: this machine has no GPU", stacklevel=2)
        if several_ranks_prevent_graph(config, world):
            warnings.warn(
                "several processes train without a CUDA graph, which a model with so few tokens gains much from: one "
                "GPU may be as fast (docs/speed.md)",
                stacklevel=2,
            )
        warn_about_steps(run)
        run.session.data_warnings = show_data_warnings(data)
        say(start_message(run))
    return run, data


def warn_about_steps(run: Run) -> None:
    """Warn about settings that count steps and do not fit the length of the run or each other."""
    training = run.config.training
    if training.warmup_steps >= run.n_steps:
        warnings.warn(
            f"training.warmup_steps {training.warmup_steps}: the learning rate still rises when the run ends, after "
            f"{run.n_steps} updates",
            stacklevel=2,
        )
    longer = max(training.save_every, training.eval_every)
    if longer < run.n_steps and math.lcm(training.save_every, training.eval_every) > longer:
        warnings.warn(
            f"training.save_every {training.save_every} and training.eval_every {training.eval_every}: few checkpoints "
            "are of steps that are evaluated, of which the best is one; let one of the numbers divide the other",
            stacklevel=2,
        )


def with_resolved_data(config: Config) -> Config:
    """The settings as a run records them: see `DataSettings.resolved`."""
    return config.model_copy(update={"data": config.data.resolved()})


def open_data(config: Config, resumed: Path | None = None) -> DataSet:
    """The data of a run, with the tokenizer of its weights; see `DataSettings.in_run` and `model.hub.initial_data`.

    Args:
        resumed: directory of a run that has a checkpoint; None: the run starts.

    Raises:
        ValueError: the run starts from weights whose tokenizer is not known.
    """
    data: DataSettings = config.data
    if resumed is not None:
        data = data.in_run(resumed)
    elif config.model.init_from is not None:
        data = initial_data(config)
    return data.open(config.model.vocab_size)


def show_data_warnings(data: DataSet) -> list[str]:
    """Show the warnings about the data, and return them."""
    found = list(data.warnings())
    for warning in found:
        warnings.warn(warning, stacklevel=3)
    return found


def open_records(run: Run) -> Recorder | None:
    """The records of the run on the main process, None on the others. Raises WriteError on all ranks."""

    def open_recorder() -> Recorder:
        # The row of a step whose evaluation is still due is written with it.
        from_step = run.step if run.pending_metrics is None else run.step - 1
        recorder = Recorder(run.run_dir, run.config, from_step)
        run.session.open(run.run_dir, run.world, run.step, run.n_steps)
        return recorder

    return only_on_main(open_recorder)


def train(run: Run, data: DataSet, recorder: Recorder | None, vote: StopVote) -> Evaluation | Signals:
    """Train from the current step of `run` to its end; record, save and evaluate when each is due.

    Where both are due, a step is saved before it is evaluated, and its score is added to the checkpoint afterwards: an
    evaluation that ends early costs no step. Where no save is due, a signal saves the step too, but an error or a kill
    costs the steps since the last save.

    Args:
        recorder: None on all ranks but the main one.

    Returns:
        The last evaluation, or the signal that stopped the run before its end; the run is saved then.

    Raises:
        TrainingDiverged: the loss, the gradient or a weight is not finite, and the run is not saved; or the validation
            loss after the last step is not.
        WriteError: a checkpoint cannot be written; all ranks raise.
    """
    training = run.config.training
    updater = Updater(run)
    evaluation: Evaluation | None = None  # of this step
    saved_step, seconds_before = run.step, run.seconds

    with main_bar(run.world, total=run.n_steps, initial=run.step, unit="step") as bar:
        started = time.perf_counter()
        try:
            while True:
                # The evaluation of this step is due, perhaps since an earlier session.
                if run.pending_metrics is not None:
                    evaluation = measure(run, data, vote)
                    record_evaluation(run, evaluation, recorder, bar)
                    if saved_step == run.step:
                        score_run(run, score_of(run, evaluation))
                    started = time.perf_counter()

                if run.step == run.n_steps:
                    # None only if an earlier command took the last step, and ended before it wrote final.json.
                    evaluation = evaluation or measure(run, data, vote)
                    if not math.isfinite(loss := evaluation.loss):
                        raise TrainingDiverged(f"the last validation loss is {loss}: lower training.learning_rate")
                    return evaluation
                if stopped := vote.stop():
                    check_finite(run)
                    run.seconds += time.perf_counter() - started
                    raise StopRequested(stopped)

                updater.step()
                evaluation = None
                bar.update()
                log = is_due(run, training.log_every)
                evaluate_now = is_due(run, training.eval_every)
                save_now = is_due(run, training.save_every)
                if log or evaluate_now or save_now:
                    check_finite(run)  # a host sync, so the time below includes all work on the device
                    run.seconds += time.perf_counter() - started
                    if log or evaluate_now:
                        record_step(run, recorder, bar, log=log, evaluate_now=evaluate_now)
                    if save_now:
                        save(run, None, seconds_before)
                        saved_step = run.step
                    started = time.perf_counter()
        except StopRequested as stop:
            if run.step > saved_step:
                save(run, score_of(run, evaluation) if evaluation else None, seconds_before)
            return stop.number


def is_due(run: Run, every: int) -> bool:
    """Whether it is time for what is done every so many steps, and after the last one."""
    return run.step % every == 0 or run.step == run.n_steps


def record_step(run: Run, recorder: Recorder | None, bar: tqdm, *, log: bool, evaluate_now: bool) -> None:
    """Record the metrics of this step, or keep them for `record_evaluation`; every rank calls this.

    Args:
        log: the means since the last such call are due too.
        evaluate_now: an evaluation of this step follows, which is recorded with them.
    """
    metrics = progress_metrics(run)
    if log:
        interval = interval_metrics(run, metrics)
        start_interval(run, metrics)
        metrics |= interval
        if recorder:
            show_progress(run, metrics, bar)
    if evaluate_now:
        run.pending_metrics = metrics
    elif log and recorder:
        recorder.write(metrics)


def record_evaluation(run: Run, evaluation: Evaluation, recorder: Recorder | None, bar: tqdm) -> None:
    """Record the evaluation of this step with the metrics that were kept for it."""
    assert run.pending_metrics is not None
    if recorder:
        recorder.write(run.pending_metrics | evaluation.metrics(), evaluation.samples)
        show_evaluation(run, evaluation, bar)
    run.pending_metrics = None


def measure(run: Run, data: DataSet, vote: StopVote) -> Evaluation:
    """Evaluate the run at its current step; every rank calls this. Raises StopRequested."""
    validation = run.config.validation
    n_examples = validation.n_last_examples if run.step == run.n_steps else validation.n_examples
    with run.session.phase("evaluation"):
        return evaluate(run.evaluated_model(), run.config, data, run.world, n_examples, vote)


def score_of(run: Run, evaluation: Evaluation) -> float:
    """What selects the best checkpoint, higher is better: the accuracy, or the loss if training asks no questions.

    Losses are negative, so that those of a run that asks questions since it was resumed are below any accuracy.
    """
    if run.config.validation.n_examples and evaluation.accuracy is not None:
        return evaluation.accuracy
    return -evaluation.loss if math.isfinite(evaluation.loss) else -sys.float_info.max  # JSON has no nan


def save(run: Run, score: float | None, seconds_before: float) -> None:
    """Write a checkpoint and note it in the history; every rank calls this.

    Args:
        score: see `score_of`; None if this step was not evaluated.
        seconds_before: of training, in earlier sessions.

    Raises:
        WriteError: it cannot be written; all ranks raise.
    """
    run.session.seconds["training"] = run.seconds - seconds_before
    with run.session.phase("checkpoints"):
        save_run(run, score)
    run.session.write("running", run.step)


def show_progress(run: Run, metrics: dict[str, Any], bar: tqdm) -> None:
    """Show loss, rate and time left: beside the progress bar, or as a line where there is none."""
    status = f"loss {metrics['train/loss']:.4f}, lr {metrics['train/learning_rate']:.1e}"
    bar.set_postfix_str(status)
    if bar.disable:
        step_s = metrics["train/step_ms"] / 1000
        left = timedelta(seconds=round((run.n_steps - run.step) * step_s))
        rate = f"{1 / step_s:,.0f}" if step_s < 0.01 else f"{1 / step_s:.3g}"
        say(f"step {run.step:,} of {run.n_steps:,}: {status}, {rate} steps/s, {left} left")


def show_evaluation(run: Run, evaluation: Evaluation, bar: tqdm) -> None:
    """Show the main result as a line."""
    line = f"step {run.step:,}: {evaluation.headline}"
    with bar.external_write_mode():
        say(line)


def write_result(run: Run, model: Transformer, data: DataSet, evaluation: Evaluation, recorder: Recorder) -> None:
    """Write final.json, which marks the run as complete, some traces, the curves and the run's page.

    Args:
        model: the one that was evaluated.

    Raises:
        WriteError: final.json cannot be written. What fails with traces, curves or the page gives a warning.
    """
    headline = evaluation.samplers[0] if evaluation.samplers else None
    with ended_in_history(run):
        final = {
            "accuracy": evaluation.accuracy,
            "n": 0 if headline is None else headline.n,
            "nfe": None if headline is None else headline.nfe,
            "train_seconds": round(run.seconds, 3),
            "steps": run.step,
            "evaluation": as_json(evaluation),
            "example": " ".join(data.question(0).text.split()),  # on one line
        }
        write_text(run.run_dir / FINAL_FILE, json.dumps(final, indent=1) + "\n")
    run.session.write("complete", run.step)
    with failure_warns(run.run_dir / TRACES_FILE):
        write_traces(trace_answers(run, model, data, evaluation), run.run_dir / TRACES_FILE)
    pictures, page = draw(run.run_dir)
    figures = ("accuracy", "n", "nfe", "train_seconds", "steps")
    known = {name: final[name] for name in figures if final[name] is not None}
    recorder.final(known | {"loss": evaluation.loss}, pictures, page)


def draw(run_dir: Path) -> tuple[dict[str, Path], Path | None]:
    """Draw the curves of a complete run and write its page, last; what fails gives a warning. Returns what there is."""
    pictures, page = {}, None
    for axis in RUN_AXES:
        picture = run_dir / f"curves_{axis}.png"
        with failure_warns(picture):
            draw_curves([run_dir], axis, picture)
            pictures[f"curves/{axis}"] = picture
    with failure_warns(run_dir / PAGE_FILE):
        page = write_page(run_dir)
    return pictures, page


@contextmanager
def failure_warns(path: Path) -> Iterator[None]:
    """A file that the run can do without: what goes wrong with it gives a warning."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"{path} cannot be written ({error})", RuntimeWarning, stacklevel=3)


def trace_answers(run: Run, model: Transformer, data: DataSet, evaluation: Evaluation) -> list[Trace]:
    """How some answers of the evaluation came about, by its first rule: one wrong answer, if any, and right ones."""
    if not evaluation.samplers:  # sampling is switched off
        return []
    config, rule = run.config, run.config.validation.rules()[0]
    by = (rule.confidence, rule.tokens_per_step)
    samples = [each for each in evaluation.samples if (each["confidence"], each["tokens_per_step"]) == by]
    wrong, right = ([each["row"] for each in samples if each["right"] is is_right] for is_right in (False, True))
    rows = ([*wrong[:1], *right, *wrong[1:]] or list(range(evaluation.samplers[0].n)))[:N_TRACES]
    model.eval()  # as in the evaluation; in training it may be compiled, for other shapes
    answers = TrainedModel(model, config, data, run.world.device).answer_test(
        rows, rule, seed=config.training.seed, trace=True
    )
    return [answer.trace for answer in answers if answer.trace is not None]


@contextmanager
def ended_in_history(run: Run) -> Iterator[None]:
    """Note in the history of the run why it failed, if it does."""
    try:
        yield
    except BaseException as error:
        run.session.write("failed", run.step, shorten(f"{type(error).__name__}: {error}", 200))
        raise


def stop_early(run: Run, stopped: Signals, recorder: Recorder | None) -> None:
    """Report the step at which the run was saved. Only Ctrl-C exits with a status that stops a calling script too."""
    if recorder is not None:
        say(f"stopped by {stopped.name} at step {run.step:,}; the same command continues from there")
        recorder.close()
    if stopped == SIGINT:
        gather(None)  # an exit with a status does not wait, and `recorder` may wait for the network
        sys.exit(INTERRUPTED)


def print_result(config: Config, run_dir: Path) -> None:
    """Print the main result of a complete run, what it has written, and a command that samples from it."""
    data, final = config.open_data(), load_final(run_dir)
    assert final is not None
    if final.accuracy is None:
        say(f"validation loss {final.evaluation.loss:.4f}")
    else:
        say(f"solved {100 * final.accuracy:.1f}% of {final.n} test {data.question_noun}")
    option, question = f"--{data.question_option}", escape(final.example)
    asked = [f"{option}={question}"] if question.startswith("-") else [option, question]
    command = shell_command("sampling.py", "--checkpoint", run_dir, *asked)
    say(f"wrote {run_dir} ({PAGE_FILE}, {FINAL_FILE}, {METRICS_FILE}, curves_*.png, checkpoints/), next: {command}")


def prepare_data(config: Config) -> None:
    """Fetch and write what a run with these settings needs: its data, such as tokenized rows, and a model of the hub.

    Raises:
        ValueError: bad data, or `model.init_from` is not there.
    """
    if config.model.init_from is not None:
        check_init_from(config.model.init_from)
        fetch_initial_weights(config.model.init_from)
    say(f"data: {escape(config.data.describe())}")
    data = open_data(config).load(train=True)
    show_data_warnings(data)
    say(f"ready: {len(data.train):,} training sequences, {data.n_questions:,} {data.question_noun} of the test")


def open_run(config_file: Path, overrides: Sequence[str], run_dir: Path) -> tuple[Run, DataSet, Recorder | None] | None:
    """All that comes before the first step; None if the run is complete, whose result is printed then.

    Raises:
        ValueError: wrong settings, others than those of the run in `run_dir`, or as in `build_or_restore`.
        OSError: the run directory is not writable.
    """
    config = read_config(config_file, overrides)
    check_unchanged(with_resolved_data(config), run_dir, config_file, overrides)
    if not is_complete(run_dir):
        run, data = build_or_restore(config, run_dir)
        return run, data, open_records(run)
    if claim_report():
        say(f"{run_dir} is complete; give another --run-dir to train again")
        if not (run_dir / PAGE_FILE).exists():  # the command ended before it was written
            draw(run_dir)
        print_result(config, run_dir)
    return None


def train_and_report(run: Run, data: DataSet, recorder: Recorder | None) -> None:
    """Train to the end and write the result, or report what has stopped the run before."""
    with ended_in_history(run), StopVote(run.world) as vote:
        outcome = train(run, data, recorder, vote)
    if isinstance(outcome, Signals):
        run.session.write("stopped", run.step, outcome.name)
        stop_early(run, outcome, recorder)
        return
    model = run.evaluated_model()  # needs all ranks
    if recorder is not None:
        write_result(run, model, data, outcome, recorder)
        say(outcome.table())
        print_result(run.config, run.run_dir)
        recorder.close()  # last, since wandb may wait for the network


@contextmanager
def run_failures(run_dir: Path) -> Iterator[None]:
    """End the command with one message where the run fails or is interrupted."""
    try:
        yield
    except TrainingDiverged as error:
        fail_once(str(error), status=1)
    except WriteError as error:
        fail_once(f"{error}; once it can, the same command continues from the newest checkpoint in {run_dir}", status=1)
    except torch.OutOfMemoryError as error:
        fail_once(
            f"{str(error).partition(' GPU ')[0]} Lower training.micro_batch_size or set "
            "training.gradient_checkpointing=true (in an evaluation, lower validation.batch_size); the command then "
            f"continues from the newest checkpoint in {run_dir}",
            status=1,
        )
    except KeyboardInterrupt:
        if (run_dir / FINAL_FILE).exists():
            fail_once(f"interrupted; {run_dir} is complete, and the same command draws what is missing", INTERRUPTED)
        fail_once(f"interrupted; the same command continues from the newest checkpoint in {run_dir}", INTERRUPTED)


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = CommandParser(description="Train a masked diffusion model.")
    parser.add_argument("--config", required=True, type=Path, help="YAML file with all settings")
    parser.add_argument("--run-dir", type=Path, help="what the run writes; by default runs/<name of the config>")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. training.seed=1")
    parser.add_argument(
        "--prepare", action="store_true", help="only fetch and write the data that the run needs, as on a login node"
    )
    options = parser.parse_intermixed_args(arguments)
    run_dir = options.run_dir or Path("runs") / options.config.stem
    with leaves_world(), run_failures(run_dir):
        raise_at_interrupt()
        try:
            if options.prepare:
                prepare_data(read_config(options.config, options.overrides))
                return
            opened = open_run(options.config, options.overrides, run_dir)
        except (ValueError, OSError) as error:
            fail_once(error)
        if opened is not None:
            train_and_report(*opened)


if __name__ == "__main__":
    main()
