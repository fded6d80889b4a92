"""Blocks of a checkpoint streamed one at a time through the calibration text."""
