"""LlamaGen and its VQ model once more, in plain torch, from the papers and the released names.

A state dict has the names and shapes of the released files. Functions take it whole and know of no
other code: there is no cache, and every token is computed anew from all before it. Padding of
prompts stays in the sequence and is masked out.
"""

import math

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional


def _filled(shapes, seed):
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=random)
        value = value / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.3 * value
        made[name] = 1 + value if "norm" in name and name.endswith("weight") else value
    return made


# --- the transformer ------------------------------------------------------------------------------


def random_model(
    *, depth=2, width=32, inner=24, vocabulary=40, classes=5, channels=0, text=6, seed=0
):
    """A LlamaGen of random weights; with `channels` of captions in the place of classes."""
    shapes = {"tok_embeddings.weight": (vocabulary, width)}
    if channels:
        shapes["cls_embedding.cap_proj.fc1.weight"] = (width, channels)
        shapes["cls_embedding.cap_proj.fc2.weight"] = (width, width)
        shapes["cls_embedding.uncond_embedding"] = (text, channels)
    else:
        shapes["cls_embedding.embedding_table.weight"] = (classes + 1, width)
    for layer in range(depth):
        own = f"layers.{layer}"
        shapes[f"{own}.attention.wqkv.weight"] = (3 * width, width)
        shapes[f"{own}.attention.wo.weight"] = (width, width)
        shapes[f"{own}.feed_forward.w1.weight"] = (inner, width)
        shapes[f"{own}.feed_forward.w3.weight"] = (inner, width)
        shapes[f"{own}.feed_forward.w2.weight"] = (width, inner)
        shapes[f"{own}.attention_norm.weight"] = shapes[f"{own}.ffn_norm.weight"] = (width,)
    shapes["norm.weight"] = (width,)
    shapes["output.weight"] = (vocabulary, width)
    made = _filled(shapes, seed)
    for name in ("tok_embeddings.weight", *(n for n in made if "embedding" in n)):
        made[name] = made[name] * math.sqrt(made[name].shape[1])  # embeddings of size 1
    return made


