"""ECAR: images in a few stages of resolution, each made by a flow (arXiv 2412.14170).

A backbone reads what the stages before have made and gives a map of tokens for the next stage, all
at once. A head, called once for each step of the flow, reads a noisy token, the time and the map:

    x = embed(tokens of U(end of the stage before)) + positions + stage;   the label's, at first
    x = x + attention(LN(x));  x = x + mlp(LN(x))        all stages before, and its own
    z = W LN(x)                                          token maps
    c = SiLU(time(t) + z)                                for every token
    y = y + gate mlp(LN(y) (1 + scale) + shift)          y = embed(noisy tokens), by c
    v = head(LN(y) (1 + scale) + shift)

With `head="dit"` each block of the head attends to the tokens of its stage before its MLP.

`effjax.autoregression.NextStage` is the loop that samples. A forward alone reads whole sequences
(teacher forcing), in which tokens see their own stage and those before: so it is trained
(`effjax.autoregression.stage_loss`).

Built from the paper's abstract: windows and jumps are those of arXiv 2410.05954, the backbone and
the head are like those of MAR (arXiv 2406.11838). No weights in this layout are published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.context import Layout, Model
from effjax.fields import Checked, Count, FloatName, Positive, Share
from effjax.layers.attention import SelfAttention
from effjax.layers.embeddings import ClassEmbedding, TimestepEmbedding, sincos_2d
from effjax.layers.folding import QKV, Fold
from effjax.layers.linear import Linear
from effjax.layers.mlp import MLP
from effjax.layers.norms import AffineLayerNorm, LayerNorm, modulate
from effjax.layers.scales import ScaleAttention, Scales, levels, whole_scales
from effjax.layers.stack import Stack
from effjax.layers.stages import Stages, TokenMaps, by_token, even_windows

_SIZES = {  # layers, heads of the backbone; layers, width of the head (MAR)
    "B": (24, 12, 6, 1024),
    "L": (32, 16, 8, 1280),
    "H": (40, 20, 12, 1536),
}


@dataclasses.dataclass(frozen=True)
class ECARConfig(Checked):
    """Shape and numerics of an ECAR; the defaults are MAR-B's sizes with three stages.

    Attributes:
        sample_size: height and width of the (latent) image.
        patch_size: side of the patch of pixels that is one token, in all stages.
        in_channels: channels of the image.
        latent_scale: what latents of an autoencoder are multiplied by before the model, so that
            their deviation is about 1 (0.2325 of MAR).
        num_stages: how many stages; sides double from one to the next.
        starts, ends: windows of the stages in 0 ... 1; () for even ones.
        num_layers, num_heads, head_dim: of the backbone, whose hidden size is num_heads * head_dim.
        intermediate_size: channels inside an MLP of the backbone.
        head: "mlp" for a head that sees single tokens, "dit" for one that attends within a stage.
        head_layers, head_width, head_intermediate_size: blocks of the head, its channels and those
            inside of its MLPs. Heads of "dit" have `head_dim` channels too.
        num_classes: labels are 0 ... num_classes - 1; num_classes itself is the null class.
        norm_eps: epsilon of the norms.
        dtype: dtype of the blocks; norms, softmax, embeddings and the last layer are float32.
        param_dtype: dtype of new parameters.
    """

    sample_size: Count = 16
    patch_size: Count = 1
    in_channels: Count = 16
    latent_scale: Positive = 1.0
    num_stages: Count = 3
    starts: tuple[Share, ...] = ()
    ends: tuple[Share, ...] = ()
    num_layers: Count = 24
    num_heads: Count = 12
    head_dim: Count = 64
    intermediate_size: Count = 3072
    head: Literal["mlp", "dit"] = "mlp"
    head_layers: Count = 6
    head_width: Count = 1024
    head_intermediate_size: Count = 1024
    num_classes: Count = 1000
    norm_eps: Positive = 1e-6
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.starts or self.ends) not in (0, self.num_stages):
            raise ValueError(
                f"{self.num_stages} stages have as many starts and ends, or () for even ones; got "
                f"{self.starts} and {self.ends}"
            )
        _ = self.stages  # sizes and windows are right
        widths = {"num_heads * head_dim": self.hidden_size, "head_width": self.head_width}
        for name, width in widths.items():
            if width % 4:
                raise ValueError(f"{name} must be a multiple of 4 (2-D positions), got {width}")
        if self.head == "dit" and self.head_width % self.head_dim:
            raise ValueError(
                f"head_width must be a multiple of head_dim ({self.head_dim}) in a head that "
                f"attends, got {self.head_width}"
            )

    @classmethod
    def preset(cls, name: str, **options: Any) -> ECARConfig:
        """Configuration of the size of a MAR: "B", "L" or "H"."""
        if name not in _SIZES:
            raise ValueError(f"no preset {name!r}; they are {', '.join(_SIZES)}")
        layers, heads, head_layers, width = _SIZES[name]
        shape: dict[str, Any] = {
            "num_layers": layers,
            "num_heads": heads,
            "intermediate_size": 4 * 64 * heads,
            "head_layers": head_layers,
            "head_width": width,
            "head_intermediate_size": width,
        }
        return cls(**{**shape, **options})

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def stages(self) -> Stages:
        """Sizes and windows of the stages."""
        starts, ends = even_windows(self.num_stages)
        windows = self.starts or starts, self.ends or ends
        return Stages(self.sample_size, self.patch_size, *windows)

    @property
    def patch_channels(self) -> int:
        """Numbers in a token."""
        return self.patch_size**2 * self.in_channels

    @property
    def tokens(self) -> int:
        """Tokens of an image, those of all stages."""
        return self.stages.scales(0, self.num_stages).all_tokens

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (height, width, channels) of what is sampled."""
        return (self.sample_size, self.sample_size, self.in_channels)

    def null_condition(self, labels: Int[Array, " B"]) -> Int[Array, " B"]:
        """The unconditional input of classifier-free guidance: the null class."""
        return jnp.full_like(labels, self.num_classes)


