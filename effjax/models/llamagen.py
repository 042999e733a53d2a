"""LlamaGen: images as sequences of codes, row by row (Sun et al., arXiv 2406.06525).

A Llama whose sequence is a condition and then an image: the codes of a `VQModel`, each predicted
from all before it. A condition is the embedding of a class, or what a text encoder makes of a
prompt:

    x = [label | codes]                    class to image
    x = [mlp(text states) | codes]         text to image; shorter prompts are padded at the left

Positions have two axes, see `RasterRotary`. Queries and keys of the condition become zero there, so
that it is attended to with the score 0, and by its values alone.

`effjax.autoregression.NextToken` is the loop that samples. A forward alone reads whole sequences
(teacher forcing), and takes the inputs of a `Llama` otherwise.

Parity target: the code that the checkpoints were released with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from effjax.context import Layout, Step
from effjax.fields import Checked, Count, FloatName, Natural, Positive, Range
from effjax.layers.attention import Positions
from effjax.layers.embeddings import ClassEmbedding
from effjax.layers.mlp import MLP
from effjax.layers.rotary import RasterRotary
from effjax.models.llama import Llama, LlamaBlock, LlamaConfig

_SIZES = {  # layers, heads, hidden size
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "3B": (24, 32, 3200),
}


class Caption(NamedTuple):
    """What a text encoder makes of prompts: the condition of a text-to-image model.

    Attributes:
        states: one vector for each token.
        mask: True for tokens of the prompt, which stand at the right, False for padding.
        null: True for rows that have no prompt: their states are the model's own.
    """

    states: Float[Array, "B T E"]
    mask: Bool[Array, "B T"]
    null: Bool[Array, " B"]


class Prompt(NamedTuple):
    """Tokens of a text: the condition of a model of texts and images (Janus, Chameleon).

    They end with what begins an image. Shorter ones are padded at the left.

    Attributes:
        tokens: ids.
        mask: False for padding.
    """

    tokens: Int[Array, "B S"]
    mask: Bool[Array, "B S"]


def known_tokens(config: Any, names: Sequence[str], told_by: str) -> dict[str, int]:
    """The tokens of a `Prompt` that a configuration knows by these names.

    Args:
        config: of a model of texts and images.
        names: its fields.
        told_by: which file of a checkpoint says them.

    Raises:
        ValueError: for those that it does not know.
    """
    found = {name: getattr(config, name) for name in names}
    if unknown := [name for name, token in found.items() if token is None]:
        raise ValueError(
            f"the model does not know its {', '.join(unknown)}, which prompts and guidance need: "
            f"{told_by} says them, or set them in its configuration"
        )
    return found


def check_tokens(config: Any, names: Sequence[str]) -> None:
    """Raise ValueError for such tokens that are none of the `text_vocab_size` of prompts."""
    tokens = {name: getattr(config, name) for name in names}
    if beyond := {name: x for name, x in tokens.items() if (x or 0) >= config.text_vocab_size}:
        raise ValueError(
            f"tokens of prompts are 0 ... {config.text_vocab_size - 1}, got "
            + ", ".join(f"{name}={x}" for name, x in beyond.items())
        )


jax.export.register_namedtuple_serialization(Caption, serialized_name="effjax.Caption")
jax.export.register_namedtuple_serialization(Prompt, serialized_name="effjax.Prompt")

Condition = Int[Array, " B"] | Caption | Prompt


@dataclasses.dataclass(frozen=True)
class LlamaGenConfig(Checked):
    """Shape and numerics of a LlamaGen; the defaults are LlamaGen-B of classes at 256 pixels.

    Attributes:
        grid: tokens of a row and of a column of the image.
        num_layers, num_heads, head_dim: depth and hidden size; that is num_heads * head_dim.
        intermediate_size: channels inside an MLP.
        vocab_size: codes of the `VQModel`.
        num_classes: labels are 0 ... num_classes - 1; num_classes itself is the null class. 0 for a
            text-to-image model.
        caption_channels: of a text encoder's states; 0 for a class-conditional model.
        caption_tokens: states of a prompt, padding included.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of the norms.
        dtype: dtype of the computation; norms and softmax are float32.
        param_dtype: dtype of new parameters.

    Raises:
        ValueError: for a model of classes and captions, or of neither.
    """

    grid: Count = 16
    num_layers: Count = 12
    num_heads: Count = 12
    head_dim: Count = 64
    intermediate_size: Count = 2048
    vocab_size: Count = 16384
    num_classes: Natural = 1000
    caption_channels: Natural = 0
    caption_tokens: Count = 120
    rope_theta: Annotated[float, Range(1, above=True)] = 10_000.0
    norm_eps: Positive = 1e-5
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 4:
            raise ValueError(
                f"rotary positions of two axes need a head_dim that 4 divides, got {self.head_dim}"
            )
        if (self.num_classes > 0) == (self.caption_channels > 0):
            raise ValueError(
                f"a condition is a class or a caption: give num_classes or caption_channels, and 0 "
                f"for the other; got {self.num_classes} and {self.caption_channels}"
            )

    @classmethod
    def preset(cls, name: str, **options: Any) -> LlamaGenConfig:
        """Configuration by its name in the paper: "B", "L", "XL", "XXL", "3B", of classes."""
        size = _SIZES.get(name.removeprefix("LlamaGen-"))
        if size is None:
            raise ValueError(f"no preset {name!r}; they are {', '.join(_SIZES)}")
        layers, heads, width = size
        shape: dict[str, Any] = {
            "num_layers": layers,
            "num_heads": heads,
            "head_dim": width // heads,
            "intermediate_size": -(-(8 * width // 3) // 256) * 256,
        }
        return cls(**{**shape, **options})

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def condition_tokens(self) -> int:
        """Tokens of a condition: one for a label."""
        return 1 if self.num_classes else self.caption_tokens

    @property
    def image_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid**2

    @property
    def max_length(self) -> int:
        """Tokens of a whole sequence."""
        return self.condition_tokens + self.image_tokens

    @property
    def decoder(self) -> LlamaConfig:
        """The configuration of the Llama that it is."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.head_dim,
            max_positions=self.max_length,
            rope_theta=self.rope_theta,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def null_condition(self, condition: Array | Caption) -> Array | Caption:
        """The unconditional input of classifier-free guidance: the null class, or no prompt."""
        if isinstance(condition, Caption):
            return condition._replace(null=jnp.ones_like(condition.null))
        return jnp.full_like(condition, self.num_classes)


