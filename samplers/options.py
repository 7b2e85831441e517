"""Command line options for a sampling rule, one per field of `SamplingRule`. Imports nothing slow."""

from __future__ import annotations

import argparse
from typing import get_args

from pydantic import ValidationError

from base.commands import whole_number
from config import Confidence, Revision, SamplingRule


def add_rule_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; those that are not given keep the defaults of `SamplingRule`."""
    fields = SamplingRule.model_fields
    kinds: dict[str, dict[str, object]] = {
        "confidence": {"choices": get_args(Confidence)},
        "tokens_per_step": {"type": whole_number(1)},
        "revise": {"choices": get_args(Revision)},
        "n_passes": {"type": whole_number(1)},
    }
    for key, field in fields.items():
        options = kinds.get(key, {"type": float})
        parser.add_argument(_option(key), default=field.default, help=field.description, **options)  # type: ignore[arg-type]


def rule_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> SamplingRule:
    """The rule of parsed options; invalid ones end the command with a message and exit status 2."""
    try:
        return SamplingRule(**{key: getattr(options, key) for key in SamplingRule.model_fields})
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        message = wrong["msg"].removeprefix("Value error, ")
        if wrong["loc"]:
            message = f"{_option(str(wrong['loc'][0]))} {wrong['input']}: {message[:1].lower()}{message[1:]}"
        parser.error(message)


def _option(key: str) -> str:
    return f"--{key}".replace("_", "-")
