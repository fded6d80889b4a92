"""Opens an untrusted ``tokenizer.json`` once, where a failure can still be told as the user's."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from workers.errors import JobError, UserError

TOKENIZER_JSON = "tokenizer.json"


_SAMPLE = "Some words, to see that it works: 0123."
_MAX_TOKENS = 100 * len(_SAMPLE)
_SECONDS = 60.0
_MEMORY_BYTES = 4 << 30


def check_tokenizer_json(content: bytes) -> None:
    """Raise UserError ``invalid_tokenizer`` if the tokenizers library cannot load it or encode with it.

    Tried in a process of its own: rules of a few bytes may ask for more time and memory than there is.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    trial = context.Process(target=_try_out, args=(content, sender), daemon=True)
    trial.start()
    sender.close()
    try:
        problem = receiver.recv() if receiver.poll(_SECONDS) else f"a short text takes more than {_SECONDS:g} s"
    except EOFError:
        problem = "a short text takes more memory than there is"
    finally:
        trial.kill()
        trial.join()
    if problem is not None:
        with tokenizer_failures("invalid_tokenizer", "tokenizer.json cannot be used"):
            raise ValueError(problem)


def _try_out(content: bytes, result: Connection) -> None:
    """Send what is wrong with a tokenizer, or None."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES, resource.RLIM_INFINITY))
    # Whoever waits may be killed: then the kernel ends this.
    resource.setrlimit(resource.RLIMIT_CPU, (int(_SECONDS) + 1, int(_SECONDS) + 1))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    try:
        num_tokens = len(Tokenizer.from_buffer(content).encode(_SAMPLE).ids)
        result.send(f"{len(_SAMPLE)} characters become {num_tokens} tokens" if num_tokens > _MAX_TOKENS else None)
    except BaseException as error:  # noqa: BLE001 - a panic of its Rust code is no Exception
        result.send(str(error)[:500])


@contextmanager
def tokenizer_failures(code: str, message: str) -> Iterator[None]:
    """Turns whatever goes wrong within tokenizers into a UserError: a bare Exception, or a panic of its Rust code."""
    try:
        yield
    except JobError:
        raise
    except BaseException as error:
        # Damaged merges make it panic, and a panic is no Exception: it would end the process as if by a crash.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            code,
            f"{message}: {str(error)[:200]}",
            param="model.id",
            hint="Write the tokenizer again with its own save_pretrained.",
        ) from None
