"""Tiny Llamas as compressed-tensors compresses them, and what they answer.

pip install torch==2.13.0 transformers compressed-tensors==0.20.0
python tests/golden/make_compressed_tensors.py
"""

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "compressed_tensors"
TOKENS = np.arange(12).reshape(2, 6) % 16

INTEGERS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FLOATS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
# name: (format, weights, inputs)
MODELS = {
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, INTEGERS),
    "int4": ("int-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, INTEGERS),
    "float8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, FLOATS),
    "float8_tensor": (
        *("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, None),
    ),
    "float8_blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [24, 16]},
        FLOATS | {"strategy": "group", "group_size": 16},
    ),
}


def main() -> None:
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    def blocks(args, shape):
        rows, columns = shape
        return {
            "tensor": lambda: (rows, columns),
            "channel": lambda: (1, columns),
            "group": lambda: (1, args.group_size),
            "block": lambda: tuple(args.block_structure),
        }[args.strategy]()

    for name, (form, weights, inputs) in MODELS.items():
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
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        said = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], format=form)
        apply_quantization_config(model, said)
        for module in model.model.modules():
            if (scheme := getattr(module, "quantization_scheme", None)) is None:
                continue
            args, weight = scheme.weights, module.weight.detach()
            high, wide = blocks(args, weight.shape)
            scales = [
                [calculate_qparams(part.min(), part.max(), args)[0] for part in row.split(wide, 1)]
                for row in weight.split(high)
            ]
            held = torch.tensor(scales).reshape(module.weight_scale.shape)
            module.weight_scale.data.copy_(held)
            module.quantization_status = QuantizationStatus.FROZEN
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode():
            logits = model(torch.from_numpy(TOKENS)).logits.numpy()
        compressor = ModelCompressor(quantization_config=said, force_compression_format=form)
        compressor.compress_model(model)
        state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        described = {
            **config.to_dict(),
            "architectures": ["LlamaForCausalLM"],
            "quantization_config": said.model_dump(mode="json"),
        }
        (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
        compressor.decompress_model(model)
        kernel = model.model.layers[0].mlp.down_proj.weight.detach().float().numpy()
        np.savez(folder / "expected.npz", logits=logits, kernel=kernel)


if __name__ == "__main__":
    main()
