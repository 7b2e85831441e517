"""What the commands of `results/` share: how records are read, and how a page says where its figures are from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from base.reading import read_text, reading
from config import AnyObjectiveSettings, BlockSettings
from runtime.history import code_version, commit_name

Number = Annotated[float | int, Field(ge=0, le=1e100)]  # larger ones overflow in the library that draws
Text = Annotated[str, Field(max_length=1000)]


def check_folder(path: Path, option: str) -> None:
    """Raise ValueError, before any work is done, if `path` is no folder and none can be created there."""
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        where = f"{option} {path}" + (f": {existing}" if existing != path else "")
        raise ValueError(f"{where} is not a folder that can be written: name another")


def named_folder(text: str) -> Path:
    """The `type` of an argument: a folder that records name; absolute if the path ends in no name, as `.` does."""
    path = Path(text)
    return path if path.name not in ("", "..") else Path(os.path.realpath(path))


def check_masks_rows(run_dir: Path, settings: AnyObjectiveSettings) -> None:
    """Raise ValueError if the objective of a run does not mask whole rows."""
    if isinstance(settings, BlockSettings) or settings.causal:
        raise ValueError(f"{run_dir}: objective.name {settings.name!r} must be one that masks whole rows")


def read_records(path: Path, kind: Any) -> dict[str, Any]:
    """The records of a `kind` (a TypedDict) in a file; ValueError if they cannot be drawn."""
    remedy = "repair or delete it, or choose another --out" if path.exists() else "run the experiment without --draw"
    with reading(f"{path}", remedy):
        return dict(TypeAdapter(kind).validate_json(read_text(path)))


def commit() -> str:
    """The commit of the checkout, with `-dirty` if files are modified."""
    return commit_name(code_version())


class Provenance(TypedDict):
    """How something was measured."""

    command: Text
    machine: Text
    commit: Text
    date: Text


def provenance(command: str, machine: str) -> Provenance:
    """That of a measurement with this checkout, today."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"command": command, "machine": machine, "commit": commit(), "date": date}


def provenance_in_words(facts: Mapping[str, object]) -> str:
    """A `Provenance` for a page."""
    return f"`{facts['command']}`, commit {facts['commit']}, {facts['date']}, {facts['machine']}"


def read_note(folder: Path) -> list[str]:
    """Paragraphs of a page that are written by hand, from note.md in its folder; empty if there is none.

    They give the answer, and what the figures do not show.
    """
    note = folder / "note.md"
    return [read_text(note).rstrip(), ""] if note.exists() else []
