"""The experiments that `results/run.py` runs: the question, settings and seeds of each."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One variant in an experiment."""

    label: str  # names the run directories too, see `folder_name`
    config: str  # a file in yaml_files/, or a path; of an experiment in a file of its own, also a file beside that
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None  # None: those of the experiment
    starts_from: str | None = None  # label of the variant whose run of the same seed gives the starting weights

    @property
    def folder_name(self) -> str:
        """The label as a part of folder names; other labels can have the same: `bias 1` and `bias -1`."""
        return re.sub(r"[^a-z0-9]+", "_", self.label.lower())


@dataclass(frozen=True)
class Experiment:
    """Variants that are compared, with all other settings equal.

    Raises:
        ValueError: two runs would have the same directory, a label names no variant, or a run would start from one
            that there is not.
    """

    question: str
    variants: tuple[Variant, ...]
    baseline: str  # label of the variant that the others are compared with
    overrides: tuple[str, ...] = ()  # for all variants
    targets: tuple[float, ...] = (0.9,)  # accuracies; tables show when each run first reaches them
    shown: tuple[str, ...] = ()  # labels of the variants in the figure; empty: all
    seeds: tuple[int, ...] = (0, 1, 2)
    # No run shared its machine, and all had the same: figure and tables compare seconds.
    seconds_comparable: bool = False

    def __post_init__(self) -> None:
        first: dict[str, str] = {}
        for variant in self.variants:
            if other := first.get(variant.folder_name):
                raise ValueError(
                    f"labels {other!r} and {variant.label!r} give the same folder name, {variant.folder_name!r}: only "
                    "letters from a to z and digits distinguish labels, write for example 'minus 1' for -1"
                )
            first[variant.folder_name] = variant.label
        labels = [variant.label for variant in self.variants]
        named = [("baseline", self.baseline), *(("shown", label) for label in self.shown)]
        named += [("starts_from", each.starts_from) for each in self.variants if each.starts_from is not None]
        for field, label in named:
            if label not in labels:
                raise ValueError(f"{field} {label!r} is no label of a variant: choose from {labels}")
        seeds = {each.label: self.seeds_of(each) for each in self.variants}
        for each in self.variants:
            if len(set(seeds[each.label])) < len(seeds[each.label]):
                raise ValueError(f"{each.label!r} has a seed twice: {seeds[each.label]}")
            if each.starts_from and (missing := set(seeds[each.label]) - set(seeds[each.starts_from])):
                raise ValueError(
                    f"{each.label!r} starts from {each.starts_from!r}, which has no seed {min(missing)}: "
                    "leave it out, or train that one too"
                )

    def seeds_of(self, variant: Variant) -> tuple[int, ...]:
        """Its own seeds, or those of the experiment."""
        return self.seeds if variant.seeds is None else variant.seeds


MINUTES = ("training.compile=true", "validation.n_examples=100", "validation.n_final_examples=500")
NO_THRESHOLD = "objective.collapse_threshold=null"
ONE_BATCH, POOL_OF_16 = "objective.pool_batches=1", "objective.pool_batches=16"
PAPER = (NO_THRESHOLD, ONE_BATCH)  # K = 8 as in the paper's Sudoku
ONE_EPOCH = ("training.max_steps=30000",)  # of uniform masks on a million boards
RATE_OF_1E_3 = ("training.max_steps=50000", "training.learning_rate=1.0e-3", "training.warmup_steps=200")
RATE_OF_7E_4, RATE_OF_3_5E_4 = "training.learning_rate=7.0e-4", "training.learning_rate=3.5e-4"
FIVE_SEEDS = (0, 1, 2, 3, 4)
RANDOM_ORDER, LOW_DISCREPANCY = "objective.reveal_order=random", "objective.low_discrepancy=true"
REDRAWN = "objective.reveal_order=redrawn"
SHIFTED, UNSHIFTED = "model.shifted=true", "model.shifted=false"
HARD_AT_1E_3 = ("training.compile=true", "training.learning_rate=1.0e-3")
SUDOKU_MINI = (
    Variant("puma, pool of 16, tau 0.9", "sudoku_mini_puma.yaml"),
    Variant("puma as in the paper", "sudoku_mini_puma.yaml", PAPER),
    Variant("uniform", "sudoku_mini_baseline.yaml"),
)


