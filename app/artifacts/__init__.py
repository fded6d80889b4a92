"""Artifacts: publish, list, download."""