class CaptionEmbedding(nnx.Module):
    """An MLP of a text encoder's states, and the states that stand for no prompt."""

    def __init__(self, config: LlamaGenConfig, *, rngs: nnx.Rngs):
        channels, dtype = config.caption_channels, jnp.dtype(config.param_dtype)
        init = nnx.initializers.normal(channels**-0.5)
        self.null_states = nnx.Param(init(rngs.params(), (config.caption_tokens, channels), dtype))
        self.proj = MLP(
            channels,
            config.hidden_size,
            outputs=config.hidden_size,
            bias=False,
            roles=("embedding", "embedding"),
            param_dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, caption: Caption, dtype: jax.typing.DTypeLike) -> Float[Array, "B T C"]:
        null = self.null_states.get_value().astype(dtype)
        return self.proj(jnp.where(caption.null[:, None, None], null, caption.states.astype(dtype)))


class ImageLlama(Llama):
    """A Llama whose sequence is a condition and then an image, row by row: the base of LlamaGen.

    Its configuration says the `grid` and the number of `image_tokens`.
    """

    def embedded(self, condition: Condition) -> Float[Array, "B T C"]:
        """The tokens of a condition.

        Raises:
            ValueError: for a condition of another kind.
        """
        raise NotImplementedError

    def layout(self, tokens: Array | None, *others: Any) -> Layout:
        """A raster where a call has all tokens of the image."""
        config, given = self.config, others[3] if tokens is None and len(others) > 3 else tokens
        count = 0 if given is None else given.shape[1]
        whole = count == config.image_tokens
        condition = others[4] if len(others) > 4 else None
        return Layout(
            grid=(1, config.grid, config.grid) if whole else None,
            text=0 if condition is None else condition_tokens(condition),
            text_first=True,
            loose=0 if whole else count,
            changed_by="a call of a part of the image",
        )

    def __call__(
        self,
        tokens: Int[Array, "B S"] | None,
        positions: Int[Array, "B P"] | Int[Array, "B R P"] | None = None,
        logits_to_keep: Int[Array, "B N"] | None = None,
        labels: Int[Array, "B N"] | None = None,
        inputs_embeds: Float[Array, "B S C"] | None = None,
        condition: Condition | None = None,
    ) -> Float[Array, "B N V"] | Float[Array, "B N"]:
        """Run the network.

        Args:
            tokens: codes, 0 ... vocab_size - 1; None for a condition alone.
            positions: as for `Llama`, of condition and codes; see `positions_of`. None for those of
                a sequence from its start.
            logits_to_keep, labels: as for `Llama`; columns of the condition are the first ones.
            inputs_embeds: in place of tokens.
            condition: labels, captions or prompts that the sequence begins with; None if a cache
                has them.

        Returns:
            Logits [B, N, vocab_size], or log-probabilities of `labels`: the logits of code i stand
            in the column before its own, those of code 0 in the condition's last one.

        Raises:
            ValueError: for a condition of another kind, or of another number of tokens.
        """
        if condition is None:
            return super().__call__(tokens, positions, logits_to_keep, labels, inputs_embeds)
        parts = [self.embedded(condition)]
        if tokens is not None:
            parts.append(self.embed(tokens))
        if positions is None:
            columns = sum(part.shape[1] for part in parts)
            positions = self.positions(condition, columns)
        embeds = jnp.concatenate(parts, axis=1)
        return super().__call__(None, positions, logits_to_keep, labels, embeds)

    def positions(self, condition: Condition, columns: int) -> Positions:
        """Positions of sequences from their start."""
        return positions_of(condition, 0, columns, columns)


