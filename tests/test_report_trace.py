"""Traces: what they record of the passes, pages that play them in a browser, and moving pictures."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from base.reading import BadInput
from data.addition import AdditionSettings
from data.dataset import AnswerVerdict
from data.sudoku import SudokuSettings
from report.trace import (
    MAX_CANDIDATES,
    Trace,
    build_trace,
    draw_gif,
    html_fragment,
    read_traces,
    write_trace_page,
    write_traces,
)
from samplers.step import Pass

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PUZZLE, SOLUTION = "1.3.........4..1", "1234341221434321"


def passes_of(prompt: np.ndarray, writes: list[dict[int, int]], mask_id: int, n_candidates: int = 2) -> list[Pass]:
    """Passes that write tokens with confidence 0.9, 0.8, ... and predict them with 0.75 everywhere, then token 1."""
    tokens, confidence, passes = prompt.copy(), np.full(len(prompt), np.nan, dtype=np.float32), []
    for number, written in enumerate(writes):
        masked = tokens == mask_id
        for position, token in written.items():
            tokens[position] = token
            confidence[position] = np.nan if token == mask_id else 0.9 - 0.1 * number
        candidates = np.full((len(prompt), n_candidates), -1)
        candidates[masked] = [2, 1][:n_candidates]
        probabilities = np.where(candidates >= 0, [0.75, 0.2][:n_candidates], 0)
        parts = (tokens.copy(), confidence.copy(), candidates, probabilities)
        passes.append(Pass(torch.tensor([0]), *(torch.from_numpy(part)[None] for part in parts)))
    return passes


def board_trace(layout: str = "in_place", last: int = 1) -> Trace:
    """A 4x4 board: four passes fill it row by row, a fifth changes its first cell, which is masked in between."""
    data = SudokuSettings(dataset="sudoku", size=4, layout=layout, source="generated", max_clues=8, min_clues=4).open(6)
    prompt = data.encode(PUZZLE)
    first, mask_id = len(prompt) - 16, 5
    cells = [int(digit) for digit in SOLUTION]
    free = [i for i in range(16) if prompt[first + i] == mask_id]
    writes = [{first + i: cells[i] for i in free if i // 4 == row} for row in range(4)]
    writes += [{first + 1: mask_id}, {first + 1: 2}]
    if layout == "two_halves":
        writes[-1][first] = last  # the clue is copied last
        del writes[0][first]
    tokens = prompt.copy()
    for written in writes:
        for position, token in written.items():
            tokens[position] = token
    (verdict,) = data.verdicts(prompt[None], tokens[None])
    return build_trace(data, PUZZLE, prompt, tokens, passes_of(prompt, writes, mask_id), mask_id, verdict)


def text_trace() -> Trace:
    data = AdditionSettings(dataset="addition", max_digits=2, n_test=2, n_train=2).open(13)
    prompt = data.encode("9+8")
    tokens = prompt.copy()
    tokens[-3:] = [7, 1, 0]
    passes = passes_of(prompt, [{8: 0}, {6: 7, 7: 1}], 12)
    return build_trace(data, "9+8 <b>", prompt, tokens, passes, 12, AnswerVerdict("17", True, "right & good"))


def test_a_trace_records_what_each_pass_changed():
    trace = board_trace()
    assert [sorted(step.written) for step in trace.steps] == [[1, 3], [4, 5, 6, 7], [8, 9, 10, 11], [13, 14], [], [1]]
    assert trace.steps[4].erased == [1]
    assert trace.steps[0].written[1] == ("2", pytest.approx(0.9))
    assert trace.steps[5].written[1] == ("2", pytest.approx(0.4))
    assert trace.steps[3].candidates.keys() == {13, 14}, "predicted are only masked positions"
    assert trace.steps[0].candidates[15 - 1] == [("2", 0.75), ("1", pytest.approx(0.2))]
    assert trace.given == {0: "1", 2: "3", 12: "4", 15: "1"}
    assert "".join(trace.final[i] for i in trace.shown) == SOLUTION
    assert not trace.wrong


def test_the_board_of_two_halves_shows_the_clues_of_the_puzzle_and_marks_a_changed_one():
    trace = board_trace("two_halves")
    assert trace.shown == list(range(16, 32))
    assert trace.given == {16: "1", 18: "3", 28: "4", 31: "1"}
    assert not trace.wrong
    changed = board_trace("two_halves", last=2)
    assert changed.wrong[16] == "clue 1 changed"
    assert 18 not in changed.wrong, "a clue that was kept is not the model's"


def test_long_traces_keep_the_candidates_of_the_pass_that_writes():
    data = AdditionSettings(dataset="addition", max_digits=50, n_test=2, n_train=2).open(13)
    prompt = data.encode("9+8")
    tokens = np.where(prompt == 12, 0, prompt)
    free = np.flatnonzero(prompt == 12)
    writes = [{int(position): 0} for position in free]
    short, long = (
        build_trace(data, "", prompt, tokens, passes_of(prompt, [{}] * n + writes, 12), 12, AnswerVerdict(""))
        for n in (0, MAX_CANDIDATES // 51)
    )
    assert [len(step.candidates) for step in short.steps] == list(range(51, 0, -1))
    assert {len(step.candidates) for step in long.steps[-51:]} == {1}


@pytest.mark.parametrize(
    ("row", "shown", "n_hidden"),
    [
        ("12?4eeeee", "1 2 3 4 EOS", 4),  # a hole in a given text with its padding
        ("12??????e", "1 2 3 EOS", 5),
        ("1e?4?????", "1 EOS 3 4 EOS", 4),
        ("1234567??", "1 2 3 4 5 6 7 EOS", 1),
        ("12345678?", "1 2 3 4 5 6 7 8 9", 0),
        ("?????????", "EOS", 8),
    ],
)
def test_a_text_ends_with_its_first_eos(row: str, shown: str, n_hidden: int, monkeypatch):
    data, mask_id, eos_id = AdditionSettings(dataset="addition", max_digits=2, n_test=2, n_train=2).open(13), 12, 11
    monkeypatch.setattr(type(data), "eos_id", eos_id)
    prompt = np.array([{"?": mask_id, "e": eos_id}.get(letter) or int(letter) for letter in row])
    filled = np.array([int(text) if text != "EOS" else eos_id for text in shown.split()] + [eos_id] * n_hidden)
    free = np.flatnonzero(prompt == mask_id)
    passes = passes_of(prompt, [{int(position): int(filled[position])} for position in free], mask_id)
    trace = build_trace(data, "", prompt, filled, passes, mask_id, AnswerVerdict(""))
    assert " ".join(trace.final[i] for i in trace.shown) == shown
    assert trace.n_hidden == n_hidden
    assert f">{n_hidden} more EOS tokens are not shown<" in html_fragment(trace) or not n_hidden


def test_a_fragment_shows_the_answer_without_code_and_needs_no_network():
    fragment = html_fragment(text_trace())
    cells = re.findall(r"data-cell><span>(.*?)</span>", fragment)
    assert "".join(cells) == "90+80=710"
    assert "9+8 &lt;b&gt;" in fragment
    assert "right &amp; good" in fragment
    assert not re.search(r"https?://|src=|href=|@import|url\(", fragment)
    content = json.loads(re.search(r'class="pt-data">(.*?)</script>', fragment, re.DOTALL)[1])
    assert content["last"] == list("90+80=710")
    assert content["steps"][0]["w"] == {"8": ["0", 900]}


def test_a_text_cannot_leave_its_place_in_the_page():
    trace = text_trace()
    hostile = "</script><script>alert(1)</script>\x1b"
    changed = Trace(hostile, AnswerVerdict("", None, hostile), None, [0], {}, trace.steps[:0], {0: hostile[:-1]}, {})
    fragment = html_fragment(changed)
    assert fragment.count("<script") == fragment.count("</script>") == 2
    assert "alert(1)</" not in fragment
    assert "\x1b" not in fragment


def test_traces_are_read_as_written(tmp_path: Path):
    traces = [board_trace("two_halves", last=2), text_trace()]
    write_traces(traces, tmp_path / "traces.json")
    assert read_traces(tmp_path / "traces.json") == traces
    assert read_traces(tmp_path / "none.json") == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda trace: trace["final"].pop("31"),
        lambda trace: trace["shown"].remove(17),
        lambda trace: trace["given"].update({"40": "1"}),
        lambda trace: trace["wrong"].update({"40": "no digit"}),
        lambda trace: trace["steps"][0]["erased"].append(40),
        lambda trace: trace["steps"][0]["written"]["17"].__setitem__(1, math.nan),
        lambda trace: trace["board"].update(size=0),
        lambda trace: trace["board"].update(box_width=0),
    ],
)
def test_a_damaged_trace_is_refused_and_not_drawn(damage, tmp_path: Path):
    path = tmp_path / "traces.json"
    write_traces([board_trace("two_halves")], path)
    content = json.loads(path.read_text())
    damage(content[0])
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"traces.json cannot be read \(.*delete it; only the traces are lost"):
        read_traces(path)


@pytest.mark.parametrize("trace", [board_trace(), text_trace()], ids=["board", "text"])
def test_a_moving_picture_has_a_frame_for_each_pass(trace: Trace, tmp_path: Path):
    draw_gif(trace, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        frames = [(frame.convert("RGB"), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
    assert len(frames) == len(trace.steps) + 1
    assert frames[-1][1] == 3000
    first, last = (np.asarray(frames[i][0]).astype(int) for i in (0, -1))
    assert (np.abs(last - first).max(2) > 30).mean() > 0.01


PLAY = """
<script>
const root = document.querySelector(".pt"), note = {};
const cells = () => [...root.querySelectorAll("[data-cell]")].map((cell) => cell.querySelector("span").textContent);
const key = (name) => root.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
const status = () => root.querySelector(".pt-status").textContent;
note.atLoad = cells();
key("Home"); note.first = cells(); note.firstStatus = status();
key("ArrowRight"); note.second = cells(); note.secondStatus = status();
root.querySelector("[data-cell]:nth-child(4)").dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
note.candidates = root.querySelector(".pt-candidates").innerText;
key("End"); key("Home");
root.querySelector(".pt-play").click();
const poll = setInterval(() => {
  if (root.querySelector(".pt-play").textContent !== "Play") return;
  clearInterval(poll);
  note.played = cells(); note.playedStatus = status();
  note.wide = document.documentElement.scrollWidth <= window.innerWidth;
  const out = document.createElement("pre"); out.id = "note"; out.textContent = JSON.stringify(note);
  document.body.append(out);
}, 50);
</script>
</body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_plays_the_page_to_the_last_board(width: int, tmp_path: Path):
    trace = board_trace()
    write_trace_page([trace], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page.replace("</body>", PLAY), encoding="utf-8")
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    options = [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=60000", "--dump-dom"]
    done = subprocess.run(
        [*command, *options, f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'<pre id="note">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    note = json.loads(html.unescape(found[1]))
    assert "".join(note["played"]) == "".join(note["atLoad"]) == SOLUTION
    assert note["playedStatus"] == "Pass 6 of 6, 12 of 12 cells filled"
    assert note["first"] == [digit if digit != "." else "" for digit in PUZZLE]
    assert note["firstStatus"] == "Pass 0 of 6, 0 of 12 cells filled"
    assert note["second"] == [digit if digit != "." else "" for digit in "1234" + PUZZLE[4:]]
    assert "Row 1, column 4: 4, written at pass 1 with 90%" in note["candidates"]
    assert "75.0%" in note["candidates"]
    assert note["wide"], "nothing is wider than the window"
