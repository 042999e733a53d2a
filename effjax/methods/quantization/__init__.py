"""Methods on the leaves: weights and activations as codes."""
