"""The embedded default: a tiny tokenizer, a tiny base model and generated conversations."""
