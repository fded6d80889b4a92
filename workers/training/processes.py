"""A training in several processes of this machine, which torchrun's starter of processes starts, watches and ends.

This process opens no model while they learn. It hears the first of them, and the first error of any.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, start_processes

from workers.engine.device import compute_device, return_freed_memory
from workers.errors import CrashError, JobError, UserError, as_job_error
from workers.lifeline import die_with_parent
from workers.training.learning import Learned, learn
from workers.training.lesson import Lesson
from workers.training.loop import Listener
from workers.training.ranks import LostRankError, Ranks

_POLL_SECONDS = 0.05
# A suspended job stands still for as long as its lease is in doubt; that a process has died is seen otherwise.
_COLLECTIVE_TIMEOUT = timedelta(days=1)
_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
# What torchrun gives handlers of its own, which would outlast the training.
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def check_accelerators(num_processes: int, param: str) -> None:
    """Raise UserError ``too_few_accelerators`` where processes would have to share one; CPUs are shared."""
    if compute_device().type != "cuda" or torch.cuda.device_count() >= num_processes:
        return
    raise UserError(
        "too_few_accelerators",
        f"The worker has {torch.cuda.device_count()} accelerators, fewer than the {num_processes} processes asked for.",
        param=param,
        hint="Ask for fewer processes, or for a worker with more accelerators.",
    )


def learn_in_processes(lesson: Lesson, num_processes: int, listener: Listener) -> Learned:
    """Have so many processes learn ``lesson`` together; when this returns or raises, none of them is left.

    Raises:
        JobError: what one of them raised; CrashError ``process_killed`` where one died without a word.
    """
    folder = lesson.folder / "processes"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    reader, writer = get_context("spawn").Pipe(duplex=False)
    # Pickled here: torch would hand tensors over in shared memory, which this process would have to keep for them.
    handed = (pickle.dumps(lesson), torch.get_num_threads(), os.getpid(), str(folder / "store"), writer)
    with reader:
        with writer, _own_signal_handlers():
            context = start_processes(
                "training",
                _run_rank,
                args={rank: (Ranks(rank, num_processes), *handed) for rank in range(num_processes)},
                envs={rank: {"GLOO_SOCKET_IFNAME": _LOOPBACK, "NCCL_SOCKET_IFNAME": _LOOPBACK}
                      for rank in range(num_processes)},
                logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
            )  # fmt: skip
        try:
            return _hear(context, reader, listener)
        finally:
            context.close(signal.SIGKILL)


def _hear(context: PContext, reader: Connection, listener: Listener) -> Learned:
    """Follow the processes to their end."""
    errors: list[JobError] = []
    while True:
        result = context.wait(_POLL_SECONDS, _POLL_SECONDS)  # asked before the last read, so that nothing is missed
        for kind, content in _messages(reader):
            if kind == "told":
                listener.told(*content)
            elif kind == "measured":
                listener.measured(content)
            else:
                errors.append(JobError.from_dict(content))
        if result is None:
            continue
        if result.is_failed():
            raise errors[0] if errors else _killed()
        learned: Learned = result.return_values[0]
        return learned


def _messages(reader: Connection) -> Iterator[tuple[str, Any]]:
    """What waits to be read; nothing when every process has ended."""
    with suppress(EOFError):
        while reader.poll():
            kind, content = json.loads(reader.recv_bytes())
            yield kind, content


def _killed() -> CrashError:
    """What is said where a process ended without having said why."""
    return CrashError(
        "process_killed",
        "One of the processes of the training ended before it was done.",
        hint="It probably ran out of memory: use fewer processes, shorter samples, a smaller micro_batch_size, or a "
        "worker with more memory.",
    )


def _run_rank(
    ranks: Ranks, lesson: bytes, num_threads: int, parent: int, store: str, writer: Connection
) -> Learned | None:
    """What each process does. ``num_threads`` are shared among all."""
    die_with_parent(parent)

    def send(kind: str, content: Any) -> None:
        # At most what a pipe takes at once: processes write to it without a lock, which a killed one would keep.
        writer.send_bytes(json.dumps([kind, content], ensure_ascii=False).encode())

    try:
        return_freed_memory()
        torch.set_num_threads(max(1, num_threads // ranks.count))
        is_cuda = compute_device().type == "cuda"
        if is_cuda:
            torch.cuda.set_device(ranks.rank)
        # Processes meet in a file: torchrun's own meeting place listens to the network, and looks up the host's name.
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            init_method=f"file://{store}",
            rank=ranks.rank,
            world_size=ranks.count,
            timeout=_COLLECTIVE_TIMEOUT,
        )
        listener = Listener(lambda *steps: send("told", steps), lambda point: send("measured", point))
        learned = learn(pickle.loads(lesson), ranks, listener)  # noqa: S301 - our parent wrote it
        dist.destroy_process_group()
    except LostRankError:
        raise  # whoever is lost says why, or its exit code does
    except BaseException as error:
        send("error", as_job_error(error).to_dict())
        raise
    return learned if ranks.is_first else None


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep what signals do to this process."""
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
