"""Two models that read the same text, each opened whole or by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from workers.formats.opening import Readable


def logits_of_both(
    original: Readable, artifact: Readable, batches: Sequence[Tensor], progress: Callable[[float], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits of both models for each of the batches of token ids (sequences × tokens), in order."""
    limits = [model.waiting for model in (original, artifact) if model.waiting is not None]
    num_tokens = sum(ids.numel() for ids in batches)
    done = 0.0
    for together in _runs(batches, min((limit.num_tokens for limit in limits), default=0)):
        share = sum(ids.numel() for ids in together) / num_tokens
        progress_of = [_between(progress, done + share * part / 3, share / 3) for part in range(3)]
        before, after = (
            model.read(together, report) for model, report in zip((original, artifact), progress_of[:2], strict=True)
        )
        finished = 0
        for group in _runs(together, min((limit.num_logits for limit in limits), default=0)):
            # A model by block reads its head anew for each group, and gives it back: never are there two.
            waiting, others = list(before(len(group)))[::-1], after(len(group))
            while waiting:
                finished += 1
                progress_of[2](finished / len(together))
                yield waiting.pop(), next(others)
            others.close()
        done += share


def _runs(batches: Sequence[Tensor], num_tokens: int) -> Iterator[Sequence[Tensor]]:
    """As many batches in a row as have ``num_tokens`` tokens together, but at least one."""
    first = found = 0
    for number, ids in enumerate(batches):
        if number > first and found + ids.numel() > num_tokens:
            yield batches[first:number]
            first = number
            found = 0
        found += ids.numel()
    if batches:
        yield batches[first:]


def _between(progress: Callable[[float], None], begin: float, share: float) -> Callable[[float], None]:
    return lambda fraction: progress(begin + share * fraction)
