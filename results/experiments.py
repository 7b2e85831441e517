"""The experiments that `results/run.py` runs: the question, settings and seeds of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One variant in an experiment."""

    label: str
    config: str  # in yaml_files/
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None  # None: those of the experiment
    starts_from: str | None = None  # label of the variant whose run of the same seed gives the starting weights


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
    "word_problems": Experiment(
        "Word problems from random weights: PUMA and uniform masks, the same model, batch, schedule and updates",
        (
            Arm("puma", "tinygsm_mini_puma.yaml"),
            Arm("uniform", "tinygsm_mini_baseline.yaml"),
            Arm("puma, rate 1e-3", "tinygsm_mini_puma.yaml", ("training.learning_rate=1.0e-3",), seeds=(0,)),
            Arm("uniform, rate 1e-3", "tinygsm_mini_baseline.yaml", ("training.learning_rate=1.0e-3",), seeds=(0,)),
            Arm("puma, rate 4e-3", "tinygsm_mini_puma.yaml", ("training.learning_rate=4.0e-3",), seeds=(0,)),
            Arm("uniform, rate 4e-3", "tinygsm_mini_baseline.yaml", ("training.learning_rate=4.0e-3",), seeds=(0,)),
        ),
        overrides=("training.max_steps=3000", "training.eval_every=125"),
    ),
}
