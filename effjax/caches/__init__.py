"""KV caches: what a language model keeps of the keys and values of its sequences.

A cache is a wrapper around an attention core (`CausalCore`). Call 0 is the prefill: the core
attends within the call, and the cache stores what it keeps. Every later call appends: the cache
stores the new tokens and attends to all that it holds. Where a token goes follows from its
position, row by row, so rows may have different lengths; tokens with position -1 are padding and
leave no trace.

Shapes are static: the forward's `CacheLength` says how long sequences may become. How much is kept
of a sequence goes by its own length, as if it were alone; its row may have more slots, which stay
empty.

    protocol          `KVCache`: what every kind is, and what it declares that it can
    install           `Caches`: the patch that puts a cache at every attention core
    inputs            `AttentionInputs`: what a layer sees of the tokens of a call
    dense, ring       every token; the first tokens and the last ones
    pressed           the tokens of a prompt that score highest, and all that follow
    shared            the same, with slots that heads share
    evicting          a fixed number of tokens: the one with the least score is overwritten
    residual_buffer   full windows in a smaller form, the newest tokens as they are
    scales            every token of a sequence of scales, whose calls differ in shape
    budgets           how many tokens are kept of a sequence
    storage           what slots hold of their tokens: floats or quantized values
    slots, attention  arithmetic of positions and slots; attention to slots
    quantization      quantized values of what a cache holds

B batch, S tokens of a call, H query heads, K key heads, D head dim, C slots.
"""

from effjax.caches.budgets import Dropped, Sizes, budgets, check_budget
from effjax.caches.dense import DenseCache
from effjax.caches.inputs import AttentionInputs
from effjax.caches.install import Caches, Kind, as_it_is
from effjax.caches.pressed import PressedCache
from effjax.caches.protocol import KVCache
from effjax.caches.residual_buffer import ResidualBufferCache
from effjax.caches.ring import RingCache
from effjax.caches.scales import ScaleCaches, StageCaches
from effjax.caches.slots import Lengths

__all__ = [
    "AttentionInputs",
    "Caches",
    "DenseCache",
    "Dropped",
    "KVCache",
    "Kind",
    "Lengths",
    "PressedCache",
    "ResidualBufferCache",
    "RingCache",
    "ScaleCaches",
    "Sizes",
    "StageCaches",
    "as_it_is",
    "budgets",
    "check_budget",
]
