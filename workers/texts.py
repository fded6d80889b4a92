"""The texts of a job as token ids of the model that it has at the moment: a stage may give it another tokenizer."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from workers.engine.skeleton import Skeleton
from workers.engine.text import (
    DOCUMENT_SEPARATOR,
    FEWEST_TOKENS,
    calibration_samples,
    check_masks,
    chosen_sequences,
    of_one_length,
    read_documents,
    sequences,
    tokenize,
)
from workers.evaluation.speed import check_prompt
from workers.recipe import Recipe
from workers.sources.text_file import CHARACTERS_A_TOKEN
from workers.sources.tokenizer_file import tokenizer_failures
from workers.training.seeds import seed_of

# Tokens whose logits the artifact has to give again, and in how many sequences an encoder reads them.
NUM_PROBE_TOKENS = 64
NUM_PROBE_SEQUENCES = 4


class Texts:
    """The texts that fetch left in a work folder's ``source``."""

    def __init__(self, source: Path, recipe: Recipe, emit: Callable[[dict[str, Any]], None]) -> None:
        self._source = source
        self._recipe = recipe
        self._emit = emit
        self._tokenizer: Any = None
        self._tokenizer_folder: Path | None = None
        self._calibration: list[Tensor] | None = None

    def tokenizer(self, skeleton: Skeleton) -> Any:
        """The model's, as transformers opens it.

        Raises:
            UserError: ``invalid_tokenizer`` where it does not open, or cannot do what the model's task needs.
        """
        checkpoint = skeleton.checkpoint
        if self._tokenizer_folder != checkpoint.tokenizer_folder:
            with tokenizer_failures("invalid_tokenizer", "The tokenizer cannot be opened"):
                self._tokenizer = AutoTokenizer.from_pretrained(checkpoint.tokenizer_folder, trust_remote_code=False)
            if skeleton.architecture.task == "masked":
                check_masks(self._tokenizer)
            elif skeleton.architecture.task == "causal":
                check_prompt(self._tokenizer, self._recipe.evaluation.prompt, checkpoint.max_positions)
            self._tokenizer_folder, self._calibration = checkpoint.tokenizer_folder, None
        return self._tokenizer

    def documents(self) -> Iterator[str]:
        """All of the calibration text, a document at a time; nothing where no stage or plan needs it."""
        if not self._recipe.needs_calibration:
            return iter(())
        on_training = self._recipe.calibrates_on_training_text
        return read_documents(self.training_path if on_training else self._source / "calibration.jsonl")

    def of_task(self) -> Iterator[str]:
        """The text that says what the model is used for: what it is trained on, or else calibrated with."""
        return read_documents(self.training_path) if self._recipe.reads_training_text else self.documents()

    def drawn_of_task(self, skeleton: Skeleton, num_tokens: int) -> list[Tensor]:
        """Samples × tokens for each length of samples: texts of :meth:`of_task`, long ones cut off.

        They are drawn from all of the text by the recipe's seed, and have about ``num_tokens`` tokens together.
        """
        tokenizer = self.tokenizer(skeleton)
        length = min(self._recipe.calibration.max_seq_length, skeleton.checkpoint.max_positions)
        drawn = self._drawn(self.of_task(), num_tokens // FEWEST_TOKENS, length)
        part = "training" if self._recipe.reads_training_text else "calibration"
        found = sequences(tokenizer, drawn, length, param=f"recipe.{part}.dataset", cuts=False)
        num_before = accumulate((ids.numel() for ids in found), initial=0)
        enough = [ids for ids, before in zip(found, num_before, strict=False) if before < num_tokens]
        return [ids for _, ids in of_one_length(enough)]

    def _drawn(self, documents: Iterator[str], count: int, max_seq_length: int) -> list[str]:
        """At most ``count`` documents, long ones cut off."""
        # By a hash, as the text may be in an order, and longer than what fits into memory.
        beginnings = (document[: max_seq_length * CHARACTERS_A_TOKEN] for document in documents)
        return heapq.nsmallest(count, beginnings, key=partial(seed_of, self._recipe.seed))

    def evaluation(self) -> Iterator[str]:
        """The held-out text, a document at a time."""
        return read_documents(self._source / "evaluation.jsonl")

    @property
    def training_path(self) -> Path:
        """The training text, with classes where it has them: JSON Lines."""
        return self._source / "training.jsonl"

    def _documents_to_read(self) -> Iterator[str]:
        """As many of them as the model reads, where there are more for a stage that counts tokens."""
        left = self._recipe.num_read_tokens * CHARACTERS_A_TOKEN
        for document in self.documents():
            yield document
            left -= len(document)
            if left <= 0:
                return

    def calibration(self, skeleton: Skeleton) -> list[Tensor]:
        """Samples × tokens for each length of samples; nothing where no stage or plan needs them."""
        tokenizer = self.tokenizer(skeleton)
        if self._calibration is None:
            self._calibration = self._read_calibration(tokenizer, skeleton)
        return self._calibration

    def _read_calibration(self, tokenizer: Any, skeleton: Skeleton) -> list[Tensor]:
        if not self._recipe.needs_calibration:
            return []
        wanted, is_shared = self._recipe.calibration, self._recipe.calibrates_on_training_text
        param = f"recipe.{'training' if is_shared else 'calibration'}.dataset"
        length = min(wanted.max_seq_length, skeleton.checkpoint.max_positions)
        if skeleton.architecture.task == "causal":
            ids = tokenize(tokenizer, self._documents_to_read(), param=param)
            samples = [calibration_samples(ids, wanted.num_samples, length, self._recipe.seed)]
            is_short = samples[0].numel() < wanted.num_samples * wanted.max_seq_length
        else:
            # Texts to train on are often in the order of their classes.
            draws = is_shared and skeleton.architecture.task == "classification"
            own = self._drawn(self.documents(), wanted.num_samples, length) if draws else self._documents_to_read()
            # Texts of people are as short as they are: only their number can fall short.
            found = sequences(tokenizer, list(own), length, param=param, cuts=not draws)
            chosen = chosen_sequences(found, wanted.num_samples, self._recipe.seed)
            samples = [ids for _, ids in of_one_length(chosen)]
            is_short = len(found) < wanted.num_samples
        if is_short:
            self._emit(
                {
                    "event": "warning",
                    "code": "short_calibration",
                    "message": f"The calibration text and the model's positions give {sum(map(len, samples))} samples "
                    f"of {samples[-1].shape[1]} tokens; {wanted.num_samples} of {wanted.max_seq_length} were asked "
                    "for.",
                    "param": "recipe.calibration",
                }
            )
        return samples

    def probe(self, skeleton: Skeleton) -> Tensor:
        """Sequences × tokens of the evaluation text, whose logits the artifact has to give."""
        tokenizer, param = self.tokenizer(skeleton), "recipe.evaluation.dataset"
        documents = self.evaluation()
        if skeleton.architecture.task == "causal":
            return tokenize(tokenizer, documents, param=param)[:NUM_PROBE_TOKENS].unsqueeze(0)
        # A classifier gives one row of logits a sequence: several short ones say more than a long one.
        text = DOCUMENT_SEPARATOR.join(islice(documents, NUM_PROBE_SEQUENCES * NUM_PROBE_TOKENS))
        length = min(NUM_PROBE_TOKENS // NUM_PROBE_SEQUENCES, skeleton.checkpoint.max_positions)
        found = sequences(tokenizer, [text], length, param=param, cuts=True)
        _, longest = of_one_length(found)[-1]
        return longest[:NUM_PROBE_SEQUENCES]
