"""Fill in masked tokens with a trained model, most confident positions first.

`sample` fills whole batches without a loop over rows. As a command it reads a checkpoint:

    python sampling.py --checkpoint runs/sudoku_puma --puzzle 530070000600195000098000060800060003400803001...
    python sampling.py --checkpoint runs/tinygsm_puma --prompt "Anna has 5 books and buys 3 more. How many has she now?"

Shapes: B rows, b of them in a pass, L positions.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from config import Confidence, Config, SudokuSettings
from model.hub import load_model
from runtime.distributed import autocast, autocast_dtype, start_world
from samplers.sampler import sampler_of
from samplers.step import Samples


def parse_puzzle(text: str, size: int) -> list[int]:
    """Cells of a puzzle written as size^2 characters, `.` or `0` where empty.

    Raises:
        ValueError: another length or another character.
    """
    digits = {".": 0} | {str(digit): digit for digit in range(size + 1)}
    wrong = sorted(set(text) - set(digits))
    if len(text) != size * size or wrong:
        detail = f"holds {wrong}" if wrong else f"has {len(text)} cells"
        raise ValueError(f"puzzle {text!r} {detail}: a {size}x{size} puzzle is {size * size} of . and 0 to {size}")
    return [digits[character] for character in text]


def format_boards(puzzle: Tensor, solution: Tensor, order: Tensor, size: int) -> str:
    """The solved board beside the order in which its cells were filled (all [size * size]); clues stand in brackets."""
    lines = [f"{'solution, [clues]':<{4 * size}}  filled at step (. = clue)"]
    for row in range(size):
        cells = range(row * size, (row + 1) * size)
        left = "".join(f"[{solution[i]}] " if puzzle[i] else f" {solution[i]}  " for i in cells)
        right = "".join(f"{int(order[i]) or '.':>4}" for i in cells)
        lines.append(f"{left:<{4 * size}}  {right}")
    return "\n".join(lines)


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Let a trained model solve a puzzle or write a program.")
    parser.add_argument("--checkpoint", required=True, help="run directory or checkpoint folder")
    question = parser.add_mutually_exclusive_group(required=True)
    question.add_argument("--puzzle", help="Sudoku: cells row by row, . or 0 where empty")
    question.add_argument("--prompt", help="TinyGSM: a question; the program and its value are printed")
    parser.add_argument("--confidence", default="top_prob", choices=get_args(Confidence))
    parser.add_argument("--tokens-per-step", type=int, default=1)
    parser.add_argument("--threshold", type=float, help="also fill all positions above this probability")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args(arguments)
    if options.tokens_per_step < 1:
        parser.error(f"--tokens-per-step must be at least 1, got {options.tokens_per_step}")
    if options.threshold is not None and not 0 < options.threshold < 1:
        parser.error(f"--threshold must lie between 0 and 1, got {options.threshold}")
    if not 0 <= options.temperature < math.inf:
        parser.error(f"--temperature must be 0 or more, got {options.temperature}")
    return options


def read_question(options: argparse.Namespace, config: Config) -> tuple[Tensor, int | None, Callable[[Samples], str]]:
    """What the command line asks, as a row int64 [1, L], the token that ends an answer, and how it is shown.

    Raises:
        ValueError: it is no question for this model.
    """
    if isinstance(config.data, SudokuSettings):
        if options.puzzle is None:
            raise ValueError("this is a Sudoku model: give it a --puzzle, not a --prompt")
        size, n_cells = config.data.size, config.data.size**2
        puzzle = torch.tensor(parse_puzzle(options.puzzle, size))
        if config.data.layout == "in_place":
            xt = puzzle.masked_fill(puzzle == 0, config.mask_id)
        else:
            xt = torch.cat([puzzle, torch.full_like(puzzle, config.mask_id)])

        def show_board(result: Samples) -> str:
            return format_boards(puzzle, result.tokens[0, -n_cells:], result.order[0, -n_cells:], size)

        return xt[None], None, show_board
    if options.prompt is None:
        raise ValueError("this is a TinyGSM model: give it a --prompt, not a --puzzle")
    # Sudoku needs none of these, and they are slow to import.
    from data.load import find_tokenizer
    from data.text import decode_programs, encode_prompts, prompt_fits
    from grader.grade import extract_program
    from grader.sandbox import run_programs

    tokenizer = find_tokenizer(config.data)
    ids = encode_prompts(tokenizer.backend_tokenizer, [options.prompt])[0]
    if not prompt_fits(len(ids), config.data.max_len):
        raise ValueError(f"the prompt has {len(ids)} tokens, which leaves no room in {config.data.max_len}")
    xt = torch.full((1, config.data.max_len), config.mask_id)
    xt[0, : len(ids)] = torch.tensor(ids)

    def show_program(result: Samples) -> str:
        text = decode_programs(tokenizer, result.tokens.numpy(), (xt != config.mask_id).numpy())[0]
        program = extract_program(text)
        if program is None:
            return f"{text}\n\nno program"
        outcome = run_programs([program], n_workers=1)[0]
        value = f"returns {outcome.value}" if outcome.status == "ok" else f"{outcome.status}: {outcome.message}"
        return f"{text}\n\n{value}"

    return xt, tokenizer.eos_token_id, show_program


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    options = _parse_arguments(arguments)
    try:
        device = start_world(options.device).device
        rule = {
            "confidence": f"[{options.confidence}]",
            "tokens_per_step": f"[{options.tokens_per_step}]",
            "threshold": "null" if options.threshold is None else options.threshold,
        }
        # As settings, so that a rule which the model cannot be sampled by is refused.
        model, config = load_model(options.checkpoint, [f"validation.{key}={value}" for key, value in rule.items()])
        xt, eos_id, show = read_question(options, config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    with autocast(device, autocast_dtype(config.training.precision, device)):
        result = sampler_of(config, eos_id)(
            model.to(device),
            xt.to(device),
            config.mask_id,
            confidence=options.confidence,
            tokens_per_step=options.tokens_per_step,
            threshold=options.threshold,
            temperature=options.temperature,
            seed=options.seed,
        )
    print(show(Samples(result.tokens.cpu(), result.order.cpu(), result.nfe.cpu())))
    print(f"{int(result.nfe[0])} network forward evaluations")


if __name__ == "__main__":
    main()
