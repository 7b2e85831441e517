"""Records: metrics.jsonl whatever happens, wandb as far as it goes."""

from __future__ import annotations

import errno
import json
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PUMA, tiny_settings

from config import Config
from runtime.config_file import parse_config, setting_name
from runtime.distributed import World
from runtime.metrics import (
    METRICS_FILE,
    Recorder,
    peak_memory_gib,
    read_metrics,
    read_samples,
    reduce_metrics,
    samples_files,
)

CPU = torch.device("cpu")
HEADLINE = "validation/accuracy/top_prob_1"


def config_of(seed: int = 0, tensorboard: bool = False, **wandb: Any) -> Config:
    settings = tiny_settings(PUMA, Path("boards"))
    settings["training"] |= {"seed": seed, "tensorboard": tensorboard}
    return parse_config(settings | {"wandb": wandb}, "test")


def record(run_dir: Path, from_step: int = 0, **settings: Any) -> Recorder:
    return Recorder(run_dir, config_of(**settings), from_step)


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "seconds": step / 2, "sequences_distinct": 8 * step} | values


# metrics.jsonl


def test_rows_are_json_objects_one_per_line(tmp_path):
    recorder = record(tmp_path)
    rows = [row(1, **{"train/loss": 0.5, "train/stage_histogram": [0.25, 0.75]}), row(2, **{"validation/loss": 0.25})]
    for values in rows:
        recorder.write(values)
        lines = (tmp_path / METRICS_FILE).read_text().splitlines()
        assert json.loads(lines[-1]) == values, "on disk at once"
    recorder.close()
    assert list(read_metrics(tmp_path)) == rows


def test_samples_of_steps_that_are_trained_again_are_deleted(tmp_path):
    recorder = record(tmp_path)
    for step in (2, 4):
        recorder.write(row(step), [{"answer": str(step)}])
    (tmp_path / "samples_mine.jsonl").touch()
    record(tmp_path, from_step=2)
    assert {path.name for path in tmp_path.glob("samples_*")} == {"samples_00000002.jsonl", "samples_mine.jsonl"}
    assert samples_files(tmp_path) == {2: tmp_path / "samples_00000002.jsonl"}


def test_what_is_not_finite_is_left_out(tmp_path):
    recorder = record(tmp_path)
    recorder.write(row(1, a=float("nan"), b=float("inf"), c=-float("inf"), d=0.0))
    assert list(read_metrics(tmp_path)) == [row(1, d=0.0)]
    assert "NaN" not in (tmp_path / METRICS_FILE).read_text()


def test_samples_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    recorder = record(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.warns(
            RuntimeWarning, match=r"a record is lost: .*samples_00000001\.jsonl cannot be written \(No space"
        ):
            recorder.write(row(1), [{"answer": "1"}])
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]
    assert list(read_metrics(tmp_path)) == [row(1)]


def test_no_records_no_rows(tmp_path):
    assert list(read_metrics(tmp_path)) == []
    assert list(read_metrics(tmp_path / "nowhere")) == []
    record(tmp_path)
    assert list(read_metrics(tmp_path)) == []


def test_a_resumed_run_cuts_the_rows_of_the_past_that_was_lost(tmp_path):
    recorder = record(tmp_path)
    for step in range(1, 6):
        recorder.write(row(step, attempt=1))
    recorder = record(tmp_path, from_step=3)
    assert [values["step"] for values in read_metrics(tmp_path)] == [1, 2, 3]
    recorder.write(row(4, attempt=2))
    assert [values["attempt"] for values in read_metrics(tmp_path)] == [1, 1, 1, 2]
    record(tmp_path, from_step=0)
    assert list(read_metrics(tmp_path)) == []
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_line_that_a_kill_cut_short_is_left_out_wherever_it_was_cut(tmp_path):
    recorder = record(tmp_path)
    for step in (1, 2):
        recorder.write(row(step))
    path = tmp_path / METRICS_FILE
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for length in range(first, len(content) - 1):
        path.write_bytes(content[:length])
        assert list(read_metrics(tmp_path)) == [row(1)], length
    for rest in (b"\x00" * 50, b"\xff\xfe{", b"}\n"):
        path.write_bytes(content[:first] + rest)
        assert list(read_metrics(tmp_path)) == [row(1)], rest
    recorder = record(tmp_path, from_step=5)
    recorder.write(row(6))
    assert list(read_metrics(tmp_path)) == [row(1), row(6)], "the remains are gone"


