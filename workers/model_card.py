"""The README.md of an artifact: what it is, how to load it, what it cost."""

from __future__ import annotations

import json
from typing import Any


def model_card(report: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Markdown for people, from a report and its recipe."""
    size, quality, speed = report["size"], report["quality"], report["speed"]
    techniques = ", then ".join(stage["technique"] for stage in report["stages"])
    fallbacks = sum(len(stage["fallbacks"]) for stage in report["stages"])
    rows = [
        ("weights, bytes", f"{size['original_bytes']:,}", f"{size['artifact_bytes']:,}"),
        (
            "perplexity",
            f"{quality['original_perplexity']:.3f} ± {quality['original_perplexity_standard_error']:.3f}",
            f"{quality['perplexity']:.3f} ± {quality['perplexity_standard_error']:.3f}",
        ),
        *(
            (label, f"{speed['original'][key]:.3g}", f"{speed['artifact'][key]:.3g}")
            for label, key in (
                ("load, seconds", "load_seconds"),
                ("first token, seconds", "first_token_seconds"),
                ("tokens a second", "tokens_per_second"),
            )
        ),
    ]
    table = "\n".join(f"| {label} | {before} | {after} |" for label, before, after in rows)
    return f"""\
# {report["model"]["id"]}, compressed by Attar

Made with {techniques} from `{report["model"]["id"]}` at revision `{report["model"]["revision"]}`
(job `{report["job_id"]}`): {_change(size)}.

```python
{report["load_snippet"]}```

| | original | this model |
| --- | --- | --- |
{table}

KL divergence to the original {_with_error(quality, "kl_divergence")} nats a token; same most likely token
{100 * quality["top1_agreement"]:.1f} % of the time; perplexity ratio {_with_error(quality, "perplexity_ratio")}.
Measured in float32 on {quality["num_tokens"]:,} held-out tokens of `{_dataset(recipe)}`, ± one standard error.
Speeds are of the worker that made this model.
Layers that got something else than what was asked for: {fallbacks}; `report.json` names them.
{_reproducibility(report["environment"])}

## Recipe

```json
{json.dumps(recipe, indent=2, ensure_ascii=False)}
```
"""


def _change(size: dict[str, Any]) -> str:
    ratio = size["compression_ratio"]
    change = f"{ratio:.2f} times smaller" if ratio >= 1.005 else "no smaller on disk: its weights are stored in full"
    if size["dense_bytes"] is not None:
        change += f"; {size['dense_bytes']:,} bytes where `load_sparse.py` has written its dense form"
    if size["original_format"] == "gguf":
        change += (
            f" than the 16-bit parameters that the GGUF file stands for; the file itself has "
            f"{size['original_file_bytes']:,} bytes"
        )
    return change


def _reproducibility(environment: dict[str, Any]) -> str:
    if environment["reproducible"]:
        return "The same recipe gives the same bytes under the `environment` of `report.json`."
    changed = sorted({name for run in environment["made_under"] for name in run["differs_in"]})
    return (
        "Not reproducible: the job was interrupted and went on where something else decides how numbers are rounded "
        f"({', '.join(changed)}), so the same recipe gives other bytes."
    )


def _with_error(quality: dict[str, Any], name: str) -> str:
    return f"{quality[name]:.4f} ± {quality[name + '_standard_error']:.4f}"


def _dataset(recipe: dict[str, Any]) -> str:
    dataset = recipe.get("evaluation", {}).get("dataset")
    return dataset if isinstance(dataset, str) else "text sent with the job"