class LlamaGen(ImageLlama):
    """The network: computes the logits of the next code from a condition and codes."""

    Config: ClassVar[type] = LlamaGenConfig

    def __init__(self, config: LlamaGenConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        classes, width, dtype = config.num_classes, config.hidden_size, config.param_dtype
        self.label = (
            ClassEmbedding(classes, width, param_dtype=dtype, rngs=rngs) if classes else None
        )
        self.caption = None if classes else CaptionEmbedding(config, rngs=rngs)

    @property
    def decoder(self) -> LlamaConfig:
        return self.config.decoder

    def block(self, layer: int, rngs: nnx.Rngs) -> LlamaBlock:
        config = self.config
        rotary = RasterRotary(
            config.head_dim,
            theta=config.rope_theta,
            condition=config.condition_tokens,
            columns=config.grid,
        )
        return LlamaBlock(self.decoder, layer, rotary=rotary, rngs=rngs)

    def embedded(self, condition: Condition) -> Float[Array, "B T C"]:
        config = self.config
        if isinstance(condition, Caption):
            expected = (config.caption_tokens, config.caption_channels)
            if self.caption is None or condition.states.shape[1:] != expected:
                raise ValueError(
                    f"this LlamaGen is conditioned on {_what(config)}; got captions of "
                    f"{list(condition.states.shape[1:])}"
                )
            return self.caption(condition, config.dtype)
        if self.label is None or isinstance(condition, Prompt):
            given = "prompts" if isinstance(condition, Prompt) else "labels"
            raise ValueError(f"this LlamaGen is conditioned on {_what(config)}; got {given}")
        return self.label(condition)[:, None].astype(config.dtype)


def _what(config: LlamaGenConfig) -> str:
    if config.num_classes:
        return f"labels 0 ... {config.num_classes}"
    return f"captions of {[config.caption_tokens, config.caption_channels]}"


def condition_tokens(condition: Condition) -> int:
    """Tokens of a condition, padding included: one for a label."""
    return condition.mask.shape[1] if isinstance(condition, Caption | Prompt) else 1


def positions_of(condition: Condition, start: Step, count: int, total: int) -> Positions:
    """Positions of the tokens start ... start + count - 1 of sequences that begin with a condition.

    Captions and prompts leave out their padding: it has no place (-1) and the tokens after it come
    earlier. Those of captions are rotated to where they would stand with it.

    Args:
        condition: what the sequences begin with.
        start: number of the first token, of those of the condition too.
        count: tokens.
        total: that a sequence may have.
    """
    if not isinstance(condition, Caption | Prompt):
        return jnp.broadcast_to(start + jnp.arange(count), (condition.shape[0], count))
    place = _places_behind(condition.mask, start, count, total)
    if isinstance(condition, Prompt):
        return place
    angles = jnp.broadcast_to(start + jnp.arange(count, dtype=jnp.int32), place.shape)
    return jnp.stack([place, angles], axis=1)


def _places_behind(
    mask: Bool[Array, "B T"], start: Step, count: int, total: int
) -> Int[Array, "B {count}"]:
    """Places of the tokens start ... start + count - 1, without the padding of their beginnings.

    Args:
        mask: of the first tokens, False for padding, whose place is -1.
        start: number of the first token, padding counted in.
        count: tokens.
        total: that a sequence may have.
    """
    counted = jnp.pad(mask, ((0, 0), (0, total - mask.shape[1])), constant_values=True)
    place = jnp.where(counted, jnp.cumsum(counted, axis=1) - 1, -1).astype(jnp.int32)
    return jax.lax.dynamic_slice_in_dim(place, start, count, axis=1)


MODEL = LlamaGen
