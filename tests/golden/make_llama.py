"""Makes llama.npz: random models of the Llama family, uneven left-padded texts, their logits.

python tests/golden/make_llama.py      (needs the `torch` extra)
"""

import json
from pathlib import Path

import numpy as np

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

# By name: class, and what differs from SHAPE.
MODELS = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    "megrez": ("Llama", {"rope_parameters": {"rope_theta": 5e6}, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "yarn": ("Qwen2", {"rope_parameters": {"rope_theta": 1e6, **YARN}}),
    "qwen2 window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5} | {"max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 8}),
}


def main() -> None:
    import torch
    import transformers

    rng = np.random.default_rng(0)
    tokens = rng.integers(3, SHAPE["vocab_size"], (3, 20)).astype(np.int32)
    lengths = np.array([20, 13, 1])
    mask = np.arange(20)[None] >= 20 - lengths[:, None]
    arrays = {"tokens": tokens, "mask": mask}
    configs = {}
    for seed, (name, (kind, changes)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{kind}Config")(**SHAPE | changes)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        for key, tensor in model.state_dict().items():
            scale = tensor.ndim > 1 or not key.endswith("norm.weight")
            noise = torch.randn(tensor.shape) * (
                tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.2
            )
            tensor.copy_(noise if scale else 1 + noise)
        model.tie_weights()
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        inputs = {
            "input_ids": torch.tensor(tokens).long(),
            "attention_mask": torch.tensor(mask).long(),
        }
        with torch.no_grad():
            logits = model(**inputs, position_ids=torch.tensor(positions)).logits
            greedy = model.generate(
                **inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=2
            )
        arrays[f"{name}/logits"] = logits.numpy()
        arrays[f"{name}/greedy"] = greedy[:, 20:].numpy().astype(np.int32)
        configs[name] = json.loads(config.to_json_string(use_diff=False))
        for key, tensor in model.state_dict().items():
            arrays[f"{name}/weights/{key}"] = tensor.numpy()
    arrays["configs"] = np.array(json.dumps(configs))
    np.savez_compressed(Path(__file__).parent / "llama.npz", **arrays)


if __name__ == "__main__":
    main()
