"""Sequence classification: the loss of a text with a label."""
