"""Which tokens of a conversation are trained: messages, the chat template, targets, and exact token borders."""
