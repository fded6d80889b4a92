"""The losses of two models on one text that their tokenizers write with different tokens, so that they compare.

Windows are made of whole pieces (:mod:`workers.evaluation.pieces`), so that both models read, and are scored on, the
same text: what each makes of a piece is the sum over its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from workers.evaluation.both import logits_of_both
from workers.evaluation.divergence import kl_divergence
from workers.evaluation.pieces import Framed, Pair, Piece
from workers.evaluation.quality import VALUES_AT_A_TIME, TokenMeasures, Window, check_finite, choose_masked, not_empty
from workers.formats.opening import Readable


@dataclass(frozen=True)
class PairedWindow:
    """Pieces as both models read them, and what is asked of them there."""

    original: Window
    artifact: Window
    of_original: Tensor  # the number of the piece that each scored token of the original is in
    of_artifact: Tensor
    is_same: Tensor  # of each piece that is scored, whether it is one token on both sides
    num_retokenized: int

    def shared(self, losses: Tensor) -> Tensor:
        """Losses of the artifact's tokens, those of each piece shared among the original's tokens of it: float64."""
        sums = torch.zeros(self.is_same.numel(), dtype=torch.float64).index_add(0, self.of_artifact, losses)
        return (sums / self.of_original.bincount(minlength=sums.numel()))[self.of_original]


def paired_windows(pieces: Sequence[Piece], num_tokens: int, max_seq_length: int) -> list[PairedWindow]:
    """Consecutive windows without overlap, each scored from its second piece on, as :func:`windows_of` has them.

    Neither model reads more than ``max_seq_length`` tokens of a window; of the text, the original reads ``num_tokens``.

    Raises:
        UserError: ``empty_dataset`` where no window has two pieces, one to read and one to score.
    """
    cut = [window for window in _runs(_first_of(pieces, num_tokens), max_seq_length) if len(window) > 1]
    return not_empty([_goes_on(window, 1) for window in cut])


def paired_contexts(pieces: Sequence[Piece], num_tokens: int, length: int, most_scored: int) -> list[PairedWindow]:
    """Consecutive windows without overlap, scored at their end: what lies beyond ``length`` / 2 tokens of a window.

    On the side that has more of them; no more than ``most_scored`` tokens are scored on either. Neither model reads
    more than ``length`` tokens of a window; of the text, the original reads ``num_tokens``.

    Raises:
        UserError: ``empty_dataset`` where no window is as long as that.
    """
    found = []
    for window in _runs(_first_of(pieces, num_tokens), length):
        first = _first_scored(window, length // 2, most_scored)
        if first < len(window):
            found.append(_goes_on(window, first))
    return not_empty(found)


def paired_sequences(texts: Iterable[Framed], num_tokens: int, max_seq_length: int) -> list[Framed]:
    """The texts, until they have so many tokens; a longer one is cut, with the special tokens around each part."""
    found: list[Framed] = []
    num_found = 0
    for begin, body, end in texts:
        around = len(_ids([*begin, *end], 0))
        for part in _runs(body, max_seq_length - around):
            if num_found >= num_tokens:
                return found
            found.append((begin, part, end))
            num_found += around + len(_ids(part, 0))
    return found


def paired_masked_windows(sequences: Sequence[Framed], pair: Pair) -> list[PairedWindow]:
    """The sequences with a part of their tokens masked, as :func:`masked_windows` chooses them.

    Of a piece with several tokens all are masked, and scored, if one of the original's is chosen.

    Raises:
        UserError: ``empty_dataset`` where all tokens are special ones.
    """
    special, windows = frozenset(pair.original.all_special_ids), []
    for number, parts in enumerate(sequences):
        pieces = [piece for part in parts for piece in part]
        positions = choose_masked(_ids(pieces, 0), special, number)
        if positions is None:
            continue
        owner = [index for index, piece in enumerate(pieces) for _ in piece.ids[0]]
        chosen = sorted({owner[position] for position in positions.tolist()})
        windows.append(_masked(pieces, chosen, pair))
    return not_empty(windows)


def sequence_of(parts: Framed) -> tuple[Tensor, Tensor]:
    """The ids of a sequence, as each tokenizer writes it."""
    pieces = [piece for part in parts for piece in part]
    return torch.tensor(_ids(pieces, 0)), torch.tensor(_ids(pieces, 1))


@torch.inference_mode()
def measure_retokenized(
    original: Readable,
    artifact: Readable,
    windows: Sequence[PairedWindow],
    pair: Pair,
    progress: Callable[[float], None],
) -> TokenMeasures:
    """Run both models over the windows, each over its own tokens.

    A loss of the artifact is what it makes of a piece, shared among the original's tokens of that piece. Divergence and
    agreement are of the pieces that both write with the same token: there both stand at one place of one text. The
    first is over the tokens that both have, each distribution made to sum to 1 over them; for the second the original
    chooses among all of its own.

    Raises:
        UserError: ``non_finite_evaluation`` where a model gives NaN or infinity.
    """
    parts: list[tuple[Tensor, ...]] = []
    batches = [(window.original.ids.unsqueeze(0), window.artifact.ids.unsqueeze(0)) for window in windows]
    read = logits_of_both(original, artifact, batches, progress)
    new_id_of = sorted(pair.new_id_of().items())
    for window in windows:
        before, after = (logits[0] for logits in next(read))
        of_artifact = _losses(after, window.artifact)
        positions = [
            each.positions[window.is_same[pieces]]
            for each, pieces in ((window.original, window.of_original), (window.artifact, window.of_artifact))
        ]
        compared = _compare(before, after, positions, new_id_of)
        parts.append((_losses(before, window.original), window.shared(of_artifact), *compared))
        del before, after  # they may be large, and are not to be there with the next ones
    original_loss, loss, divergence, agreement = (torch.cat(values) for values in zip(*parts, strict=True))
    longest = max(window.original.ids.numel() for window in windows)
    num_others = sum(window.num_retokenized for window in windows)
    measures = TokenMeasures(len(windows), longest, original_loss, loss, divergence, agreement, num_others)
    check_finite(measures.original_loss, measures.loss)
    return measures


def _losses(logits: Tensor, window: Window) -> Tensor:
    """−log p of each target, nats: float64."""
    found = []
    for positions, targets in _chunks(logits, window.positions, window.targets):
        log_probabilities = logits[positions].float().log_softmax(dim=-1)
        found.append(-log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double().cpu())
    return torch.cat(found)


def _compare(
    before: Tensor, after: Tensor, positions: Sequence[Tensor], new_id_of: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """KL(original ‖ artifact) over the tokens that both have, and whether their choices agree, at each position."""
    both = [(old, new) for old, new in new_id_of if old < before.shape[-1] and new < after.shape[-1]]
    old, new = torch.tensor(both, device=before.device).T
    renamed = torch.full((before.shape[-1],), -1, device=before.device).index_put((old,), new)
    divergences, agreements = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.float64)]
    for here, there in _chunks(before, *positions):
        rows, others = before[here].float(), after[there].float()
        divergence = kl_divergence(rows[:, old].log_softmax(dim=-1), others[:, new].log_softmax(dim=-1))
        divergences.append(divergence.double().cpu())
        agreements.append((renamed[rows.argmax(dim=-1)] == others.argmax(dim=-1)).double().cpu())
    return torch.cat(divergences), torch.cat(agreements)


def _chunks(logits: Tensor, first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    num_rows = max(1, VALUES_AT_A_TIME // logits.shape[-1])
    for one, other in zip(torch.split(first, num_rows), torch.split(second, num_rows), strict=True):
        yield one.to(logits.device), other.to(logits.device)


def _runs(pieces: Sequence[Piece], max_seq_length: int) -> Iterator[list[Piece]]:
    """As many pieces in a row as have at most so many tokens on either side. One that has more alone is left out."""
    found: list[Piece] = []
    lengths = [0, 0]
    for piece in pieces:
        more = list(map(len, piece.ids))
        if any(length + each > max_seq_length for length, each in zip(lengths, more, strict=True)):
            if found:
                yield found
            found, lengths = [], [0, 0]
            if max(more) > max_seq_length:
                continue
        found.append(piece)
        lengths = [length + each for length, each in zip(lengths, more, strict=True)]
    if found:
        yield found


def _ids(pieces: Iterable[Piece], side: int) -> list[int]:
    return [index for piece in pieces for index in piece.ids[side]]


def _first_of(pieces: Sequence[Piece], num_tokens: int) -> list[Piece]:
    """As many of the first pieces as have ``num_tokens`` tokens of the original together."""
    ends = accumulate(len(each.ids[0]) for each in pieces)
    return [piece for piece, end in zip(pieces, ends, strict=True) if end <= num_tokens]


def _first_scored(pieces: Sequence[Piece], num_seen: int, most_scored: int) -> int:
    """The first piece of a window that has so many tokens before it, and no more from it on; or how many there are."""
    before = [list(accumulate((len(piece.ids[side]) for piece in pieces), initial=0)) for side in range(2)]
    ends = [counts[-1] for counts in before]
    places = zip(*before, strict=True)
    return next(
        index
        for index, counts in enumerate(places)
        if index == len(pieces)
        or (max(counts) >= num_seen and all(e - c <= most_scored for e, c in zip(ends, counts, strict=True)))
    )


def _goes_on(pieces: Sequence[Piece], first_scored: int) -> PairedWindow:
    sides = []
    for side in range(2):
        ids = torch.tensor(_ids(pieces, side))
        first = len(_ids(pieces[:first_scored], side))
        places = torch.arange(first, ids.numel())
        owners = torch.tensor([index for index, piece in enumerate(pieces[first_scored:]) for _ in piece.ids[side]])
        sides.append((Window(ids, places - 1, ids[places]), owners))
    return _paired(sides, pieces, pieces[first_scored:])


def _masked(pieces: Sequence[Piece], chosen: Sequence[int], pair: Pair) -> PairedWindow:
    sides = []
    for side, tokenizer in enumerate((pair.original, pair.artifact)):
        ids = torch.tensor(_ids(pieces, side))
        begins = list(accumulate((len(piece.ids[side]) for piece in pieces), initial=0))
        places = torch.tensor([place for piece in chosen for place in range(begins[piece], begins[piece + 1])])
        owners = torch.tensor([number for number, piece in enumerate(chosen) for _ in pieces[piece].ids[side]])
        sides.append((Window(ids.index_fill(0, places, tokenizer.mask_token_id), places, ids[places]), owners))
    return _paired(sides, pieces, [pieces[index] for index in chosen])


def _paired(sides: Sequence[tuple[Window, Tensor]], read: Sequence[Piece], scored: Sequence[Piece]) -> PairedWindow:
    (original, of_original), (artifact, of_artifact) = sides
    is_same = torch.tensor([piece.is_same for piece in scored])
    num_retokenized = sum(piece.num_retokenized for piece in read)
    return PairedWindow(original, artifact, of_original, of_artifact, is_same, num_retokenized)
