"""The README.md of an artifact: what it is, how to load it, what it cost."""

from __future__ import annotations

import json
from typing import Any

_QUALITY_ROWS = (("perplexity", "perplexity", 3), ("accuracy", "accuracy", 4), ("macro F1", "macro_f1", 4))
# What text is called that is no evaluation text.
_KINDS = {"general": "general text (Python's documentation)", "task": "the text of the task"}
_SPEED_ROWS = (
    ("load, seconds", "load_seconds"),
    ("first token, seconds", "first_token_seconds"),
    ("tokens a second", "tokens_per_second"),
)


def model_card(report: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Markdown for people, from a report and its recipe."""
    size, quality, speed = report["size"], report["quality"], report["speed"]
    techniques = ", then ".join(stage["technique"] for stage in report["stages"])
    fallbacks = sum(len(stage["fallbacks"]) for stage in report["stages"])
    rows = [
        ("weights, bytes", f"{size['original_bytes']:,}", f"{size['artifact_bytes']:,}"),
        ("parameters", f"{size['original_parameters']:,}", f"{size['artifact_parameters']:,}"),
        *_cache_row(report["context"]),
        *(
            (label, _with_error(quality, f"original_{name}", digits), _with_error(quality, name, digits))
            for label, name, digits in _QUALITY_ROWS
            if quality[name] is not None
        ),
        *_apart_row(report["quality_apart"]),
        *(
            (label, _speed(speed["original"][key]), _speed(speed["artifact"][key]))
            for label, key in _SPEED_ROWS
            if speed["artifact"][key] is not None
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

{_comparison(report["task"], quality)}
Measured in float32 on {_text(report["task"], quality)} of `{_dataset(recipe)}`, ± one standard error.
{_apart(report["task"], report["quality_apart"])}\
{_opening(report["opened"])}
Layers that got something else than what was asked for: {fallbacks}; `report.json` names them.
{_reproducibility(report["environment"])}

## Recipe

```json
{json.dumps(recipe, indent=2, ensure_ascii=False)}
```
"""


def _cache_row(context: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """Memory of the KV cache at the longest context, where a window makes it smaller."""
    if context is None or context["max_positions"] is None:
        return []
    before, after = (context[f"{whose}kv_cache_bytes"] for whose in ("original_", ""))
    return [(f"KV cache of {context['max_positions']:,} tokens, bytes", f"{before:,}", f"{after:,}")]


def _apart_row(quality: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """Perplexity on text of the other kind, where the job has it."""
    if quality is None:
        return []
    before, after = (_with_error(quality, f"{whose}perplexity", 3) for whose in ("original_", ""))
    return [(f"perplexity, {_KINDS[quality['text']]}", before, after)]


def _apart(task: str, quality: dict[str, Any] | None) -> str:
    """The same of that text."""
    if quality is None:
        return ""
    text = f"On {_text(task, quality)} of {_KINDS[quality['text']]}"
    return f"{text}: perplexity ratio {_with_error(quality, 'perplexity_ratio')}.\n"


def _comparison(task: str, quality: dict[str, Any]) -> str:
    one, what = ("text", "class") if task == "classification" else ("token", "most likely token")
    ratio = ""
    if quality["perplexity_ratio"] is not None:
        ratio = f"; perplexity ratio {_with_error(quality, 'perplexity_ratio')}"
    elif quality["accuracy_difference"] is not None:
        ratio = f"; accuracy gained {_with_error(quality, 'accuracy_difference')}"
    if quality["kl_divergence"] is None:
        return f"No token of the original was compared: this model's tokenizer writes all of them otherwise{ratio}."
    return (
        f"KL divergence to the original {_with_error(quality, 'kl_divergence')} nats a {one}; same {what}\n"
        f"{100 * quality['top1_agreement']:.1f} % of the time{ratio}."
    )


def _text(task: str, quality: dict[str, Any]) -> str:
    if task == "classification":
        text = f"{quality['num_windows']:,} held-out texts"
    else:
        text = f"{quality['num_tokens']:,} held-out tokens" + (", masked," if task == "masked" else "")
    others = quality["num_retokenized"]
    return text if not others else f"{text} ({others:,} of what was read this model's tokenizer writes with others)"


def _opening(opened: dict[str, str]) -> str:
    """What is to be said of the speeds, and of what was not measured."""
    if opened["artifact"] == "by_block":
        return "Both models were read block by block, for want of memory: their speed is not measured."
    speeds = "Speeds are of the worker that made this model."
    if opened["original"] == "by_block":
        return f"{speeds} That of the original is not measured: it was read block by block, for want of memory."
    return speeds


def _speed(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


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


def _with_error(quality: dict[str, Any], name: str, digits: int = 4) -> str:
    error = quality[f"{name}_standard_error"]
    return f"{quality[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _dataset(recipe: dict[str, Any]) -> str:
    dataset = recipe.get("evaluation", {}).get("dataset")
    return dataset if isinstance(dataset, str) else "text sent with the job"
