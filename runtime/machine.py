"""Names of the processor and of the GPU, for reports of measurements."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

# What makes matrix products fast, by the flag that Linux shows, best first.
INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX512", "avx2": "AVX2"}


def processor_name() -> str:
    """Model name of the processor and its best instruction set; the architecture where the system names no model."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name, flags = facts.get("model name", platform.machine()), facts.get("flags", "").split()
    best = next((name for flag, name in INSTRUCTIONS.items() if flag in flags), None)
    return f"{name} ({best})" if best else name


def device_name(device: torch.device) -> str:
    """The GPU; or the processor, with the threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
