"""Sample from a trained model: solve a Sudoku puzzle or write a program.

    python sampling.py --checkpoint runs/sudoku_puma --puzzle 530070000600195000098000060800060003400803001...
    python sampling.py --checkpoint runs/tinygsm_puma --prompt "Anna has 5 books and buys 3 more. How many has she now?"

In a notebook:

    from sampling import load, sample

    trained = load("runs/sudoku_mini_puma")
    for answer in sample(trained, [trained.data.example()]):
        print(answer.text, answer.nfe)

The samplers are in `samplers/`; the data set (`data/`) defines questions and answers.

Shapes: L positions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from config import DEFAULT_RULE, Config, SamplingRule
from data.dataset import DataSet
from data.foreign import CommandParser, ends_with_message, whole_number
from samplers.options import add_rule_options, rule_of

if TYPE_CHECKING:
    import torch

    from model.transformer import Transformer

DEVICES = ("auto", "cpu", "cuda")

# torch takes seconds to import, so functions import it when they need it: `--help` and wrong options answer at once.


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to sample from."""

    model: Transformer
    config: Config
    data: DataSet
    device: torch.device


@dataclass(frozen=True)
class Answer:
    """A model's answer to one question."""

    text: str  # formatted for a terminal
    tokens: np.ndarray  # int64 [L]
    order: np.ndarray  # int64 [L], step at which a position was filled, from 1; 0 for given positions
    nfe: int  # network forward evaluations


def load(path: str, device: str = "auto") -> Trained:
    """Load a run directory (its newest checkpoint) or a checkpoint folder; averaged weights if there are any.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: there is no usable checkpoint, or `device` is another one, or `cuda` and there is no GPU.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r} must be one of {', '.join(DEVICES)}")
    from model.hub import load_model
    from runtime.distributed import start_world

    chosen = start_world(device).device
    model, config = load_model(path)
    return Trained(model.to(chosen), config, config.open_data(), chosen)


def sample(
    trained: Trained, questions: Sequence[str], rule: SamplingRule = DEFAULT_RULE, *, seed: int = 0
) -> list[Answer]:
    """Answer questions: Sudoku puzzles, word problems or additions.

    All questions are one batch.

    Args:
        questions: in the form that the data set's `encode` takes.
        rule: which positions are filled first, and how many per forward pass.
        seed: of the random numbers, used by the temperature and the confidence `random`.

    Raises:
        ValueError: a question is invalid, or the rule does not work with this model.
    """
    import torch

    from runtime.distributed import autocast, autocast_dtype
    from samplers.build import build_sampler

    config, data = trained.config, trained.data
    rule.check(causal=config.causal)
    if isinstance(questions, str):
        raise ValueError("questions must be a list of texts, got one text")
    if not questions:
        return []
    prompts = np.stack([data.encode(question) for question in questions])  # [B, L]
    with autocast(trained.device, autocast_dtype(config.training.precision, trained.device)):
        result = build_sampler(config, data.eos_id)(
            trained.model, torch.from_numpy(prompts).to(trained.device), config.mask_id, rule, seed=seed
        )
    rows = zip(prompts, result.tokens.cpu().numpy(), result.order.cpu().numpy(), result.nfe.tolist(), strict=True)
    return [
        Answer(data.show(prompt, tokens, order), tokens, order, n_passes) for prompt, tokens, order, n_passes in rows
    ]


def _parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, SamplingRule]:
    parser = CommandParser(description="Solve a puzzle or write a program with a trained model.")
    parser.add_argument("--checkpoint", required=True, help="run directory or checkpoint folder")
    question = parser.add_mutually_exclusive_group(required=True)
    question.add_argument("--puzzle", help="Sudoku: cells row by row, . or 0 for empty cells")
    question.add_argument(
        "--prompt",
        help="a question in words, to which TinyGSM prints a program and the value that it returns; or 123+456",
    )
    add_rule_options(parser)
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0, help="from 0 to 2^32 - 1")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    options = parser.parse_args(arguments)
    return options, rule_of(parser, options)


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    options, rule = _parse_arguments(arguments)
    with ends_with_message():
        trained = load(options.checkpoint, options.device)
        option = trained.data.question_option
        question = getattr(options, option)
        if question is None:
            raise ValueError(f"this model was trained on {trained.config.data.dataset}: use --{option}")
        (answer,) = sample(trained, [question], rule, seed=options.seed)
    print(answer.text)
    print(f"{answer.nfe} network forward evaluations")


if __name__ == "__main__":
    main()