def test_disabled_wandb_is_not_even_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    recorder = record(tmp_path, mode="disabled")
    recorder.write(row(1))
    recorder.final({}, {"curves": tmp_path / "curves.png"}, None)
    recorder.close()
    assert list(read_metrics(tmp_path)) == [row(1)]


# wandb, by a stand-in that can fail


class FakeWandb(types.ModuleType):
    """Keeps what it is given; raises in the calls named in `failing`, `online` meaning init in that mode."""

    def __init__(self, *failing: str) -> None:
        super().__init__("wandb")
        self.failing = failing
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.step = 0  # the next one, of a server that remembers
        self.summary: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.n_finished = 0
        self.held: str | None = None
        self.axes: list[tuple[str, dict[str, Any]]] = []
        self.Settings = lambda **options: options

    def _may_fail(self, call: str) -> None:
        if call in self.failing:
            raise OSError(f"no {call}")

    def init(self, mode: str, **options: Any) -> FakeWandb:
        self.id = options["id"]
        assert options["id"] != self.held, "the real wandb refuses an id that a failed run holds"
        self.held = options["id"]
        self.inits.append({"mode": mode} | options)
        self._may_fail("init")
        self._may_fail(mode)
        self.held = None
        return self

    def teardown(self) -> None:
        self.held = None

    def define_metric(self, name: str, **options: Any) -> None:
        self.axes.append((name, options))

    def log(self, values: dict[str, Any], step: int | None = None, commit: bool = True) -> None:
        self._may_fail("log")
        step = self.step if step is None else step
        assert commit
        assert step >= self.step, "the real wandb drops such rows with a warning"
        self.step = step + 1
        self.logged.append(values)

    def Table(self, columns: list[str], data: list[list[str]]) -> Any:
        return ("table", columns, data)

    def Artifact(self, name: str, type: str) -> Any:
        return types.SimpleNamespace(name=name, type=type, add_file=lambda path: self.artifacts.append(path))

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact.name)

    def Histogram(self, np_histogram: Any) -> Any:
        return ("histogram", np_histogram[0].tolist(), np_histogram[1].tolist())

    def Image(self, path: str) -> Any:
        self._may_fail("Image")
        return ("image", path)

    def finish(self) -> None:
        self._may_fail("finish")
        self.n_finished += 1


def use(monkeypatch: pytest.MonkeyPatch, *failing: str) -> FakeWandb:
    fake = FakeWandb(*failing)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_the_same_rows(tmp_path, monkeypatch):
    fake = use(monkeypatch)
    recorder = record(tmp_path, mode="online", project="p", entity="e", tags=["t"])
    recorder.write(row(1, histogram=[0.25, 0.75], bad=float("nan")))
    boards = [{"puzzle": "1...", "value": 3}, {"puzzle": ".2..", "value": None}]
    recorder.write(row(2, **{HEADLINE: 0.5}), boards)
    recorder.write(row(3, **{HEADLINE: 0.25}))
    recorder.final({"accuracy": 0.25}, {"curves": tmp_path / "curves.png"}, tmp_path / "report.html")
    recorder.close()
    recorder.close()
    table = ("table", ["puzzle", "value"], [["1...", "3"], [".2..", "None"]])
    assert fake.logged == [
        row(1, histogram=("histogram", [0.25, 0.75], [0, 1, 2])),
        row(2, **{HEADLINE: 0.5}, samples=table),
        row(3, **{HEADLINE: 0.25}),
        {"curves": ("image", str(tmp_path / "curves.png"))},
    ]
    assert fake.summary == {"best/accuracy": 0.5, "best/step": 2, "final/accuracy": 0.25}
    assert fake.artifacts == [str(tmp_path / "report.html"), f"report-{fake.id}"]
    assert fake.n_finished == 1
    (options,) = fake.inits
    assert (options["mode"], options["project"], options["entity"]) == ("online", "p", "e")
    assert (options["job_type"], options["tags"]) == ("train", ["t"])
    assert options["name"] == tmp_path.name
    assert options["config"]["objective"]["name"] == "puma", "nested"
    assert {name for name, _ in fake.axes} >= {"step", "seconds", "sequences_distinct", "tokens"}
    assert [json.loads(line) for line in (tmp_path / "samples_00000002.jsonl").read_text().splitlines()] == boards


