"""Opens an untrusted ``tokenizer.json`` once, where a failure can still be told as the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from workers.errors import JobError, UserError

TOKENIZER_JSON = "tokenizer.json"


def check_tokenizer_json(content: bytes) -> None:
    """Raise UserError ``invalid_tokenizer`` if the tokenizers library cannot load it or encode with it."""
    from tokenizers import Tokenizer

    with tokenizer_failures("invalid_tokenizer", "tokenizer.json cannot be used"):
        Tokenizer.from_buffer(content).encode("Some words, to see that it works: 0123.")


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