class BackboneBlock(nnx.Module):
    """Attention to the stages so far, and an MLP, each behind a norm."""

    folds = (
        Fold(QKV, "norm1", "norm"),
        Fold(("mlp.fc1",), "norm2", "norm"),
        Fold(("attn.to_out",), "attn.to_v", "linear"),
    )

    def __init__(self, config: ECARConfig, *, rngs: nnx.Rngs):
        hidden_size = config.hidden_size
        dtype: dict[str, Any] = {"param_dtype": jnp.dtype(config.param_dtype)}
        self.norm1 = AffineLayerNorm(hidden_size, eps=config.norm_eps, **dtype)
        self.attn = ScaleAttention(
            hidden_size,
            heads=config.num_heads,
            head_dim=config.head_dim,
            unit_norm=True,
            rngs=rngs,
            **dtype,
        )
        self.norm2 = AffineLayerNorm(hidden_size, eps=config.norm_eps, **dtype)
        self.mlp = MLP(hidden_size, config.intermediate_size, rngs=rngs, **dtype)

    def __call__(self, x: Float[Array, "B S C"], scales: Scales) -> Float[Array, "B S C"]:
        x = x + self.attn(self.norm1(x), scales)
        return x + self.mlp(self.norm2(x))


def _modulation(config: ECARConfig, parts: int, rngs: nnx.Rngs) -> Linear:
    return Linear(
        config.head_width,
        parts * config.head_width,
        role="modulation",
        param_dtype=config.param_dtype,
        init=nnx.initializers.zeros,
        rngs=rngs,
    )


