"""Text generation: read prompts (prefill), then choose token after token (decode).

    out = generate(forward, params, [[5, 9, 2], [7, 7]], max_new_tokens=64)

Both are one jitted program each; decoding is a `lax.while_loop`. What keys and values are kept in
is the forward's matter: one without a cache gets a dense one.
"""

from __future__ import annotations

from effjax.generate.arguments import Prompts
from effjax.generate.decoding import Generated, Streamer, generate
from effjax.generate.installed import CacheBytes, cached, caches, has_cache, sequence_bytes
from effjax.generate.prefix_cache import PrefixCache, cache_bytes, extend, prefill
from effjax.generate.sampling import Sampling, process_logits
from effjax.generate.scoring import Reading, perplexity, score

__all__ = [
    "CacheBytes",
    "Generated",
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
    "score",
    "sequence_bytes",
]
