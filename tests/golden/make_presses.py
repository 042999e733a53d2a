"""Makes presses.npz: scores and kept tokens of kvpress' presses, for models of llama.npz.

Of presses whose layers or heads keep different numbers, and of wrappers, a mask of kept tokens.

kvpress needs another transformers than the `torch` extra brings, so it has its own environment:

    python3.11 -m venv kvpress-venv
    kvpress-venv/bin/pip install torch==2.13.0      (a CPU build; first, and alone)
    kvpress-venv/bin/pip install kvpress==0.5.5
    kvpress-venv/bin/python -P tests/golden/make_presses.py

L layers, K key heads, S tokens, C kept tokens, D head dim.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np

MODELS = {"llama3": 40, "yarn": 40, "qwen3": 29}  # with grouped heads; tokens of a prompt
RATIO = {"compression_ratio": 0.6}

# By our name: class, and options beside the ratio.
PRESSES = {
    "knorm": ("KnormPress", {}),
    "snap_kv": ("SnapKVPress", {"window_size": 6, "kernel_size": 5}),
    "expected_attention": ("ExpectedAttentionPress", {"n_future_positions": 64, "n_sink": 4}),
    "streaming_llm": ("StreamingLLMPress", {"n_sink": 4}),
    "tova": ("TOVAPress", {}),
}
# Beside these: class, the press whose score it takes, and options of its own.
WRAPPERS = {
    "pyramid_kv": ("PyramidKVPress", None, {"window_size": 2, "kernel_size": 5, "beta": 4}),
    "ada_kv": ("AdaKVPress", "snap_kv", {"alpha_safeguard": 0.2}),
    "chunk_press": ("ChunkPress", "knorm", {"chunk_length": 16}),
    "chunk_kv": ("ChunkKVPress", "knorm", {"chunk_length": 6}),
}


def main() -> None:
    import kvpress
    import torch
    import transformers

    golden = dict(np.load(Path(__file__).with_name("llama.npz")))
    configs = json.loads(str(golden["configs"]))
    options = {method: RATIO | own for method, (_, own) in PRESSES.items()}
    wrappers = {method: own for method, (_, _, own) in WRAPPERS.items()}
    arrays = {"options": np.array(json.dumps(options)), "wrappers": np.array(json.dumps(wrappers))}

    def load(name):
        config = transformers.AutoConfig.for_model(**configs[name])
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        stored = {key.removeprefix(f"{name}/weights/"): golden[key] for key in golden}
        model.load_state_dict({key: torch.tensor(stored[key]) for key in model.state_dict()})
        return model

    def keys(model, tokens):
        """Those that the cache holds after a prompt, [L, K, C, D]."""
        cache = transformers.DynamicCache()
        with torch.no_grad():
            model(torch.tensor(tokens).long()[None], past_key_values=cache)
        return [layer.keys for layer in cache.layers]

    def wrapped(method):
        kind, inner, own = WRAPPERS[method]
        if inner is None:
            return getattr(kvpress, kind)(**RATIO, **own)
        press = getattr(kvpress, PRESSES[inner][0])(**options[inner])
        return getattr(kvpress, kind)(press=press, **own)

    def recorded(score, scores, *inputs):
        scores.append(score(*inputs))
        return scores[-1]

    for seed, (name, length) in enumerate(MODELS.items()):
        model = load(name)
        # No token comes twice: in the first layer its keys would be equally long.
        tokens = np.random.default_rng(seed).permutation(40)[:length].astype(np.int32)
        arrays[f"{name}/tokens"] = tokens
        for method, (kind, _) in PRESSES.items():
            press, scores = getattr(kvpress, kind)(**options[method]), []
            press.score = partial(recorded, press.score, scores)
            with press(model):
                pressed = torch.cat(keys(model, tokens))
            whole = torch.cat(keys(model, tokens))
            same = (pressed[:, :, :, None] == whole[:, :, None]).all(-1)
            assert (same.sum(-1) == 1).all()
            kept = np.sort(same.int().argmax(-1).numpy().astype(np.int32), axis=-1)
            scores = torch.cat(scores).numpy()  # [L, K, S]
            falling, count = -np.sort(-scores, axis=-1), kept.shape[-1]
            last, next_ = falling[..., count - 1], falling[..., count]
            assert (last - next_ > 1e-4 * np.abs(next_)).all()  # no ties, up to rounding
            arrays[f"{name}/{method}/scores"] = scores
            arrays[f"{name}/{method}/kept"] = kept
        whole = keys(model, tokens)
        for method in WRAPPERS:
            with wrapped(method)(model):
                pressed, masks = keys(model, tokens), []
            for layer, (kept, every) in enumerate(zip(pressed, whole)):
                mask = (kept[0][:, :, None] == every[0][:, None]).all(-1).any(1)  # [K, S]
                attn = model.model.layers[layer].self_attn
                if method == "ada_kv":
                    _, heads, places = attn.masked_key_indices
                    mask[heads, places] = False
                masks.append(mask.numpy())
            arrays[f"{name}/{method}/mask"] = np.stack(masks)
    np.savez_compressed(Path(__file__).with_name("presses.npz"), **arrays)


if __name__ == "__main__":
    main()
