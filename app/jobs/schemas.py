"""What is sent about a job, and what is answered."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from app.catalog.presets import PRESETS
from workers.recipe import Recipe
from workers.recipe_parts import Calibration, Evaluation, Output, Training, at_most

_MAX_PARAM_CHARACTERS = 1000
_MAX_FIELDS = 1000  # of one object; no object of a submission has nearly as many

Status = Literal["queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled"]

SUBMISSION_EXAMPLE: dict[str, Any] = {
    "model": {"id": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": "main"},
    "recipe": {
        "stages": [{"technique": "gptq", "scheme": "W4A16", "group_size": 64}],
        "calibration": {"dataset": "builtin:python-docs", "num_samples": 64, "max_seq_length": 512},
        "evaluation": {"dataset": "builtin:python-docs", "num_tokens": 16384},
        "output": {"format": "compressed-tensors"},
        "seed": 0,
    },
    "constraints": {"max_perplexity_ratio": 1.25, "max_size_bytes": 140_000_000},
    "metadata": {"team": "search"},
}


JOB_EXAMPLE: dict[str, Any] = {
    "id": "job_01KAN5V6D7Q0T3X8Z2B4C6E8GH",
    "object": "job",
    "status": "running",
    "attempt": 1,
    "model": {"id": SUBMISSION_EXAMPLE["model"]["id"], "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac"},
    "recipe": SUBMISSION_EXAMPLE["recipe"],
    "constraints": SUBMISSION_EXAMPLE["constraints"],
    "queue": "cpu",
    "priority": 0,
    "timeout_seconds": 86_400,
    "progress": {
        "fraction": 0.31,
        "stage": 0,
        "step": "model.layers.12",
        "block": 12,
        "num_blocks": 30,
        "eta_seconds": 84,
        "queue_position": None,
        "heartbeat_at": "2026-11-22T09:30:12Z",
    },
    "stages": [{"index": 0, "technique": "gptq", "status": "running", "metrics": {}}],
    "result": None,
    "error": None,
    "warnings": [],
    "metadata": {"team": "search"},
    "retry_of": None,
    "created_at": "2026-11-22T09:29:20Z",
    "started_at": "2026-11-22T09:29:20Z",
    "finished_at": None,
}


class _Sent(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSource(_Sent):
    """The model to compress."""

    id: Annotated[
        str,
        Field(
            min_length=1,
            max_length=600,
            description="A hub id, `file:NAME` (a folder or GGUF file under a model root) or `job:ID` (a result).",
        ),
    ]
    revision: Annotated[str | None, Field(max_length=200, description="A branch, tag or commit of a hub model.")] = None


class Constraints(_Sent):
    """What the result must keep to; a breach ends the job ``failed``, its artifact kept."""

    max_perplexity_ratio: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    min_accuracy: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    max_size_bytes: Annotated[int | None, Field(ge=1, le=2**62)] = None


def _preset(value: object) -> object:
    """The recipe that a name stands for, or an object with a name for ``preset`` and what is other there."""
    changes: dict[str, Any] = {}
    name = value
    if isinstance(value, dict) and "preset" in value:
        changes = dict(value)
        name = changes.pop("preset")
    elif not isinstance(value, str):
        return value
    if not isinstance(name, str) or name not in PRESETS:
        raise PydanticCustomError(
            "unknown_preset",
            "There is no preset '{name}'",
            {"name": str(name)[:100], "hint": "One of: " + ", ".join(PRESETS) + ". Or send a recipe as an object."},
        )
    if "stages" in changes:
        raise PydanticCustomError(
            "preset_with_stages",
            "A preset has stages of its own",
            {"hint": "Leave `preset` out and send the stages; GET /v1/recipes spells all presets out."},
        )
    return {**PRESETS[name].recipe, **changes}


class _ChangedPreset(_Sent):
    """A preset with parts of its recipe replaced."""

    preset: Annotated[str, Field(json_schema_extra={"enum": list(PRESETS)})]
    calibration: Calibration = Calibration()
    training: Training | None = None
    evaluation: Evaluation = Evaluation()
    output: Output = Output()
    seed: int = 0


_RecipeOrPreset = Annotated[
    Recipe,
    BeforeValidator(
        _preset,
        json_schema_input_type=Recipe
        | _ChangedPreset
        | Annotated[str, Field(json_schema_extra={"enum": list(PRESETS)})],
    ),
]
_MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
_MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class JobSubmission(_Sent):
    """A job to run."""

    model_config = ConfigDict(json_schema_extra={"examples": [SUBMISSION_EXAMPLE]})

    model: ModelSource
    recipe: Annotated[_RecipeOrPreset, Field(description="A recipe, the name of a preset, or a preset with changes.")]
    constraints: Constraints = Constraints()
    queue: Annotated[
        str | None, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", description="Null for the service's default.")
    ] = None
    priority: Annotated[int, Field(ge=-100, le=100, description="Higher runs first.")] = 0
    timeout_seconds: Annotated[int, Field(ge=1, le=604_800)] = 86_400
    metadata: Annotated[dict[_MetadataKey, _MetadataValue], Field(max_length=32), at_most(32)] = {}

    @model_validator(mode="before")
    @classmethod
    def _storable(cls, data: object) -> object:
        """Refuse text that no database column and no file can hold."""
        # Paths are chains of parents, written out only for a fault: a long key above many values costs nothing.
        waiting: list[tuple[_Place | None, object]] = [(None, data)]
        while waiting:
            place, value = waiting.pop()
            if isinstance(value, dict):
                if len(value) > _MAX_FIELDS:
                    raise ValueError(f"an object of {len(value)} fields was sent")
                waiting.extend((_Place(place, str(key)), part) for key, part in value.items())
                if not all(_is_storable(key) for key in value):
                    raise _unstorable(place)
            elif isinstance(value, list):
                waiting.extend((_Place(place, index), part) for index, part in enumerate(value))
            elif isinstance(value, str) and not _is_storable(value):
                raise _unstorable(place)
        return data


class _Place(NamedTuple):
    """Where a value is in a body."""

    parent: _Place | None
    step: str | int


def _is_storable(text: str) -> bool:
    """Whether it is free of NUL and of lone surrogates."""
    if "\x00" in text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unstorable(place: _Place | None) -> PydanticCustomError:
    path = ""
    while place is not None:
        path = (f"[{place.step}]" if isinstance(place.step, int) else f".{place.step}") + path
        place = place.parent
    param = path.removeprefix(".")[:_MAX_PARAM_CHARACTERS] or None
    return PydanticCustomError(
        "invalid_text", "The text holds a NUL character or half of a surrogate pair", {"param": param}
    )


class ModelView(BaseModel):
    """The model, its revision 40 hex digits once resolved."""

    id: str
    revision: str | None


class ProgressView(BaseModel):
    """How far a job is."""

    fraction: float
    stage: int | None
    step: str | None
    block: int | None
    num_blocks: int | None
    eta_seconds: float | None
    queue_position: int | None = Field(description="1 for the next job of its queue; null once it runs.")
    heartbeat_at: datetime | None


class StageView(BaseModel):
    """A stage of the recipe, and what was measured while it ran."""

    index: int
    technique: str
    status: str
    metrics: dict[str, Any]


class ResultView(BaseModel):
    """What came out; the report says more."""

    model_config = ConfigDict(extra="allow")

    size_bytes: int | None
    original_size_bytes: int | None
    compression_ratio: float | None
    perplexity: float | None
    original_perplexity: float | None
    accuracy: float | None
    original_accuracy: float | None


class JobErrorView(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None
    hint: str | None
    retryable: bool


class WarningView(BaseModel):
    """Something about a job that its owner should know."""

    code: str
    message: str
    param: str | None


class JobView(BaseModel):
    """A job."""

    model_config = ConfigDict(json_schema_extra={"examples": [JOB_EXAMPLE]})

    id: str
    object: Literal["job"]
    status: Status
    attempt: int
    model: ModelView
    recipe: dict[str, Any] = Field(description="Resolved: every default filled in. Long inline texts are cut short.")
    constraints: dict[str, Any]
    queue: str
    priority: int
    timeout_seconds: int
    progress: ProgressView
    stages: list[StageView]
    result: ResultView | None
    error: JobErrorView | None
    warnings: list[WarningView]
    metadata: dict[str, str]
    retry_of: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class JobList(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"]
    data: list[JobView]
    first_id: str | None
    last_id: str | None
    has_more: bool
