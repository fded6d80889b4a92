"""API keys: create, list, revoke, look up."""
