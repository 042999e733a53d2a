"""NAR once more, in plain torch, from the paper and the released names.

Tokens stay in raster order, masks are whole matrices, and every diagonal is computed anew from all
tokens before it. A state dict has the names and shapes of the released files: the block before the
lower head is the last one of `layers`.
"""

import math

import pytest

from tests.models import llamagen_reference as llamagen

torch = pytest.importorskip("torch")
F = torch.nn.functional


def random_model(*, depth=1, width=32, vocabulary=40, seed=0, **options):
    """A NAR of random weights."""
    made = llamagen.random_model(
        depth=depth + 1, width=width, vocabulary=vocabulary, seed=seed, **options
    )
    random = torch.Generator().manual_seed(seed + 1)
    made["medusa_norm.weight"] = 1 + 0.3 * torch.randn(width, generator=random)
    made["medusa_output.weight"] = torch.randn(vocabulary, width, generator=random) / width**0.5
    return made


def mask_of(condition, grid):
    """True where a token (row) sees another (column)."""
    total = condition + grid * grid
    seen = torch.ones(total, total, dtype=torch.bool).tril()
    for query in range(grid * grid):
        for key in range(grid * grid):
            nearer = sum(divmod(key, grid)) <= sum(divmod(query, grid))
            seen[condition + query, condition + key] = nearer
    return seen


def heads_of(sd, condition, tokens, *, heads, grid, mask=None):
    """Logits of right and lower neighbors [B, T + grid^2, V], of whole images."""
    first = llamagen.condition_of(sd, condition)
    x = torch.cat([first, sd["tok_embeddings.weight"][tokens]], dim=1)
    batch, length, width = x.shape
    factors = llamagen.turns(grid, first.shape[1], width // heads)
    seen = mask_of(first.shape[1], grid)[None].repeat(batch, 1, 1)
    if mask is not None:
        seen[:, :, : first.shape[1]] &= mask[:, None].bool()
        seen |= torch.eye(length, dtype=torch.bool)
    layers = llamagen._numbers(sd, "layers.")
    for layer in layers:
        if layer == layers[-1]:
            right = llamagen._rms(sd, "norm", x) @ sd["output.weight"].T
        own = f"layers.{layer}"
        h = llamagen._rms(sd, f"{own}.attention_norm", x) @ sd[f"{own}.attention.wqkv.weight"].T
        q, k, v = (y.reshape(batch, length, heads, -1) for y in h.chunk(3, dim=-1))
        q, k = llamagen._rotated(q, factors), llamagen._rotated(k, factors)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        weights = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf), dim=-1)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
        x = x + out @ sd[f"{own}.attention.wo.weight"].T
        h = llamagen._rms(sd, f"{own}.ffn_norm", x)
        gate, up = (h @ sd[f"{own}.feed_forward.{w}.weight"].T for w in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ sd[f"{own}.feed_forward.w2.weight"].T
    return right, llamagen._rms(sd, "medusa_norm", x) @ sd["medusa_output.weight"].T


def logits_of(sd, condition, tokens, *, grid, **options):
    """Logits [B, grid^2, V] of the tokens of whole images, one after the other."""
    right, below = heads_of(sd, condition, tokens, grid=grid, **options)
    before = right.shape[1] - grid * grid
    made = []
    for token in range(grid * grid):
        row, column = divmod(token, grid)
        parts = [right[:, before + token - 1]] if column else []
        parts += [below[:, before + token - grid]] if row else []
        parts = parts or [right[:, before - 1], below[:, before - 1]]
        made.append(sum(parts) / len(parts))
    return torch.stack(made, dim=1)


def greedy(sd, condition, null, *, scale, interval, grid, **options):
    """The likeliest tokens [B, grid^2], diagonal by diagonal, guided with < interval before."""
    tokens = torch.zeros(len(condition), grid * grid, dtype=torch.long)
    distance = torch.arange(grid * grid) // grid + torch.arange(grid * grid) % grid
    for diagonal in range(2 * grid - 1):
        cond, uncond = (
            logits_of(sd, each, tokens, grid=grid, **options) for each in (condition, null)
        )
        guided = int((distance < diagonal).sum()) < interval
        z = uncond + scale * (cond - uncond) if guided else cond
        tokens[:, distance == diagonal] = z.argmax(dim=-1)[:, distance == diagonal]
    return tokens
