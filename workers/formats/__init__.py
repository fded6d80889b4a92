"""Output formats: how an artifact is written and opened again."""
