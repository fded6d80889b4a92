"""Two models that read the same text, each opened whole or by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from workers.formats.opening import Readable

# Token ids that the original reads and those that the artifact reads, each sequences × tokens: of one text.
Batch = tuple[Tensor, Tensor]


def logits_of_both(
    original: Readable, artifact: Readable, batches: Sequence[Batch], progress: Callable[[float], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits of both models for each of the batches, in order."""
    limits = [model.waiting for model in (original, artifact) if model.waiting is not None]
    num_tokens = sum(map(_num_tokens, batches))
    done = 0.0
    for together in _runs(batches, min((limit.num_tokens for limit in limits), default=0)):
        share = sum(map(_num_tokens, together)) / num_tokens
        progress_of = [_between(progress, done + share * part / 3, share / 3) for part in range(3)]
        before, after = (
            model.read([batch[number] for batch in together], progress_of[number])
            for number, model in enumerate((original, artifact))
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


def _num_tokens(batch: Batch) -> int:
    return max(ids.numel() for ids in batch)


def _runs(batches: Sequence[Batch], num_tokens: int) -> Iterator[Sequence[Batch]]:
    """As many batches in a row as have ``num_tokens`` tokens together, but at least one."""
    first = found = 0
    for number, batch in enumerate(batches):
        if number > first and found + _num_tokens(batch) > num_tokens:
            yield batches[first:number]
            first = number
            found = 0
        found += _num_tokens(batch)
    if batches:
        yield batches[first:]


def _between(progress: Callable[[float], None], begin: float, share: float) -> Callable[[float], None]:
    return lambda fraction: progress(begin + share * fraction)
