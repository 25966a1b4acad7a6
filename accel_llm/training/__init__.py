"""Around the training loop: setup, the verbs of a step, optimizers, checks, evaluation and export."""
