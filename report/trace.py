"""How a sampled answer came about: an interactive page or page fragment (HTML), or an animated GIF.

    python sampling.py --puzzle 53..7.... --trace solved.html
    python sampling.py --puzzle 53..7.... --trace solved.gif

`html_fragment` is for pages and notebooks that show more than a trace. Pages need no network: style, code and data are
in the file. A data set says with `board` and `token_text` how its rows are drawn.

Shapes: L positions.
"""

from __future__ import annotations

import functools
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter

from base.files import replacing, write_text
from base.reading import read_text, reading
from base.text import escape
from data.dataset import AnswerVerdict, Board, DataSet
from samplers.step import Pass

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

# Candidates of every pass are kept up to this many position-passes, which is about 100 kB; above, only those of the
# pass that writes a position.
MAX_CANDIDATES = 3500
MIN_PROBABILITY = 0.005  # of a candidate that is kept
MAX_FRAMES = 120  # of a GIF

Probability = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Step:
    """What one forward pass changed."""

    # Text and confidence by position; None: written without a prediction.
    written: dict[int, tuple[str, Probability | None]]
    erased: list[int]  # positions that were masked again
    # The most probable tokens and their probabilities by position, best first.
    candidates: dict[int, list[tuple[str, Probability]]]


@dataclass(frozen=True)
class Trace:
    """How an answer came about, pass by pass. Positions are those of the row; only those in `shown` are drawn."""

    question: str
    verdict: AnswerVerdict
    board: Board | None  # None: positions are drawn as text
    shown: list[int]  # in reading order
    given: dict[int, str]  # text of given positions; those of a board may be written again, maybe wrongly
    steps: list[Step]
    final: dict[int, str]  # text of all drawn positions at the end
    wrong: dict[int, str]  # what is wrong with drawn positions that the model wrote
    n_hidden: int = 0  # EOS tokens at the end but one, which are not drawn


_TRACES = TypeAdapter(list[Trace])


def build_trace(
    data: DataSet,
    question: str,
    prompt: np.ndarray,
    tokens: np.ndarray,
    passes: Sequence[Pass],
    mask_id: int,
    verdict: AnswerVerdict,
) -> Trace:
    """The trace of one sampled row.

    Args:
        prompt: int64 [L], `mask_id` at the positions that were filled.
        tokens: int64 [L], sampled.
        passes: of this row alone, in order, see `samplers.step.Samples.history`.
    """
    board = data.board
    texts: dict[int, str] = {}

    def text_of(token: int) -> str:
        if token not in texts:
            texts[token] = "EOS" if token == data.eos_id else escape(data.token_text(token), keep="\n\t")
        return texts[token]

    shown = _shown_positions(data, tokens)
    if board is None:
        given = {i: text_of(int(prompt[i])) for i in shown if prompt[i] != mask_id}
    else:
        puzzle = prompt[board.puzzle_first :][: len(shown)]
        given = {i: text_of(int(clue)) for i, clue in zip(shown, puzzle, strict=True) if clue != board.empty}
    final = {i: text_of(int(tokens[i])) for i in shown}
    n_predicted = sum(int((np.asarray(each.candidates)[0, shown, 0] >= 0).sum()) for each in passes)
    keep_all = n_predicted <= MAX_CANDIDATES
    steps, before = [], np.asarray(prompt)
    for number, each in enumerate(passes, 1):
        now = each.tokens[0].cpu().numpy().copy()
        if number == len(passes):  # EOS tokens after the first of an answer are in no pass
            now = np.where(now == mask_id, tokens, now)
        changed = [i for i in shown if now[i] != before[i]]
        written = [i for i in changed if now[i] != mask_id]
        confidence = each.confidence[0].numpy()
        steps.append(
            Step(
                written={
                    i: (text_of(int(now[i])), None if math.isnan(confidence[i]) else float(confidence[i]))
                    for i in written
                },
                erased=[i for i in changed if now[i] == mask_id],
                candidates=_candidates(each, shown if keep_all else written, text_of),
            )
        )
        before = now
    return Trace(
        question=question,
        verdict=verdict,
        board=board,
        shown=shown,
        given=given,
        steps=steps,
        final=final,
        wrong={i: reason for i, reason in verdict.wrong.items() if i in final and given.get(i) != final[i]},
        n_hidden=len(prompt) - len(shown) if board is None else 0,
    )


