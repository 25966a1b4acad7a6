"""Merges adapters into their base model and verifies the result; extracts adapters from tuned models."""
