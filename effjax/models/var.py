"""VAR: next-scale prediction, an image in ten calls (Tian et al., arXiv 2404.02905).

A sequence is a start and then maps of codes, coarse to fine. All tokens of a scale are predicted at
once from all scales before it, through what these make so far: the latents of a VQVAE
(`effjax.models.vqvae`), averaged to the size of the scale.

    x     = word_embed(area(f_hat, p_i)) + positions + level;  the start is the label's embedding
    x     = x + gate1 attention(LN(x) (1 + scale1) + shift1)   all scales before, and its own
    x     = x + gate2 mlp(LN(x) (1 + scale2) + shift2)         shifts, scales, gates by the label
    logits = head(LN(x) (1 + scale) + shift)

`effjax.autoregression.NextScale` is the loop that samples. A forward alone reads whole sequences
(teacher forcing), in which tokens see their own scale and those before.

Parity target: the code that the checkpoints were released with.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.context import Layout, Model
from effjax.fields import Checked, Count, FloatName, Positive
from effjax.layers.embeddings import ClassEmbedding
from effjax.layers.folding import QKV, Fold
from effjax.layers.linear import Linear
from effjax.layers.mlp import MLP
from effjax.layers.norms import LayerNorm, modulate
from effjax.layers.scales import ScaleAttention, Scales, levels, token_starts, whole_scales
from effjax.layers.stack import Stack

PATCH_NUMS = {  # by side of the image
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}


@dataclasses.dataclass(frozen=True)
class VARConfig(Checked):
    """Shape and numerics of a VAR; the defaults are VAR-d16.

    Attributes:
        patch_nums: sides of the maps of codes, coarse to fine.
        num_layers, num_heads, head_dim: depth and hidden size; that is num_heads * head_dim.
        intermediate_size: channels inside an MLP.
        num_classes: labels are 0 ... num_classes - 1; num_classes itself is the null class.
        vocab_size, code_channels: of the codes of the VQVAE.
        shared_modulation: one projection of the label for all blocks, each of which adds a table.
        qk_norm: queries and keys have unit length.
        norm_eps: epsilon of the norms.
        dtype: dtype of the blocks; embeddings, norms, softmax and the head are float32.
        param_dtype: dtype of new parameters.
    """

    patch_nums: tuple[Count, ...] = PATCH_NUMS[256]
    num_layers: Count = 16
    num_heads: Count = 16
    head_dim: Count = 64
    intermediate_size: Count = 4096
    num_classes: Count = 1000
    vocab_size: Count = 4096
    code_channels: Count = 32
    shared_modulation: bool = False
    qk_norm: bool = True
    norm_eps: Positive = 1e-6
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        token_starts(self.patch_nums)

    @classmethod
    def preset(cls, name: str, **options: Any) -> VARConfig:
        """Configuration by its name in the paper: "d16", "d20", "d24", "d30", "d36-s".

        All sizes follow from the depth d: d heads of 64 channels. "-s" is the model of 512 pixels,
        with a shared modulation.
        """
        found = re.fullmatch(r"d(\d+)(-s)?", name.removeprefix("VAR-"))
        if found is None or not int(found[1]):
            raise ValueError(f"no preset {name!r}; they are d16, d20, d24, d30 and d36-s")
        depth, shared = int(found[1]), found[2] is not None
        shape: dict[str, Any] = {
            "patch_nums": PATCH_NUMS[512 if shared else 256],
            "num_layers": depth,
            "num_heads": depth,
            "intermediate_size": 4 * 64 * depth,
            "shared_modulation": shared,
        }
        return cls(**{**shape, **options})

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def tokens(self) -> int:
        """Tokens of an image, those of all scales."""
        return token_starts(self.patch_nums)[-1]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (height, width, channels) of the latents that codes add up to."""
        return (self.patch_nums[-1], self.patch_nums[-1], self.code_channels)

    def scales(self, start: int = 0, stop: int | None = None) -> Scales:
        """The scales start ... stop - 1; all of them."""
        return Scales(self.patch_nums, start, len(self.patch_nums) if stop is None else stop)

    def null_condition(self, labels: Int[Array, " B"]) -> Int[Array, " B"]:
        """The unconditional input of classifier-free guidance: the null class."""
        return jnp.full_like(labels, self.num_classes)


Initializer = Callable[..., jax.Array]


def _normal(config: VARConfig, factor: float = 1.0) -> Initializer:
    return nnx.initializers.truncated_normal(factor * (3 * config.hidden_size) ** -0.5)


