"""Where the time of our step goes, by PyTorch operation: `python -m bench step --profile`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure import Report, row, synchronize, table

N_STEPS = 3
N_SHOWN = 12
COLUMNS = {"name": "operation", "share": "share", "ours_ms": "ms per step", "n_calls": "calls per step"}


def profile_step(step: Callable[[], object], n_warmup: int, device: torch.device, title: str) -> Report:
    """Shares of the operations that take longest, each without what it calls; on a GPU, of the GPU's time."""
    on_gpu = device.type == "cuda"
    for _ in range(n_warmup):
        step()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        for _ in range(N_STEPS):
            step()
        synchronize(device)
    spent = {
        event.key: ((event.self_device_time_total if on_gpu else event.self_cpu_time_total), event.count)
        for event in recorded.key_averages()
    }
    total = sum(own for own, _ in spent.values())
    dearest = sorted(spent.items(), key=lambda item: -item[1][0])[:N_SHOWN]
    rows = [
        row(name, own / 1000 / N_STEPS, share=f"{own / total:.1%}", n_calls=round(count / N_STEPS, 1))
        for name, (own, count) in dearest
    ]
    remark = f"Of {total / 1000 / N_STEPS:,.0f} ms per step, over {N_STEPS} steps; the profiler's own cost included."
    return Report(rows, [f"# Where the time goes: {title}", "", *table(rows, COLUMNS), "", remark])
