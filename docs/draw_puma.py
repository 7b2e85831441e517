"""Draw the figure of README: masks of the baseline, and masks of the PUMA pool of a trained model (`top_prob`).

    python train.py --config yaml_files/sudoku_mini_puma.yaml --run-dir RUN_DIR model.vocab_size=6 data.size=4 \
        model.learned_positions=16 data.n_train=20000 data.min_clues=4 data.max_clues=5 objective.n_stages=6 \
        objective.collapse_threshold=null training.max_steps=600 validation.n_examples=200
    python -m docs.draw_puma RUN_DIR --out docs/puma.png     # any run of `puma` (not `block_puma`) on small boards

Shapes: L positions, C cells of the solution.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from base.commands import CommandParser, ends_with_message, whole_number
from config import PumaSettings
from data.sudoku import SudokuData
from model.hub import load_model
from progressive import reveal_next_stage
from runtime.figures import save_figure
from unmasking import mask_uniformly, row_weights

HIDDEN, SHOWN, FRESH, EDGE = "#d5dae3", "#ffffff", "#f6c667", "#5b6577"


@torch.no_grad()
def trajectory(run_dir: Path, row: int, seed: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """One test puzzle with the masks of the pool and of the baseline.

    Returns:
        x0 (int64 [C]), clues (bool [C]), masks at each step of the pool, and as many random masks (each bool [C]).

    Raises:
        ValueError: the run is not one of `puma` on boards, or has no such test puzzle.
    """
    loaded = load_model(str(run_dir))
    model, config = loaded.model, loaded.config
    data, settings = config.open_data().validation, config.objective
    if not isinstance(settings, PumaSettings) or not isinstance(data, SudokuData):
        raise ValueError(f"{run_dir}: {settings.name} on {config.data.dataset}: name a run of puma on sudoku")
    if row >= len(data):
        raise ValueError(f"--row {row}: there are {len(data)} test puzzles, the first is 0")
    tokens, prompt_mask = (torch.from_numpy(part) for part in data.rows(np.array([row])))
    maskable, generator = ~prompt_mask, torch.Generator().manual_seed(seed)
    n_cells = data.n_cells
    masked, stage = maskable.clone(), torch.zeros(1, dtype=torch.long)
    pool = []
    n_stages = settings.n_stages_at(0)
    for _ in range(n_stages):
        pool.append(masked[0, -n_cells:])
        scores = model(tokens.masked_fill(masked, data.mask_id), tokens, row_weights(masked, 1))
        masked, stage, _ = reveal_next_stage(
            masked,
            stage,
            maskable,
            scores.confidence,
            scores.max_log_prob,
            n_stages=n_stages,
            collapse_threshold=None,
            generator=generator,
        )
    drawn = [mask_uniformly(maskable, generator)[0, -n_cells:] for _ in pool]
    return tokens[0, -n_cells:], torch.from_numpy(data.puzzles[row] > 0), pool, drawn


def draw(run_dir: Path, row: int, seed: int, out: Path) -> None:
    """Write the figure."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    x0, clues, pool, drawn = trajectory(run_dir, row, seed)
    size = round(len(x0) ** 0.5)
    figure = Figure(figsize=(1.55 * len(pool), 4.15), layout="constrained")
    halves = figure.add_gridspec(2, 1)
    titles = (
        "baseline: each update masks random cells, of new boards; here one board six times (bold: clues, never masked)",
        "PUMA: update by update, the most confident cells are revealed first (in yellow)",
    )
    for line, (masks, title) in enumerate(zip((drawn, pool), titles, strict=True)):
        half = figure.add_subfigure(halves[line])
        half.suptitle(title, x=0.01, ha="left", fontsize=11)
        plots = half.subplots(1, len(masks))
        for step, (mask, plot) in enumerate(zip(masks, plots, strict=True)):
            fresh = masks[step - 1] & ~mask if line == 1 and step else torch.zeros_like(mask)
            for cell in range(len(x0)):
                x, y = cell % size, cell // size
                color = HIDDEN if mask[cell] else FRESH if fresh[cell] else SHOWN
                plot.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor=EDGE, linewidth=0.8))
                if not mask[cell]:
                    weight = "bold" if clues[cell] else "normal"
                    plot.text(x + 0.5, y + 0.5, int(x0[cell]), ha="center", va="center", weight=weight, fontsize=12)
            plot.set(xlim=(-0.05, size + 0.05), ylim=(size + 0.05, -0.05), aspect="equal", xticks=[], yticks=[])
            plot.set_xlabel(f"update {step + 1}", labelpad=5)
            for side in plot.spines.values():
                side.set_visible(False)
    save_figure(figure, out, 110, pad_inches=0.08, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = CommandParser(description="Draw the figure of README that explains PUMA.")
    parser.add_argument("run_dir", type=Path, help="run directory of a small Sudoku model")
    parser.add_argument("--row", type=whole_number(0), default=0, help="index of the test puzzle")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/puma.png"))
    options = parser.parse_args(arguments)
    with ends_with_message():
        draw(options.run_dir, options.row, options.seed, options.out)


if __name__ == "__main__":
    main()
