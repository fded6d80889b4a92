"""What the tests of refused requests share."""

from collections.abc import Callable
from typing import Any

GPTQ = {"technique": "gptq", "group_size": 64}

# Sends a body that is right but for the named fields; the problem that comes back.
Refused = Callable[..., dict[str, Any]]
