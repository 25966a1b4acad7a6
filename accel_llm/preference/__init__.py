"""Preference training: losses of pairs and of single answers, and the log-probabilities of the reference."""