def turns(grid, condition, width):
    """Complex factors [condition + grid^2, width / 2]: zeros of the condition, then e^(i angle)."""
    quarter = width // 4
    rates = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    found = torch.zeros(condition + grid * grid, width // 2, dtype=torch.complex128)
    for place in range(grid * grid):
        row, column = divmod(place, grid)
        angles = torch.cat([row * rates, column * rates])
        found[condition + place] = torch.polar(torch.ones_like(angles), angles)
    return found.to(torch.complex64)


def _rotated(x, factors):
    """Heads [B, S, H, D] whose neighboring channels are real and imaginary parts."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * factors[None, :, None]).reshape(x.shape)


def _rms(sd, name, x):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * sd[f"{name}.weight"]


def _numbers(sd, prefix):
    found = {int(name[len(prefix) :].split(".")[0]) for name in sd if name.startswith(prefix)}
    return sorted(found)


def condition_of(sd, condition):
    """Tokens [B, T, C] of labels [B], or of states [B, T, E]; None stands for no prompt."""
    if "cls_embedding.embedding_table.weight" in sd:
        return sd["cls_embedding.embedding_table.weight"][condition][:, None]
    inside = F.gelu(condition @ sd["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
    return inside @ sd["cls_embedding.cap_proj.fc2.weight"].T


def logits_of(sd, condition, tokens, *, heads, grid, mask=None, seen=None):
    """Logits [B, T + n, V] of a condition and n tokens.

    A token sees all before it but masked ones (mask [B, T], 0 for padding); padding sees itself.
    With `seen` [T + n, T + n] it sees what that says.
    """
    first = condition_of(sd, condition)
    x = torch.cat([first, sd["tok_embeddings.weight"][tokens]], dim=1)
    batch, length, width = x.shape
    factors = turns(grid, first.shape[1], width // heads)[:length]
    seen = torch.ones(length, length, dtype=torch.bool).tril() if seen is None else seen
    seen = seen[None].repeat(batch, 1, 1)
    if mask is not None:
        seen[:, :, : first.shape[1]] &= mask[:, None].bool()
        seen |= torch.eye(length, dtype=torch.bool)
    for layer in _numbers(sd, "layers."):
        own = f"layers.{layer}"
        h = _rms(sd, f"{own}.attention_norm", x) @ sd[f"{own}.attention.wqkv.weight"].T
        q, k, v = (y.reshape(batch, length, heads, -1) for y in h.chunk(3, dim=-1))
        q, k, v = (y.transpose(1, 2) for y in (_rotated(q, factors), _rotated(k, factors), v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf), dim=-1)
        out = (weights @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + out @ sd[f"{own}.attention.wo.weight"].T
        h = _rms(sd, f"{own}.ffn_norm", x)
        gate, up = (h @ sd[f"{own}.feed_forward.{w}.weight"].T for w in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ sd[f"{own}.feed_forward.w2.weight"].T
    return _rms(sd, "norm", x) @ sd["output.weight"].T


def greedy(sd, condition, null, *, scale, interval, heads, grid, mask=None):
    """The likeliest tokens [B, grid^2], one after the other, the first `interval` ones guided."""
    tokens = torch.zeros(len(condition), 0, dtype=torch.long)
    for number in range(grid * grid):
        cond, uncond = (
            logits_of(sd, each, tokens, heads=heads, grid=grid, mask=mask)[:, -1]
            for each in (condition, null)
        )
        z = uncond + scale * (cond - uncond) if number < interval else cond
        tokens = torch.cat([tokens, z.argmax(dim=-1, keepdim=True)], dim=1)
    return tokens


# --- the VQ model ---------------------------------------------------------------------------------


def random_codes(*, widths=(32, 64), blocks=1, between=12, latents=8, vocabulary=40, seed=0):
    """A VQ model of random weights."""
    shapes, last = {}, len(widths) - 1

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
        for part in ("q", "k", "v", "proj_out"):
            affine(f"{name}.{part}", width, width, 1, 1)

    def coder(name, order, count, change, inputs, outputs):
        width = widths[order[0]]
        affine(f"{name}.conv_in", width, inputs, 3, 3)
        for place, level in enumerate(order):
            for number in range(count):
                block(f"{name}.conv_blocks.{place}.res.{number}", width, widths[level])
                width = widths[level]
                if level == last:
                    attention(f"{name}.conv_blocks.{place}.attn.{number}", width)
            if place < last:
                affine(f"{name}.conv_blocks.{place}.{change}.conv", width, width, 3, 3)
        for place in (0, 2):
            block(f"{name}.mid.{place}", widths[last], widths[last])
        attention(f"{name}.mid.1", widths[last])
        affine(f"{name}.norm_out", width)
        affine(f"{name}.conv_out", outputs, width, 3, 3)

    levels = list(range(len(widths)))
    coder("encoder", levels, blocks, "downsample", 3, between)
    coder("decoder", levels[::-1], blocks + 1, "upsample", between, 3)
    affine("quant_conv", latents, between, 1, 1)
    affine("post_quant_conv", between, latents, 1, 1)
    shapes["quantize.embedding.weight"] = (vocabulary, latents)
    return {**_filled(shapes, seed), "quantize.codebook_used": torch.zeros(65536)}


def _norm(sd, name, x):
    return F.group_norm(x, 32, sd[f"{name}.weight"], sd[f"{name}.bias"], eps=1e-6)


def _conv(sd, name, x, **options):
    return F.conv2d(x, sd[f"{name}.weight"], sd[f"{name}.bias"], **options)


def _block(sd, name, x):
    h = _conv(sd, f"{name}.conv1", F.silu(_norm(sd, f"{name}.norm1", x)), padding=1)
    h = _conv(sd, f"{name}.conv2", F.silu(_norm(sd, f"{name}.norm2", h)), padding=1)
    return h + (_conv(sd, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in sd else x)


def _attend(sd, name, x):
    h = _norm(sd, f"{name}.norm", x)
    q, k, v = (_conv(sd, f"{name}.{part}", h).flatten(2) for part in "qkv")
    weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=-1)
    return x + _conv(sd, f"{name}.proj_out", (v @ weights.transpose(1, 2)).reshape(x.shape))


def _middle(sd, coder, x):
    x = _attend(sd, f"{coder}.mid.1", _block(sd, f"{coder}.mid.0", x))
    return _block(sd, f"{coder}.mid.2", x)


def _levels(sd, coder, x, change):
    for place in _numbers(sd, f"{coder}.conv_blocks."):
        own = f"{coder}.conv_blocks.{place}"
        for number in _numbers(sd, f"{own}.res."):
            x = _block(sd, f"{own}.res.{number}", x)
            if f"{own}.attn.{number}.q.weight" in sd:
                x = _attend(sd, f"{own}.attn.{number}", x)
        if f"{own}.downsample.conv.weight" in sd or f"{own}.upsample.conv.weight" in sd:
            x = change(own, x)
    return x


def tokens_of(sd, images):
    """Tokens [B, N] of images [B, 3, H, W]: the codes of the nearest direction."""

    def halved(own, x):
        return _conv(sd, f"{own}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)

    x = _levels(sd, "encoder", _conv(sd, "encoder.conv_in", images, padding=1), halved)
    x = F.silu(_norm(sd, "encoder.norm_out", _middle(sd, "encoder", x)))
    z = _conv(sd, "quant_conv", _conv(sd, "encoder.conv_out", x, padding=1))
    z = F.normalize(z.flatten(2).transpose(1, 2), dim=-1)
    codes = F.normalize(sd["quantize.embedding.weight"], dim=-1)
    return torch.cdist(z, codes[None]).argmin(dim=-1)


def images_of(sd, tokens, grid):
    """Images [B, 3, H, W] of tokens [B, N]."""

    def doubled(own, x):
        wide = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return _conv(sd, f"{own}.upsample.conv", wide, padding=1)

    codes = F.normalize(sd["quantize.embedding.weight"], dim=-1)
    z = codes[tokens].transpose(1, 2).reshape(len(tokens), -1, grid, grid)
    x = _conv(sd, "decoder.conv_in", _conv(sd, "post_quant_conv", z), padding=1)
    x = _levels(sd, "decoder", _middle(sd, "decoder", x), doubled)
    return _conv(sd, "decoder.conv_out", F.silu(_norm(sd, "decoder.norm_out", x)), padding=1)
