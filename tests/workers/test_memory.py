"""A checkpoint larger than the memory limit of a job is compressed under that limit."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from app.database import Database
from app.settings import Settings
from tests.jobs import abandon_jobs, insert_job
from tests.models import write_tokenizer
from tests.workers.attempts import TEXTS, Attempt, fetched
from tests.workers.supervisor.running import claim
from workers.supervisor.lease import Lease
from workers.supervisor.phases import Watch, run_phase
from workers.supervisor.processes import JobProcess, Spawner, scrubbed_environment

pytestmark = pytest.mark.service

LIMIT_BYTES = 600_000_000  # of which the interpreter with torch takes more than half
HIDDEN, INTERMEDIATE, VOCABULARY, NUM_BLOCKS, BLOCKS_A_SHARD = 1024, 2816, 384, 28, 4


def write_large_llama(folder: Path) -> int:
    """Write a random Llama in bfloat16 in shards of some blocks; the bytes of its weights."""
    write_tokenizer(folder, VOCABULARY)
    config: Any = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    square, wide, narrow = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": square for name in "qkvo"}
    shapes |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": narrow}
    shapes |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    outer: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    files: dict[str, str] = {}
    size_bytes = 0
    for first in range(0, NUM_BLOCKS, BLOCKS_A_SHARD):
        names = {} if first else dict(outer)
        for block in range(first, first + BLOCKS_A_SHARD):
            names |= {f"model.layers.{block}.{name}": shape for name, shape in shapes.items()}
        tensors = {
            f"{name}.weight": torch.randn(shape, dtype=torch.bfloat16) * 0.02 if len(shape) == 2 else torch.ones(shape)
            for name, shape in names.items()
        }
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        file = f"model-{first // BLOCKS_A_SHARD + 1:05d}-of-{NUM_BLOCKS // BLOCKS_A_SHARD:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        size_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size_bytes}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size_bytes


class Sampled:
    """The most memory that a process held while the block ran."""

    def __init__(self, process: JobProcess) -> None:
        self.peak_bytes = 0
        self._process = process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.peak_bytes = max(self.peak_bytes, self._process.memory_bytes())
            time.sleep(0.02)


@contextmanager
def worker(settings: Settings, database: Database, limit_bytes: int) -> Iterator[Callable[[Attempt, str], int]]:
    """What runs a phase under the limit, in a process of its own, and gives the most memory that it held."""
    limited = settings.model_copy(update={"memory_limit_bytes": limit_bytes})
    abandon_jobs(database)
    insert_job(database)
    spawner = Spawner()
    with Lease(limited, database, claim(database, limited)) as lease:

        def run(attempt: Attempt, phase: str) -> int:
            (attempt.work / "request.json").write_text(json.dumps(attempt.request))
            (attempt.work / "logs").mkdir(exist_ok=True)
            log = attempt.work / "logs" / f"{phase}.log"
            environment = scrubbed_environment(os.environ, network=False)
            process = JobProcess(spawner, "workers.runner", environment=environment, log=log)
            with Sampled(process) as sampled:
                run_phase(
                    process,
                    {
                        "phase": phase,
                        "work": str(attempt.work),
                        "num_threads": None,
                        "memory_limit_bytes": limit_bytes,
                    },
                    log=log,
                    watch=Watch(limited, lease, threading.Event(), 600),
                    hear=lambda message: attempt.events.append(message.model_dump()),
                )
            return sampled.peak_bytes

        yield run
    spawner.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "large"
    assert write_large_llama(folder) > 1.15 * LIMIT_BYTES
    return folder


def test_a_job_on_a_checkpoint_larger_than_the_limit_keeps_to_it(
    large: Path, settings: Settings, database: Database, tmp_path: Path
) -> None:
    recipe = {
        "stages": [{"technique": "smoothquant"}],
        "calibration": {"dataset": {"texts": TEXTS[:150]}, "num_samples": 4, "max_seq_length": 64},
        "evaluation": {"dataset": {"texts": TEXTS[150:]}, "num_tokens": 128, "max_seq_length": 64},
    }
    attempt = fetched(tmp_path / "work", large, recipe)
    with worker(settings, database, LIMIT_BYTES) as run:
        assert 0 < run(attempt, "compress") < LIMIT_BYTES
        assert 0 < run(attempt, "certify") < LIMIT_BYTES
    report = attempt.report
    assert report["opened"] == {"original": "by_block", "artifact": "by_block"}
    assert "certified_by_block" in [event.get("code") for event in attempt.events]
    assert report["quality"]["perplexity"] > 1
    assert report["size"]["compression_ratio"] > 1.9
    assert set(report["speed"]["artifact"].values()) == {None}
    assert report["generation"] is None