def puma_and_uniform(
    stem: str,
    change: str = "",
    overrides: tuple[str, ...] = (),
    seeds: tuple[int, ...] | None = None,
    puma: tuple[str, ...] = (),
) -> tuple[Variant, Variant]:
    """Both objectives with the same change of settings, by the YAML files whose names begin with `stem`.

    Args:
        puma: further settings, of PUMA alone.
    """
    return (
        Variant(f"puma{change}", f"{stem}_puma.yaml", (*overrides, *puma), seeds),
        Variant(f"uniform{change}", f"{stem}_baseline.yaml", overrides, seeds),
    )


def from_autoregressive(stem: str) -> tuple[Variant, ...]:
    """An autoregressive model, and both objectives started from it, by the YAML files whose names begin with `stem`."""
    file, start = f"{stem}_puma_from_arm.yaml", "autoregressive"
    return (
        Variant(start, f"{stem}_arm.yaml"),
        Variant("puma from AR", file, starts_from=start),
        Variant("uniform from AR", file, ("objective.name=uniform",), starts_from=start),
    )


def in_blocks(stem: str, attention: str, pools: tuple[int, ...] = (1,)) -> tuple[Variant, ...]:
    """PUMA with each number of batches in its pool, and uniform masks, in blocks of 32 tokens."""
    blocks = ("objective.block_size=32", f"objective.block_attention={attention}")
    puma = ("objective.name=block_puma", *blocks)
    return (
        *(
            Variant(
                f"puma, {attention}" + (f", pool of {n}" if n > 1 else ""),
                f"{stem}_puma.yaml",
                (*puma, f"objective.pool_batches={n}"),
            )
            for n in pools
        ),
        Variant(f"uniform, {attention}", f"{stem}_baseline.yaml", ("objective.name=block_uniform", *blocks)),
    )


def k_schedule(*stages: tuple[int, int]) -> tuple[str, str]:
    """Overrides for pairs of K and the update from which it holds. K = 1 masks at random: uniform masks at first."""
    return "objective.n_stages=null", f"objective.k_schedule={[list(pair) for pair in stages]}".replace(" ", "")


