"""The experiments that `results/run.py` runs: the question, settings and seeds of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One variant in an experiment, run with every seed."""

    label: str
    config: str  # in yaml_files/
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """Variants that are compared, with all other settings equal."""

    question: str
    arms: tuple[Arm, ...]
    overrides: tuple[str, ...] = ()  # for all arms
    target: float = 0.9  # accuracy; the table shows when each run first reaches it
    seeds: tuple[int, ...] = (0, 1, 2)


EXPERIMENTS = {
    "sudoku_mini": Experiment(
        "9x9 Sudoku on a CPU, 30 to 40 clues: PUMA and uniform masks, the same model, batch, schedule and updates",
        (Arm("puma", "sudoku_mini_puma.yaml"), Arm("uniform", "sudoku_mini_baseline.yaml")),
        overrides=("training.compile=true", "validation.n_examples=100", "validation.n_final_examples=500"),
    ),
    "positions": Experiment(
        "Rotary and learned positions, each alone and both: sudoku_mini_puma with 500 updates",
        (
            Arm("rotary and learned", "sudoku_mini_puma.yaml"),
            Arm("learned alone", "sudoku_mini_puma.yaml", ("model.rotary=false",)),
            Arm("rotary alone", "sudoku_mini_puma.yaml", ("model.learned_positions=null",)),
        ),
        overrides=(
            "training.max_steps=500",
            "training.eval_every=125",
            "validation.n_examples=50",
            "validation.n_final_examples=300",
        ),
        target=0.7,
    ),
    "tinygsm_mini": Experiment(
        "Generated word problems from random weights, two tokens per step: PUMA, uniform masks, no learned positions",
        (
            Arm("puma", "tinygsm_mini_puma.yaml"),
            Arm("uniform", "tinygsm_mini_baseline.yaml"),
            Arm("puma, rotary alone", "tinygsm_mini_puma.yaml", ("model.learned_positions=null",)),
        ),
    ),
}
