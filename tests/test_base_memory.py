"""How much memory is left, of the machine and of a job."""

from __future__ import annotations

import os

import pytest

from base.memory import check_memory, free_in_groups, free_memory


def test_memory_is_bounded_by_the_machine():
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory() <= physical
    check_memory(1000, "a list")
    with pytest.raises(ValueError, match=r"a list: needs [\d,]+\.\d GiB of memory, but [\d,]+\.\d GiB are free"):
        check_memory(2 * physical, "a list")


def test_the_memory_of_a_job_is_what_its_control_groups_have_left(tmp_path):
    job = tmp_path / "slurm" / "job_7"
    step = job / "step_0" / "task_0"
    step.mkdir(parents=True)
    for group, limit, anon in (
        (tmp_path / "slurm", "1000", 100),
        (job, "500", 300),
        (job / "step_0", "max", 300),
        (step, "max", 10),
    ):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.stat").write_text(f"anon {anon}\nfile 10000\n")
    assert free_in_groups(step) == [200, 900]
    assert free_in_groups(tmp_path / "of another namespace") == []
