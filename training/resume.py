"""What a run that is started again may differ in from what it was before."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

from base.files import reported
from config import Config
from runtime.checkpoint import step_folders, step_of
from runtime.command import shell_command
from runtime.config_file import changed_settings, format_changes, read_config
from runtime.final import FINAL_FILE
from runtime.metrics import WANDB_ID_FILE
from runtime.optim import decay_start


def check_unchanged(config: Config, run_dir: Path, config_file: Path, overrides: Sequence[str]) -> None:
    """Refuse to continue a run with settings that change its result (ValueError with the differences).

    Args:
        config_file, overrides: where `config` is from, for the command that the message proposes.
    """
    begun = step_folders(run_dir) or (run_dir / FINAL_FILE).exists()
    if not begun or not (run_dir / "config.yaml").exists():
        return
    before = read_config(run_dir / "config.yaml")
    changes = changed_settings(before, config)
    if not changes or may_change_length(before, config, changes.keys(), run_dir):
        return
    listed = format_changes(changes)
    length_only = changes.keys() <= {"training.max_steps", "training.num_epochs"}
    longer = length_only and all(None not in (old, new) and new > old for old, new in changes.values())
    if longer and (run_dir / FINAL_FILE).exists():
        arguments: list[str | Path] = ["--config", config_file, "--run-dir", f"{run_dir}_longer", *overrides]
        arguments += [f"model.init_from={run_dir}"] + ["model.shifted=false"] * (not config.shifted)
        raise ValueError(
            f"{run_dir} is complete and cannot be made longer: its learning-rate schedule has ended.\n{listed}\n"
            "Give another --run-dir to train that long from the start, or start a new run from its weights:\n"
            f"  {shell_command('train.py', *arguments)}"
        )
    raise ValueError(f"{run_dir} was started with other settings; give another --run-dir, or restore them:\n{listed}")


def may_change_length(before: Config, config: Config, changes: Set[str], run_dir: Path) -> bool:
    """Whether only the length of an incomplete run changes, and no update that it has done would have been another."""
    lengths = [(each.training, each.training.max_steps) for each in (before, config)]
    if not changes <= {"training.max_steps", "training.decay_steps"} or (run_dir / FINAL_FILE).exists():
        return False
    if config.training.num_epochs is not None:  # the number of rows is not known here
        return False
    newest = step_of(step_folders(run_dir)[0])
    return all(
        n_steps is not None and newest <= min(n_steps, decay_start(training, n_steps)) for training, n_steps in lengths
    )


def leave_earlier_attempt(config: Config, run_dir: Path) -> None:
    """Give a run that begins with other settings than an attempt before it another run of wandb.

    The attempt, which has left no checkpoint, keeps its curves; wandb takes no step that it has already.
    """
    try:
        if not changed_settings(read_config(run_dir / "config.yaml"), config):
            return
    except (ValueError, OSError):  # there is none, or it is damaged
        pass
    with reported(run_dir / WANDB_ID_FILE):
        (run_dir / WANDB_ID_FILE).unlink(missing_ok=True)
