"""The network: loading, placement, isolated attention, the loss, quantization, vocabulary and generation."""
