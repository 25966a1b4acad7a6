"""Saves and resumes runs without losing work."""
