"""Gather the results of the Sudoku runs, complete or not: records, curves, accuracy, and weights in bfloat16.

Writes collect.json with the accuracy by all rules, and for each run its metrics.jsonl and its weights, averaged ones if
the run has them. config.yaml, and final.json of a complete run, are in collect.json.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.gpu.report import Report
from bench.gpu.runs import SUDOKU
from data.foreign import read_json, reading
from report.curves import accuracy_points, draw_curves, rules_of, target_table
from runtime.checkpoint import find_checkpoint
from runtime.final import read_final
from runtime.metrics import METRICS_FILE, read_metrics
from samplers.options import rule_in_words

LOG_BYTES = 4000  # of the end of each log, in collect.json


def run(options: Namespace, report: Report) -> None:
    """Gather both runs, then compare them."""
    runs, target = options.runs, options.target or 0.9
    for name in SUDOKU:
        report.details[name] = gather(runs / name, report.out, name, report)
    for log in sorted(runs.glob("*.log")):
        report.details[log.name] = log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
    found = [runs / name for name in SUDOKU if any(rules_of(read_metrics(runs / name)))]
    if not found:
        report.fail("curves", f"no run in {runs} has been evaluated yet")
        return
    curves = draw_curves(found, "step", report.out / "curves.png", targets=[target])
    for curve in curves:
        at = curve.first_reaching(target, "step")
        report.add(f"{curve.setting}, first at {target:.0%}", at if at is not None else "not reached", "updates")
    report.details["target"] = target_table(curves, target, curves[-1].setting)
    print("\n".join(report.details["target"]))


def gather(run_dir: Path, out: Path, name: str, report: Report) -> dict[str, Any]:
    """The figures of one run; copies its records and weights."""
    final, rules = read_final(run_dir), run_dir.with_name(f"{name}_rules.json")
    found: dict[str, Any] = {"complete": final is not None} | ({"final": final} if final else {})
    if rules.exists():
        with reading(f"{rules}", "delete it; only the accuracy by all rules is lost"):
            found["rules"] = read_json(rules)
    if not (run_dir / METRICS_FILE).exists():
        report.fail(name, "it has no records yet")
        return found
    shutil.copyfile(run_dir / METRICS_FILE, out / f"{name}_metrics.jsonl")
    found["config"] = (run_dir / "config.yaml").read_text(encoding="utf-8")
    rows = list(read_metrics(run_dir))
    report.add(f"{name}, updates" + ("" if found["complete"] else " so far"), float(rows[-1]["step"] if rows else 0))
    times = [row["train/step_ms"] for row in rows if "train/step_ms" in row]
    if times:
        report.add(f"{name}, median time of an update while sharing the card", sorted(times)[len(times) // 2], "ms")
    points = accuracy_points(rows, rules_of(rows)[0]) if rules_of(rows) else []
    if points:
        report.add(f"{name}, solved at update {points[-1]['step']:,}", 100 * points[-1]["accuracy"], "%")
    for each in found.get("rules", {}).get("samplers", []):
        rule = rule_in_words(each["confidence"], each["tokens_per_step"], each["options"])
        report.add(f"{name}, solved of {each['n']:,}, {rule}", 100 * each["accuracy"], "%")
    try:
        checkpoint = find_checkpoint(run_dir)
    except ValueError:
        report.add(f"{name}, weights", "no checkpoint yet")
        return found
    weights = checkpoint.weights("ema") or checkpoint.weights("model") or {}
    path = out / f"{name}.safetensors"
    save_file({key: tensor.to(torch.bfloat16).contiguous() for key, tensor in weights.items()}, path)
    report.add(f"{name}, weights of update {checkpoint.step:,}", path.stat().st_size / 2**20, "MiB", ("<=", 14))
    return found | {"weights_step": checkpoint.step}
