"""Checkpoints: there whole or not at all, damage is noticed, old ones go, nothing that is read is executed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import UNIFORM, tiny_settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from base import memory
from base.files import WriteError, write_text
from base.reading import BadInput
from config import Config
from runtime import checkpoint as module
from runtime.checkpoint import (
    MANIFEST,
    Checkpoint,
    find_checkpoint,
    latest_checkpoint,
    loading_checkpoint,
    open_checkpoint,
    resumable_checkpoint,
    save_checkpoint,
    score_checkpoint,
    step_folders,
)
from runtime.config_file import parse_config
from runtime.distributed import World

WORLD = World(0, 1, torch.device("cpu"))


def config(keep: int = 2) -> Config:
    values = tiny_settings(UNIFORM, Path("boards"))
    values["training"]["keep_checkpoints"] = keep
    return parse_config(values, "test")


def save(run_dir: Path, step: int, score: float | None = None, keep: int = 2) -> Path:
    """A small checkpoint whose tensors hold the step."""
    save_checkpoint(
        run_dir,
        WORLD,
        config(keep),
        step,
        weights={
            "model": {"w": torch.full((3, 4), float(step)), "v": torch.arange(5).t()},
            "ema": {"w": torch.ones(2)},
        },
        train_state={"optimizer": {"state": {0: torch.tensor(float(step))}}, "seconds": 1.5},
        rank_state={"generator": torch.Generator().manual_seed(step).get_state(), "n_drawn": step},
        score=score,
    )
    return folder(run_dir, step)


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").iterdir())


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def check(checkpoint: Checkpoint | None, step: int) -> None:
    """It is the one of that step and holds what was saved."""
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.n_ranks) == (step, 1)
    weights = checkpoint.weights("model")
    assert weights is not None
    assert torch.equal(weights["w"], torch.full((3, 4), float(step)))
    assert checkpoint.state("rank_0")["n_drawn"] == step


# Saving and reading


def test_everything_saved_is_read_back(tmp_path):
    save(tmp_path, 7, score=0.25)
    checkpoint = find_checkpoint(tmp_path)
    check(checkpoint, 7)
    assert checkpoint.score == 0.25
    assert checkpoint.config() == config()
    assert checkpoint.config(["training.seed=4"]).training.seed == 4
    assert set(checkpoint.weights("model") or {}) == {"w", "v"}
    assert torch.equal((checkpoint.weights("ema") or {})["w"], torch.ones(2))
    assert checkpoint.weights("other") is None
    assert checkpoint.state("train") == {"optimizer": {"state": {0: torch.tensor(7.0)}}, "seconds": 1.5}
    generator = torch.Generator()
    generator.set_state(checkpoint.state("rank_0")["generator"])
    assert generator.initial_seed() == 7


def test_the_manifest_lists_every_file(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {MANIFEST}
    assert set(manifest["files"]) == {"model.safetensors", "ema.safetensors", "train.pt", "rank_0.pt", "config.yaml"}
    for name, facts in manifest["files"].items():
        assert facts["bytes"] == (path / name).stat().st_size


def test_a_run_directory_a_checkpoint_folder_and_a_copy_are_found(tmp_path):
    path = save(tmp_path, 3)
    save(tmp_path, 5)
    check(find_checkpoint(tmp_path), 5)
    check(find_checkpoint(path), 3)
    shutil.copytree(path, tmp_path / "elsewhere")
    check(find_checkpoint(str(tmp_path / "elsewhere")), 3)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, 0.5, keep=2)
    check(latest_checkpoint(tmp_path), 100_000_000)
    check(find_checkpoint(f"{tmp_path}@best"), 100_000_000)


def test_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="holds no usable checkpoint"):
            find_checkpoint(path)


def test_the_best_checkpoint_and_that_of_a_step_are_found(tmp_path):
    run_dir = tmp_path / "run"
    for step, score in ((2, 0.5), (4, 0.75), (6, 0.75), (8, 0.25), (10, None)):
        save(run_dir, step, score, keep=9)
    check(find_checkpoint(f"{run_dir}@best"), 6)  # of equal ones the newest, as when old ones are deleted
    check(find_checkpoint(f"{run_dir}@2"), 2)
    check(find_checkpoint(tmp_path / "run@00000010"), 10)
    check(find_checkpoint(f"{run_dir}@10/"), 10)
    there = re.escape("there are 2, 4, 6 (best), 8, 10") + "$"
    for choice in ("3", "9" * 18, "9" * 100, "last", "", "step_00000002", "-2"):
        with pytest.raises(ValueError, match=f"{run_dir} has no checkpoint.*{there}"):
            find_checkpoint(f"{run_dir}@{choice}")
    (folder(run_dir, 6) / "train.pt").unlink()
    with pytest.raises(ValueError, match=r"step_00000006: train\.pt is missing"):
        find_checkpoint(f"{run_dir}@best")


def test_a_chosen_checkpoint_that_is_not_there_is_explained(tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(ValueError, match="run holds no usable checkpoint"):
        find_checkpoint(f"{run_dir}@best")
    save(run_dir, 3)
    save(run_dir, 5)
    with pytest.raises(ValueError, match=r"no evaluated checkpoint, so none is the best: there are 3, 5$"):
        find_checkpoint(f"{run_dir}@best")


def test_a_folder_whose_name_has_an_at_sign_is_itself(tmp_path):
    save(tmp_path / "run", 3, score=0.5)
    for name in ("run@best", "run@3", "me@home", "@best"):
        save(tmp_path / name, 5, score=0.5)
        save(tmp_path / name, 6, score=0.25)
        check(find_checkpoint(tmp_path / name), 6)
        check(find_checkpoint(f"{tmp_path / name}@best"), 5)
        check(find_checkpoint(folder(tmp_path / name, 5)), 5)
    check(find_checkpoint(f"{tmp_path}/run"), 3)


def test_a_best_checkpoint_that_is_unknown_just_now_is_not_replaced_by_another(tmp_path, monkeypatch):
    save(tmp_path, 3, score=0.5)
    save(tmp_path, 5, score=0.25)
    read = module.read_json

    def failing(path):
        if path.parent == folder(tmp_path, 3):
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    monkeypatch.setattr(module, "read_json", failing)
    with pytest.raises(OSError, match=r"step_00000003 cannot be read now"):
        find_checkpoint(f"{tmp_path}@best")


def test_a_step_saved_again_is_replaced(tmp_path):
    save(tmp_path, 3, score=0.1)
    save(tmp_path, 3, score=0.2)
    assert find_checkpoint(tmp_path).score == 0.2
    assert steps(tmp_path) == [3]


# A kill at any moment


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_kill_at_any_moment_leaves_the_old_checkpoint_or_the_new(call, tmp_path, monkeypatch):
    """Save, dying at the first file that is synced or renamed, then at the second, and so on until nothing is left."""
    for n_calls in range(100):
        run_dir = tmp_path / str(n_calls)
        save(run_dir, 1)
        left = n_calls

        def die(original):
            def wrapped(*arguments, **options):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return original(*arguments, **options)

            return wrapped

        owner = os if call == "fsync" else Path
        with monkeypatch.context() as patch:
            patch.setattr(owner, call, die(getattr(owner, call)))
            try:
                save(run_dir, 2)
                finished = True
            except Killed:
                finished = False
        newest = latest_checkpoint(run_dir)  # a warning would fail the test
        assert newest is not None
        check(newest, newest.step)
        assert newest.step in ((2,) if finished else (1, 2))
        save(run_dir, 3)
        assert all(not path.name.startswith(".") for path in (run_dir / "checkpoints").iterdir())
        if finished:
            break
    assert finished
    assert n_calls >= 1, "the call is never made, so nothing was tested"


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    written = []

    def spy(path: Path, text: str) -> None:
        written.append(sorted(file.name for file in path.parent.iterdir()))
        write_text(path, text)

    monkeypatch.setattr(module, "write_text", spy)
    path = save(tmp_path, 1)
    assert written[-1] == sorted({file.name for file in path.iterdir()} - {MANIFEST})


def test_text_is_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "final.json"
    write_text(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        write_text(path, "new")
    assert path.read_text() == "old"


# Damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A checkpoint folder to take copies of."""
    return save(tmp_path_factory.mktemp("sound"), 4, score=0.5)