def test_a_histogram_of_many_stages_has_as_many_bins_as_wandb_takes(tmp_path, monkeypatch):
    fake = use(monkeypatch)
    recorder = record(tmp_path, mode="online")
    counts = list(range(1300))
    recorder.write(row(1, histogram=counts))
    _, shares, edges = fake.logged[0]["histogram"]
    assert len(shares) == len(edges) - 1 <= 512
    assert edges[:2] == [0, 3]
    assert edges[-1] == 1300
    assert shares == [sum(counts[i : i + 3]) for i in range(0, 1300, 3)]


def test_the_best_of_a_run_without_accuracy_is_its_lowest_loss(tmp_path, monkeypatch):
    fake = use(monkeypatch)
    recorder = record(tmp_path, mode="online")
    for step, loss in enumerate((0.5, 0.25, 0.75), 1):
        recorder.write(row(step, **{"validation/loss": loss}))
    assert fake.summary == {"best/loss": 0.25, "best/step": 2}


def test_a_resumed_run_is_the_same_wandb_run(tmp_path, monkeypatch):
    fake = use(monkeypatch)
    record(tmp_path, mode="online", name="mine")
    record(tmp_path, from_step=3, mode="online", name="mine")
    first, second = fake.inits
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert first["name"] == "mine"


@pytest.mark.parametrize("n_sent", [0, 1, 4, 6])
def test_a_resumed_run_leaves_no_hole_in_wandb(n_sent, tmp_path, monkeypatch):
    """Killed at step 6, of which a checkpoint of step 4 is left; of the rows `n_sent` have reached the server."""
    recorder = record(tmp_path)
    for step in range(1, 7):
        recorder.write(row(step, **{HEADLINE: step / 10}), [{"step": step}] if step == 3 else [])
    fake = use(monkeypatch)
    fake.step = n_sent + 1
    recorder = record(tmp_path, from_step=4, mode="online")
    for step in range(5, 9):
        recorder.write(row(step, **{HEADLINE: 0.1}))
    assert [values["step"] for values in fake.logged] == list(range(n_sent + 1, 9))
    assert all("samples" in values for values in fake.logged if values["step"] == 3)
    assert fake.summary["best/accuracy"] == 0.4


def test_an_id_of_wandb_that_a_full_disk_left_empty_is_made_anew(tmp_path, monkeypatch):
    (tmp_path / "wandb_id.txt").write_text("\n")
    fake = use(monkeypatch)
    for _ in range(2):
        record(tmp_path, mode="online")
    first, second = (options["id"] for options in fake.inits)
    assert len(first) == 8
    assert first == second


def test_seeds_of_a_setting_form_a_group(tmp_path, monkeypatch):
    fake = use(monkeypatch)
    for seed, changes in ((0, {}), (1, {"tags": ["other"]}), (0, {"group": "mine"})):
        record(tmp_path, mode="offline", seed=seed, **changes)
    first, second, named = (options["group"] for options in fake.inits)
    assert first == second
    assert first.startswith("sudoku_puma_")
    assert named == "mine"
    assert setting_name(config_of().model_copy(update={"training": config_of(seed=3).training})) == first
    changed = config_of().training.model_copy(update={"learning_rate": 0.5})
    assert setting_name(config_of().model_copy(update={"training": changed})) != first


