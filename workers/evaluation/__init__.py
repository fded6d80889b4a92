"""What is measured on a model: perplexity, divergence, size, speed."""
