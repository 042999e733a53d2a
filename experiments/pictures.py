"""Pictures of plans."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from effjax.methods.attention.dit_fast_attn import DiTFastAttnPlan, Strategy

STRATEGIES = {
    Strategy.FULL: ("#33415c", "dense attention"),
    Strategy.FULL_ASC: ("#81b29a", "dense on the conditional half, used for both halves"),
    Strategy.WARS: ("#f2b880", "a window, and the residual of the last FULL call"),
    Strategy.WARS_ASC: ("#e07a5f", "the same on the conditional half, used for both halves"),
    Strategy.AST: ("#f2e9de", "the last output again"),
}
"""Color and meaning of a plan's strategies."""


def draw_plan(plan: DiTFastAttnPlan, path: Path) -> None:
    """Strategies over layers and network calls, with a legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = [STRATEGIES[strategy][0] for strategy in Strategy]
    size = (max(6.0, 1.5 + 0.32 * plan.calls), 2.3 + 0.32 * plan.layers)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    norm = BoundaryNorm(np.arange(len(Strategy) + 1) - 0.5, len(Strategy))
    axes.imshow(np.array(plan.strategies), cmap=ListedColormap(colors), norm=norm, aspect="auto")
    axes.set_title("What attention does, by layer and network call", fontsize="medium")
    axes.set_xlabel("network call")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, plan.calls, max(1, plan.calls // 10)))
    axes.set_yticks(range(plan.layers))
    for edges, mark in ((plan.calls, axes.axvline), (plan.layers, axes.axhline)):
        for edge in range(1, edges):
            mark(edge - 0.5, color="white", linewidth=0.8)
    handles = [
        Patch(facecolor=color, edgecolor="#33415c", label=f"{strategy.name}: {meaning}")
        for strategy, (color, meaning) in STRATEGIES.items()
    ]
    figure.legend(handles=handles, loc="outside lower left", frameon=False)
    figure.savefig(path, dpi=100)
