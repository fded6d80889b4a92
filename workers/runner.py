"""Main of the processes of an attempt: fetch, compress or certify one work folder, and tell how it goes.

Knows a work folder and a pipe, nothing else. Started with ``--preload`` it imports torch first and waits; its one
order then comes as a JSON line on standard input, which stays open: its end means that the supervisor is gone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workers.errors import as_job_error
from workers.lifeline import die_with_parent

NICENESS = 10
logger = logging.getLogger(__name__)


def main() -> None:
    """Wait for the order, carry it out, and end with 0 or 1."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--events-fd", type=int, required=True)
    arguments.add_argument("--preload", action="store_true")
    options = arguments.parse_args()
    die_with_parent()
    # On a machine that also serves, answers come before the job's next product.
    os.nice(NICENESS)
    if options.preload:
        _preload()
    line = sys.stdin.buffer.readline()
    if not line:
        return
    order = json.loads(line)
    threading.Thread(target=_die_at_end_of_input, daemon=True, name="watch").start()
    work = Path(order["work"])
    _log_to(work / "logs" / f"{order['phase']}.log")
    emit = _Events(options.events_fd)
    try:
        done = _run(order, work, emit)
    except BaseException as error:  # a panic of compiled code is no Exception; the supervisor has to hear of all
        logger.exception("phase=%s failed", order["phase"])
        emit({"event": "error", **as_job_error(error).to_dict()})
        sys.exit(1)
    emit({"event": "done", "peak_memory_bytes": _peak_memory_bytes(), **done})


def _run(order: Mapping[str, Any], work: Path, emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    phase = order["phase"]
    request = json.loads((work / "request.json").read_text(encoding="utf-8"))
    if phase == "fetch":
        from workers.fetch import fetch

        fetch(work, request, emit)
        return {}
    import torch

    if num_threads := order.get("num_threads"):
        torch.set_num_threads(num_threads)
    if phase == "compress":
        from workers.pipeline import compress

        compress(work, request, emit, order.get("memory_limit_bytes"))
        return {}
    if phase == "certify":
        from workers.certify import certify

        return certify(work, request, emit, order.get("memory_limit_bytes"))
    raise ValueError(f"unknown phase {phase!r}")


class _Events:
    """Writes events to the pipe, a JSON line each."""

    def __init__(self, descriptor: int) -> None:
        self._pipe = os.fdopen(descriptor, "w", encoding="utf-8")

    def __call__(self, event: dict[str, Any]) -> None:
        self._pipe.write(json.dumps(event, allow_nan=False, default=str) + "\n")
        self._pipe.flush()


def _preload() -> None:
    """Import what compress and certify need, so that the job does not wait for it."""
    import compressed_tensors.compressors  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.auto.tokenization_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import workers.certify
    import workers.pipeline  # noqa: F401


def _die_at_end_of_input() -> None:
    # Not through sys.stdin: its lock, held by a waiting thread, makes the interpreter wait 1 s and abort as it ends.
    while os.read(0, 4096):
        continue
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _log_to(path: Path) -> None:
    """Send standard output and error, libraries' included, to the attempt's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")


def _peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
