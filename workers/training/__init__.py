"""One loop for every stage that trains: fine-tuning and distillation, of language models and of classifiers."""
