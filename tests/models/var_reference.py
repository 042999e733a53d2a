"""VAR and its VQVAE once more, in plain torch, from the papers' formulas and the released names.

A state dict has the names and shapes of the released files. Functions take it whole and know of no
other code: attention is written out, and every scale is computed anew from all scales before it.
"""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

EVERY_SCALE = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


# --- state dicts --------------------------------------------------------------------------------


def _filled(shapes, seed):
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=random)
        if len(shape) > 1 and "scale_mul" not in name:
            value = value / math.sqrt(math.prod(shape[1:]))
        else:
            value = 0.3 * value
        if "norm" in name and name.endswith("weight"):
            value = 1 + value
        made[name] = value
    return made


def random_vae(*, widths, blocks=1, latents=6, vocabulary=40, refinements=4, seed=0):
    """A VQVAE of random weights; its decoder has one block more in each level."""
    shapes = {}

    def affine(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name, inputs, outputs):
        affine(f"{name}.norm1", inputs)
        affine(f"{name}.conv1", outputs, inputs, 3, 3)
        affine(f"{name}.norm2", outputs)
        affine(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            affine(f"{name}.nin_shortcut", outputs, inputs, 1, 1)

    def attention(name, width):
        affine(f"{name}.norm", width)
        affine(f"{name}.qkv", 3 * width, width, 1, 1)
        affine(f"{name}.proj_out", width, width, 1, 1)

    def middle(coder, width):
        block(f"{coder}.mid.block_1", width, width)
        attention(f"{coder}.mid.attn_1", width)
        block(f"{coder}.mid.block_2", width, width)

    last = len(widths) - 1
    affine("encoder.conv_in", widths[0], 3, 3, 3)
    width = widths[0]
    for level, own in enumerate(widths):
        for number in range(blocks):
            block(f"encoder.down.{level}.block.{number}", width, own)
            width = own
            if level == last:
                attention(f"encoder.down.{level}.attn.{number}", own)
        if level != last:
            affine(f"encoder.down.{level}.downsample.conv", own, own, 3, 3)
    middle("encoder", width)
    affine("encoder.norm_out", width)
    affine("encoder.conv_out", latents, width, 3, 3)
    affine("decoder.conv_in", width, latents, 3, 3)
    middle("decoder", width)
    for level in range(last, -1, -1):
        own = widths[level]
        for number in range(blocks + 1):
            block(f"decoder.up.{level}.block.{number}", width, own)
            width = own
            if level == last:
                attention(f"decoder.up.{level}.attn.{number}", own)
        if level:
            affine(f"decoder.up.{level}.upsample.conv", own, own, 3, 3)
    affine("decoder.norm_out", width)
    affine("decoder.conv_out", 3, width, 3, 3)
    shapes["quantize.embedding.weight"] = (vocabulary, latents)
    for number in range(refinements):
        affine(f"quantize.quant_resi.qresi_ls.{number}", latents, latents, 3, 3)
    affine("quant_conv", latents, latents, 3, 3)
    affine("post_quant_conv", latents, latents, 3, 3)
    made = _filled(shapes, seed)
    made["quantize.ema_vocab_hit_SV"] = torch.zeros(10, vocabulary)
    return made


# --- VQVAE --------------------------------------------------------------------------------------


def _norm(sd, name, x):
    return F.group_norm(x, 32, sd[f"{name}.weight"], sd[f"{name}.bias"], eps=1e-6)


def _conv(sd, name, x, **options):
    return F.conv2d(x, sd[f"{name}.weight"], sd[f"{name}.bias"], **options)


def _block(sd, name, x):
    h = _conv(sd, f"{name}.conv1", F.silu(_norm(sd, f"{name}.norm1", x)), padding=1)
    h = _conv(sd, f"{name}.conv2", F.silu(_norm(sd, f"{name}.norm2", h)), padding=1)
    return h + (_conv(sd, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in sd else x)


def _attend(sd, name, x):
    if f"{name}.qkv.weight" not in sd:
        return x
    batch, width, rows, columns = x.shape
    q, k, v = _conv(sd, f"{name}.qkv", _norm(sd, f"{name}.norm", x)).flatten(2).chunk(3, dim=1)
    weights = torch.softmax(q.transpose(1, 2) @ k * width**-0.5, dim=-1)
    out = (v @ weights.transpose(1, 2)).reshape(batch, width, rows, columns)
    return x + _conv(sd, f"{name}.proj_out", out)


def _middle(sd, coder, x):
    x = _attend(sd, f"{coder}.mid.attn_1", _block(sd, f"{coder}.mid.block_1", x))
    return _block(sd, f"{coder}.mid.block_2", x)


def _numbers(sd, prefix):
    return sorted(
        {int(name[len(prefix) :].split(".")[0]) for name in sd if name.startswith(prefix)}
    )


def encoded(sd, images):
    """Latents of images [B, 3, H, W], before they are codes."""
    x = _conv(sd, "encoder.conv_in", images, padding=1)
    for level in _numbers(sd, "encoder.down."):
        for number in _numbers(sd, f"encoder.down.{level}.block."):
            x = _block(sd, f"encoder.down.{level}.block.{number}", x)
            x = _attend(sd, f"encoder.down.{level}.attn.{number}", x)
        name = f"encoder.down.{level}.downsample.conv"
        if f"{name}.weight" in sd:
            x = _conv(sd, name, F.pad(x, (0, 1, 0, 1)), stride=2)
    x = F.silu(_norm(sd, "encoder.norm_out", _middle(sd, "encoder", x)))
    return _conv(sd, "quant_conv", _conv(sd, "encoder.conv_out", x, padding=1), padding=1)


def decoded(sd, latents):
    """Images of latents [B, C, s, s]."""
    x = _conv(sd, "post_quant_conv", latents, padding=1)
    x = _middle(sd, "decoder", _conv(sd, "decoder.conv_in", x, padding=1))
    for level in reversed(_numbers(sd, "decoder.up.")):
        for number in _numbers(sd, f"decoder.up.{level}.block."):
            x = _block(sd, f"decoder.up.{level}.block.{number}", x)
            x = _attend(sd, f"decoder.up.{level}.attn.{number}", x)
        name = f"decoder.up.{level}.upsample.conv"
        if f"{name}.weight" in sd:
            x = _conv(sd, name, F.interpolate(x, scale_factor=2, mode="nearest"), padding=1)
    return _conv(sd, "decoder.conv_out", F.silu(_norm(sd, "decoder.norm_out", x)), padding=1)


def enlarged(sd, vectors, scale, sides):
    """What the vectors [B, n, C] of a scale add to the latents."""
    batch, _, channels = vectors.shape
    h = vectors.transpose(1, 2).reshape(batch, channels, sides[scale], sides[scale])
    if scale < len(sides) - 1:
        h = F.interpolate(h, size=(sides[-1], sides[-1]), mode="bicubic")
    places = np.linspace(1 / 12, 11 / 12, 4)
    nearest = int(np.argmin(np.abs(places - scale / (len(sides) - 1))))
    phi = f"quantize.quant_resi.qresi_ls.{nearest}"
    return 0.5 * h + 0.5 * _conv(sd, phi, h, padding=1)


def averaged(latents, side):
    """Latents as tokens [B, side^2, C] of one scale."""
    return F.interpolate(latents, size=(side, side), mode="area").flatten(2).transpose(1, 2)


def tokens_of(sd, latents, sides):
    """Tokens [B, L] of latents, and the latents that they stand for."""
    rest, total, found = latents, torch.zeros_like(latents), []
    codes = sd["quantize.embedding.weight"]
    for scale, side in enumerate(sides):
        own = torch.cdist(averaged(rest, side), codes[None]).argmin(dim=-1)
        h = enlarged(sd, codes[own], scale, sides)
        rest, total = rest - h, total + h
        found.append(own)
    return torch.cat(found, dim=1), total


# --- VAR ----------------------------------------------------------------------------------------


def random_var(
    *, depth=2, width=None, heads=None, sides=EVERY_SCALE, classes=5, vocabulary=40, channels=6,
    shared=False, unit=True, seed=1,
):  # fmt: skip
    """A VAR of random weights."""
    width, heads = width or 64 * depth, heads or depth
    tokens, shapes = sum(side**2 for side in sides), {}

    def affine(name, outputs, inputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    shapes["pos_start"] = (1, sides[0] ** 2, width)
    shapes["pos_1LC"] = (1, tokens, width)
    shapes["lvl_embed.weight"] = (len(sides), width)
    shapes["class_emb.weight"] = (classes + 1, width)
    affine("word_embed", width, channels)
    if shared:
        affine("shared_ada_lin.1", 6 * width, width)
    for block in range(depth):
        own = f"blocks.{block}"
        shapes[f"{own}.attn.mat_qkv.weight"] = (3 * width, width)
        shapes[f"{own}.attn.q_bias"] = shapes[f"{own}.attn.v_bias"] = (width,)
        if unit:
            shapes[f"{own}.attn.scale_mul_1H11"] = (1, heads, 1, 1)
        affine(f"{own}.attn.proj", width, width)
        affine(f"{own}.ffn.fc1", 4 * width, width)
        affine(f"{own}.ffn.fc2", width, 4 * width)
        if shared:
            shapes[f"{own}.ada_gss"] = (1, 1, 6, width)
        else:
            affine(f"{own}.ada_lin.1", 6 * width, width)
    affine("head_nm.ada_lin.1", 2 * width, width)
    affine("head", vocabulary, width)
    made = _filled(shapes, seed)
    level = torch.repeat_interleave(torch.arange(len(sides)), torch.tensor([s**2 for s in sides]))
    made["lvl_1L"] = level[None]
    hidden = level[:, None] < level[None]
    made["attn_bias_for_masking"] = torch.where(hidden, -torch.inf, 0.0)[None, None]
    for block in range(depth):
        made[f"blocks.{block}.attn.zero_k_bias"] = torch.zeros(width)
        if unit:
            made[f"blocks.{block}.attn.scale_mul_1H11"] += math.log(4)
    return made


def _linear(sd, name, x):
    return F.linear(x, sd[f"{name}.weight"], sd[f"{name}.bias"])


def _plain_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _of_scales(sd, name, x, hidden, heads):
    batch, length, width = x.shape
    bias = [sd[f"{name}.q_bias"], torch.zeros(width), sd[f"{name}.v_bias"]]
    qkv = F.linear(x, sd[f"{name}.mat_qkv.weight"], torch.cat(bias))
    q, k, v = qkv.reshape(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    if f"{name}.scale_mul_1H11" in sd:
        factor = sd[f"{name}.scale_mul_1H11"].clamp_max(math.log(100)).exp()
        q, k = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1)
    else:
        q = q * 0.25 / math.sqrt(q.shape[-1])
    logits = (q @ k.transpose(-1, -2)).masked_fill(hidden, -torch.inf)
    out = torch.softmax(logits, dim=-1) @ v
    return _linear(sd, f"{name}.proj", out.transpose(1, 2).reshape(batch, length, width))


def logits_of(sd, inputs, labels, heads):
    """Logits [B, n, V] of the first n tokens, from the inputs [B, n - n_0, Z] of all but the first.

    A token sees its own scale and those before it.
    """
    c = sd["class_emb.weight"][labels]
    start = c[:, None] + sd["pos_start"]
    x = torch.cat([start, _linear(sd, "word_embed", inputs)], dim=1)
    length = x.shape[1]
    level = sd["lvl_1L"][0, :length]
    x = x + sd["lvl_embed.weight"][level] + sd["pos_1LC"][:, :length]
    hidden = level[:, None] < level[None]
    batch, width = c.shape
    for block in _numbers(sd, "blocks."):
        name = f"blocks.{block}"
        if f"{name}.ada_gss" in sd:
            six = _linear(sd, "shared_ada_lin.1", F.silu(c)).reshape(batch, 1, 6, width)
            six = six + sd[f"{name}.ada_gss"]
        else:
            six = _linear(sd, f"{name}.ada_lin.1", F.silu(c)).reshape(batch, 1, 6, width)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(2)
        h = _plain_norm(x) * (1 + scale1) + shift1
        x = x + gamma1 * _of_scales(sd, f"{name}.attn", h, hidden, heads)
        h = _plain_norm(x) * (1 + scale2) + shift2
        h = F.gelu(_linear(sd, f"{name}.ffn.fc1", h), approximate="tanh")
        x = x + gamma2 * _linear(sd, f"{name}.ffn.fc2", h)
    scale, shift = _linear(sd, "head_nm.ada_lin.1", F.silu(c)).reshape(batch, 1, 2, -1).unbind(2)
    return _linear(sd, "head", _plain_norm(x) * (1 + scale) + shift)


def inputs_of(vae, tokens, sides):
    """What the tokens of all scales but the first one are made of, [B, L - n_0, Z]."""
    codes, total, found, begin = vae["quantize.embedding.weight"], 0, [], 0
    for scale, side in enumerate(sides[:-1]):
        own = codes[tokens[:, begin : begin + side**2]]
        begin += side**2
        total = total + enlarged(vae, own, scale, sides)
        found.append(averaged(total, sides[scale + 1]))
    return torch.cat(found, dim=1)


def sampled(sd, vae, labels, *, guidance, heads, sides, classes):
    """The likeliest tokens [B, L] scale by scale, their guided logits, and the latents."""
    codes = vae["quantize.embedding.weight"]
    batch, found, logits = len(labels), [], []
    both = torch.cat([labels, torch.full_like(labels, classes)])
    total = torch.zeros(batch, codes.shape[1], sides[-1], sides[-1])
    inputs = torch.zeros(batch, 0, codes.shape[1])
    for scale, side in enumerate(sides):
        z = logits_of(sd, inputs.repeat(2, 1, 1), both, heads)[:, -(side**2) :]
        t = guidance * scale / (len(sides) - 1)
        logits.append((1 + t) * z[:batch] - t * z[batch:])
        found.append(logits[-1].argmax(dim=-1))
        total = total + enlarged(vae, codes[found[-1]], scale, sides)
        if scale < len(sides) - 1:
            inputs = torch.cat([inputs, averaged(total, sides[scale + 1])], dim=1)
    return torch.cat(found, dim=1), torch.cat(logits, dim=1), total
