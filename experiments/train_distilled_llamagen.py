"""Distill the tiny LlamaGen of glyphs into one or two calls (Distilled Decoding, arXiv 2412.17153).

    python -m experiments.train_distilled_llamagen --checkpoints DIR

As `experiments.train_distilled`, token by token. `experiments.train_llamagen` comes first.
"""

from __future__ import annotations

import sys

from effjax.methods.distillation.distilled_decoding import DistilledPlan
from experiments import train_distilled, train_llamagen

WEIGHTS = train_llamagen.WEIGHTS.parent / "distilled_llamagen_glyphs"
PLAN = DistilledPlan(starts=(0, 20), split=20, solver_steps=24)


def main(argv: list[str] | None = None) -> int:
    return train_distilled.command(
        "experiments.train_distilled_llamagen",
        argv,
        about=__doc__.splitlines()[0],
        teacher=train_llamagen.WEIGHTS,
        plan=PLAN,
        output=WEIGHTS,
        guidance=1.5,
        weight=2.5,
    )


if __name__ == "__main__":
    sys.exit(main())