def _shown_positions(data: DataSet, tokens: np.ndarray) -> list[int]:
    """The cells of the board, or all positions of a text up to the first EOS token of those at its end."""
    positions = list(range(len(tokens)))
    if data.board is not None:
        return positions[data.board.first : data.board.first + data.board.size**2]
    if data.eos_id is None:
        return positions
    before_end = np.flatnonzero(tokens != data.eos_id)
    return positions[: before_end[-1] + 2 if len(before_end) else 1]


def _candidates(
    each: Pass, positions: Sequence[int], text_of: Callable[[int], str]
) -> dict[int, list[tuple[str, float]]]:
    """The probable tokens of a pass at those of `positions` that it predicted."""
    candidates, probabilities = each.candidates[0].numpy(), each.probabilities[0].numpy()
    return {
        i: [
            (text_of(int(token)), float(probability))
            for token, probability in zip(candidates[i], probabilities[i], strict=True)
            if token >= 0 and probability >= MIN_PROBABILITY
        ]
        for i in positions
        if candidates[i, 0] >= 0
    }


def html_fragment(trace: Trace) -> str:
    """A self-contained HTML element with its style and code: it plays the trace, on any page and several times on one.

    Without JavaScript it shows the answer.
    """
    cells = _board_cells(trace) if trace.board is not None else _text_tokens(trace)
    kind = "" if trace.verdict.right is None else " pt-right" if trace.verdict.right else " pt-not-right"
    folder, n_steps = Path(__file__).parent, len(trace.steps)
    style, code = ((folder / f"trace.{suffix}").read_text(encoding="utf-8") for suffix in ("css", "js"))
    wrong = '<span><span class="pt-wrong"><span>5</span></span> wrong</span>' if trace.wrong else ""
    number = "small numbers: per cent" if trace.board is not None else "small numbers: pass"
    hidden = f"<span>{trace.n_hidden} more EOS tokens are not shown</span>" if trace.n_hidden else ""
    content = json.dumps(_content(trace), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return f"""<div class="pt{" pt-has-board" * (trace.board is not None)}" tabindex="0">
<style>{style}</style>
<p class="pt-question">{escape_html(escape(trace.question, keep=chr(10)))}</p>
<p class="pt-verdict{kind}">{escape_html(escape(trace.verdict.reason))}</p>
<div class="pt-main">
{cells}
<div class="pt-side">
<div class="pt-controls">
<button type="button" class="pt-play" title="play or pause (space)">Play</button>
<button type="button" class="pt-first" title="before the first pass (Home)" aria-label="first">«</button>
<button type="button" class="pt-back" title="one pass back (left arrow)" aria-label="back">‹</button>
<button type="button" class="pt-next" title="one pass on (right arrow)" aria-label="next">›</button>
<button type="button" class="pt-end" title="to the end (End)" aria-label="end">»</button>
</div>
<input class="pt-slider" type="range" min="0" max="{n_steps}" value="{n_steps}" aria-label="pass">
<p class="pt-status" role="status">{n_steps} passes</p>
<p class="pt-legend"><span>confidence 0% <span class="pt-scale"></span> 100%</span>
<span>{number}</span>{wrong}{hidden}</p>
<div class="pt-candidates"></div>
</div>
</div>
<script type="application/json" class="pt-data">{content}</script>
<script>{code}</script>
</div>
"""


def _content(trace: Trace) -> dict[str, Any]:
    """The data of `report/trace.js`; cells are numbered in reading order, probabilities in thousandths."""
    number = {position: i for i, position in enumerate(trace.shown)}
    return {
        "size": trace.board.size if trace.board is not None else 0,
        "given": {number[i]: text for i, text in trace.given.items()},
        "last": [trace.final[i] for i in trace.shown],
        "wrong": {number[i]: reason for i, reason in trace.wrong.items()},
        "steps": [
            {
                "w": {number[i]: [text, _thousandths(confidence)] for i, (text, confidence) in step.written.items()},
                "e": [number[i] for i in step.erased],
                "c": {
                    number[i]: [part for text, probability in found for part in (text, _thousandths(probability))]
                    for i, found in step.candidates.items()
                },
            }
            for step in trace.steps
        ],
    }


def _thousandths(probability: float | None) -> int | None:
    return None if probability is None else round(1000 * probability)


def _board_cells(trace: Trace) -> str:
    """The board's element, filled."""
    board = trace.board
    assert board is not None
    cells = []
    for i, position in enumerate(trace.shown):
        row, column = divmod(i, board.size)
        edges = {
            "pt-edge-right": (column + 1) % board.box_width == 0,
            "pt-edge-bottom": (row + 1) % board.box_height == 0,
            "pt-last-column": column + 1 == board.size,
            "pt-last-row": row + 1 == board.size,
            "pt-given": position in trace.given,
        }
        names = " ".join(["pt-cell", *(name for name, applies in edges.items() if applies)])
        cells.append(
            f'<div class="{names}" data-cell><span>{escape_html(trace.final[position])}</span><small></small></div>'
        )
    return f'<div class="pt-board" style="--size:{board.size}">\n' + "\n".join(cells) + "\n</div>"


def _text_tokens(trace: Trace) -> str:
    """The element of a text, filled; lines break where the final text does."""
    tokens = []
    for position in trace.shown:
        visible, newline, indent = _split_token(trace.final[position])
        name = "pt-token pt-given" if position in trace.given else "pt-token"
        token = f'<span class="{name}" data-cell><span>{escape_html(visible)}</span><small></small></span>'
        tokens.append(token + (f'<br><span class="pt-indent">{indent}</span>' if newline else ""))
    return f'<div class="pt-text">{"".join(tokens)}</div>'


def _split_token(text: str) -> tuple[str, bool, str]:
    """What to draw of a token, whether a line ends after it, and the indent of the next line."""
    _, newline, rest = text.rpartition("\n")
    indent = rest if newline and not rest.strip() else ""
    return text[: len(text) - len(indent)].replace("\n", "↵") or "·", bool(newline), indent


def write_traces(traces: Sequence[Trace], path: Path) -> None:
    """Write traces to a JSON file, for `read_traces`. Raises WriteError."""
    write_text(path, _TRACES.dump_json(list(traces)).decode())


def read_traces(path: Path) -> list[Trace]:
    """The traces in a file of `write_traces`; none if there is no file. Raises ValueError if it is damaged."""
    if not path.exists():
        return []
    with reading(f"{path}", "delete it; only the traces are lost"):
        traces = _TRACES.validate_json(read_text(path))
        for trace in traces:
            _check(trace)
        return traces


def _check(trace: Trace) -> None:
    """Raise ValueError if a trace of unknown origin cannot be drawn."""
    if trace.board is not None and min(trace.board.size, trace.board.box_height, trace.board.box_width) < 1:
        raise ValueError("a board has no cells")
    drawn = {*trace.given, *trace.wrong}
    for step in trace.steps:
        drawn.update(step.written, step.erased, step.candidates)
    if missing := (drawn - set(trace.shown)) | (set(trace.shown) - trace.final.keys()):
        raise ValueError(f"position {min(missing)} has no place or no final text")


def write_trace_page(traces: Sequence[Trace], out: Path) -> None:
    """Write a page with one trace after another, which needs no network. Raises WriteError."""
    fragments = '<hr style="border: 0; margin: 2rem 0">\n'.join(html_fragment(trace) for trace in traces)
    title = escape_html(escape(traces[0].question)[:100])
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>How {title} was sampled</title>
<style>
body {{ margin: 1.5rem auto; max-width: 60rem; padding: 0 1rem; background: #ffffff; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #14161a; }} }}
@media (max-width: 640px) {{ body {{ margin: .75rem auto; }} }}
</style>
</head>
<body>
{fragments}
<script>document.querySelector(".pt").focus({{ preventScroll: true }});</script>
</body>
</html>
"""
    write_text(out, page)


# Colours of the light page, see report/trace.css.
INK, DIM, PAPER, LINE, GIVEN, MASK, WRONG = "#16181d", "#5b6270", "#ffffff", "#c9ced8", "#eceef2", "#dfe3ea", "#b00020"
LOW, HIGH = (255, 217, 176), (166, 212, 247)
CELL, MARGIN, FOOTER, LINE_HEIGHT, TEXT_WIDTH = 52, 16, 54, 40, 800  # pixels
GIF_S, LAST_FRAME_S = 10.0, 3.0  # duration of all frames but the last, and of the last


@dataclass(frozen=True)
class _Held:
    """What a position holds at some pass."""

    text: str
    confidence: float | None = None
    step: int = 0  # 0: given


def _states(trace: Trace) -> list[dict[int, _Held]]:
    """What each position holds before the first pass and after each pass; masked positions are missing."""
    states = [{i: _Held(text) for i, text in trace.given.items()}]
    for number, step in enumerate(trace.steps, 1):
        written = {i: _Held(text, confidence, number) for i, (text, confidence) in step.written.items()}
        kept = {i: held for i, held in states[-1].items() if i not in step.erased}
        unchanged = {i for i, held in written.items() if trace.given.get(i) == held.text}  # copied clues
        states.append(kept | {i: held for i, held in written.items() if i not in unchanged})
    return states


def draw_gif(trace: Trace, out: Path) -> None:
    """Write an animated GIF of a trace, for slides; it has at most `MAX_FRAMES` frames. Raises WriteError."""
    states = _states(trace)
    n_frames = min(len(states), MAX_FRAMES)
    numbers = [round(i * (len(states) - 1) / max(1, n_frames - 1)) for i in range(n_frames)]
    draw = _draw_board if trace.board is not None else _draw_text
    frames = [draw(trace, states[number], number) for number in numbers]
    from PIL.Image import Dither

    palette = frames[-1].quantize(64)  # one for all frames, so that each stores only what has changed
    frames = [frame.quantize(palette=palette, dither=Dither.NONE) for frame in frames]
    pause_ms = round(1000 * min(0.5, GIF_S / len(frames)))
    with replacing(out) as scratch:
        frames[0].save(
            scratch,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            duration=[pause_ms] * (len(frames) - 1) + [round(1000 * LAST_FRAME_S)],
            loop=0,
        )


@functools.cache
def _font(name: str, size: int) -> FreeTypeFont:
    """A font that matplotlib brings along, so that pictures do not depend on the machine."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def _color_of(confidence: float | None) -> tuple[int, int, int]:
    share = 1.0 if confidence is None else confidence
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(LOW, HIGH, strict=True))
    return red, green, blue


def _footer(trace: Trace, number: int) -> tuple[str, str]:
    """A text below each frame and its colour: the pass, and at the end the verdict."""
    if number < len(trace.steps) or not trace.verdict.reason:
        return f"pass {number} of {len(trace.steps)}", DIM
    return trace.verdict.reason, WRONG if trace.verdict.right is False else INK


def _draw_board(trace: Trace, state: dict[int, _Held], number: int) -> Image:
    """A frame of a board."""
    from PIL import Image, ImageDraw

    board = trace.board
    assert board is not None
    side, font, bold = board.size * CELL, _font("DejaVuSans", 26), _font("DejaVuSans-Bold", 26)
    small = _font("DejaVuSans", 11)
    width = max(side, 6 * CELL) + 2 * MARGIN
    image = Image.new("RGB", (width, side + 2 * MARGIN + FOOTER), PAPER)
    draw = ImageDraw.Draw(image)
    left = (width - side) // 2
    for i, position in enumerate(trace.shown):
        row, column = divmod(i, board.size)
        x, y, held = left + column * CELL, MARGIN + row * CELL, state.get(position)
        if held is not None:
            fill = _color_of(held.confidence) if held.step else GIVEN
            draw.rectangle((x, y, x + CELL, y + CELL), fill=fill)
            is_wrong = position in trace.wrong and held.text == trace.final[position]
            color = WRONG if is_wrong else INK
            draw.text((x + CELL // 2, y + CELL // 2), held.text, color, font if held.step else bold, anchor="mm")
            if is_wrong:
                draw.line((x + 16, y + CELL - 11, x + CELL - 16, y + CELL - 11), fill=WRONG, width=2)
            if held.step and held.confidence is not None:
                text = str(round(100 * held.confidence))
                draw.text((x + CELL - 3, y + CELL - 2), text, INK, small, anchor="rs")
    for thick in (False, True):  # thick lines over thin ones
        for i in range(board.size + 1):
            at = left + i * CELL, MARGIN + i * CELL
            if (i % board.box_height == 0) == thick:
                draw.line((left, at[1], left + side, at[1]), fill=INK if thick else LINE, width=1 + thick)
            if (i % board.box_width == 0) == thick:
                draw.line((at[0], MARGIN, at[0], MARGIN + side), fill=INK if thick else LINE, width=1 + thick)
    _write_footer(draw, trace, number, width, side + 2 * MARGIN)
    return image


def _draw_text(trace: Trace, state: dict[int, _Held], number: int) -> Image:
    """A frame of a text: tokens in reading order, each with the pass that wrote it."""
    from PIL import Image, ImageDraw

    font, small = _font("DejaVuSansMono", 15), _font("DejaVuSansMono", 10)
    space = font.getlength(" ")
    places: list[tuple[int, float, int, float, str]] = []  # position, x, y, width, final text without its newline
    x, y = float(MARGIN), MARGIN
    for position in trace.shown:
        visible, newline, indent = _split_token(trace.final[position])
        width = max(font.getlength(visible), 1.3 * space) + 2
        if x + width > TEXT_WIDTH - MARGIN and x > MARGIN:
            x, y = float(MARGIN), y + LINE_HEIGHT
        places.append((position, x, y, width, visible))
        x += width + 2
        if newline:
            x, y = MARGIN + len(indent) * space, y + LINE_HEIGHT
    height = places[-1][2] + LINE_HEIGHT + MARGIN if places else 2 * MARGIN
    image = Image.new("RGB", (TEXT_WIDTH, height + FOOTER), PAPER)
    draw = ImageDraw.Draw(image)
    for position, left, top, width, visible in places:
        held = state.get(position)
        fill = MASK if held is None else _color_of(held.confidence) if held.step else GIVEN
        draw.rounded_rectangle((left, top, left + width, top + 22), 3, fill=fill)
        if held is not None:
            same = held.text == trace.final[position]
            color = WRONG if same and position in trace.wrong else INK
            draw.text((left + 1, top + 3), visible if same else held.text.replace("\n", "↵"), color, font)
            if held.step:
                draw.text((left + width / 2, top + 25), str(held.step), DIM, small, anchor="ma")
    _write_footer(draw, trace, number, TEXT_WIDTH, height)
    return image


def _write_footer(draw: Any, trace: Trace, number: int, width: int, top: int) -> None:
    """The footer, in as many lines as it needs, at most two."""
    font, (text, color) = _font("DejaVuSans", 15), _footer(trace, number)
    n_columns = int((width - 2 * MARGIN) / font.getlength("n"))
    lines = textwrap.wrap(text, n_columns, max_lines=2, placeholder=" ...")
    draw.multiline_text((MARGIN, top), "\n".join(lines), color, font, spacing=4)
