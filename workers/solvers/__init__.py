"""Tensor mathematics without I/O and without a model."""
