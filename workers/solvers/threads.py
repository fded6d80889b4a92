"""Compiled loops on plain threads, which hold no lock while they compute.

There is no barrier inside, unlike OpenMP's, whose waiting made small operations many times slower when the other cores
were busy; and where parts are independent the result is the same for every number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import torch


def over_parts(count: int, work: Callable[[slice], None]) -> None:
    """Run ``work`` over contiguous parts of ``count`` rows, or columns, one a thread."""
    num_threads = max(1, min(torch.get_num_threads(), count))
    edges = [count * index // num_threads for index in range(num_threads + 1)]
    parts = [slice(start, stop) for start, stop in pairwise(edges)]
    if num_threads == 1:
        work(parts[0])
    else:
        list(_threads(torch.get_num_threads()).map(work, parts))


@lru_cache(maxsize=1)
def _threads(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="solver")