FILES = ["model.safetensors", "ema.safetensors", "train.pt", "rank_0.pt", "config.yaml", MANIFEST]


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_noticed(name, place, bit, sound):
    file = sound / name
    content = file.read_bytes()
    damaged = bytearray(content)
    damaged[int(place * len(content))] ^= 1 << bit
    file.write_bytes(damaged)
    try:
        with pytest.raises(ValueError, match="checkpoint" if name == MANIFEST else name):
            open_checkpoint(sound)
    finally:
        file.write_bytes(content)
    check(open_checkpoint(sound), 4)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_noticed(name, share, sound, tmp_path):
    copy = Path(shutil.copytree(sound, tmp_path / "copy"))
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=str(copy)):
        open_checkpoint(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(name, sound, tmp_path):
    copy = Path(shutil.copytree(sound, tmp_path / "copy"))
    (copy / name).unlink()
    with pytest.raises(ValueError, match=name):
        open_checkpoint(copy)


def test_damaged_checkpoints_are_passed_over_with_a_warning(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (folder(tmp_path, 3) / MANIFEST).unlink()
    (folder(tmp_path, 2) / "train.pt").write_bytes(b"")
    with pytest.warns(RuntimeWarning) as warned:
        check(latest_checkpoint(tmp_path), 1)
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2
    assert "step_00000003" in messages[0]
    assert "step_00000002" in messages[1]
    assert "train.pt has 0 bytes" in messages[1]


@pytest.mark.parametrize("call", ["stat", "hash"])
def test_a_file_that_the_disk_cannot_read_is_damaged(call, tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    bad = folder(tmp_path, 2) / "train.pt"

    def failing(original):
        def wrapped(path, *arguments, **options):
            if path == bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return original(path, *arguments, **options)

        return wrapped

    if call == "stat":
        monkeypatch.setattr(Path, "stat", failing(Path.stat))
    else:
        monkeypatch.setattr(module, "hash_file", failing(module.hash_file))
    with pytest.warns(RuntimeWarning, match=r"step_00000002: train\.pt cannot be read \(Input/output error\)"):
        check(latest_checkpoint(tmp_path), 1)
    with pytest.warns(RuntimeWarning, match="step_00000002 is damaged and was renamed"):
        save(tmp_path, 3)
    assert names(tmp_path) == ["step_00000001", "step_00000002.damaged", "step_00000003"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.ETIMEDOUT])
def test_one_that_cannot_be_read_now_is_not_damaged(number, tmp_path, monkeypatch):
    """The start ends; nothing is set aside, and no older one is taken."""
    for step in (1, 2):
        save(tmp_path, step)
    original = module.hash_file

    def failing(path: Path) -> str:
        if path == folder(tmp_path, 2) / "train.pt":
            raise OSError(number, os.strerror(number), str(path))
        return original(path)

    monkeypatch.setattr(module, "hash_file", failing)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        resumable_checkpoint(tmp_path)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    save(tmp_path, 3)  # nor when old ones are deleted: it stays, and so does the one before it
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]
    monkeypatch.setattr(module, "hash_file", original)
    save(tmp_path, 4)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


def test_one_whose_score_cannot_be_read_now_is_kept(tmp_path, monkeypatch):
    """It may be the best."""
    save(tmp_path, 1, score=0.9)
    original = module.read_json

    def failing(path: Path) -> object:
        if path.parent == folder(tmp_path, 1):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return original(path)

    monkeypatch.setattr(module, "read_json", failing)
    for step in (2, 3, 4):
        save(tmp_path, step, score=0.1 * step)
    assert names(tmp_path) == ["step_00000001", "step_00000003", "step_00000004"]
    with pytest.raises(WriteError, match=r"manifest\.json cannot be written \(Stale file handle"):
        score_checkpoint(tmp_path, WORLD, config(), 1, 0.5)


def test_one_of_another_version_is_not_damaged(tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(module, "FORMAT", 99)
        save(tmp_path, 1, score=0.9)
    with pytest.raises(
        ValueError, match=r"has format 99, this code reads \d: use the version of the code that wrote it"
    ):
        resumable_checkpoint(tmp_path)
    assert names(tmp_path) == ["step_00000001"]
    for step in (2, 3, 4):
        save(tmp_path, step)
    assert names(tmp_path) == ["step_00000001", "step_00000003", "step_00000004"], (
        "not renamed, and not deleted while it is the best"
    )


@pytest.mark.filterwarnings("ignore:checkpoint .*:RuntimeWarning")
def test_a_run_with_nothing_but_damage_does_not_start_again(tmp_path):
    """It would erase the records of the run."""
    (save(tmp_path, 1) / MANIFEST).write_text("[]")
    (save(tmp_path, 2) / "train.pt").unlink()
    assert latest_checkpoint(tmp_path) is None
    remedy = f"{tmp_path}: all its checkpoints are damaged (2): restore one, or delete {tmp_path}/checkpoints to start"
    with pytest.raises(ValueError, match=re.escape(remedy)):
        resumable_checkpoint(tmp_path)
    assert names(tmp_path) == ["step_00000001", "step_00000002"], "nothing is renamed"
    save(tmp_path, 3, score=0.5)  # a damaged neighbour does no harm
    check(latest_checkpoint(tmp_path), 3)


# Which are kept


def test_the_newest_and_the_best_are_kept(tmp_path):
    scores = {1: 0.5, 2: 0.9, 3: None, 4: 0.2, 5: 0.3}
    kept = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5]}
    for step, score in scores.items():
        save(tmp_path, step, score)
        assert steps(tmp_path) == kept[step]


