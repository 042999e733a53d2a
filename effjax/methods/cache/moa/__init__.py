"""MoA: each head keeps the first tokens and a span of the last ones, which grows with the sequence.

Use it where heads differ in how far they look back: some need a constant number of tokens and some
need all. With spans chosen head by head, a mean span of half the sequence halves the cache, the
traffic of decoding and the attention of the prompt, and loses far less than one window for all.

    N = prompt + new tokens                         of each sequence, known when it begins
    c = min(int(alpha + beta N), N), at least `floor`, rounded up to blocks: C slots
    sinks S = min(C, sink), ring R = C - S
    slot(p) = p for p < S, then S + (p - S) mod R

A new token attends to all C slots. In the prompt spans are of whole blocks: a block of queries sees
the sinks and the last R / block blocks of keys, its own included. That is up to block - 1 tokens
less than a new token sees at the same place.

The plan and the largest N are static, and with them all sizes. Lengths are data, and with them how
many of its slots a shorter sequence uses.

There are two layouts. "flat" has one pair of arrays for all heads of a layer, with a stretch of
slots for each. "grouped" has one pair for the heads of a layer with the same rule; these arrays can
be sharded by heads. On a TPU, groups whose number of heads is not a multiple of 8 are copied for
every token. With 8 or 4 bits the slots hold quantized values, with a scale and an offset for each
token and head; new tokens see them, and the prompt sees floats.

Cost: mean C / N of the dense cache.

`search` chooses the rules. For every head it estimates what the loss of answers would be if an
element of the attention map were masked and its row normalized again. To first order, with A the
softmax and dA = dLoss / dA:

    E_ij = A_ij (sum_n A_in dA_in - dA_ij) / (1 - A_ij + eps)   and E_00 = -A_00 dA_00

|E| is summed over blocks, and the loss of a rule is what lies outside its span. An integer program
chooses a rule for each head, at most two different ones in a layer, within a density at every
length. Of the Pareto front over the lengths, the plan with the least loss at another length is
taken.

Source: Mixture of Attention Spans, arXiv 2406.14909. Here a *key* head has one rule, and its
influence is the largest of its query heads'; the reference copies keys for every query head.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from effjax import testing
from effjax.calibration import Answers
from effjax.fields import Checked, Count, NotNegative, Range, Share
from effjax.forward import Forward, Params
from effjax.methods.cache.moa.caches import NAME, FlatCache, GroupedCache, SpanCache, transform
from effjax.methods.cache.moa.order import order_heads
from effjax.methods.cache.moa.plan import (
    LAYOUTS,
    MoAPlan,
    Rule,
    read_released,
    uniform,
)
from effjax.methods.cache.moa.plan_search import candidates, rule_grid, search
from effjax.methods.cache.moa.profile import Samples, answered, influence, response_loss
from effjax.transform import Method, Shorthand

__all__ = [
    "LAYOUTS",
    "FlatCache",
    "Goals",
    "GroupedCache",
    "MoAPlan",
    "Rule",
    "Samples",
    "SpanCache",
    "Uniform",
    "answered",
    "candidates",
    "influence",
    "order_heads",
    "read_released",
    "response_loss",
    "rule_grid",
    "search",
    "transform",
    "uniform",
]


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """What a search aims at.

    Attributes:
        density: the most that heads keep of a sequence, on average, at every length.
        lengths: of the sequences; the longest one validates.
    """

    density: Annotated[float, Range(0, 1, above=True)] = 0.5
    lengths: tuple[Count, ...] = (256, 512, 704)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.lengths)) < 2:
            raise ValueError(
                f"give two lengths or more, the longest to validate; got {list(self.lengths)}"
            )
        if wrong := [length for length in self.lengths if length % self.block]:
            raise ValueError(f"lengths must be multiples of {self.block} tokens, got {wrong}")

    @property
    def block(self) -> int:
        """Tokens of a block: fewer for short sequences."""
        return 64 if min(self.lengths) >= 2048 else 16


def _search(goals: Goals, forward: Forward, params: Params, data: Answers) -> MoAPlan:
    *profiled, validated = sorted(set(goals.lengths))
    block = goals.block
    validation = data.draw(validated, data.count, data.seed + 1)  # the longest, or none fit
    return search(
        forward,
        params,
        {length: data.draw(length, data.count, data.seed) for length in profiled},
        validation=validation,
        density=goals.density,
        extend=[validated],
        rules=rule_grid(profiled, [validated], step=max(min(profiled) // 4, block)),
        block=block,
        sink=block,
        floor=2 * block,
    )


@dataclasses.dataclass(frozen=True)
class Uniform(Shorthand):
    """One rule for all heads: StreamingLLM at the same density.

    Attributes:
        alpha: tokens of every span.
        beta: share of a sequence that every span takes beside them.
    """

    alpha: NotNegative = 0.0
    beta: Share = 0.5

    def plan(self, forward: Forward, params: Params) -> MoAPlan:
        config = forward.config
        return uniform(config.num_layers, config.num_kv_heads, alpha=self.alpha, beta=self.beta)


def _plan(subject: testing.Subject, *betas: float) -> MoAPlan:
    """Rules that differ by head, for short sequences."""
    config = subject.forward.config
    row = tuple(betas[head % len(betas)] for head in range(config.num_kv_heads))
    table = (row,) * config.num_layers
    return MoAPlan(((0.0,) * len(row),) * len(table), table, block=2, sink=2, floor=4)


def _identity(subject: testing.Subject) -> MoAPlan:
    return _plan(subject, 1.0)


def _ladder(subject: testing.Subject) -> tuple[MoAPlan, ...]:
    return tuple(_plan(subject, *betas) for betas in ((1.0, 0.5), (0.5, 0.7), (0.2, 0.5)))


METHOD = Method(
    name=NAME,
    paper="Mixture of Attention Spans: Optimizing LLM Inference Efficiency with Heterogeneous "
    "Sliding-Window Lengths, arXiv 2406.14909",
    seams=("patches",),
    domain="language models",
    plan=MoAPlan,
    transform=transform,
    identity=_identity,
    ladder=_ladder,
    tiny=testing.tiny_llama,
    systems=("MoA",),
    shorthands=(Uniform,),
    data=Answers,
    goals=Goals,
    search=_search,
)
