"""Parts of a training script: setup, one step of the loop, optimizers, checks, evaluation and export."""
