"""PostgreSQL and Redis from their wheels, run as children of one process; :mod:`app.local` puts them together."""
