"""ECAR once more in plain numpy, from the equations: windows, jumps, network, sampling, cost."""

import numpy as np


def windows(stages):
    starts = [(k - 1) / stages for k in range(1, stages + 1)]
    ends = [2 * s / (1 + s) for s in starts[1:]] + [1.0]
    return starts, ends


def pool(x):
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def up(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


def block_noise(z):
    """Covariance 1, and -1/3 between the pixels of a block."""
    return 2 / np.sqrt(3) * (z - up(pool(z)))


def jump(end, s, e, z):
    return s / e * up(end) + np.sqrt(3) * (1 - s) / 2 * block_noise(z)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def norm(x, p=None):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return y if p is None else y * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def sincos(width, side, whole):
    """Positions of a coarse map are those of every second, fourth ... token of the whole one."""
    f = 10_000.0 ** -(np.arange(width // 4) / (width / 4))
    a = (np.arange(side) * whole / side)[:, None] * f
    one = np.concatenate([np.sin(a), np.cos(a)], -1)
    return np.concatenate([np.tile(one, (side, 1)), np.repeat(one, side, 0)], -1)


def attend(x, p, head_dim, unit, mask=None):
    batch, tokens, _ = x.shape
    q, k, v = (
        linear(x, p[f"to_{n}"]).reshape(batch, tokens, -1, head_dim).transpose(0, 2, 1, 3)
        for n in "qkv"
    )
    scale = head_dim**-0.5
    if unit:
        q, k = (y / np.linalg.norm(y, axis=-1, keepdims=True) for y in (q, k))
        scale = np.exp(p["q_norm"]["scale"])[:, None, None]
    logits = scale * (q @ k.transpose(0, 1, 3, 2))
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    w = np.exp(logits - logits.max(-1, keepdims=True))
    o = (w / w.sum(-1, keepdims=True)) @ v
    return linear(o.transpose(0, 2, 1, 3).reshape(batch, tokens, -1), p["to_out"])


def patches(x, p):
    batch, side, _, channels = x.shape
    x = x.reshape(batch, side // p, p, side // p, p, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, -1, p * p * channels)


def unpatches(x, p):
    batch, tokens, size = x.shape
    n = int(tokens**0.5)
    x = x.reshape(batch, n, n, p, p, size // p**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, n * p, n * p, -1)


def mlp(x, p, act):
    return linear(act(linear(x, p["fc1"])), p["fc2"])


class Reference:
    """The network of float64 parameters, called on whole prefixes: no cache."""

    def __init__(self, params, config):
        self.p, self.c = params, config
        self.sides = [
            config.sample_size // config.patch_size // 2**k for k in range(config.num_stages)
        ][::-1]

    def maps(self, labels, before):
        """Token maps of all stages for which there is what the stages before have made."""
        p, c, x, level = self.p, self.c, [], []
        width = c.num_heads * c.head_dim
        for k, made in enumerate([None, *before]):
            tokens = (
                p["label"]["embedding_table"][labels][:, None] + p["queries"]
                if made is None
                else linear(patches(up(made), c.patch_size), p["embed"])
            )
            x.append(tokens + sincos(width, self.sides[k], self.sides[-1]) + p["stage_embed"][k])
            level += [k] * tokens.shape[1]
        x, level = np.concatenate(x, 1), np.array(level)
        mask = level[:, None] >= level[None, :]
        for i in range(c.num_layers):
            b = p["blocks"][str(i)]
            x = x + attend(norm(x, b["norm1"]), b["attn"], c.head_dim, True, mask)
            x = x + mlp(norm(x, b["norm2"]), b["mlp"], gelu)
        z = linear(norm(x, p["maps"]["norm"]), p["maps"]["proj"])
        cuts = np.cumsum([n**2 for n in self.sides])[: len(before)]
        return np.split(z, cuts, axis=1)

    def velocity(self, x, t, z, stage):
        """Of the noisy image of one stage at one time, given its token map."""
        p, c = self.p["head"], self.c
        f = np.exp(-np.log(10_000.0) * np.arange(128) / 128) * 1000 * t
        time = mlp(np.concatenate([np.cos(f), np.sin(f)]), p["time"], silu)
        h = silu(time + z)
        y = linear(patches(x, c.patch_size), p["embed"])
        if c.head == "dit":
            y = y + sincos(c.head_width, self.sides[stage], self.sides[-1])
        for i in range(c.head_layers):
            b = p["blocks"][str(i)]
            m = np.split(linear(h, b["modulation"]), 6 if c.head == "dit" else 3, -1)
            if c.head == "dit":
                y = y + m[2] * attend(norm(y) * (1 + m[1]) + m[0], b["attn"], c.head_dim, False)
                y = y + m[5] * mlp(norm(y) * (1 + m[4]) + m[3], b["mlp"], gelu)
            else:
                y = y + m[2] * mlp(norm(y) * (1 + m[1]) + m[0], b["mlp"], silu)
        shift, scale = np.split(linear(h, p["modulation"]), 2, -1)
        return unpatches(linear(norm(y) * (1 + scale) + shift, p["proj"]), c.patch_size)

    def sample(self, labels, noises, steps, scales):
        """Guided samples from white noise of every stage."""
        starts, ends = windows(self.c.num_stages)
        null, made, x = np.full_like(labels, self.c.num_classes), [], None
        for k, z in enumerate(noises):
            x = z if k == 0 else jump(made[-1], starts[k], ends[k - 1], z)
            cond, uncond = (self.maps(each, made)[k] for each in (labels, null))
            for j in range(steps[k]):
                t = starts[k] + j / steps[k] * (ends[k] - starts[k])
                u, v = (self.velocity(x, t, each, k) for each in (uncond, cond))
                x = x + (u + scales[k] * (v - u)) / steps[k]
            made.append(x)
        return x


def flops(c, steps, branches):
    """(backbone, head) of an image, by closed form."""
    sizes = [(c.sample_size // c.patch_size // 2**k) ** 2 for k in range(c.num_stages)][::-1]
    width, w, inner = c.num_heads * c.head_dim, c.head_width, c.head_intermediate_size
    patch = c.patch_size**2 * c.in_channels
    backbone = head = 0
    for k, n in enumerate(sizes):
        layer = 8 * width**2 + 4 * width * c.intermediate_size + 4 * sum(sizes[: k + 1]) * width
        embed = 0 if k == 0 else 2 * patch * width
        backbone += branches * n * (c.num_layers * layer + embed + 2 * width * w)
        block = 6 * w * w + 4 * w * inner
        if c.head == "dit":
            block += 6 * w * w + 8 * w * w + 4 * n * w
        time = 2 * 256 * w + 2 * w * w  # once for a row
        head += (
            branches * steps[k] * (n * (c.head_layers * block + 4 * w * w + 4 * patch * w) + time)
        )
    return backbone, head
