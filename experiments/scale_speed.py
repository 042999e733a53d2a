"""Is the loop over scales of VAR faster than the same arithmetic in PyTorch?

    python -m experiments.scale_speed

VAR-d16's shape with random weights, float32, guided and greedy, without the decoder: all ten scales
in one program, and in plain PyTorch, eager, with keys and values in a cache of fixed size and
modulations computed once. Both take turns on the same threads and must draw the same tokens. The
goal is 0.9 of PyTorch's seconds at batches of 1 and 8.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

import converters
import effjax
from converters import var, vqvae
from effjax.autoregression import NextScale
from effjax.forward import abstract, flatten_params
from effjax.models.var import VAR, VARConfig
from effjax.models.vqvae import VQVAE, VQVAEConfig, refinement_of
from experiments import report
from experiments.recipes import turns

GUIDANCE = 1.5

Tensors = dict[str, torch.Tensor]


def random_tensors(model: Any, config: Any, table: Any, *, seed: int) -> Tensors:
    """Random weights with the names and shapes of a released file."""
    shapes = {path: leaf.shape for path, leaf in flatten_params(abstract(model, config)[1]).items()}
    rng, found = np.random.default_rng(seed), {}
    for name, shape in table.bind(shapes).source_shapes(shapes).items():
        scale = np.float32(np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1)
        values = torch.from_numpy(scale * rng.standard_normal(shape, np.float32))
        found[name] = 1 + values if "norm" in name and name.endswith("weight") else values
    return found


class Plain:
    """VAR in plain PyTorch, with a cache."""

    def __init__(self, config: VARConfig, sd: Tensors, vae: Tensors):
        self.config, self.sd, self.vae = config, sd, vae

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.sd[f"{name}.weight"], self.sd[f"{name}.bias"])

    def attention(
        self, block: int, x: torch.Tensor, cache: torch.Tensor, place: slice
    ) -> torch.Tensor:
        sd, name = self.sd, f"blocks.{block}.attn"
        batch, length, width = x.shape
        bias = torch.cat([sd[f"{name}.q_bias"], torch.zeros(width), sd[f"{name}.v_bias"]])
        qkv = F.linear(x, sd[f"{name}.mat_qkv.weight"], bias)
        q, k, v = qkv.view(batch, length, 3, self.config.num_heads, -1).permute(2, 0, 3, 1, 4)
        q = F.normalize(q, dim=-1) * sd[f"{name}.scale_mul_1H11"].clamp_max(np.log(100)).exp()
        cache[0, :, :, place], cache[1, :, :, place] = F.normalize(k, dim=-1), v
        k, v = cache[:, :, :, : place.stop]
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.linear(f"{name}.proj", out.transpose(1, 2).reshape(batch, length, width))

    @torch.inference_mode()
    def sample(self, labels: torch.Tensor) -> torch.Tensor:
        """The likeliest tokens of all scales."""
        config, sd, sides = self.config, self.sd, self.config.patch_nums
        batch, width, total = len(labels), config.hidden_size, config.tokens
        c = sd["class_emb.weight"][torch.cat([labels, torch.full_like(labels, config.num_classes)])]
        mods = [
            self.linear(f"blocks.{i}.ada_lin.1", F.silu(c)).view(2 * batch, 1, 6, -1).unbind(2)
            for i in range(config.num_layers)
        ]
        scale, shift = (
            self.linear("head_nm.ada_lin.1", F.silu(c)).view(2 * batch, 1, 2, -1).unbind(2)
        )
        shape = (2, 2 * batch, config.num_heads, total, config.head_dim)
        caches = [torch.empty(shape) for _ in range(config.num_layers)]
        latents = torch.zeros(batch, config.code_channels, sides[-1], sides[-1])
        x, begin, found = c[:, None] + sd["pos_start"], 0, []
        for number, side in enumerate(sides):
            place = slice(begin, begin + side**2)
            begin = place.stop
            x = x + sd["lvl_embed.weight"][number] + sd["pos_1LC"][:, place]
            for block, (g1, g2, s1, s2, b1, b2) in enumerate(mods):
                h = F.layer_norm(x, (width,), eps=1e-6) * (1 + s1) + b1
                x = x + g1 * self.attention(block, h, caches[block], place)
                h = F.layer_norm(x, (width,), eps=1e-6) * (1 + s2) + b2
                h = F.gelu(self.linear(f"blocks.{block}.ffn.fc1", h), approximate="tanh")
                x = x + g2 * self.linear(f"blocks.{block}.ffn.fc2", h)
            h = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift
            z, t = self.linear("head", h), GUIDANCE * number / (len(sides) - 1)
            found.append(((1 + t) * z[:batch] - t * z[batch:]).argmax(dim=-1))
            h = self.vae["quantize.embedding.weight"][found[-1]].transpose(1, 2)
            h = h.reshape(batch, -1, side, side)
            if side < sides[-1]:
                h = F.interpolate(h, size=(sides[-1], sides[-1]), mode="bicubic")
            phi = f"quantize.quant_resi.qresi_ls.{refinement_of(number, len(sides), 4)}"
            convolved = F.conv2d(h, self.vae[f"{phi}.weight"], self.vae[f"{phi}.bias"], padding=1)
            latents = latents + 0.5 * h + 0.5 * convolved
            if number + 1 < len(sides):
                size = (sides[number + 1],) * 2
                tokens = F.interpolate(latents, size=size, mode="area").flatten(2).transpose(1, 2)
                x = self.linear("word_embed", tokens).repeat(2, 1, 1)
        return torch.cat(found, dim=1)


def rows(layers: int, batches: list[int], repeats: int, *, scan: bool) -> list[dict[str, Any]]:
    """Seconds of both, at each batch."""
    config, codes = VARConfig.preset("d16", num_layers=layers), VQVAEConfig()
    sd = random_tensors(VAR, config, var.ORIGINAL, seed=0)
    vae_sd = random_tensors(VQVAE, codes, vqvae.ORIGINAL, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        for name, tensors in (("var.pth", sd), ("vae.pth", vae_sd)):
            torch.save(tensors, Path(folder) / name)
            pairs.append(converters.from_pretrained(Path(folder) / name, progress=False))
    (forward, params), vae = pairs
    if scan:
        forward, params = effjax.scan_blocks(stack=True)(forward, params)
    loop = NextScale(vae, config.patch_nums, guidance=GUIDANCE, top_k=1)
    program, plain = jax.jit(lambda *given: loop.sample(*given)[1]), Plain(config, sd, vae_sd)
    key, table = jax.random.key(0), []
    for batch in batches:
        labels = np.arange(batch) * 97 % config.num_classes
        given, theirs = jnp.asarray(labels, jnp.int32), torch.from_numpy(labels)
        same = np.mean(
            np.asarray(program(forward, params, given, key)) == plain.sample(theirs).numpy()
        )
        programs: dict[str, Any] = {
            "effjax": lambda given=given: program(forward, params, given, key),
            "torch": lambda theirs=theirs: plain.sample(theirs),
        }
        seconds = turns(programs, repeats)
        table.append(
            {
                "model": f"VAR-d16, {layers} layers",
                "batch": batch,
                "effjax seconds": round(seconds["effjax"], 2),
                "torch seconds": round(seconds["torch"], 2),
                "effjax / torch": round(seconds["effjax"] / seconds["torch"], 3),
                "equal tokens": round(float(same), 3),
            }
        )
        print(table[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="VAR beside plain PyTorch")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scan", action="store_true", help="hold equal blocks once")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = arguments.layers, arguments.batches, arguments.repeats
    table = rows(*given, scan=arguments.scan)
    report.write(
        "scale_speed",
        title="VAR: all scales in one program beside PyTorch",
        command="python -m experiments.scale_speed"
        + (f" --layers {arguments.layers}" if arguments.layers != 16 else "")
        + (" --scan" if arguments.scan else ""),
        loop=table,
    )


if __name__ == "__main__":
    main()
