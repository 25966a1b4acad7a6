"""Conversations become token ids and labels: message formats, chat templates, loss masks and exact token borders."""
