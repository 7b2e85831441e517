"""The processor, for the pages that report figures."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_facts() -> dict[str, str]:
    """What Linux says of the last processor, by name (`model name`, `flags`, ...); empty on other systems."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    fields = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in fields}


def processor_name() -> str:
    """Model name of the processor, or its architecture where the system names no model."""
    return processor_facts().get("model name", platform.machine())