def _by_part(config: VARConfig, factors: tuple[float, ...]) -> Initializer:
    """An initializer of a projection whose equal parts have factors of their own."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        values = _normal(config)(key, shape, dtype)
        return values * jnp.asarray(np.repeat(factors, config.hidden_size), dtype)

    return init


_SHIFT, _SCALE, _GATE = 0.5, 0.5, 1e-5  # factors of new weights
_SIX = 2 * (_SHIFT, _SCALE, _GATE)


class SharedModulationBlock(nnx.Module):
    """Attention and MLP, each behind an adaptive norm and a gate.

    Shifts, scales and gates are a table added to what all blocks share.
    """

    # What all blocks share takes no factors of one of them.
    folds: tuple[Fold, ...] = (Fold(("attn.to_out",), "attn.to_v", "linear"),)

    def __init__(self, config: VARConfig, *, rngs: nnx.Rngs):
        hidden_size, dtype = config.hidden_size, jnp.dtype(config.param_dtype)
        self._add_modulation(config, rngs)
        self.norm1 = LayerNorm(eps=config.norm_eps)
        self.attn = ScaleAttention(
            hidden_size,
            heads=config.num_heads,
            head_dim=config.head_dim,
            unit_norm=config.qk_norm,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = LayerNorm(eps=config.norm_eps)
        self.mlp = MLP(hidden_size, config.intermediate_size, param_dtype=dtype, rngs=rngs)

    def _add_modulation(self, config: VARConfig, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(config.hidden_size**-0.5)
        table = init(rngs.params(), (6, config.hidden_size), jnp.dtype(config.param_dtype))
        factors = jnp.asarray(_SIX, table.dtype)[:, None]
        self.scale_shift_table = nnx.Param(table * factors)

    def modulations(self, c: Float[Array, "B 6 C"]) -> Float[Array, "B 6 C"]:
        """shift1, scale1, gate1, shift2, scale2, gate2."""
        return self.scale_shift_table.get_value().astype(c.dtype) + c

    def __call__(
        self, x: Float[Array, "B S C"], c: Float[Array, "B ... C"], scales: Scales
    ) -> Float[Array, "B S C"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(self.modulations(c), 1, 0)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), scales)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class VARBlock(SharedModulationBlock):
    """The same with a projection of its own."""

    folds = (
        Fold(QKV, "modulation", "adaln", 0),
        Fold(("mlp.fc1",), "modulation", "adaln", 3),
        Fold(("attn.to_out",), "attn.to_v", "linear"),
    )

    def _add_modulation(self, config: VARConfig, rngs: nnx.Rngs) -> None:
        self.modulation = _modulation(config, _SIX, rngs)

    def modulations(self, c: Float[Array, "B C"]) -> Float[Array, "B 6 C"]:
        return self.modulation(nnx.silu(c)).reshape(c.shape[0], 6, -1)


def _modulation(config: VARConfig, factors: tuple[float, ...], rngs: nnx.Rngs) -> Linear:
    return Linear(
        config.hidden_size,
        len(factors) * config.hidden_size,
        role="modulation",
        param_dtype=config.param_dtype,
        init=_by_part(config, factors),
        rngs=rngs,
    )


class Head(nnx.Module):
    """Adaptive norm and projection to logits, in float32."""

    def __init__(self, config: VARConfig, *, rngs: nnx.Rngs):
        self.modulation = _modulation(config, (_SHIFT, _SCALE), rngs)
        self.norm = LayerNorm(eps=config.norm_eps)
        self.proj = Linear(
            config.hidden_size,
            config.vocab_size,
            role="head",
            param_dtype=config.param_dtype,
            init=_normal(config, 0.02),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B S C"], c: Float[Array, "B C"]) -> Float[Array, "B S V"]:
        shift, scale = jnp.split(self.modulation(nnx.silu(c)).astype(jnp.float32), 2, axis=-1)
        return self.proj(modulate(self.norm(x.astype(jnp.float32)), shift, scale))


class VARParts(Model):
    """What a VAR is made of, for sequences of any length.

    Args:
        start: tokens that are made of the label.
        positions: tokens of a sequence.
        levels: its levels.
        blocks: classes of blocks with a modulation of their own, and with a shared one.
    """

    Config = VARConfig

    def __init__(
        self,
        config: VARConfig,
        *,
        start: int,
        positions: int,
        levels: int,
        blocks: tuple[type[SharedModulationBlock], type[SharedModulationBlock]],
        rngs: nnx.Rngs,
    ):
        self.config = config
        hidden_size, dtype = config.hidden_size, jnp.dtype(config.param_dtype)
        init = _normal(config)

        def table(rows: int) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (rows, hidden_size), dtype))

        self.start = table(start)
        self.positions = table(positions)
        self.level_embed = table(levels)
        self.label = ClassEmbedding(config.num_classes, hidden_size, param_dtype=dtype, rngs=rngs)
        self.word_embed = Linear(
            config.code_channels,
            hidden_size,
            role="embedding",
            param_dtype=dtype,
            init=init,
            rngs=rngs,
        )
        shared = config.shared_modulation
        self.modulation = _modulation(config, _SIX, rngs) if shared else None
        block = blocks[shared]
        self.blocks = Stack([block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.head = Head(config, rngs=rngs)
        for layer in self.blocks:  # what is added to the residual stream
            assert isinstance(layer, SharedModulationBlock)
            for linear in (layer.attn.to_out, layer.mlp.fc2):
                assert linear is not None
                value = linear.kernel.get_value()
                linear.kernel.set_value(value * (2 * config.num_layers) ** -0.5)

    def tables(self) -> tuple[Float[Array, "_ C"], Float[Array, "_ C"], Float[Array, "_ C"]]:
        """Positions, levels and start, float32."""
        params = self.positions, self.level_embed, self.start
        positions, levels, start = (each.get_value().astype(jnp.float32) for each in params)
        return positions, levels, start

    def for_blocks(self, c: Float[Array, "B C"]) -> Float[Array, "B ... C"]:
        """What blocks make their shifts, scales and gates of."""
        if self.modulation is None:
            return c
        return self.modulation(nnx.silu(c)).reshape(c.shape[0], 6, -1)


class VAR(VARParts):
    """The network: computes the logits of the codes of scales from the latents before them."""

    def __init__(self, config: VARConfig, *, rngs: nnx.Rngs):
        super().__init__(
            config,
            start=config.patch_nums[0] ** 2,
            positions=config.tokens,
            levels=len(config.patch_nums),
            blocks=(VARBlock, SharedModulationBlock),
            rngs=rngs,
        )

    def example_inputs(self) -> tuple[Any, ...]:
        config = self.config
        codes = jax.ShapeDtypeStruct((2, config.tokens, config.code_channels), jnp.float32)
        return codes, jax.ShapeDtypeStruct((2,), jnp.int32), config.scales()

    def layout(self, codes: Array, labels: Array, scales: Scales | None = None) -> Layout:
        if scales is not None and scales.stop - scales.start == 1:
            side = scales.sides[scales.start]
            return Layout(grid=(1, side, side))
        several = "a call of several scales"
        return Layout(grid=None, loose=codes.shape[1], changed_by=several)

    def __call__(
        self,
        codes: Float[Array, "B S Z"],
        labels: Int[Array, " B"],
        scales: Scales | None = None,
    ) -> Float[Array, "B N V"]:
        """Run the network.

        Args:
            codes: of every token what the scales before its own make, averaged to its place. Those
                of the first scale are not read: the start is made of the label.
            labels: class of each image, `num_classes` for none.
            scales: which ones the tokens are of; as many as there are, from the first one on, if
                None. Those before come from a cache.

        Returns:
            Logits float32[B, S, vocab_size]; of the wanted tokens alone, if `scales` says which.

        Raises:
            ValueError: for codes that are not those of the scales.
        """
        config = self.config
        read: Scales = scales or config.scales(0, whole_scales(config.patch_nums, codes.shape[1]))
        expected = (read.tokens, config.code_channels)
        if read.sides != config.patch_nums or codes.shape[1:] != expected:
            raise ValueError(
                f"this VAR has the scales {config.patch_nums} of {config.code_channels} channels; "
                f"got {list(codes.shape)} for the scales {read.start} ... {read.stop - 1} of "
                f"{read.sides}, which are {list(expected)}"
            )
        embedded = self.label(labels)
        x = self.embedded(codes.astype(jnp.float32), embedded, read).astype(config.dtype)
        c = embedded.astype(config.dtype)
        return self.head(self.blocks(x, self.for_blocks(c), read)[:, read.unwanted :], c)

    def embedded(
        self, codes: Float[Array, "B S Z"], label: Float[Array, "B C"], scales: Scales
    ) -> Float[Array, "B S C"]:
        """Tokens with their positions, float32."""
        given = scales.before, scales.before + scales.tokens
        positions, by_level, start = self.tables()
        positions = positions[slice(*given)] + by_level[np.asarray(levels(scales))]
        if scales.start > 0:
            return self.word_embed(codes) + positions
        x, first = label[:, None] + start, start.shape[0]
        if codes.shape[1] > first:
            x = jnp.concatenate([x, self.word_embed(codes[:, first:])], axis=1)
        return x + positions


MODEL = VAR
