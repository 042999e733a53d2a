"""Methods that add trained changes to a model's layers: LoRA files."""