@pytest.mark.parametrize("keep", [1, 3])
def test_how_many_are_kept_is_a_setting(keep, tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, keep=keep)
    assert steps(tmp_path) == list(range(7 - keep, 7))


def test_of_equally_good_ones_the_newest_is_kept(tmp_path):
    for step in range(1, 4):
        save(tmp_path, step, score=1.0, keep=1)
    assert steps(tmp_path) == [3]
    save(tmp_path, 4, score=0.0, keep=1)
    assert steps(tmp_path) == [3, 4]


def test_the_best_of_those_that_can_be_read_is_kept(tmp_path):
    for step, score in enumerate((0.7, 0.8, 0.9, 0.1), start=1):
        save(tmp_path, step, score, keep=4)
    flipped = folder(tmp_path, 3) / "model.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\xff")
    with pytest.warns(RuntimeWarning, match=r"step_00000003 is damaged and was renamed to step_00000003\.damaged"):
        save(tmp_path, 5, 0.2, keep=1)
    assert names(tmp_path) == ["step_00000002", "step_00000003.damaged", "step_00000005"]


def test_a_damaged_one_does_not_count_among_the_newest(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (folder(tmp_path, 3) / "train.pt").unlink()
    with pytest.warns(RuntimeWarning, match="step_00000003 is damaged"):
        save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003.damaged", "step_00000004"]


def test_one_that_another_step_has_written_is_not_taken_for_that_of_its_name(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(folder(tmp_path, 1), folder(tmp_path, 7))
    with pytest.warns(RuntimeWarning, match="step_00000007: it was saved at step 1"):
        check(latest_checkpoint(tmp_path), 1)


def test_a_reader_leaves_damaged_ones_and_a_run_sets_them_aside(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    for _ in range(2):
        shutil.rmtree(folder(tmp_path, 3))
        folder(tmp_path, 3).mkdir()
        with pytest.warns(RuntimeWarning, match="trying the previous one"):
            check(find_checkpoint(tmp_path), 2)
        assert folder(tmp_path, 3).exists()
        with pytest.warns(RuntimeWarning, match="is damaged and was renamed"):
            check(resumable_checkpoint(tmp_path), 2)
        save(tmp_path, 3, keep=3)
    aside = ["step_00000003.damaged", "step_00000003.damaged_2"]
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003", *aside]
    assert [path.name for path in step_folders(tmp_path)] == ["step_00000003", "step_00000002", "step_00000001"]
    check(resumable_checkpoint(tmp_path), 3)


def test_a_score_that_comes_later_selects_the_best_too(tmp_path):
    kept = {1: [1], 2: [1, 2], 3: [3], 4: [3, 4]}
    for step, score in ((1, 0.9), (2, 0.5), (3, 0.95), (4, 0.1)):
        save(tmp_path, step, keep=1)
        score_checkpoint(tmp_path, WORLD, config(1), step, score)
        check(latest_checkpoint(tmp_path), step)
        assert open_checkpoint(folder(tmp_path, step)).score == score
        assert steps(tmp_path) == kept[step], "the best before is deleted at once"


@pytest.mark.parametrize("content", ["", "[]", "{}", None])
def test_a_score_for_a_damaged_manifest_is_a_failed_write(content, tmp_path):
    """Of which all ranks hear, so that none waits for the main process."""
    manifest = save(tmp_path, 1) / MANIFEST
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(WriteError, match=r"step_00000001: manifest\.json cannot be read"):
        score_checkpoint(tmp_path, WORLD, config(), 1, 0.5)


def test_a_kill_while_old_ones_are_deleted_leaves_no_half_of_one(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def killed(path, **_):
        if path.name.startswith(".step_00000001") and path.exists():
            next(file for file in path.iterdir()).unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            save(tmp_path, 3)
    assert [path.name for path in step_folders(tmp_path)] == ["step_00000003", "step_00000002"]
    save(tmp_path, 4)
    assert steps(tmp_path) == [3, 4], "what was left of it is gone"


# Whose fault an error is


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyError("queue"), BadInput),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), BadInput),
        (OverflowError("too large"), BadInput),
        (OSError(errno.EIO, "Input/output error"), BadInput),
        (MemoryError(), OSError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"), OSError),
        (RuntimeError("unable to mmap 64 bytes from file <x>: Cannot allocate memory (12)"), OSError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), RuntimeError),
        (torch.distributed.DistBackendError("NCCL error"), torch.distributed.DistBackendError),
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (OSError(errno.ESTALE, "Stale file handle"), OSError),
    ],
    ids=str,
)
def test_only_what_a_checkpoint_holds_is_blamed_on_it(error, raised, sound, monkeypatch):
    """Who obeys the message deletes it."""

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(module, "load_file", failing)
    monkeypatch.setattr(torch, "load", failing)
    checkpoint = open_checkpoint(sound)
    for read in (lambda: checkpoint.weights("model"), lambda: checkpoint.state("train")):
        # Where the code that loads it is, this stays the message of the file.
        with pytest.raises(raised) as caught, loading_checkpoint(sound):
            read()
        assert ("delete the checkpoint" in str(caught.value)) == (raised is BadInput)
    with pytest.raises(raised) as caught, loading_checkpoint(sound):
        failing()
    assert "delete" not in str(caught.value)
    assert ("does not fit this code" in str(caught.value)) == (raised is BadInput)


