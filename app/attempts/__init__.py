"""Attempts: the life of a lease, with all of its SQL in one place."""