class HeadBlock(nnx.Module):
    """An MLP behind an adaptive norm and a gate, all by token."""

    folds: tuple[Fold, ...] = (Fold(("mlp.fc1",), "modulation", "adaln", 0, 3),)

    def __init__(self, config: ECARConfig, *, rngs: nnx.Rngs):
        self.modulation = _modulation(config, 3, rngs)
        self.norm = LayerNorm(eps=config.norm_eps)
        self.mlp = MLP(
            config.head_width,
            config.head_intermediate_size,
            activation="silu",
            param_dtype=config.param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B S W"], c: Float[Array, "B S W"]) -> Float[Array, "B S W"]:
        shift, scale, gate = jnp.split(self.modulation(c), 3, axis=-1)
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class AttendingHeadBlock(nnx.Module):
    """Attention within a stage, and an MLP, each behind an adaptive norm and a gate."""

    folds = (
        Fold(QKV, "modulation", "adaln", 0),
        Fold(("mlp.fc1",), "modulation", "adaln", 3),
        Fold(("attn.to_out",), "attn.to_v", "linear"),
    )

    def __init__(self, config: ECARConfig, *, rngs: nnx.Rngs):
        dtype: dict[str, Any] = {"param_dtype": jnp.dtype(config.param_dtype)}
        width, head_dim = config.head_width, config.head_dim
        self.modulation = _modulation(config, 6, rngs)
        self.norm1 = LayerNorm(eps=config.norm_eps)
        self.attn = SelfAttention(
            width, heads=width // head_dim, head_dim=head_dim, rngs=rngs, **dtype
        )
        self.norm2 = LayerNorm(eps=config.norm_eps)
        self.mlp = MLP(width, config.head_intermediate_size, rngs=rngs, **dtype)

    def __call__(self, x: Float[Array, "B S W"], c: Float[Array, "B S W"]) -> Float[Array, "B S W"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(c), 6, axis=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FlowHead(nnx.Module):
    """Velocities of noisy tokens, given the time and their token maps."""

    def __init__(self, config: ECARConfig, *, rngs: nnx.Rngs):
        width = config.head_width
        numerics: dict[str, Any] = {"param_dtype": config.param_dtype, "rngs": rngs}
        self.attends = config.head == "dit"
        self.embed = Linear(config.patch_channels, width, role="embedding", **numerics)
        self.time = TimestepEmbedding(width, dtype=config.dtype, **numerics)
        block = AttendingHeadBlock if self.attends else HeadBlock
        self.blocks = Stack([block(config, rngs=rngs) for _ in range(config.head_layers)])
        self.modulation = _modulation(config, 2, rngs)
        self.norm = LayerNorm(eps=config.norm_eps)
        self.proj = Linear(
            width, config.patch_channels, role="head", init=nnx.initializers.zeros, **numerics
        )

    def __call__(
        self,
        x: Float[Array, "N S P"],
        t: Float[Array, "N K"],
        maps: Float[Array, "N S W"],
        scales: Scales,
    ) -> Float[Array, "N S P"]:
        times = self.time(1000 * t.reshape(-1)).reshape(*t.shape, -1)
        c = nnx.silu(by_token(times, scales) + maps)
        y = self.embed(x).astype(maps.dtype)
        if not self.attends:
            y = self.blocks(y, c)
        else:
            parts, first = [], 0
            for stage in range(scales.start, scales.stop):
                own = slice(first, first := first + scales.sizes[stage])
                positions = _positions(y.shape[-1], scales, stage).astype(y.dtype)
                parts.append(self.blocks(y[:, own] + positions, c[:, own]))
            y = jnp.concatenate(parts, axis=1)
        c = c.astype(jnp.float32)
        shift, scale = jnp.split(self.modulation(c), 2, axis=-1)
        return self.proj(modulate(self.norm(y.astype(jnp.float32)), shift, scale))


def _positions(channels: int, scales: Scales, stage: int) -> Float[Array, "S C"]:
    """Positions of the tokens of a stage; a place in the image has the same one in all of them."""
    side = scales.sides[stage]
    return jnp.asarray(sincos_2d(channels, side, side, base=scales.sides[-1]))


class ECAR(Model):
    """The network: computes velocities of the noisy tokens of stages from the stages before."""

    Config = ECARConfig
    counts: ClassVar[Mapping[str, str]] = {"num_layers": "blocks", "head_layers": "head.blocks"}
    systems = ("ECAR",)

    def __init__(self, config: ECARConfig, *, rngs: nnx.Rngs):
        self.config = config
        hidden_size, dtype = config.hidden_size, jnp.dtype(config.param_dtype)
        init = nnx.initializers.normal(0.02)

        def table(rows: int) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (rows, hidden_size), dtype))

        self.queries = table(config.stages.sides[0] ** 2)
        self.stage_embed = table(config.num_stages)
        self.label = ClassEmbedding(config.num_classes, hidden_size, param_dtype=dtype, rngs=rngs)
        self.embed = Linear(
            config.patch_channels, hidden_size, role="embedding", param_dtype=dtype, rngs=rngs
        )
        self.blocks = Stack([BackboneBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.maps = TokenMaps(
            hidden_size,
            config.head_width,
            eps=config.norm_eps,
            dtype=config.dtype,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.head = FlowHead(config, rngs=rngs)

    def example_inputs(self) -> tuple[Any, ...]:
        config = self.config
        tokens = jax.ShapeDtypeStruct((2, config.tokens, config.patch_channels), jnp.float32)
        times = jax.ShapeDtypeStruct((2, config.num_stages), jnp.float32)
        return tokens, times, jax.ShapeDtypeStruct((2,), jnp.int32), tokens

    def layout(
        self, x: Any, t: Any, labels: Any, before: Any = None, scales: Scales | None = None
    ) -> Layout | None:
        if scales is not None and scales.stop - scales.start == 1:
            side = scales.sides[scales.start]
            return Layout(grid=(1, side, side))
        given = before if x is None else x
        if given is None:
            return None
        return Layout(grid=None, loose=given.shape[1], changed_by="a call of several stages")

    def __call__(
        self,
        x: Float[Array, "N S P"] | None,
        t: Float[Array, "N K"] | None,
        labels: Int[Array, " B"],
        before: Float[Array, "B S P"] | None = None,
        scales: Scales | None = None,
    ) -> Float[Array, "N S O"]:
        """Run the network, or a part of it.

        Args:
            x: noisy tokens of the stages; None for the backbone alone. N is B, or a multiple of it
                for several draws of each image, one draw of all images after the other.
            t: times in 0 ... 1, one for each stage or each token; None without x.
            labels: class of each image, `num_classes` for none.
            before: for each token what the stage before has made at its place. Those of the first
                stage are not read. None for the head alone, on the token maps in a cache.
            scales: which stages the tokens are of; as many as there are, from the first one on, if
                None. Those before come from a cache.

        Returns:
            Velocities float32[N, S, P]; without x the token maps [B, S, head_width] in
            `config.dtype`.

        Raises:
            ValueError: for tokens that are not those of the stages, and for rows that are no
                draws.
        """
        read, batch = self._scales(x, t, before, scales), labels.shape[0]
        if x is not None and x.shape[0] % batch:
            raise ValueError(
                f"noisy tokens are of one draw for each of {batch} images or of several, got "
                f"{x.shape[0]}"
            )
        backbone = None
        if before is not None:
            embedded = self.embedded(before.astype(jnp.float32), labels, read)
            backbone = self.blocks(embedded.astype(self.config.dtype), read)
        maps = self.maps(backbone, read, batch)
        if x is None or t is None:
            return maps
        maps = jnp.tile(maps, (x.shape[0] // batch, 1, 1))
        return self.head(x.astype(jnp.float32), t, maps, read)

    def embedded(
        self, before: Float[Array, "B S P"], labels: Int[Array, " B"], scales: Scales
    ) -> Float[Array, "B S C"]:
        """Tokens as the backbone reads them, float32."""
        stages = range(scales.start, scales.stop)
        by_stage, queries = (
            param.get_value().astype(jnp.float32) for param in (self.stage_embed, self.queries)
        )
        positions = [_positions(by_stage.shape[-1], scales, stage) for stage in stages]
        added = jnp.concatenate(positions) + by_stage[np.asarray(levels(scales))]
        if scales.start > 0:
            return self.embed(before) + added
        first = queries.shape[0]
        x = self.label(labels).astype(jnp.float32)[:, None] + queries
        if before.shape[1] > first:
            x = jnp.concatenate([x, self.embed(before[:, first:])], axis=1)
        return x + added

    def _scales(
        self, x: Array | None, t: Array | None, before: Array | None, scales: Scales | None
    ) -> Scales:
        """Which stages these tokens are of."""
        config, sides = self.config, self.config.stages.sides
        given = [each for each in (x, before) if each is not None]
        if not given or (x is None) != (t is None):
            raise ValueError(
                "an ECAR is called with noisy tokens x and times t, with what was made `before`, "
                "or with all three"
            )
        read = scales or Scales(sides, 0, whole_scales(sides, given[0].shape[1]))
        expected = (read.tokens, config.patch_channels)
        wrong = [each for each in given if each.shape[1:] != expected]
        if read.sides != sides or wrong:
            raise ValueError(
                f"this ECAR has stages of {sides} tokens a side, of {config.patch_channels} "
                f"numbers; got {', '.join(str(list(each.shape)) for each in given)} for the stages "
                f"{read.start} ... {read.stop - 1} of {read.sides}, which are {list(expected)}"
            )
        return read


MODEL = ECAR
