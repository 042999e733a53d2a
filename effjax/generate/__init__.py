"""Text generation: read prompts (prefill), then choose one token after the other (decode).

    out = generate(forward, params, [[5, 9, 2], [7, 7]], max_new_tokens=64)

Each of the two is one jitted program; decoding is a `lax.while_loop`. The patches of the forward
decide how keys and values are kept. A forward without a cache gets a dense one.
"""

from __future__ import annotations

from effjax.generate.arguments import Prompts
from effjax.generate.decoders import DECODERS, read_decoder
from effjax.generate.decoding import Generated, Streamer, generate
from effjax.generate.grid import Grid
from effjax.generate.installed import CacheBytes, cached, caches, has_cache, sequence_bytes
from effjax.generate.jacobi import JacobiDecoding
from effjax.generate.prefix_cache import PrefixCache, cache_bytes, extend, prefill
from effjax.generate.sampling import Sampling, process_logits
from effjax.generate.scoring import Reading, perplexity, score

__all__ = [
    "DECODERS",
    "CacheBytes",
    "Generated",
    "Grid",
    "JacobiDecoding",
    "PrefixCache",
    "Prompts",
    "Reading",
    "Sampling",
    "Streamer",
    "cache_bytes",
    "cached",
    "caches",
    "extend",
    "generate",
    "has_cache",
    "perplexity",
    "prefill",
    "process_logits",
    "read_decoder",
    "score",
    "sequence_bytes",
]
