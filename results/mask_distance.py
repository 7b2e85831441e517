"""Measure how far the masks of training are from the masks that the sampler visits, over training and by stage.

    python train.py --config yaml_files/sudoku_mini_puma.yaml --run-dir runs/mask_distance/puma \\
        training.save_every=125 training.keep_checkpoints=20
    python train.py --config yaml_files/sudoku_mini_baseline.yaml --run-dir runs/mask_distance/uniform \\
        training.save_every=125 training.keep_checkpoints=20
    python -m results.mask_distance runs/mask_distance/puma runs/mask_distance/uniform
    python -m results.mask_distance --draw  # only the table and figure, from existing records

PUMA is meant to train on the masks that generation visits, uniform masking mostly on masks that it never visits (arXiv
2602.10314). All checkpoints of the runs are measured, each once: the same command continues. The output is
records.json, README.md and curves.png in results/mask_distance/. Runs that an earlier command has measured stay in it;
a run is known by the name of its folder.

Definitions, for a row (x0, M) with n maskable positions, of which M masks m and reveals r = n - m:

- Training rows are those on which the objective trains next at the checkpoint. `puma`: a random sample of the pool,
  which holds the batches of the next `pool_batches` updates. `uniform`, and any other objective that masks whole rows:
  the batches that it draws next (`draw_masks`), one after the other without an update in between.
- The sampler starts from the prompt of the same row and fills one position per step, the most confident first, with the
  averaged weights of the checkpoint. It visits one mask S_j for each number j of masked positions. There are two paths:
  `sampler` writes the model's own tokens, as in generation; after a wrong token it continues from a wrong row.
  `teacher_forced` chooses positions in the same way and writes the true tokens, as the PUMA pool does when it reveals
  one position per update. So model errors contribute to the distance from `sampler` alone. What remains in the distance
  from `teacher_forced` comes from the pool: a row enters it with random positions revealed, reveals many positions per
  visit, and was advanced by the weights of earlier updates.
- The distance of M is d = |M - S_m|, the number of positions that M masks and S_m reveals. It equals |S_m - M|: d swaps
  turn one mask into the other. The Hamming distance is 2 d. Every other visited mask differs from M in at least d
  positions.
- A random mask of m out of n positions is at distance m r / n on average; its distance is hypergeometric. The relative
  distance of a set of rows is the sum of their distances over the sum of these averages: 0 for visited masks, 1 for
  masks drawn without regard to the model. Rows with r = 0 or m = n, where only one mask exists, add 0 to both sums.
- The share within k swaps is the share of rows with d <= k. Where few positions are masked or few revealed, most random
  masks are within k too, so their expected share is reported beside it.
- Stage i of 8 contains the rows with revealed ratio r / n in [i / 8, (i + 1) / 8), whatever the objective and K.

Shapes: B rows, L positions.
"""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Iterator, Sequence
from math import comb
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm
from typing_extensions import NotRequired, TypedDict

from base.commands import CommandParser, ends_with_message, whole_number
from base.files import write_text
from config import DEFAULT_RULE, Config, ProgressiveSettings
from data.dataset import SequenceData
from model.transformer import Transformer
from objective import Objective
from progressive import PumaObjective, stage_of
from progressive_block import MaskedObjective
from results.records import (
    Number,
    Provenance,
    Text,
    check_folder,
    check_masks_rows,
    named_folder,
    provenance,
    provenance_in_words,
    read_note,
    read_records,
)
from runtime.checkpoint import Checkpoint, open_checkpoint, step_folders
from runtime.distributed import World, autocast, autocast_dtype, start_world
from runtime.figures import COLORS, save_figure, set_grid
from runtime.final import Share
from runtime.history import ROOT
from runtime.machine import device_name
from runtime.markdown import markdown_table
from samplers.build import build_sampler
from samplers.step import Filling
from training.run import build_run, restore_run

N_STAGES = 8  # of the table; need not be the K of the runs
SWAPS = (0, 1, 2, 4, 8)
PATHS = {"sampler": "own tokens", "teacher_forced": "true tokens"}
DRAWN_SWAPS = 4  # in the figure


