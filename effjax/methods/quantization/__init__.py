"""Methods on the leaves: weights and activations as quantized values."""
