"""A model of Qwen2.5-0.5B's shape against transformers on the same CPU, in one run.

    python -m experiments.llm.speed      (needs the `torch` extra, and 8 GB of memory)

Random weights. Reading: a prompt at once, logits of its last token only. Decoding: greedy, token
after token from a short context; transformers' model is called in a plain loop, without what its
`generate` does around it. The programs take turns.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import converters
from effjax.forward import Forward, Params
from effjax.generate import generate, prefill
from experiments import report
from experiments.kernels.timing import best_seconds

CONTEXT = 128  # tokens before decoding


def models(dtype: str, layers: int, folder: Path) -> tuple[Any, Forward, Params]:
    """transformers' model with random weights, and ours with the same ones."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    theirs = Qwen2ForCausalLM(config).to(getattr(torch, dtype)).eval()
    theirs.save_pretrained(folder / dtype)
    forward, params = converters.from_pretrained(folder / dtype, dtype=dtype, progress=False)
    return theirs, forward, params


def reading(
    theirs: Any, forward: Forward, params: Params, tokens: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """Logits of the last token of prompts, and their keys and values."""
    import torch

    ids = torch.tensor(tokens).long()

    @torch.inference_mode()
    def other() -> Any:
        return theirs(ids, use_cache=True, logits_to_keep=1).logits.float().numpy()

    return {
        "effjax": lambda: prefill(forward, params, tokens, new=1, buckets=None).logits,
        "transformers": other,
    }


def decoding(
    theirs: Any, forward: Forward, params: Params, tokens: np.ndarray, new: int
) -> dict[str, Callable[[], Any]]:
    """The tokens that follow prompts which were read before, int[B, new]."""
    import torch

    session = prefill(forward, params, tokens, new=new, buckets=None)
    with torch.inference_mode():
        read = theirs(torch.tensor(tokens).long(), use_cache=True, logits_to_keep=1)

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
        return torch.cat(made, dim=1).numpy()

    def ours() -> Any:
        return generate(forward, params, session=session, max_new_tokens=new).tokens

    return {"effjax": ours, "transformers": other}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="to decode")
    parser.add_argument("--read-batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    options = " ".join(
        f"--{name.replace('_', '-')} "
        + (" ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in vars(arguments).items()
    )
    rows, rng = [], np.random.default_rng(0)
    for dtype in arguments.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            trio = models(dtype, arguments.layers, Path(folder))
        for batch in sorted({*arguments.read_batches, *arguments.batches}):
            long, short = (
                rng.integers(0, 151_936, (batch, length)).astype(np.int32)
                for length in (arguments.prompt, CONTEXT)
            )
            phases = {}
            if batch in arguments.read_batches:
                phases[f"read {arguments.prompt} tokens"] = reading(*trio, long)
            if batch in arguments.batches:
                decode = decoding(*trio, short, arguments.new)
                phases[f"decode {arguments.new} tokens"] = decode
            for phase, programs in phases.items():
                seconds = best_seconds(programs, arguments.repeats)
                ours, theirs = (np.asarray(run()) for run in programs.values())
                if phase.startswith("read"):
                    ours, theirs = (each.reshape(batch, -1).argmax(-1) for each in (ours, theirs))
                rows.append(
                    {
                        "phase": phase,
                        "dtype": dtype,
                        "batch": batch,
                        "effjax_seconds": seconds["effjax"],
                        "transformers_seconds": seconds["transformers"],
                        "ratio": seconds["effjax"] / seconds["transformers"],
                        "equal_tokens": float(np.mean(ours == theirs)),
                    }
                )
                print(report.markdown(rows[-1:]), flush=True)
                report.write(
                    f"llm_speed_{jax.default_backend()}",
                    title="Qwen2.5-0.5B's shape against transformers",
                    command=f"python -m experiments.llm.speed {options}",
                    rows=rows,
                )


if __name__ == "__main__":
    main()
