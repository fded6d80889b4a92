"""Where models and texts come from: hub, local folders, earlier jobs, GGUF files. Nothing here imports torch."""
