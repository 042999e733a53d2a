"""Tiny Llamas as torchao quantises and saves them, and what they answer.

    pip install torch==2.13.0 transformers torchao==0.18.0
    python tests/golden/make_torchao.py

Importing torchao warns, which is an error in the tests: nothing else here imports it.
"""

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "torchao"
TOKENS = np.arange(12).reshape(2, 6) % 16


def main() -> None:
    import torch
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        quantize_,
    )
    from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

    four = {"weight_dtype": torch.int4}
    configs = {
        "int8": Int8WeightOnlyConfig(),
        "int8_inputs": Int8DynamicActivationInt8WeightConfig(),
        "int4": IntxWeightOnlyConfig(**four, granularity=PerGroup(32)),
        "int4_asymmetric": IntxWeightOnlyConfig(
            **four, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC
        ),
        "int3": IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerAxis(0)),
        "int4_inputs": Int8DynamicActivationIntxWeightConfig(
            **four, weight_granularity=PerGroup(32)
        ),
    }
    for name, how in configs.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config).eval()
        quantize_(model.model, how)  # its linear layers; the head is tied, and stays as it is
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
        tensors, metadata = flatten_tensor_state_dict(state)
        save_file(tensors, folder / "model.safetensors", {"format": "pt", **metadata})
        described = {
            **config.to_dict(),
            "architectures": ["LlamaForCausalLM"],
            "quantization_config": TorchAoConfig(how).to_dict(),
        }
        (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
        with torch.inference_mode():
            logits = model(torch.from_numpy(TOKENS)).logits.numpy()
            kernel = model.model.layers[0].mlp.down_proj.weight.dequantize().numpy()
        np.savez(folder / "expected.npz", logits=logits, kernel=kernel)


if __name__ == "__main__":
    main()