@pytest.mark.parametrize(
    ("environment", "file", "mode"),
    [
        ({}, None, None),
        ({"WANDB_API_KEY": "k"}, None, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, None, "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, None, None),
        ({}, "machine api.wandb.ai\n  login user\n  password k\n", "online"),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine api.wandb.ai login user password k\n", None),
        ({}, "machine", None),
    ],
)
def test_auto_is_online_where_a_key_is_configured(environment, file, mode, tmp_path, monkeypatch, capsys):
    fake = use(monkeypatch)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if file is not None:
        (tmp_path / "netrc").write_text(file)
    record(tmp_path, mode="auto")
    assert [options["mode"] for options in fake.inits] == ([] if mode is None else [mode])
    hint = "wandb is off: no key is configured; `wandb login` switches it on, or wandb.mode=offline\n"
    assert capsys.readouterr().out == (hint if mode is None and "WANDB_MODE" not in environment else "")


def test_without_a_network_wandb_keeps_its_records_on_disk(tmp_path, monkeypatch):
    fake = use(monkeypatch, "online")
    with pytest.warns(RuntimeWarning, match=r"cannot go online \(no online\).*wandb sync"):
        recorder = record(tmp_path, mode="online")
    assert [options["mode"] for options in fake.inits] == ["online", "offline"]
    recorder.write(row(1))
    assert fake.logged == [row(1)]


@pytest.mark.parametrize("failing", ["init", "log", "Image", "finish"])
def test_whatever_fails_in_wandb_is_said_once_and_the_run_goes_on(failing, tmp_path, monkeypatch):
    use(monkeypatch, failing)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        recorder = record(tmp_path, mode="offline")
        recorder.write(row(1))
        recorder.final({}, {"curves": tmp_path / "curves.png"}, None)
        recorder.write(row(9))
        recorder.close()
        recorder.close()
    assert [f"no {failing}" in str(warning.message) for warning in warned] == [True]
    assert list(read_metrics(tmp_path)) == [row(1), row(9)]


def test_a_machine_without_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(RuntimeWarning, match="wandb is off"):
        recorder = record(tmp_path, mode="online")
    recorder.write(row(1))
    assert list(read_metrics(tmp_path)) == [row(1)]


def test_real_wandb_offline(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        recorder = record(tmp_path, mode="offline")
        recorder.write(row(1, **{"train/loss": 0.5, "train/stage_histogram": [0.5, 0.5]}))
        recorder.write(row(2, **{HEADLINE: 0.5}), [{"puzzle": "1...", "answer": "1234"}])
        (tmp_path / "report.html").write_text("page")
        recorder.final({"accuracy": 0.5}, {}, tmp_path / "report.html")
        recorder.close()
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    parts = (b"train/loss", b"sudoku_puma_", b"best/accuracy", b"final/accuracy", b"report-")
    deadline = time.monotonic() + 30  # wandb's own process writes the file, on a busy machine after finish() returns
    while (missing := [part for part in parts if part not in stored.read_bytes()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not missing


# TensorBoard, by a stand-in


class FakeWriter:
    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "events.out.tfevents.0"
        self.path.parent.mkdir(exist_ok=True)

    def add_scalar(self, key: str, value: float, step: int) -> None:
        with open(self.path, "a") as file:
            file.write(f"{key} {value} {step}\n")

    def flush(self) -> None:
        """Written already."""

    close = flush


def test_tensorboard_gets_the_numbers_and_after_a_resume_each_once(tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    recorder = record(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        recorder.write(row(step, histogram=[1, 2]))
    recorder = record(tmp_path, from_step=2, tensorboard=True)
    recorder.write(row(3))
    monkeypatch.setattr(FakeWriter, "close", lambda _: 1 / 0)
    with pytest.warns(RuntimeWarning, match="TensorBoard is off for the rest of this run: division by zero"):
        recorder.close()
    lines = (tmp_path / "tensorboard" / "events.out.tfevents.0").read_text().splitlines()
    expected = [(key, row(step)[key], step) for step in (1, 2, 3) for key in ("seconds", "sequences_distinct")]
    assert lines == [f"{key} {value} {step}" for key, value, step in expected]


def test_a_machine_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(RuntimeWarning, match=r"training\.tensorboard: the package is not installed"):
        recorder = record(tmp_path, tensorboard=True)
    recorder.write(row(1))
    assert list(read_metrics(tmp_path)) == [row(1)]


# Figures


def test_figures_become_plain_numbers_and_lists():
    values = {
        "loss": torch.tensor(0.5),
        "n_stages": torch.tensor(8),
        "histogram": torch.tensor([0.25, 0.75]),
        "sequences_finished": torch.tensor(12),
    }
    assert reduce_metrics(values, World(0, 1, CPU)) == {
        "loss": 0.5,
        "n_stages": 8,
        "histogram": [0.25, 0.75],
        "sequences_finished": 12,
    }


def test_peak_memory_is_what_the_machine_says():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc on this system")
    (kib,) = (int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory_gib(CPU) == pytest.approx(kib / 2**20, rel=0.01)


def test_lines_of_samples_that_a_full_disk_cut_are_left_out(tmp_path):
    record(tmp_path).write(row(1), [{"answer": "1"}, {"answer": "2"}])
    path = tmp_path / "samples_00000001.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    assert read_samples(tmp_path, 1) == [{"answer": "1"}]
    assert read_samples(tmp_path, 2) == []
    path.unlink()
    path.mkdir()
    with pytest.raises(
        ValueError, match=r"samples_00000001\.jsonl cannot be read .*delete it; only the samples are lost"
    ):
        read_samples(tmp_path, 1)
