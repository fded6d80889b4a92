"""A report for people: what was measured, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from app.cli.output import number, plain, size

# On what a model and its original may agree.
_AGREED = {"causal": "next token", "masked": "masked token", "classification": "class"}


def print_report(console: Console, report: Mapping[str, Any]) -> None:
    """Print the tables of a ``report.json``, the generated texts and the snippet that loads the result."""
    model = report["model"]
    console.print(f"{plain(model['id'])} at {plain(str(model.get('revision'))[:12])}", style="bold", soft_wrap=True)
    console.print(_measurements(report))
    _print_constraints(console, report.get("constraints") or [])
    _print_fallbacks(console, report.get("stages") or [])
    if (report.get("environment") or {}).get("reproducible") is False:
        console.print("not reproducible: the job went on under other conditions; report.json names them")
    _print_opening(console, report.get("opened") or {})
    generation = report.get("generation")
    if generation:
        _print_generation(console, generation)
    if report.get("load_snippet"):
        console.print("\nLoad the result:", style="bold")
        console.print(plain(report["load_snippet"]).rstrip(), soft_wrap=True)


def _measurements(report: Mapping[str, Any]) -> Table:
    table = Table("", "original", "result", "change", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    _add_size(table, report.get("size") or {})
    _add_quality(table, report.get("quality") or {}, str(report.get("task")))
    _add_apart(table, report.get("quality_apart") or {})
    speed = report.get("speed") or {}
    before, after = speed.get("original") or {}, speed.get("artifact") or {}
    for name, key, digits in (
        ("load time (s)", "load_seconds", 2),
        ("first token (s)", "first_token_seconds", 3),
        ("tokens per second", "tokens_per_second", 1),
    ):
        if before.get(key) is not None or after.get(key) is not None:
            table.add_row(name, number(before.get(key), digits), number(after.get(key), digits), "")
    return table


def _add_size(table: Table, sizes: Mapping[str, Any]) -> None:
    ratio = sizes.get("compression_ratio")
    change = ""
    if ratio is not None:
        change = f"{number(ratio, 2)} times smaller" if ratio >= 1.005 else "no smaller"
    table.add_row("bytes", size(sizes.get("original_bytes")), size(sizes.get("artifact_bytes")), change)
    if sizes.get("dense_bytes") is not None:
        table.add_row("bytes of its dense form", "", size(sizes["dense_bytes"]), "")
    # A GGUF file is smaller than the parameters that it stands for; a safetensors file differs by its header alone.
    file_bytes, format_name = sizes.get("original_file_bytes"), sizes.get("original_format")
    if file_bytes is not None and format_name == "gguf":
        table.add_row("bytes of the source's files", size(file_bytes), "", "")
    if sizes.get("original_parameters") is not None:
        left = number(sizes.get("artifact_parameters"), 0)
        table.add_row("parameters", number(sizes["original_parameters"], 0), left, "")


def _add_quality(table: Table, quality: Mapping[str, Any], task: str) -> None:
    for name, key in (("accuracy", "accuracy"), ("macro F1", "macro_f1")):
        if quality.get(key) is not None:
            table.add_row(
                f"{name} ({number(quality.get('num_windows'), 0)} texts)",
                _with_error(quality.get(f"original_{key}"), quality.get(f"original_{key}_standard_error"), 4),
                _with_error(quality[key], quality.get(f"{key}_standard_error"), 4),
                _with_error(quality.get(f"{key}_difference"), quality.get(f"{key}_difference_standard_error"), 4),
            )
    if quality.get("perplexity") is not None:
        _add_perplexity(table, quality, "masked tokens" if task == "masked" else "tokens")
    if quality.get("num_retokenized"):
        table.add_row("tokens that the result writes with others", "", number(quality["num_retokenized"], 0), "")
    if quality.get("kl_divergence") is not None:
        error = quality.get("kl_divergence_standard_error")
        table.add_row("KL to the original (nats)", "", _with_error(quality["kl_divergence"], error, 4), "")
    if quality.get("top1_agreement") is not None:
        what = _AGREED.get(task, "choice")
        table.add_row(f"same {what} as the original", "", f"{100 * quality['top1_agreement']:.1f} %", "")


def _add_apart(table: Table, quality: Mapping[str, Any]) -> None:
    """Perplexity on text of the other kind than the evaluation's, where the job has it."""
    if quality.get("perplexity") is not None:
        kind = "general text" if quality.get("text") == "general" else "your own text"
        _add_perplexity(table, quality, f"tokens of {kind}")


def _add_perplexity(table: Table, quality: Mapping[str, Any], tokens: str) -> None:
    ratio = quality.get("perplexity_ratio")
    table.add_row(
        f"perplexity ({number(quality.get('num_tokens'), 0)} {tokens})",
        _with_error(quality.get("original_perplexity"), quality.get("original_perplexity_standard_error"), 2),
        _with_error(quality["perplexity"], quality.get("perplexity_standard_error"), 2),
        f"× {number(ratio, 3)}" if ratio is not None else "",
    )


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    return number(value, digits) if error is None else f"{number(value, digits)} ± {number(error, digits)}"


def _print_constraints(console: Console, constraints: list[Mapping[str, Any]]) -> None:
    for constraint in constraints:
        limit, value = (_constrained(constraint[key]) for key in ("limit", "value"))
        text = f"{constraint['name']}: limit {limit}, measured {value}"
        console.print(plain(f"{text}: {constraint['status']}"), soft_wrap=True)


def _constrained(value: float | None) -> str:
    return number(value, 0 if isinstance(value, int) else 3)


def _print_fallbacks(console: Console, stages: list[Mapping[str, Any]]) -> None:
    for stage in stages:
        fallbacks = stage.get("fallbacks") or []
        if fallbacks:
            layers = "layer" if len(fallbacks) == 1 else "layers"
            console.print(plain(f"{stage['technique']}: {len(fallbacks)} {layers} fell back; report.json names them"))


def _print_generation(console: Console, generation: Mapping[str, Any]) -> None:
    names = {"original": "original", "artifact": "result"}
    written = {name: generation[key] for key, name in names.items() if generation[key] is not None}
    who = "Both continue" if len(written) == len(names) else f"The {next(iter(written))} continues"
    console.print(f"\n{who}: {plain(generation['prompt'])}", style="bold", soft_wrap=True)
    table = Table(*written, width=min(console.width, 110))
    for column in table.columns:
        column.ratio = 1
    table.add_row(*map(plain, written.values()))
    console.print(table)


def _print_opening(console: Console, opened: Mapping[str, Any]) -> None:
    if opened.get("artifact") == "by_block":
        console.print("read block by block, for want of memory: speed is not measured")
    elif opened.get("original") == "by_block":
        console.print("the original was read block by block, for want of memory: its speed is not measured")
