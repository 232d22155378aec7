"""Work spread over forked processes, whose jobs need not be sent: functions and tensors cannot be pickled."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

from mvkernels.report import Progress

Job = TypeVar("Job")
Result = TypeVar("Result")

_WORK: list[Callable[[int], object]] = []


def results(work: Callable[[Job], tuple[Result, list[str]]], jobs: Sequence[Job], processes: int) -> list[Result]:
    """What ``work`` gives for each job, in order. The faults that it gives too are said at once, on stderr."""

    def one(index: int) -> tuple[Result, list[str]]:
        torch.set_num_threads(1)
        return work(jobs[index])

    _WORK[:] = [one]
    found: dict[int, Result] = {}
    progress = Progress(len(jobs))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        futures = {pool.submit(_call, index): index for index in range(len(jobs))}
        for future in as_completed(futures):
            index = futures[future]
            found[index], faults = future.result()
            progress.step(str(jobs[index]))
            for fault in faults:
                print(f"{jobs[index]}: {fault}", file=sys.stderr, flush=True)
    progress.close()
    return [found[index] for index in range(len(jobs))]


def _call(index: int) -> object:
    return _WORK[0](index)
