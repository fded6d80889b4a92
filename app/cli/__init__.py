"""The command line ``attar``: one module for each group of commands.

Exit codes: 0 ok, 1 the job failed or was cancelled, 2 wrong use, 3 the service refused, 4 unreachable,
130 interrupted.
"""

from app.cli.main import main

__all__ = ["main"]
