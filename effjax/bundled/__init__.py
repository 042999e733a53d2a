"""What ships so that the demo and the commands run without a download.

A world of glyphs with a judge that reads it, a world of texts, and the weights of the tiny models
that were trained on them. `experiments/` of the repository holds the training.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""`dit_glyphs`, `judge` and `llama_texts`, each with the `log.json` of its training."""
