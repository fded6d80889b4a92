"""What goes wrong with embedded servers, told with what the user can do."""

from __future__ import annotations


class LocalServersError(RuntimeError):
    """The embedded servers cannot run; ``hint`` says what would help."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class HomeInUseError(LocalServersError):
    """Another process runs the servers of this home."""
