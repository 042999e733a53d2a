"""PAROAttention: heads in orders in which their attention is local, and a fixed mask of blocks.

Use it to leave out half to four fifths of the attention of a trained image or video transformer,
and to run the rest on integers, without training. Each head gets an order of the image tokens
(frames, rows and columns nested in another way) in which what it looks at stands together; in that
order it keeps blocks of queries and keys, found once and used for all prompts.

    goals = Goals(density=0.5, block=64, bits=8, values=8)
    found = find(goals, forward, params, Trajectory(sampler, cond, key))
    forward, params = transform(found.plan, found.masks)(forward, params)

It works on self-attention and on joint attention with text on either side, after norms and rotary
positions. Blocks begin at multiples of their size, counted from the begin of the sequence; those
with text, and an incomplete last one, are always kept, and count in densities.

The plan is static: orders, and how many blocks are kept. The masks are arrays, a bit for each block
of each head and slot, in `params["methods"]`; the step chooses the slot, and lists of kept blocks
are made of its bits on the device, so one compiled program serves all calls. Layers with different
orders are different programs for `scan_blocks`.

Cost of a layer and call, in FLOPs: density 4 B H N^2 d (`attention_flops`; ideal speed-up 1 /
density), and M ceil(M / 8) bytes for each mask of M blocks. GPU and TPU kernels do the work of the
listed blocks; XLA's program that of `width` blocks for each row, the most that any row keeps, so
`rule="row"` suits it. With 8 bits queries and keys take half the bytes of bfloat16; 4 bits have
the accuracy of 4 bits, and the speed of 8.

Kernels choose blocks: GPUs powers of two from 16 (32 for integers), TPUs multiples of 128. XLA's
program runs all others.

Source: PAROAttention, arXiv 2506.16054. The score of orders has the sign that its text describes
(see `order_scores`); the threshold of masses is bisected to a density; rows keep one block at
least.
"""

from __future__ import annotations

from effjax import testing
from effjax.calibration import Trajectory
from effjax.context import Layout
from effjax.methods.attention.paro_attention.diagonal import Diagonal, diagonal
from effjax.methods.attention.paro_attention.order import (
    INVERSES,
    ORDERS,
    candidates,
    permute,
    unpermute,
)
from effjax.methods.attention.paro_attention.patch import (
    Options,
    ParoAttention,
    ParoCore,
    paro_attention,
    transform,
)
from effjax.methods.attention.paro_attention.plan import (
    NAME,
    Blocks,
    Masks,
    ParoAttentionPlan,
    attention_flops,
    slots_of_steps,
)
from effjax.methods.attention.paro_attention.search import Found, Goals, calibrate, find, search
from effjax.methods.attention.paro_attention.statistics import order_scores
from effjax.transform import Method

__all__ = [
    "INVERSES",
    "METHOD",
    "ORDERS",
    "Blocks",
    "Diagonal",
    "Found",
    "Goals",
    "Masks",
    "Options",
    "ParoAttention",
    "ParoAttentionPlan",
    "ParoCore",
    "attention_flops",
    "calibrate",
    "candidates",
    "diagonal",
    "find",
    "order_scores",
    "paro_attention",
    "permute",
    "search",
    "slots_of_steps",
    "transform",
    "unpermute",
]


def _of(subject: testing.Subject, density: float) -> ParoAttentionPlan:
    layout = Layout(grid=(1, 8, 8))
    orders, calls = ((0, 1), (1, 0)), subject.sampler.calls
    return diagonal(density, orders, (False, False), layout, steps=calls, block=8)


METHOD = Method(
    name=NAME,
    paper="PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in "
    "Visual Generation Models, arXiv 2506.16054",
    seams=("patches",),
    domain="images",
    plan=ParoAttentionPlan,
    transform=transform,
    identity=lambda subject: _of(subject, 1.0),
    ladder=lambda subject: tuple(_of(subject, density) for density in (0.75, 0.5, 0.25)),
    tiny=testing.tiny_dit,
    systems=("PAROAttention",),
    shorthands=(Diagonal,),
    data=Trajectory,
    calibrate=calibrate,
    goals=Goals,
    search=search,
)
