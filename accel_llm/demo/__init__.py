"""The demo that every script uses by default: a tiny tokenizer, a tiny base model and generated conversations."""
