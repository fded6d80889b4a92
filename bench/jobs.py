"""Jobs of benchmarks: fetch, compress and certify in this process, and what they leave kept under .bench/jobs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bench.materials import FOLDER
from workers.certify import certify
from workers.fetch import fetch
from workers.pipeline import compress


def run_job(name: str, model: Path, recipe: dict[str, Any], *roots: Path) -> Path:
    """The artifact of ``recipe`` on ``model``; one that is there from the same recipe is not made again.

    Files of datasets are looked for in the folder of the model and under ``roots``. A run that was stopped goes on.
    """
    work = FOLDER / "jobs" / name
    request = {
        "job_id": f"job_{name}",
        "model": {"id": f"file:{model.name}", "revision": None},
        "model_roots": [str(root) for root in (model.parent, *roots)],
        "recipe": recipe,
        "constraints": {},
    }
    path = work / "request.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != request:
        shutil.rmtree(work)
    if (work / "artifact" / "report.json").exists():
        return work / "artifact"
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(request), encoding="utf-8")
    shutil.rmtree(work / "artifact", ignore_errors=True)
    fetch(work, request, _told(name))
    compress(work, request, _told(name))
    certify(work, request, _told(name))
    shutil.rmtree(work / "journal", ignore_errors=True)
    return work / "artifact"


def report_of(artifact: Path) -> dict[str, Any]:
    """The report of an artifact."""
    report: dict[str, Any] = json.loads((artifact / "report.json").read_text(encoding="utf-8"))
    return report


def _told(name: str) -> Any:
    def tell(event: dict[str, Any]) -> None:
        metrics = event.get("metrics") or {}
        if "held_out_loss" in metrics and "step" in metrics:
            speed = metrics.get("tokens_per_second") or 0.0
            print(
                f"  {name}: stage {event['index']}, step {metrics['step']} of {metrics['num_steps']}, "
                f"held-out loss {metrics['held_out_loss']:.4f}, {speed:,.0f} tokens/s",
                flush=True,
            )
        elif event["event"] == "warning":
            print(f"  {name}: {event['code']}: {event['message']}", flush=True)

    return tell
