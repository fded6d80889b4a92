"""How far an attempt is: phases weighted into one fraction that never falls, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from workers.supervisor.messages import ProgressMessage, StageMessage

# Share of an attempt's time, as measured on small models.
PHASE_WEIGHTS: Mapping[str, float] = {"fetch": 0.02, "compress": 0.73, "certify": 0.25}

_ETA_SMOOTHING = 0.2  # weight of the newest estimate
_ETA_FROM_FRACTION = 0.02  # of a phase: below it, an estimate is noise


class Progress:
    """What is known of one attempt."""

    def __init__(self, techniques: list[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = "fetch"
        self._phase_started_at = clock()
        self._fraction = 0.0
        self._last = ProgressMessage(event="progress", fraction=0)
        self._eta: tuple[float, float] | None = None  # seconds left, as estimated at that time
        self._stages: list[dict[str, Any]] = [
            {"index": index, "technique": technique, "status": "pending", "metrics": {}}
            for index, technique in enumerate(techniques)
        ]

    def begin(self, phase: str) -> None:
        """``phase`` starts."""
        self._phase = phase
        self._phase_started_at = self._clock()
        self.update(ProgressMessage(event="progress", fraction=0))

    def update(self, message: ProgressMessage) -> None:
        """The running phase went on."""
        before = sum(weight for phase, weight in PHASE_WEIGHTS.items() if _precedes(phase, self._phase))
        fraction = before + PHASE_WEIGHTS[self._phase] * message.fraction
        self._fraction = max(self._fraction, min(fraction, 1.0))
        self._last = message
        self._estimate(message.fraction)

    def update_stage(self, message: StageMessage) -> bool:
        """A stage began or ended; False for a stage that the recipe does not have."""
        if message.index >= len(self._stages):
            return False
        stage = self._stages[message.index]
        self._stages[message.index] = {
            **stage,
            "status": message.status,
            "metrics": {**stage["metrics"], **message.metrics},
        }
        return True

    def snapshot(self) -> dict[str, Any]:
        """The job's ``progress``."""
        return {
            "fraction": round(self._fraction, 4),
            "phase": self._phase,
            "stage": self._last.stage,
            "step": self._last.step,
            "block": self._last.block,
            "num_blocks": self._last.num_blocks,
            "eta_seconds": self.eta_seconds,
        }

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The job's ``stages``."""
        return list(self._stages)

    @property
    def eta_seconds(self) -> int | None:
        """Seconds until the attempt ends, as far as one can tell."""
        if self._eta is None:
            return None
        seconds_left, estimated_at = self._eta
        # It has not ended: what takes longer than was thought is nearly there, not there.
        return max(1, round(seconds_left - (self._clock() - estimated_at)))

    def _estimate(self, phase_fraction: float) -> None:
        """From the pace of the running phase: how long a fetch took says nothing of the computing after it."""
        now = self._clock()
        if self._phase == "fetch" or phase_fraction < _ETA_FROM_FRACTION:
            return
        phase_seconds = (now - self._phase_started_at) / phase_fraction
        later = sum(weight for phase, weight in PHASE_WEIGHTS.items() if _precedes(self._phase, phase))
        newest = phase_seconds * (1 - phase_fraction + later / PHASE_WEIGHTS[self._phase])
        if self._eta is not None:
            seconds_left, estimated_at = self._eta
            expected = max(0.0, seconds_left - (now - estimated_at))
            newest = expected + _ETA_SMOOTHING * (newest - expected)
        self._eta = (newest, now)


def _precedes(phase: str, other: str) -> bool:
    order = list(PHASE_WEIGHTS)
    return order.index(phase) < order.index(other)
