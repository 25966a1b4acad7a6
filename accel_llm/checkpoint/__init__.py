"""Saving and resuming a run without losing work."""
