"""Measure how far the gradients of neighbouring updates repeat each other, with uniform masks and in PUMA's pools.

    python -m results.gradient_noise RUN           # a run directory; its newest checkpoint gives model and settings
    python -m results.gradient_noise RUN --draw    # only the table and figure, from existing records

A row stays in the PUMA pool for K updates, so updates share rows, and what the choice of rows adds to the gradient (the
noise) repeats. The run may have any objective that masks whole rows: one other than `puma` and `uniform` is measured
beside these. The output is records.json, README.md and curves.png in results/gradient_noise/NAME, after the run's
folder.

Definitions. The weights are those of the checkpoint and do not change, so gradients g_1 .. g_N of N successive updates
differ by rows and masks alone; a pool first advances until all of its rows entered under these weights. With c_t = g_t
minus the mean of all, the correlation at lag l is the mean of <c_t, c_{t+l}> over t, divided by the mean of <c_t, c_t>.
The noise of K successive updates is the variance of their sum in units of the variance of K independent ones:
1 + 2 * sum over l < K of (1 - l / K) * correlation(l). It is 1 for independent updates and K for equal ones; as far as
noise limits the learning rate, K updates of B rows are like K independent ones of B / noise rows. Since c_t is relative
to the mean of N updates, both figures are low: a noise n is measured as (n - K V) / (1 - V), where V is the variance of
that mean in units of the variance of one update, 1 / N for independent ones and more for others.

Shapes: N updates, P parameters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from tqdm import tqdm
from typing_extensions import TypedDict

from base.commands import CommandParser, ends_with_message, whole_number
from base.files import write_text
from base.memory import check_memory
from config import AnyObjectiveSettings, ProgressiveSettings, PumaSettings, UniformSettings
from data.stream import SequenceStream
from model.transformer import Transformer, build_model
from objective import Objective
from results.records import (
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
from runtime.checkpoint import find_checkpoint
from runtime.distributed import autocast, autocast_dtype, start_world
from runtime.figures import COLORS, save_figure, set_grid
from runtime.history import ROOT
from runtime.machine import device_name
from runtime.markdown import markdown_table
from training.run import build_objective

N_LAGS = 40  # in the figure
SHOWN_LAGS = (1, 2, 4, 7, 8, 16)  # in the table
DEEP_POOL = 16
N_STAGES = 8  # K, where the run has none
MARKERS = "osD^v"  # in the figure, one for each of the `variants`


class Series(TypedDict):
    """The correlations of one objective at lags 0, 1, ..."""

    label: Text
    correlation: Annotated[list[Annotated[float, Field(ge=-2, le=2)]], Field(min_length=N_LAGS)]


class Records(Provenance):
    """Content of records.json."""

    run: Text
    settings: Text
    step: int
    updates: int
    n_stages: Annotated[int, Field(ge=1)]
    batch_size: int
    series: Annotated[list[Series], Field(min_length=1, max_length=len(MARKERS))]


def check_lags(records: Records) -> Records:
    """Raise ValueError unless each series has the lags that the noise of K updates takes."""
    n_stages, shortest = records["n_stages"], min(len(each["correlation"]) for each in records["series"])
    if n_stages > shortest:
        raise ValueError(f"n_stages {n_stages} is above {shortest}, the lags of a series")
    return records


def variants(n_stages: int, settings: AnyObjectiveSettings) -> dict[str, AnyObjectiveSettings]:
    """What is compared, by label: uniform masks, three pools, and the objective of the run if it is another one.

    The pools have the other settings of a PUMA run, such as its threshold.
    """
    pools: dict[str, dict[str, Any]] = {
        "one batch in the pool": {},
        "one batch, random order": {"reveal_order": "random"},
        f"{DEEP_POOL} batches in the pool": {"pool_batches": DEEP_POOL},
    }
    own_puma = settings.model_dump() if isinstance(settings, PumaSettings) else {"name": "puma"}
    base = own_puma | {"n_stages": n_stages, "k_schedule": None, "pool_batches": 1, "reveal_order": "top_prob"}
    puma = {label: PumaSettings.model_validate(base | changes) for label, changes in pools.items()}
    own = {} if settings.name in ("uniform", "puma") else {f"{settings.name}, as in the run": settings}
    uniform = settings if isinstance(settings, UniformSettings) else UniformSettings(name="uniform")
    label = "uniform masks of low discrepancy" if uniform.low_discrepancy else "uniform masks"
    return {label: uniform, **puma, **own}


def gradients(
    model: Transformer, objective: Objective, step: int, dtype: torch.dtype | None, n: int, n_before: int
) -> Tensor:
    """Gradients of n times update `step`, without a change of weights, float32 [N, P]; `n_before` precede them.

    Raises:
        ValueError: they do not fit into memory.
    """
    parameters = list(model.parameters())
    device, n_parameters = parameters[0].device, sum(each.numel() for each in parameters)
    check_memory(4 * n * n_parameters, f"--updates {n}: the gradients")
    found = torch.empty(n, n_parameters)
    for number in tqdm(range(n_before + n), unit="update", leave=False):
        measured = number >= n_before
        with torch.set_grad_enabled(measured):
            for microbatch in objective.microbatches(step):
                with autocast(device, dtype):
                    scores = model(microbatch.xt, microbatch.x0, microbatch.weight, objective.confidence)
                if measured:
                    scores.loss.backward()
                objective.observe(microbatch, scores)
        objective.end_step()
        objective.prefetch()
        if measured:
            found[number - n_before] = torch.cat([gradient_of(each).flatten() for each in parameters])
            model.zero_grad()
    return found


def gradient_of(parameter: Tensor) -> Tensor:
    """The gradient of a parameter, zeros if it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def centre(gradient: Tensor) -> Tensor:
    """Subtract the mean of the updates from gradients [N, P], in place: they may take most of the memory."""
    return gradient.sub_(gradient.mean(0))


