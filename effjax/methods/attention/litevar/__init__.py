"""LiteVAR: windows on the scales of VAR, attention shared over guidance, mixed precision.

Use it for models that predict maps of tokens scale by scale (VAR). Nothing is trained: windows are
calibrated on a few batches of samples. Windows and sharing save attention, which is what large maps
cost (6 % of the FLOPs of VAR-d16 at 256 pixels, 61 % of 64 times as many tokens); sharing and bits
save the memory of keys, values and weights at every size.

    |x m / n - y| < w        token x of a scale of n sees key y of one of m, in heads with windows

A head has a half width for each pair of scales: 0 skips it, m keeps it whole. The distance is in
the order of the tokens, row by row, and so a window covers about w / sqrt(m) rows to each side. The
first three scales, and their keys, stay dense. To calibrate, P is the map of a head summed over a
batch, without its probabilities below a floor; w is the least with tau of P's mass on the pair, and
0 where the pair has too little of P; of several batches the widest is taken.

Over guidance the unconditional branch takes from the conditional one its "map" (queries, keys and
QK^T of one branch), or the attention's "output" (values, PV and the projection too). Keys, and with
outputs values, of the unconditional branch are not kept. Gates are those of each branch.

With a share p of all pairs of queries and keys kept, attention saves 1 - p, with shared maps
1 - 3/4 p and with shared outputs 1 - p/2: 70.34 %, 77.76 % and 85.17 % of the paper's windows, of
attention and not of all FLOPs. FLOPs of attention are 4 C d b' times the kept pairs, b' = 2, 3/2 or
1; XLA's program and the kernels work on whole blocks of them (see `effjax.cost`).

Linear layers are rounded by `rules`, those of round_to_nearest, and feed-forward outputs (fc2) stay
floats. `sensitivity` measures which type of layers bears rounding least. Attention of 8 bits is
`pallas_kernels.quantized_attention`.

The plan is static, and with it all block lists, which differ by layer: `effjax.scan_blocks` unites
layers of equal windows alone.

Source: LiteVAR, arXiv 2411.17178. Other than in the released code, tokens that are not seen have no
weight at all, and the rest is renormalized (`renormalize=False` leaves weights as the calibration
saw them); inputs of layers, queries and keys are symmetric, and probabilities are counted in the
largest of a block of keys, in place of steps of 1/256. The widest windows of several batches are
ours: the script that merges them was not released.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effjax import testing
from effjax.calibration import Trajectory
from effjax.fields import Count, Share
from effjax.forward import Forward, Params
from effjax.methods.attention.litevar.patch import LiteVAR, described, transform
from effjax.methods.attention.litevar.plan import (
    FIRST,
    NAME,
    AttentionBits,
    LiteVARPlan,
    Sharing,
    attention_saving,
    mixed_precision,
    scale_pairs,
    uniform,
    windowed_pairs,
)
from effjax.methods.attention.litevar.search import Goals, search, sensitivity
from effjax.quant.notation import read_bits
from effjax.transform import Method, Shorthand

__all__ = [
    "METHOD",
    "Goals",
    "LiteVAR",
    "LiteVARPlan",
    "attention_saving",
    "mixed_precision",
    "scale_pairs",
    "search",
    "sensitivity",
    "transform",
    "uniform",
    "windowed_pairs",
]


@dataclasses.dataclass(frozen=True)
class Uniform(Shorthand):
    """Equal windows in all layers and heads, or none, and bits by type of layer.

    Attributes:
        window: half width as a share of the keys of a scale; without it all pairs are dense.
        first: the first scale with windows.
        share: what the unconditional branch takes of the conditional one.
        attention_bits: of queries, keys, probabilities and values, 8 or 16 for floats.
        bits: of weights and inputs of linear layers but feed-forward outputs, such as w8a8.
    """

    window: Share | None = None
    first: Count = FIRST
    share: Sharing = "output"
    attention_bits: AttentionBits = 16
    bits: str = "w16"

    def __post_init__(self) -> None:
        super().__post_init__()
        read_bits(self.bits)

    def plan(self, forward: Forward, params: Params) -> LiteVARPlan:
        patch_nums, layers, heads = described(forward, params)
        return uniform(
            patch_nums,
            layers=layers,
            heads=heads,
            window=self.window,
            first=self.first,
            share=self.share,
            attention_bits=self.attention_bits,
            rules=mixed_precision(*read_bits(self.bits)),
        )


def _tiny(**options: Any) -> testing.Subject:
    return testing.tiny_var(**{"patch_nums": (1, 4), **options})


def _of(subject: testing.Subject, width: int, share: Sharing, **fields: Any) -> LiteVARPlan:
    """Of the last scale's own keys a half width, that of the one before in one head."""
    config = subject.forward.config
    last, (layers, heads) = len(config.patch_nums) - 1, (config.num_layers, config.num_heads)
    own = (last, last, ((width,) * heads,) * layers)
    before = (last, last - 1, ((max(width, 1), *(99,) * (heads - 1)),) * layers)
    shape = config.patch_nums, layers, heads
    return LiteVARPlan(*shape, (own, before), share, **fields)


METHOD = Method(
    name=NAME,
    paper="LiteVAR: Compressing Visual Autoregressive Modelling with Efficient Attention and "
    "Quantization, arXiv 2411.17178",
    seams=("patches", "leaves"),
    domain="images",
    plan=LiteVARPlan,
    transform=transform,
    identity=lambda subject: _of(subject, 99, "none"),
    ladder=lambda subject: (
        _of(subject, 0, "none"),
        _of(subject, 0, "map"),
        _of(subject, 0, "output", rules=mixed_precision(8, 8)),
    ),
    tiny=_tiny,
    systems=("LiteVAR",),
    shorthands=(Uniform,),
    data=Trajectory,
    goals=Goals,
    search=search,
)
