"""A model of Qwen2.5-0.5B's shape against transformers: reading prompts, making tokens.

Reading gives the logits of the last token. Tokens are made greedily from a context of 128;
transformers' model is called in a plain loop, without what its `generate` does around it. Ratios of
float32 go by the host, by what its memory is worth.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import converters
from effjax.forward import Forward, Params
from effjax.generate import generate, prefill
from experiments.peers.comparison import HAS_TORCH, Row, timed, torch_device

VOCABULARY = 151_936
# Of transformers' seconds.
READ = {"float32": 1.0, "bfloat16": 1.05}
DECODE = {"float32": 0.6, "bfloat16": 1.1}


def rows(quick: bool) -> Iterator[Row]:
    if not HAS_TORCH:
        return
    layers, prompt, context, new, repeats = (1, 16, 8, 3, 1) if quick else (24, 512, 128, 32, 3)
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            trio = models(dtype, layers, Path(folder))
        long, short = (
            rng.integers(0, VOCABULARY, (1, length)).astype(np.int32)
            for length in (prompt, context)
        )
        yield timed(
            f"Qwen2.5-0.5B reads {prompt} tokens, {dtype}",
            reading(*trio, long),
            repeats=repeats,
            at_most=READ[dtype],
        )
        yield timed(
            f"Qwen2.5-0.5B makes {new} tokens, {dtype}",
            decoding(*trio, short, new),
            repeats=repeats,
            at_most=DECODE[dtype],
        )


def models(dtype: str, layers: int, folder: Path) -> tuple[Any, Forward, Params]:
    """transformers' model with random weights, and ours with the same ones."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    theirs: Any = Qwen2ForCausalLM(config).to(torch_device(), getattr(torch, dtype)).eval()
    theirs.save_pretrained(folder / dtype)
    forward, params = converters.from_pretrained(folder / dtype, dtype=dtype, progress=False)
    return theirs, forward, params


def reading(
    theirs: Any, forward: Forward, params: Params, tokens: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """Logits of the last token of prompts, and their keys and values."""
    import torch

    ids = torch.tensor(tokens).long().to(theirs.device)

    @torch.inference_mode()
    def other() -> Any:
        return theirs(ids, use_cache=True, logits_to_keep=1).logits.float().cpu().numpy()

    return {
        "effjax": lambda: np.asarray(prefill(forward, params, tokens, new=1, buckets=None).logits),
        "transformers": other,
    }


def decoding(
    theirs: Any, forward: Forward, params: Params, tokens: np.ndarray, new: int
) -> dict[str, Callable[[], Any]]:
    """The tokens that follow prompts which were read before, int[B, new]."""
    import torch

    prefix = jax.block_until_ready(prefill(forward, params, tokens, new=new, buckets=None))
    ids = torch.tensor(tokens).long().to(theirs.device)
    with torch.inference_mode():
        read = theirs(ids, use_cache=True, logits_to_keep=1)

    # transformers 5.24 renamed it.
    new_name = "cache" in inspect.signature(theirs.forward).parameters
    named = "cache" if new_name else "past_key_values"
    kept = getattr(read, named)

    @torch.inference_mode()
    def other() -> Any:
        cache, last = copy.deepcopy(kept), read.logits[:, -1:].argmax(-1)
        made = [last]
        for _ in range(new - 1):
            out = theirs(last, use_cache=True, **{named: cache})
            last = out.logits[:, -1:].argmax(-1)
            made.append(last)
        return torch.cat(made, dim=1).cpu().numpy()

    def ours() -> Any:
        return generate(forward, params, prefix=prefix, max_new_tokens=new).tokens

    return {"effjax": ours, "transformers": other}