class Masks(TypedDict):
    """Sums over the rows of a stage, for one kind of masks."""

    distance: Number
    within: Annotated[list[Number], Field(min_length=len(SWAPS), max_length=len(SWAPS))]


class Stage(TypedDict):
    """What `summarize` gives for a stage: the number of rows, and random masks and each of `PATHS`."""

    n: Number
    random: Masks
    sampler: Masks
    teacher_forced: Masks


class Point(TypedDict):
    """One checkpoint."""

    step: Number
    rows_right: Share
    tokens_right: Share
    stages: Annotated[list[Stage], Field(min_length=N_STAGES, max_length=N_STAGES)]


class MeasuredRun(TypedDict):
    """One run in the records."""

    label: Text
    masks: Text
    config: dict[str, Any]
    points: Annotated[list[Point], Field(min_length=1)]
    measured: NotRequired[Provenance]  # if by an earlier command than the last one


class Records(Provenance):
    """Content of records.json."""

    rows: int
    seed: int
    runs: Annotated[list[MeasuredRun], Field(min_length=1)]


class Rows(NamedTuple):
    """Training rows and their masks."""

    x0: Tensor  # int64 [B, L]
    maskable: Tensor  # bool [B, L]
    masked: Tensor  # bool [B, L]


def training_rows(objective: Objective, n_rows: int, seed: int, step: int) -> Rows:
    """`n_rows` rows on which `objective` trains next; draws from its stream and generator if it has no PUMA pool.

    Args:
        seed: of the sample of the pool.
        step: the update.

    Raises:
        ValueError: the pool has fewer rows, or the objective masks nothing.
    """
    if isinstance(objective, PumaObjective):
        pool = objective.pool
        if n_rows > len(pool.rows.x0):
            raise ValueError(f"--rows {n_rows}: the pool has {len(pool.rows.x0)} rows; set at most that")
        chosen = torch.randperm(len(pool.rows.x0), generator=torch.Generator().manual_seed(seed))[:n_rows]
        chosen = chosen.to(pool.rows.x0.device)
        return Rows(pool.rows.x0[chosen], pool.rows.maskable[chosen], pool.rows.masked[chosen])
    if not isinstance(objective, MaskedObjective):
        raise ValueError(
            f"{type(objective).__name__} is no progressive_block.MaskedObjective: it has no masks to measure"
        )
    batches = []
    for number in range(0, n_rows, objective.n_rows):
        batches.append(objective.draw_masks(step + number // objective.n_rows))
        objective.prefetch()
    return Rows(*(torch.cat(parts)[:n_rows] for parts in zip(*batches, strict=True)))


@torch.no_grad()
def sampler_orders(model: Transformer, config: Config, x0: Tensor, maskable: Tensor) -> dict[str, Tensor]:
    """The step at which each path of `PATHS` fills a position, int64 [B, L], 0 for prompts; and the `tokens` sampled.

    Args:
        x0: int64 [B, L].
        maskable: bool [B, L].
    """
    xt = x0.masked_fill(maskable, config.mask_id)
    with autocast(xt.device, autocast_dtype(config.training.precision, xt.device)):
        samples = build_sampler(config)(model, xt, config.mask_id, DEFAULT_RULE)
        forced, number = Filling(xt, config.mask_id, DEFAULT_RULE, seed=0, row_ids=None, record=None), 0
        while len(rows := forced.unfinished(0, xt.shape[1])):
            number += 1
            forced.make_pass(model, rows, 0, xt.shape[1], number=number)
            forced.tokens = torch.where(forced.tokens == config.mask_id, config.mask_id, x0)
    return {"sampler": samples.order, "teacher_forced": forced.order, "tokens": samples.tokens}


def swap_distance(masked: Tensor, maskable: Tensor, order: Tensor) -> Tensor:
    """Distance d of each mask from the mask with the same count that the sampler visits; int64 [B].

    Args:
        masked: bool [B, L].
        maskable: bool [B, L].
        order: int64 [B, L], step at which the sampler fills a position: each of 1..n_maskable once in a row, 0 for
            prompts.
    """
    n_revealed = (maskable & ~masked).sum(1, keepdim=True)  # [B, 1]
    return (masked & (order <= n_revealed)).sum(1)


def random_distance(n_masked: Tensor, n_maskable: Tensor) -> Tensor:
    """Expected distance of a random mask with the same count; float64 of the shape of the arguments (int64)."""
    return n_masked * (n_maskable - n_masked) / n_maskable.double()


def random_share(n_masked: int, n_maskable: int, n_swaps: int) -> float:
    """Probability that a random mask is within `n_swaps` of a given mask with the same count."""
    n_revealed = n_maskable - n_masked
    ways = sum(comb(n_masked, n) * comb(n_revealed, n) for n in range(n_swaps + 1))
    return ways / comb(n_maskable, n_masked)


def summarize(rows: Rows, orders: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Sums over the rows of each stage: `n`, and for random masks and each path `distance` and `within` SWAPS."""
    n_masked, n_maskable = rows.masked.sum(1), rows.maskable.sum(1)
    stage = stage_of(n_maskable - n_masked, n_maskable, N_STAGES)
    distances = {path: swap_distance(rows.masked, rows.maskable, orders[path]) for path in PATHS}
    expected = random_distance(n_masked, n_maskable)
    shares = [
        [random_share(*counts, n_swaps) for n_swaps in SWAPS]
        for counts in zip(n_masked.tolist(), n_maskable.tolist(), strict=True)
    ]
    within = torch.tensor(shares, dtype=torch.float64, device=stage.device)  # [B, len(SWAPS)]
    sums = []
    for number in range(N_STAGES):
        members = stage == number
        entry: dict[str, Any] = {
            "n": int(members.sum()),
            "random": {
                "distance": round(float(expected[members].sum()), 3),
                "within": [round(value, 3) for value in within[members].sum(0).tolist()],
            },
        }
        for path, distance in distances.items():
            own = distance[members]
            entry[path] = {"distance": int(own.sum()), "within": [int((own <= n_swaps).sum()) for n_swaps in SWAPS]}
        sums.append(entry)
    return sums


def readable_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """All undamaged checkpoints of a run, oldest first; warns about the others.

    Raises:
        ValueError: there is none, or the run's objective has no comparable masks.
    """
    checkpoints = []
    for path in reversed(step_folders(run_dir)):
        try:
            checkpoints.append(open_checkpoint(path))
        except ValueError as error:
            warnings.warn(f"{error}; it is left out", RuntimeWarning, stacklevel=2)
    if not checkpoints:
        raise ValueError(f"{run_dir} holds no usable checkpoint: name a run directory")
    settings = checkpoints[-1].config().objective
    check_masks_rows(run_dir, settings)
    if isinstance(settings, ProgressiveSettings) and settings.uniform_fraction:
        raise ValueError(
            f"{run_dir}: objective.uniform_fraction {settings.uniform_fraction} mixes two kinds of masks; "
            "name a run with 0"
        )
    return checkpoints


def measure(
    checkpoint: Checkpoint, train: SequenceData, world: World, n_rows: int, seed: int, bar: tqdm
) -> dict[str, Any]:
    """One point of the records: the sums of `summarize` at a checkpoint, and how well its model samples.

    Args:
        train: the run's training data.
        seed: of the sample of the pool.
    """
    config = checkpoint.config(["training.compile=false"])
    run = build_run(config, world, checkpoint.path.parents[1], train, resuming=True)
    restore_run(run, checkpoint)
    rows = training_rows(run.objective, n_rows, seed, checkpoint.step)
    model = run.evaluated_model().eval()
    parts = []
    for start in range(0, n_rows, config.validation.batch_size):
        part = slice(start, start + config.validation.batch_size)
        parts.append(sampler_orders(model, config, rows.x0[part], rows.maskable[part]))
        bar.update(len(parts[-1]["tokens"]))
    orders = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    right = orders.pop("tokens") == rows.x0  # [B, L]
    return {
        "step": checkpoint.step,
        "rows_right": float(right.all(1).double().mean()),
        "tokens_right": float((right & rows.maskable).sum() / rows.maskable.sum()),
        "stages": summarize(rows, orders),
    }


def collect(run_dirs: Sequence[Path], n_rows: int, seed: int, records_file: Path) -> None:
    """Measure all checkpoints of the runs; write the records, with command, commit and machine, after each.

    Checkpoints that `records_file` has with the same settings, commit, number of rows and seed are not measured again.
    Its other runs stay.

    Raises:
        ValueError: a run cannot be measured, or not beside those of `records_file`; the message names it.
    """
    labels = [run_dir.name for run_dir in run_dirs]
    if repeated := [str(run_dir) for run_dir in run_dirs if labels.count(run_dir.name) > 1]:
        raise ValueError(f"{', '.join(repeated)}: runs are recorded by the names of their folders; name each once")
    runs = earlier_runs(records_file, labels, n_rows, seed)
    checkpoints = {run_dir: readable_checkpoints(run_dir) for run_dir in run_dirs}
    command = f"python -m results.mask_distance {shlex.join(map(str, run_dirs))} --rows {n_rows} --seed {seed}"
    facts = provenance(command, device_name(start_world("auto").device))
    records: dict[str, Any] = {**facts, "rows": n_rows, "seed": seed}
    for run_dir, own in checkpoints.items():
        config = own[-1].config()
        run = {"label": run_dir.name, "masks": describe(config), "config": config.model_dump(mode="json")}
        known = known_points(runs.get(run_dir.name), run, facts["commit"])
        steps = [checkpoint.step for checkpoint in own]
        runs[run_dir.name] = run | {"points": [point for point in known if point["step"] in steps]}

    def write() -> None:
        shown = [run for run in runs.values() if run["points"]]  # the others come when they have been measured
        write_text(records_file, json.dumps(records | {"runs": shown}, indent=1) + "\n")

    n_points = sum(map(len, checkpoints.values()))
    n_known = sum(len(runs[label]["points"]) for label in labels)
    records_file.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=n_points * n_rows, initial=n_known * n_rows, unit="row") as bar:
        for run_dir, own in checkpoints.items():
            points = runs[run_dir.name]["points"]
            config, known_steps = own[-1].config(), {point["step"] for point in points}
            world, train = start_world(config.training.device), config.open_data().train
            for checkpoint in own:
                if checkpoint.step in known_steps:
                    continue
                bar.set_postfix_str(f"{run_dir.name}, update {checkpoint.step}")
                points.append(measure(checkpoint, train, world, n_rows, seed, bar))
                points.sort(key=lambda point: point["step"])
                write()
    write()


def earlier_runs(records_file: Path, labels: Sequence[str], n_rows: int, seed: int) -> dict[str, dict[str, Any]]:
    """The runs in a records file by label, in their order, each with how it was `measured`; none without a file.

    Args:
        labels: of the runs to be measured now; they have no points if those of the file are for other rows.

    Raises:
        ValueError: the points of another run are for other rows.
    """
    if not records_file.exists():
        return {}
    records = read_records(records_file, Records)
    same_rows = (records["rows"], records["seed"]) == (n_rows, seed)
    runs = {}
    for run in records["runs"]:
        if run["label"] not in labels and not same_rows:
            raise ValueError(
                f"{records_file} has {run['label']!r}, measured with --rows {records['rows']} --seed "
                f"{records['seed']}: use the same, name that run too, or choose another --out"
            )
        measured = run.get("measured") or {key: records[key] for key in Provenance.__annotations__}
        runs[run["label"]] = run | {"measured": measured, "points": run["points"] if same_rows else []}
    return runs


def known_points(earlier: dict[str, Any] | None, run: dict[str, Any], commit: str) -> list[dict[str, Any]]:
    """The points of an earlier measurement, if it was of the same settings and by the same commit."""
    if earlier is None or earlier["measured"]["commit"] != commit or any(earlier[key] != run[key] for key in run):
        return []
    points: list[dict[str, Any]] = earlier["points"]
    return points


def describe(config: Config) -> str:
    """The settings of a run that decide which masks it trains on."""
    settings = config.objective
    facts, told = [str(settings.name)], {"name"}
    if isinstance(settings, ProgressiveSettings):
        schedule = settings.k_schedule or [(settings.n_stages, 0)]
        stages = ", ".join(f"{n_stages} from update {step}" if step else f"{n_stages}" for n_stages, step in schedule)
        facts += [
            f"K = {stages}",
            f"tau = {settings.collapse_threshold}",
            f"reveal order {settings.reveal_order}",
            f"a pool of {settings.pool_batches} batches",
        ]
        # uniform_fraction is 0: others are refused.
        told |= {"n_stages", "k_schedule", "collapse_threshold", "reveal_order", "pool_batches", "uniform_fraction"}
    facts += [f"{key} {getattr(settings, key)}" for key in type(settings).model_fields if key not in told]
    return ", ".join([*facts, f"{config.training.batch_size} rows per update, seed {config.training.seed}"])


def relative_distance(stages: Sequence[dict[str, Any]], path: str) -> float | None:
    """Relative distance over `stages`; None if no row's distance can differ from 0."""
    expected = sum(stage["random"]["distance"] for stage in stages)
    return sum(stage[path]["distance"] for stage in stages) / expected if expected else None


def share_within(stages: Sequence[dict[str, Any]], path: str, n_swaps: int) -> float | None:
    """Share of the rows of `stages` within `n_swaps` (one of SWAPS); `path` may be `random`. None without rows."""
    n = sum(stage["n"] for stage in stages)
    return sum(stage[path]["within"][SWAPS.index(n_swaps)] for stage in stages) / n if n else None


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _over_training(run: dict[str, Any]) -> Iterator[list[str]]:
    """Rows of the table over training."""
    for point in run["points"]:
        stages = point["stages"]
        cells = [f"{100 * point['rows_right']:.1f}"]
        cells += [_cell(relative_distance(stages, path), ".2f") for path in PATHS]
        for path in (*PATHS, "random"):
            shares = [share_within(stages, path, n_swaps) for n_swaps in SWAPS]
            cells.append(" / ".join(_cell(None if share is None else 100 * share, ".0f") for share in shares))
        yield [run["label"], f"{point['step']:,}", *cells]


def _by_stage(run: dict[str, Any]) -> Iterator[list[str]]:
    """Rows of the table by stage at the last checkpoint."""
    stages = run["points"][-1]["stages"]
    yield [f"{run['label']}: rows", *(str(stage["n"]) for stage in stages)]
    for path, tokens in PATHS.items():
        cells = [_cell(relative_distance([stage], path), ".2f") for stage in stages]
        yield [f"{run['label']}: relative distance, {tokens}", *cells]
    for path, tokens in (PATHS | {"random": "random masks"}).items():
        shares = [share_within([stage], path, DRAWN_SWAPS) for stage in stages]
        cells = [_cell(None if share is None else 100 * share, ".0f") for share in shares]
        yield [f"{run['label']}: within {DRAWN_SWAPS} swaps, %, {tokens}", *cells]


def report(records: dict[str, Any], note: list[str]) -> str:
    """README.md: what was measured, over training and by stage, and a note (`read_note`)."""
    runs = records["runs"]
    swaps = " / ".join(map(str, SWAPS))
    titles = ["run", "updates", "solved, %", "relative distance, own tokens", "true tokens"]
    titles += ["within, %, own tokens", "true tokens", "random masks"]
    shares = [f"{n}/{N_STAGES} to {n + 1}/{N_STAGES}" for n in range(N_STAGES)]
    lines = ["# How far the masks of training are from the masks that the sampler visits", ""]
    lines += ["![Distance from the sampler's masks, over training and by stage](curves.png)", ""]
    lines += [
        *note,
        "The mask of a training row is compared with the mask of the same count that the sampler visits on that row: "
        "the distance is the number of positions to swap. The relative distance is 0 for the sampler's own masks and 1 "
        "for random masks. *Own tokens*: the sampler writes the tokens that the model predicts. *True tokens*: it "
        "writes the true tokens, as the PUMA pool does. Definitions: [mask_distance.py](../mask_distance.py).",
        "",
        *(f"- {run['label']}: {run['masks']}" for run in runs),
        "",
        f"Over training, {records['rows']:,} rows per checkpoint; shares are of rows within {swaps} swaps:",
        "",
        *markdown_table(titles, [row for run in runs for row in _over_training(run)]),
        "",
        "By revealed share of a row at the last checkpoint:",
        "",
        *markdown_table(["revealed", *shares], [row for run in runs for row in _by_stage(run)]),
        "",
        f"{provenance_in_words(records)}. 'Solved' is the share of these training rows that the sampler fills without "
        f"an error. Random masks in the figure have the counts of the rows of {runs[0]['label']}.",
        *(f"\nEarlier: {run['label']}, {provenance_in_words(run['measured'])}." for run in runs if "measured" in run),
    ]
    return "\n".join(lines) + "\n"


def draw(records: dict[str, Any], out: Path) -> None:
    """Draw the relative distance over training and by stage, and the share within DRAWN_SWAPS by stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    over_training, by_stage, near = figure.subplots(1, 3)
    centers = [(number + 0.5) / N_STAGES for number in range(N_STAGES)]
    for number, run in enumerate(records["runs"]):
        last = run["points"][-1]["stages"]
        for (path, tokens), line, marker in zip(PATHS.items(), ("-", "--"), ("o", "s"), strict=True):
            style = {
                "color": COLORS[number % len(COLORS)],
                "linestyle": line,
                "linewidth": 1.6,
                "marker": marker,
                "markersize": 4,
                "markerfacecolor": "white" if line == "--" else COLORS[number % len(COLORS)],
                "label": f"{run['label']}, {tokens}",
            }
            steps = [point["step"] for point in run["points"]]
            over_training.plot(steps, _numbers(relative_distance(p["stages"], path) for p in run["points"]), **style)
            by_stage.plot(centers, _numbers(relative_distance([stage], path) for stage in last), **style)
            shares = _numbers(share_within([stage], path, DRAWN_SWAPS) for stage in last)
            near.plot(centers, [100 * share for share in shares], **style)
    # One line for the rows of the first run: in a stage, the counts of other runs differ little.
    first = records["runs"][0]["points"][-1]["stages"]
    reference = {"color": "0.35", "linestyle": ":", "linewidth": 1.4}
    shares = _numbers(share_within([stage], "random", DRAWN_SWAPS) for stage in first)
    near.plot(centers, [100 * share for share in shares], **reference)
    for plot in (over_training, by_stage):
        plot.axhline(1, **reference, label="random masks")
        plot.set_ylim(bottom=0)
    last_step = records["runs"][0]["points"][-1]["step"]
    over_training.set(xlabel="updates", ylabel="relative distance", title="over training")
    over_training.set_xlim(left=0)
    by_stage.set(xlabel="revealed share of the row", ylabel="relative distance", title=f"after {last_step:,} updates")
    near.set(
        xlabel="revealed share of the row",
        ylabel=f"rows within {DRAWN_SWAPS} swaps, %",
        title=f"after {last_step:,} updates",
        ylim=(-2, 102),
    )
    for plot in (by_stage, near):
        plot.set_xlim(0, 1)
    for plot in (over_training, by_stage, near):
        set_grid(plot)
    figure.legend(*over_training.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    save_figure(figure, out, 110)


def _numbers(values: Iterator[float | None]) -> list[float]:
    """NaN, which leaves a gap in a line, for None."""
    return [float("nan") if value is None else value for value in values]


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = CommandParser(description="Measure the distance of training masks from the sampler's masks.")
    parser.add_argument(
        "run_dirs", nargs="*", type=named_folder, metavar="RUN", help="run directory, of an objective that masks rows"
    )
    parser.add_argument("--rows", type=whole_number(1), default=256, help="training rows per checkpoint")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the sample of the pool")
    parser.add_argument("--draw", action="store_true", help="only the table and figure, from existing records")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "mask_distance", help="output folder")
    options = parser.parse_args(arguments)
    if options.draw == bool(options.run_dirs):
        parser.error("give run directories, or --draw without any")
    records_file = options.out / "records.json"
    with ends_with_message():
        check_folder(options.out, "--out")
        if not options.draw:
            collect(options.run_dirs, options.rows, options.seed, records_file)
        if not records_file.exists():
            raise ValueError(f"{records_file} is missing: name run directories to measure")
        records = read_records(records_file, Records)
        write_text(options.out / "README.md", report(records, read_note(options.out)))
        draw(records, options.out / "curves.png")
        print(f"wrote {options.out}/README.md")


if __name__ == "__main__":
    main()
