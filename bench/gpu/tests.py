"""The tests that need a GPU: those with the mark `gpu`."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.gpu.report import Report


def run(options: Namespace, report: Report) -> None:
    """Run them in one process; names and reasons of those that did not pass go to tests.json."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        # Errors at import, of a package that is missing here, concern other tests; the log has them.
        words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        report.run("pytest -m gpu", *words, f"--junit-xml={file}", limit_s=600)
        if not file.exists():
            return
        cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    outcomes: dict[str, list[str]] = {"passed": [], "failure": [], "error": [], "skipped": []}
    for case in cases:
        outcome = next((child.tag for child in case if child.tag in outcomes), "passed")
        reason = next((child.get("message") or "" for child in case if child.tag in outcomes), "")
        outcomes[outcome].append(f"{case.get('classname')}::{case.get('name')} {reason}".strip())
    report.details |= outcomes
    n_passed = len(outcomes["passed"])
    report.add("tests passed", n_passed, "tests", (">=", len(cases)) if torch.cuda.is_available() else None)
    for outcome in ("failure", "error", "skipped"):
        if outcomes[outcome]:
            report.add(outcome, len(outcomes[outcome]), "tests")