def test_a_state_that_needs_more_memory_than_is_free_is_not_blamed(sound, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 10)
    with pytest.raises(OSError, match=r"step_00000004: train\.pt cannot be read now \(its content: needs .* free\)$"):
        open_checkpoint(sound).state("train")
    assert open_checkpoint(sound).state("train", mapped=True), "it is read as it is copied"


# Hostile content


def facts_of(file: Path) -> dict[str, object]:
    """What a manifest says of a file."""
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def reseal(path: Path, **changes: object) -> None:
    """Rewrite a manifest so that its own digest fits."""
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    manifest.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest}))


def test_a_manifest_with_a_digest_that_fits_is_taken(sound, tmp_path):
    """So what refuses those below is not the digest."""
    copy = Path(shutil.copytree(sound, tmp_path / "copy"))
    reseal(copy)
    check(open_checkpoint(copy), 4)


OUTSIDE = "a file outside the checkpoint's folder"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside.txt", OUTSIDE),
        ("../../outside.txt", OUTSIDE),
        ("ABSOLUTE", OUTSIDE),
        ("a/b", OUTSIDE),
        (".", OUTSIDE),
        ("", "is missing"),
        ("..", "is missing"),
        ("a\x00b", "cannot be read|is missing"),
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused(name, message, sound, tmp_path):
    copy = Path(shutil.copytree(sound, tmp_path / "checkpoint"))
    outside = tmp_path / "outside.txt"
    outside.write_text("x")
    files = json.loads((copy / MANIFEST).read_text())["files"]
    reseal(copy, files=files | {name if name != "ABSOLUTE" else str(outside): facts_of(outside)})
    with pytest.raises(ValueError, match=message):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    "changes", [{"files": []}, {"files": {"train.pt": 3}}, {"files": {"train.pt": {}}}, {"format": 99}, {"files": {}}]
)
def test_manifests_that_make_no_sense_are_refused(changes, sound, tmp_path):
    copy = Path(shutil.copytree(sound, tmp_path / "copy"))
    reseal(copy, **changes)
    with pytest.raises(ValueError, match="checkpoint"):
        open_checkpoint(copy)


