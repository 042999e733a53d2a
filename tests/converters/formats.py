"""The formats of quantized layers once more, each as its own library describes it."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

import converters
from effjax.models.t5 import T5Config

T5 = T5Config(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, head_dim=32
)
FILE = "model.safetensors"
WI, WO = (
    "encoder.block.0.layer.1.DenseReluDense.wi_0",
    "encoder.block.1.layer.1.DenseReluDense.wo",
)
LAYERS = (WI, WO, "encoder.block.1.layer.0.SelfAttention.q")  # what is quantized in the tests
KERNELS = ("blocks.0.mlp.gate.kernel", "blocks.1.mlp.down.kernel", "blocks.1.attn.to_q.kernel")


def words(qvalues, bits):
    """int32[..., words]: quantized values of a row from the lowest bit of the first word on."""
    count = -(-qvalues.shape[-1] * bits // 32)
    rows = [
        sum(int(qvalue) << (bits * n) for n, qvalue in enumerate(row)).to_bytes(4 * count, "little")
        for row in qvalues.reshape(-1, qvalues.shape[-1])
    ]
    return np.frombuffer(b"".join(rows), "<i4").reshape(*qvalues.shape[:-1], count)


def planes(qvalues, bits):
    """int32[..., words]: 32 values of a row are words of their low bits, then of those above."""
    split = {5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 3: (2, 1)}.get(bits, (bits,))
    blocks = qvalues.reshape(*qvalues.shape[:-1], -1, 32)
    found = [words(blocks >> sum(split[:n]) & (2**w - 1), w) for n, w in enumerate(split)]
    return np.concatenate(found, axis=-1).reshape(*qvalues.shape[:-1], -1)


class Matrix:
    """Random values [O, I], zero points [O, G], both unsigned, and scales float16[O, G]."""

    def __init__(self, shape, bits, group, symmetric, seed=0, low=1):
        rng = np.random.default_rng(seed)
        self.outputs, self.inputs = shape
        self.bits, self.symmetric = bits, symmetric
        self.group = self.inputs if group == -1 else group
        zeros = (self.outputs, self.inputs // self.group)
        self.qvalues = rng.integers(0, 2**bits, shape)
        self.zeros = rng.integers(low, 2**bits, zeros)
        if symmetric:
            self.zeros[:] = 2 ** (bits - 1)
        self.scales = rng.uniform(0.001, 0.01, zeros).astype(np.float16)

    def value(self, dtype=np.float32):
        """s (q - z) as libraries compute it, in the dtype of their scales or another."""
        every = self.group
        whole = (self.qvalues - self.zeros.repeat(every, 1)).astype(dtype)
        return self.scales.repeat(every, 1).astype(dtype) * whole

    def gptq(self, version=1):
        groups = np.arange(self.inputs) // self.group
        zeros = words(self.zeros.T, self.bits).astype(np.int64)
        if version == 1:
            zeros = words(self.zeros.T - 1, self.bits)
        return {
            "qweight": words(self.qvalues, self.bits).T,
            "qzeros": zeros.astype(np.int32),
            "scales": self.scales.T,
            "g_idx": groups.astype(np.int32),
        }

    def gptq_planes(self):
        return self.gptq() | {
            "qweight": planes(self.qvalues, self.bits).T,
            "qzeros": planes(self.zeros.T, self.bits),
        }

    def awq(self):
        def interleaved(qvalues):  # [..., O]
            eights = qvalues.reshape(*qvalues.shape[:-1], -1, 8)
            packed = sum(eights[..., n] << (4 * p) for p, n in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
            return packed.astype(np.uint32).view(np.int32)

        return {
            "qweight": interleaved(self.qvalues.T),
            "qzeros": interleaved(self.zeros.T),
            "scales": self.scales.T,
        }

    def packed(self, plain_zeros=False):
        half = 2 ** (self.bits - 1)
        zeros = words(self.zeros.T, self.bits).T
        return {
            "weight_packed": words(self.qvalues, self.bits),
            "weight_scale": self.scales,
            "weight_shape": np.array([self.outputs, self.inputs]),
        } | (
            {}
            if self.symmetric
            else {
                "weight_zero_point": (self.zeros - half).astype(np.int8) if plain_zeros else zeros
            }
        )

    def int8(self):
        half = 2 ** (self.bits - 1)
        tensors = {"weight": (self.qvalues - half).astype(np.int8), "weight_scale": self.scales}
        if not self.symmetric:
            tensors["weight_zero_point"] = (self.zeros - half).astype(np.int8)
        return tensors


def gptq(bits, group=32, sym=True, **options):
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, **options}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def torchao(kind, version=2, **data):
    described = {"_type": kind, "_version": version, "_data": data}
    return {"quant_method": "torchao", "quant_type": {"default": described}}


def compressed(form, bits, group=None, sym=True, inputs=None, targets=("Linear",)):
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "dynamic": False}
    weights |= {"strategy": "group" if group else "channel", "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {
            "group_0": {
                "targets": list(targets),
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
            }
        },
        "ignore": ["encoder.block.0.layer.0.SelfAttention.k"],
        "kv_cache_scheme": None,
    }


# name: (configuration, how a layer is written, (bits, group, symmetric))
CASES = {
    "gptq 2": (gptq(2), Matrix.gptq, (2, 32, True)),
    "gptq 3": (gptq(3, sym=False), Matrix.gptq, (3, 32, False)),
    "gptq 4": (gptq(4, sym=False), Matrix.gptq, (4, 32, False)),
    "gptq 4 channel": (gptq(4, -1), Matrix.gptq, (4, -1, True)),
    "gptq 8": (gptq(8, sym=False), Matrix.gptq, (8, 32, False)),
    "gptq 4 second": (
        gptq(4, sym=False, checkpoint_format="gptq_v2"),
        lambda m: m.gptq(2),
        (4, 32, False),
    ),
    **{
        f"gptq {bits} planes": (
            gptq(bits, sym=False, checkpoint_format="gptq_p"),
            Matrix.gptq_planes,
            (bits, 32, False),
        )
        for bits in (3, 5, 6, 7)
    },
    "awq": (AWQ, Matrix.awq, (4, 32, False)),
    "awq symmetric": (AWQ | {"zero_point": False}, Matrix.awq, (4, 32, True)),
    "packed 4": (compressed("pack-quantized", 4, 32), Matrix.packed, (4, 32, True)),
    "packed 4 channel": (
        compressed("pack-quantized", 4, sym=False),
        Matrix.packed,
        (4, -1, False),
    ),
    "packed 8": (compressed("pack-quantized", 8, 32, sym=False), Matrix.packed, (8, 32, False)),
    "packed plain zeros": (
        compressed("pack-quantized", 4, 32, sym=False),
        lambda m: m.packed(plain_zeros=True),
        (4, 32, False),
    ),
    "int8": (compressed("int-quantized", 8), Matrix.int8, (8, -1, True)),
    "int4 tokens": (
        compressed("int-quantized", 4, 32, inputs=TOKENS),
        Matrix.int8,
        (4, 32, True),
    ),
    "int4 asymmetric tokens": (
        compressed("int-quantized", 4, sym=False, inputs=TOKENS | {"symmetric": False}),
        Matrix.int8,
        (4, -1, False),
    ),
    "int8 tokens": (
        compressed("int-quantized", 8, sym=False, inputs=TOKENS),
        Matrix.int8,
        (8, -1, False),
    ),
}


def write(model, directory, config, layers, layout="transformers"):
    """The model's directory with these tensors by layer in the place of their weights."""
    if not directory.exists():
        converters.save_pretrained(*model, directory, layout=layout)
    [file] = directory.glob("*.safetensors")
    tensors = load_file(file)
    for layer, held in layers.items():
        tensors.pop(f"{layer}.weight", None)
        tensors |= {f"{layer}.{name}": np.ascontiguousarray(x) for name, x in held.items()}
    save_file(tensors, file)
    said = json.loads((directory / "config.json").read_text()) | {"quantization_config": config}
    (directory / "config.json").write_text(json.dumps(said))
    return directory


def shapes_of(layers=LAYERS):
    return {layer: {WI: (96, 64), WO: (64, 96)}.get(layer, (64, 64)) for layer in layers}


def matrices(settings, layers=LAYERS, **options):
    return {
        layer: Matrix(shape, *settings, seed=seed, **options)
        for seed, (layer, shape) in enumerate(shapes_of(layers).items())
    }
