"""``python -m app.cli``: how `attar serve` starts its roles."""

from app.cli.main import main

main()