def correlations(noise: Tensor) -> list[float]:
    """Correlation at lags 0 .. N / 2, from centred gradients [N, P]."""
    products = (noise @ noise.T).double()  # [N, N]
    return [float(products.diagonal(lag).mean() / products.diagonal().mean()) for lag in range(len(noise) // 2 + 1)]


def noise_of_sum(correlation: Sequence[float], window: int) -> float:
    """Variance of the sum of `window` successive gradients, in units of that of independent ones."""
    return 1 + 2 * sum((1 - lag / window) * correlation[lag] for lag in range(1, window))


def collect(run_dir: Path, n_updates: int, records_file: Path) -> None:
    """Measure all variants on the newest checkpoint of a run, and write the records.

    Raises:
        ValueError: the run has no checkpoint, its objective does not mask whole rows, or as in `gradients`.
    """
    checkpoint = find_checkpoint(run_dir)
    config = checkpoint.config(["training.compile=false"])
    settings, training = config.objective, config.training
    check_masks_rows(run_dir, settings)
    n_stages = settings.n_stages_at(checkpoint.step) if isinstance(settings, ProgressiveSettings) else N_STAGES
    fewest = 2 * (n_stages - 1)  # `correlations` has lags to N / 2, `noise_of_sum` takes those to K - 1
    if n_updates < fewest:
        raise ValueError(f"--updates {n_updates}: for K = {n_stages} give at least {fewest}")
    train, world = config.open_data().train, start_world(training.device)
    model = build_model(config).to(world.device).train()
    model.load_weights(checkpoint.weights("model") or {})
    dtype, series = autocast_dtype(training.precision, world.device), []
    for label, each in variants(n_stages, settings).items():
        objective = build_objective(each, training, SequenceStream(train, training.seed), world.device)
        # At most K visits of each row, and once more: the first rows enter a pool that is not yet in its steady state.
        n_before = 2 * n_stages * each.pool_batches if isinstance(each, ProgressiveSettings) else 0
        found = correlations(centre(gradients(model, objective, checkpoint.step, dtype, n_updates, n_before)))
        series.append({"label": label, "correlation": [round(value, 4) for value in found]})
    records = {
        **provenance(f"python -m results.gradient_noise {run_dir} --updates {n_updates}", device_name(world.device)),
        "run": run_dir.name,
        "settings": f"objective {settings.name}{_threshold(settings)}, rate {training.learning_rate:g}, seed "
        f"{training.seed}",
        "step": checkpoint.step,
        "updates": n_updates,
        "n_stages": n_stages,
        "batch_size": training.batch_size,
        "series": series,
    }
    records_file.parent.mkdir(parents=True, exist_ok=True)
    write_text(records_file, json.dumps(records, indent=1) + "\n")


def _threshold(settings: AnyObjectiveSettings) -> str:
    """The threshold of the pools, in words."""
    tau = settings.collapse_threshold if isinstance(settings, PumaSettings) else None
    return "" if tau is None else f" with tau = {tau:g}"


def report(records: dict[str, Any], note: list[str]) -> str:
    """README.md: the figure, the table and a note (`read_note`)."""
    n_stages, rows = records["n_stages"], []
    for each in records["series"]:
        values = each["correlation"]
        cells = [f"{values[lag]:.2f}" for lag in SHOWN_LAGS]
        rows.append([each["label"], *cells, f"{noise_of_sum(values, n_stages):.1f}"])
    first, *others = map(str, SHOWN_LAGS)
    titles = ["masks", f"correlation at lag {first}", *others, f"noise of {n_stages} updates"]
    lines = [
        f"# How far neighbouring updates repeat each other: {records['run']}",
        "",
        "![Correlation of the noise of two gradients by the number of updates from one to the other](curves.png)",
        "",
        f"Gradients of {records['updates']:,} successive updates of {records['batch_size']} rows under the weights of "
        f"update {records['step']:,} of the run ({records['settings']}), K = {n_stages}. *Correlation*: of the noise "
        f"of two updates, by the number of updates from one to the other. *Noise of {n_stages} updates*: the variance "
        f"of their sum, 1 if they were independent, {n_stages} if they were equal; the variance of one "
        "update differs between masks and is not compared. Definitions: [gradient_noise.py](../../gradient_noise.py).",
        "",
        *markdown_table(titles, rows),
        "",
        *note,
        f"{provenance_in_words(records)}.",
    ]
    return "\n".join(lines) + "\n"


def draw(records: dict[str, Any], out: Path) -> None:
    """Draw the correlations by lag."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    plot = figure.subplots()
    for number, each in enumerate(records["series"]):
        values = each["correlation"][: N_LAGS + 1]
        style: dict[str, Any] = {
            "color": COLORS[number],
            "marker": MARKERS[number],
            "markersize": 3.5,
            "linewidth": 1.4,
        }
        plot.plot(range(len(values)), values, label=each["label"], **style)
    plot.set(xlabel="updates from one to the other", ylabel="correlation of the noise", xlim=(0, N_LAGS))
    set_grid(plot, integers=True)
    plot.legend(frameon=False)
    save_figure(figure, out, 110)


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = CommandParser(description="Measure how far the gradients of neighbouring updates repeat each other.")
    parser.add_argument(
        "run_dir", type=named_folder, metavar="RUN", help="run directory, of an objective that masks rows"
    )
    parser.add_argument("--updates", type=whole_number(2 * N_LAGS), default=128, help="N")
    parser.add_argument("--draw", action="store_true", help="only the table and figure, from existing records")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gradient_noise", help="parent output folder")
    options = parser.parse_args(arguments)
    folder = options.out / options.run_dir.name
    records_file = folder / "records.json"
    with ends_with_message():
        check_folder(folder, "--out")
        if not options.draw:
            collect(options.run_dir, options.updates, records_file)
        records = read_records(records_file, Annotated[Records, AfterValidator(check_lags)])
        write_text(folder / "README.md", report(records, read_note(folder)))
        draw(records, folder / "curves.png")
        print(f"wrote {folder}/README.md")


if __name__ == "__main__":
    main()
