"""The compression: recipes, techniques, engine, certification, and the processes that run them."""
