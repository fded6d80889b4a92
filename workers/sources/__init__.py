"""Where models and texts come from: hub, folder, GGUF; checked before anything is loaded. Torch-free."""