class Malicious:
    """A pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickled_code_is_refused_even_where_the_manifest_fits(sound, tmp_path):
    copy, trace = Path(shutil.copytree(sound, tmp_path / "copy")), tmp_path / "executed"
    torch.save({"optimizer": Malicious(trace)}, copy / "train.pt")
    files = json.loads((copy / MANIFEST).read_text())["files"]
    reseal(copy, files=files | {"train.pt": facts_of(copy / "train.pt")})
    checkpoint = open_checkpoint(copy)
    with pytest.raises(ValueError, match=r"train\.pt cannot be read"):
        checkpoint.state("train")
    assert not trace.exists()


def replace_file(path: Path, name: str, content: bytes) -> Checkpoint:
    """Put other content into a checkpoint, with a manifest that fits."""
    (path / name).write_bytes(content)
    reseal(path, files=json.loads((path / MANIFEST).read_text())["files"] | {name: facts_of(path / name)})
    return open_checkpoint(path)


ABSURD_HEADER = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (1 << 62).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{" * 100,
        len(ABSURD_HEADER).to_bytes(8, "little") + ABSURD_HEADER,
        pickle.dumps({"w": 1}),
    ],
    ids=["empty", "ones", "a header of exabytes", "no JSON", "a tensor of exabytes", "a pickle"],
)
def test_weights_of_absurd_sizes_are_refused_without_being_allocated(content, sound, tmp_path):
    checkpoint = replace_file(Path(shutil.copytree(sound, tmp_path / "copy")), "model.safetensors", content)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        checkpoint.weights("model")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_bare_pickle_is_not_unpickled(protocol, sound, tmp_path):
    trace = tmp_path / "executed"
    content = pickle.dumps({"objective": Malicious(trace)}, protocol)
    checkpoint = replace_file(Path(shutil.copytree(sound, tmp_path / "copy")), "rank_0.pt", content)
    with pytest.raises(ValueError, match=r"rank_0\.pt cannot be read"):
        checkpoint.state("rank_0")
    assert not trace.exists()


@pytest.mark.parametrize("cut", [1, 100, 1000])
def test_a_state_that_is_no_archive_is_refused(cut, sound, tmp_path):
    copy = Path(shutil.copytree(sound, tmp_path / "copy"))
    checkpoint = replace_file(copy, "train.pt", (copy / "train.pt").read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"train\.pt cannot be read"):
        checkpoint.state("train")


@pytest.mark.parametrize(
    "changes",
    [{"n_ranks": 10**18}, {"n_ranks": -1}, {"n_ranks": "1"}, {"n_ranks": True}, {"n_ranks": 0}, {"step": "4"}],
)
def test_absurd_numbers_in_a_manifest_are_refused_at_once(changes, sound, tmp_path):
    copy = Path(shutil.copytree(sound, tmp_path / "copy"))
    reseal(copy, **changes)
    with pytest.raises(ValueError, match="manifest"):
        open_checkpoint(copy)


@pytest.mark.parametrize("content", ["[" * 200_000, "x" * ((1 << 24) + 1)], ids=["nested", "large"])
def test_manifests_meant_to_exhaust_the_machine_are_refused(content, sound, tmp_path):
    copy = Path(shutil.copytree(sound, tmp_path / "copy"))
    (copy / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match="manifest"):
        open_checkpoint(copy)