EXPERIMENTS = {
    "sudoku": Experiment(
        "The paper's Sudoku experiment: 9x9 boards of 30 to 40 clues, 6.9M parameters, one GPU, PUMA and uniform masks",
        (
            Variant("puma, rate 3e-4", "sudoku_puma.yaml", ONE_EPOCH),
            Variant("uniform, rate 3e-4", "sudoku_baseline.yaml", ONE_EPOCH),
            Variant("puma, rate 1e-3", "sudoku_puma.yaml", RATE_OF_1E_3, seeds=(0,)),
            Variant("puma, rate 1e-3, pool of 16", "sudoku_puma.yaml", (*RATE_OF_1E_3, POOL_OF_16), seeds=(0,)),
            Variant("uniform, rate 1e-3", "sudoku_baseline.yaml", RATE_OF_1E_3, seeds=(0,)),
        ),
        baseline="uniform, rate 3e-4",
        overrides=(
            "training.num_epochs=null",
            "training.compile=true",
            "training.cuda_graph=true",
            "validation.confidence=[top_prob]",
            "validation.tokens_per_step=[1]",
        ),
        targets=(0.75, 0.9, 0.95),
    ),
    "sudoku_mini": Experiment(
        "9x9 Sudoku on a CPU, 30 to 40 clues: PUMA and uniform masks, the same model, batch, schedule and updates",
        (
            *SUDOKU_MINI,
            *(
                Variant(label, "sudoku_mini_puma.yaml", (*PAPER, *overrides), seeds=(0,))
                for label, overrides in (
                    ("puma as in the paper, random order", (RANDOM_ORDER,)),
                    ("puma, pool of 16", (POOL_OF_16,)),
                    ("puma, pool of 16, random order", (POOL_OF_16, RANDOM_ORDER)),
                )
            ),
            Variant(
                "puma, K 2, 4, 8 from 0, 250, 500",
                "sudoku_mini_puma.yaml",
                (*PAPER, *k_schedule((2, 0), (4, 250), (8, 500))),
            ),
            Variant("puma as in the paper, rate 7e-4", "sudoku_mini_puma.yaml", (*PAPER, RATE_OF_7E_4)),
            Variant("uniform, rate 7e-4", "sudoku_mini_baseline.yaml", (RATE_OF_7E_4,)),
            Variant("puma, pool of 16, tau 0.9, rate 7e-4", "sudoku_mini_puma.yaml", (RATE_OF_7E_4,)),
        ),
        baseline="uniform",
        overrides=MINUTES,
        targets=(0.1, 0.9),
        shown=(
            "puma, pool of 16, tau 0.9",
            "puma as in the paper",
            "uniform",
            "puma, pool of 16, tau 0.9, rate 7e-4",
            "puma as in the paper, rate 7e-4",
            "uniform, rate 7e-4",
        ),
    ),
    "sudoku_few_clues": Experiment(
        "9x9 Sudoku, 22 to 28 clues: PUMA and uniform masks, at the rate and batch that were best on 30 to 40 clues",
        SUDOKU_MINI,
        baseline="uniform",
        overrides=(
            *MINUTES,
            "data.min_clues=22",
            "data.max_clues=28",
            "training.batch_size=128",
            "training.learning_rate=1.5e-3",
        ),
        targets=(0.1, 0.5),
    ),
    "sudoku_orders": Experiment(
        "9x9 Sudoku, 22 to 28 clues: PUMA that reveals by probability, margin or entropy, each sampled by all three",
        (
            *(
                Variant(f"puma, {order}", "sudoku_mini_puma.yaml", (f"objective.reveal_order={order}",), seeds)
                for order, seeds in (
                    ("top_prob", None),
                    ("top_prob_margin", (0, 1, 2)),
                    ("neg_entropy", (0, 1, 2)),
                )
            ),
            Variant("uniform", "sudoku_mini_baseline.yaml"),
            # Is it the rate that keeps uniform masks on the plateau?
            Variant("puma, top_prob, rate 3.5e-4", "sudoku_mini_puma.yaml", (RATE_OF_3_5E_4,), seeds=(0, 1, 2)),
            Variant("uniform, rate 3.5e-4", "sudoku_mini_baseline.yaml", (RATE_OF_3_5E_4,), seeds=(0, 1, 2)),
        ),
        baseline="uniform",
        overrides=(
            "training.compile=true",
            "training.eval_every=500",
            RATE_OF_7E_4,
            "data.min_clues=22",
            "data.max_clues=28",
            "validation.confidence=[top_prob,top_prob_margin,neg_entropy]",
            "validation.n_examples=100",
            "validation.n_final_examples=1000",
        ),
        targets=(0.1, 0.3),
        seeds=FIVE_SEEDS,  # uniform masks stay on a plateau in some
    ),
    "sudoku_variants": Experiment(
        "9x9 Sudoku, 30 to 40 clues: what each setting of PUMA changes, from the paper's K = 8 without threshold",
        (
            Variant("uniform", "sudoku_mini_baseline.yaml"),
            Variant("K 8", "sudoku_mini_puma.yaml", PAPER),
            *(Variant(f"K {k}", "sudoku_mini_puma.yaml", (*PAPER, f"objective.n_stages={k}")) for k in (4, 16, 32)),
            *(
                Variant(f"K 8, tau {tau}", "sudoku_mini_puma.yaml", (*PAPER, f"objective.collapse_threshold={tau}"))
                for tau in (0.9, 0.99)
            ),
            *(
                Variant(
                    f"K 8, uniform fraction {share}",
                    "sudoku_mini_puma.yaml",
                    (*PAPER, f"objective.uniform_fraction={share}"),
                )
                for share in (0.1, 0.3)
            ),
            *(
                Variant(f"K 8, pool of {n}", "sudoku_mini_puma.yaml", (*PAPER, f"objective.pool_batches={n}"))
                for n in (4, 16, 64)
            ),
            Variant("K 8, pool of 16, tau 0.9", "sudoku_mini_puma.yaml"),
            *(
                Variant(f"K {name}", "sudoku_mini_puma.yaml", (*PAPER, *k_schedule(*stages)))
                for name, stages in (
                    ("1 until 250, then 8", ((1, 0), (8, 250))),
                    ("1 until 500, then 8", ((1, 0), (8, 500))),
                    ("2, 4, 8 from 0, 250, 500", ((2, 0), (4, 250), (8, 500))),
                )
            ),
        ),
        baseline="uniform",
        overrides=(*MINUTES, "training.max_steps=1000", "training.eval_every=125"),
        targets=(0.1, 0.8),
        shown=("uniform", "K 8", "K 4", "K 32", "K 8, uniform fraction 0.1", "K 8, pool of 4", "K 8, pool of 16"),
        seeds=(0,),
    ),
    "sudoku_rates": Experiment(
        "9x9 Sudoku, 30 to 40 clues: learning rates and batch sizes for uniform masks, PUMA and a mixture",
        tuple(
            Variant(
                f"{name}, {batch_size} boards, rate {rate}",
                config,
                (*overrides, f"training.batch_size={batch_size}", f"training.learning_rate={rate}"),
            )
            for batch_size in (64, 32, 128)
            for rate in ("1.5e-3", "3.0e-3", "7.0e-4")
            for name, config, overrides in (
                ("uniform", "sudoku_mini_baseline.yaml", ()),
                ("puma", "sudoku_mini_puma.yaml", PAPER),
                ("mixture", "sudoku_mini_puma.yaml", (*PAPER, "objective.uniform_fraction=0.25")),
            )
        ),
        baseline="uniform, 64 boards, rate 1.5e-3",
        overrides=(*MINUTES, "training.max_steps=1000", "training.eval_every=125"),
        targets=(0.1, 0.8),
        seeds=(0,),
        shown=tuple(f"{name}, 64 boards, rate 1.5e-3" for name in ("uniform", "puma", "mixture")),
    ),
    "positions": Experiment(
        "Rotary and learned positions, each alone and both: sudoku_mini_puma with 500 updates",
        (
            Variant("rotary and learned", "sudoku_mini_puma.yaml"),
            Variant("learned alone", "sudoku_mini_puma.yaml", ("model.rotary=false",)),
            Variant("rotary alone", "sudoku_mini_puma.yaml", ("model.learned_positions=null",)),
        ),
        baseline="rotary and learned",
        overrides=(
            "training.max_steps=500",
            "training.eval_every=125",
            "validation.n_examples=50",
            "validation.n_final_examples=300",
        ),
        targets=(0.7,),
    ),
    "word_problems_positions": Experiment(
        "Rotary positions, with and without learned positions: tinygsm_mini_puma",
        (
            Variant("rotary and learned", "tinygsm_mini_puma.yaml"),
            Variant("rotary alone", "tinygsm_mini_puma.yaml", ("model.learned_positions=null",)),
        ),
        baseline="rotary and learned",
        seeds=(0,),
    ),
    "word_problems": Experiment(
        "Word problems from random weights: PUMA and uniform masks, the same model, batch, schedule and updates",
        (
            Variant("puma", "tinygsm_mini_puma.yaml"),
            Variant("puma, no threshold", "tinygsm_mini_puma.yaml", (NO_THRESHOLD,)),
            Variant("uniform", "tinygsm_mini_baseline.yaml"),
        ),
        baseline="uniform",
        overrides=("training.max_steps=3000", "training.eval_every=125"),
    ),
    "word_problems_variants": Experiment(
        "Word problems from random weights: learning rates, and what the pool and the threshold of PUMA change",
        (
            *(
                variant
                for rate in ("2.0e-3", "4.0e-3", "1.0e-3")
                for variant in puma_and_uniform("tinygsm_mini", f", rate {rate}", (f"training.learning_rate={rate}",))
            ),
            Variant("puma, rate 2.0e-3, pool of 16", "tinygsm_mini_puma.yaml", (POOL_OF_16,)),
            Variant("puma, rate 2.0e-3, no threshold", "tinygsm_mini_puma.yaml", (NO_THRESHOLD,)),
            Variant("puma, rate 2.0e-3, random order", "tinygsm_mini_puma.yaml", (RANDOM_ORDER,)),
        ),
        baseline="uniform, rate 2.0e-3",
        overrides=("training.max_steps=1500", "training.eval_every=125"),
        targets=(0.5, 0.9),
        seeds=(0,),
    ),
    "word_problems_medium": Experiment(
        "Word problems of two to four operations with numbers to 99, from random weights: PUMA and uniform masks, each "
        "predicting a position's own token or, shifted, the next one",
        (
            *puma_and_uniform("tinygsm_mini_medium", ", unshifted", (UNSHIFTED,), puma=(ONE_BATCH,)),
            *puma_and_uniform("tinygsm_mini_medium", ", shifted", (SHIFTED,), FIVE_SEEDS, puma=(ONE_BATCH,)),
            *(
                variant
                for rate in ("2.0e-3", "5.0e-4")
                for variant in puma_and_uniform(
                    "tinygsm_mini_medium",
                    f", shifted, rate {rate}",
                    (SHIFTED, f"training.learning_rate={rate}"),
                    seeds=(0,),
                    puma=(ONE_BATCH,),
                )
            ),
            *(
                Variant(f"puma, shifted, {change}", "tinygsm_mini_medium_puma.yaml", (SHIFTED, *overrides), seeds=seeds)
                for change, overrides, seeds in (
                    ("no threshold", (NO_THRESHOLD, ONE_BATCH), None),
                    *((f"pool of {n}", (f"objective.pool_batches={n}",), FIVE_SEEDS) for n in (2, 4)),
                    ("pool of 16", (POOL_OF_16,), FIVE_SEEDS),
                    ("pool of 16, no threshold", (POOL_OF_16, NO_THRESHOLD), None),
                    ("random order", (RANDOM_ORDER, ONE_BATCH), None),
                    ("random order, no threshold", (RANDOM_ORDER, NO_THRESHOLD, ONE_BATCH), FIVE_SEEDS),
                    ("random order, pool of 16", (RANDOM_ORDER, POOL_OF_16), None),
                    # Masks that do not depend on the model.
                    ("random order, pool of 16, no threshold", (RANDOM_ORDER, POOL_OF_16, NO_THRESHOLD), FIVE_SEEDS),
                    ("redrawn, pool of 16, no threshold", (REDRAWN, POOL_OF_16, NO_THRESHOLD), FIVE_SEEDS),
                    ("redrawn, no threshold", (REDRAWN, ONE_BATCH, NO_THRESHOLD), None),
                )
            ),
            Variant(
                "uniform, shifted, low discrepancy", "tinygsm_mini_medium_baseline.yaml", (SHIFTED, LOW_DISCREPANCY)
            ),
            # As many distinct problems as a pool of 16 without a threshold draws in 4,000 updates, and fewer.
            *(
                Variant(
                    f"uniform, shifted, {50_000 - n_held_out:,} problems",
                    "tinygsm_mini_medium_baseline.yaml",
                    (SHIFTED, f"data.n_held_out={n_held_out}"),
                )
                for n_held_out in (33_500, 45_500)
            ),
            Variant(
                "autoregressive",
                "tinygsm_mini_medium_baseline.yaml",
                ("objective.name=autoregressive", "validation.tokens_per_step=[1]"),
            ),
        ),
        baseline="uniform, shifted",
        overrides=("training.compile=true",),
        targets=(0.1, 0.9),
        shown=("puma, shifted, pool of 16", "puma, shifted", "uniform, shifted"),
    ),
    "word_problems_medium_long": Experiment(
        "The same shifted models with 12,000 updates: does uniform masking find what PUMA finds?",
        puma_and_uniform("tinygsm_mini_medium", puma=(POOL_OF_16,)),
        baseline="uniform",
        overrides=("training.compile=true", SHIFTED, "training.max_steps=12000"),
        targets=(0.1, 0.9),
    ),
    "word_problems_block": Experiment(
        "Easy word problems in two blocks: PUMA and uniform masks with each of the two attention layouts",
        (*in_blocks("tinygsm_mini", "prefix"), *in_blocks("tinygsm_mini", "block_causal")),
        baseline="uniform, prefix",
        overrides=("training.max_steps=2000", "training.eval_every=125"),
        targets=(0.5, 0.9),
    ),
    "word_problems_medium_block": Experiment(
        "Medium word problems in three blocks, each with its clean prefix: PUMA and uniform masks",
        in_blocks("tinygsm_mini_medium", "prefix", (16, 1)),
        baseline="uniform, prefix",
        overrides=("training.compile=true", SHIFTED),
        targets=(0.1, 0.9),
    ),
    "word_problems_from_ar": Experiment(
        "Word problems from an autoregressive model: PUMA and uniform masks",
        from_autoregressive("tinygsm_mini"),
        baseline="uniform from AR",
        overrides=("training.max_steps=1000", "training.eval_every=25"),
    ),
    "word_problems_hard": Experiment(
        "Hard word problems (two to four operations, numbers to 999, one token per digit) from an autoregressive model",
        (
            *from_autoregressive("tinygsm_mini_hard"),
            Variant(
                "puma from AR, pool of 16",
                "tinygsm_mini_hard_puma_from_arm.yaml",
                (POOL_OF_16,),
                starts_from="autoregressive",
            ),
            *(
                Variant(
                    f"{name} from AR, rate 2.0e-3",
                    "tinygsm_mini_hard_puma_from_arm.yaml",
                    ("training.learning_rate=2.0e-3", f"objective.name={name}"),
                    seeds=(0,),
                    starts_from="autoregressive",
                )
                for name in ("puma", "uniform")
            ),
        ),
        baseline="uniform from AR",
        targets=(0.5, 0.9),
        shown=("autoregressive", "puma from AR", "puma from AR, pool of 16", "uniform from AR"),
    ),
    "word_problems_hard_random": Experiment(
        "Hard word problems from random weights: PUMA and uniform masks",
        (
            *puma_and_uniform(
                "tinygsm_mini_hard",
                ", unshifted, rate 2.0e-3",
                ("training.learning_rate=2.0e-3", UNSHIFTED),
                seeds=(0,),
                puma=(ONE_BATCH,),
            ),
            *puma_and_uniform(
                "tinygsm_mini_hard",
                ", unshifted, rate 1.0e-3",
                (*HARD_AT_1E_3, UNSHIFTED),
                seeds=(0,),
                puma=(ONE_BATCH,),
            ),
            *puma_and_uniform(
                "tinygsm_mini_hard", ", shifted, rate 1.0e-3", (*HARD_AT_1E_3, SHIFTED), puma=(ONE_BATCH,)
            ),
            Variant(
                "puma, shifted, rate 1.0e-3, pool of 16",
                "tinygsm_mini_hard_puma.yaml",
                (*HARD_AT_1E_3, SHIFTED, POOL_OF_16),
            ),
            *(
                Variant(
                    f"puma, shifted, rate 1.0e-3, {order}pool of 16, no threshold",
                    "tinygsm_mini_hard_puma.yaml",
                    (*HARD_AT_1E_3, SHIFTED, *overrides, POOL_OF_16, NO_THRESHOLD),
                )
                for order, overrides in (("", ()), ("random order, ", (RANDOM_ORDER,)), ("redrawn, ", (REDRAWN,)))
            ),
            Variant(
                "uniform, shifted, rate 1.0e-3, low discrepancy",
                "tinygsm_mini_hard_baseline.yaml",
                (*HARD_AT_1E_3, SHIFTED, LOW_DISCREPANCY),
                seeds=(0,),
            ),
        ),
        baseline="uniform, shifted, rate 1.0e-3",
        overrides=("training.max_steps=6000", "training.eval_every=500"),
        targets=(0.1, 0.9),
        shown=("puma, shifted, rate 1.0e-3, pool of 16", "puma, shifted, rate 1.0e-3", "uniform, shifted, rate 1.0e-3"),
    ),
    "addition": Experiment(
        "Addition of numbers of up to 12 digits: PUMA, uniform masks and a mixture, units first and last",
        (
            *(
                Variant(f"{name}, {digits} first", f"addition_{file}.yaml", (f"data.order={order}", *overrides))
                for order, digits in (("least_first", "units"), ("most_first", "highest"))
                for name, file, overrides in (
                    ("uniform", "baseline", ()),
                    ("puma", "puma", ()),
                    ("mixture", "puma", ("objective.uniform_fraction=0.25",)),
                )
            ),
            Variant(
                "puma, units first, pool of 16, tau 0.9",
                "addition_puma.yaml",
                ("data.order=least_first", POOL_OF_16, "objective.collapse_threshold=0.9"),
            ),
            Variant(
                "puma, highest first, pool of 16, tau 0.9",
                "addition_puma.yaml",
                ("data.order=most_first", POOL_OF_16, "objective.collapse_threshold=0.9"),
            ),
            Variant(
                "puma, units first, pool of 16",
                "addition_puma.yaml",
                ("data.order=least_first", POOL_OF_16),
            ),
            *(
                Variant(
                    f"puma, units first, {pool}random order",
                    "addition_puma.yaml",
                    ("data.order=least_first", *overrides, RANDOM_ORDER),
                )
                for pool, overrides in (("", ()), ("pool of 16, ", (POOL_OF_16,)))
            ),
        ),
        baseline="uniform, units first",
        shown=(
            "uniform, units first",
            "puma, units first",
            "puma, units first, pool of 16",
            "puma, units first, pool of 16, tau 0.9",
            "puma, units first, random order",
            "puma, units first, pool of 16, random order",
        ),
        overrides=("training.max_steps=1500", "training.learning_rate=2.0e-3"),
        targets=(0.5, 0.9),
    ),
    "addition_rates": Experiment(
        "Addition at lower learning rates than 2e-3: PUMA, its pool and order, and uniform masks",
        tuple(
            Variant(
                f"{name}, rate {rate}", f"addition_{file}.yaml", (f"training.learning_rate={rate}", *overrides), seeds
            )
            for rate, seeds, variants in (
                (
                    "1.0e-3",
                    None,
                    (
                        ("puma", "puma", ()),
                        ("uniform", "baseline", ()),
                        # As many distinct sums as PUMA draws in the same updates: K = 8 times fewer.
                        ("uniform, 12,000 sums", "baseline", ("data.n_train=12000",)),
                        ("puma, pool of 16", "puma", (POOL_OF_16,)),
                        ("puma, random order", "puma", (RANDOM_ORDER,)),
                    ),
                ),
                (
                    "1.0e-3",
                    (0, 1, 2),
                    (
                        ("puma, tau 0.9", "puma", ("objective.collapse_threshold=0.9",)),
                        ("puma, highest first", "puma", ("data.order=most_first",)),
                        ("uniform, highest first", "baseline", ("data.order=most_first",)),
                    ),
                ),
                ("5.0e-4", (0, 1, 2), (("puma", "puma", ()), ("uniform", "baseline", ()))),
            )
            for name, file, overrides in variants
        ),
        baseline="uniform, rate 1.0e-3",
        overrides=("data.order=least_first", "training.max_steps=1500"),
        targets=(0.5, 0.9),
        seeds=FIVE_SEEDS,
        shown=(
            "puma, rate 1.0e-3",
            "uniform, rate 1.0e-3",
            "uniform, 12,000 sums, rate 1.0e-3",
            "puma, pool of 16, rate 1.0e-3",
            "puma, random order, rate 1.0e-3",
        ),
    ),
    "addition_20_digits": Experiment(
        "Addition of numbers of up to 20 digits, units first: PUMA and uniform masks",
        (
            Variant("puma", "addition_puma.yaml"),
            Variant("uniform", "addition_baseline.yaml"),
            Variant("puma, pool of 16", "addition_puma.yaml", (POOL_OF_16,)),
            Variant("puma, random order", "addition_puma.yaml", (RANDOM_ORDER,)),
            Variant("uniform, 16,000 sums", "addition_baseline.yaml", ("data.n_train=16000",), seeds=(0, 1, 2)),
            *(
                Variant(f"puma, {change}", "addition_puma.yaml", overrides, seeds=(0, 1, 2))
                for change, overrides in (
                    ("pool of 16, random order", (POOL_OF_16, RANDOM_ORDER)),
                    ("uniform fraction 0.25", ("objective.uniform_fraction=0.25",)),
                    ("tau 0.9", ("objective.collapse_threshold=0.9",)),
                    ("rate 5.0e-4", ("training.learning_rate=5.0e-4",)),
                )
            ),
            Variant(
                "puma, K 1 until 1,000, then 8", "addition_puma.yaml", k_schedule((1, 0), (8, 1000)), seeds=(0, 1, 2)
            ),
            Variant(
                "uniform, rate 5.0e-4", "addition_baseline.yaml", ("training.learning_rate=5.0e-4",), seeds=(0, 1, 2)
            ),
        ),
        baseline="uniform",
        overrides=("data.max_digits=20", "model.learned_positions=63"),
        targets=(0.5, 0.9),
        seeds=FIVE_SEEDS,  # seeds differ by up to 85 points
        shown=("puma", "uniform", "puma, pool of 16", "puma, random order", "uniform, 16,000 sums"),
    ),
}
