"""The catalog: techniques and preset recipes."""
