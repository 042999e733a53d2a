"""The student of Distilled Decoding for LlamaGen (arXiv 2412.17153): all tokens in one call.

A sequence is the label's token, and then a slot for every token. A slot holds the code of its
token, if that is known, and else the noise that the token follows from (see
`effjax.autoregression.flow_map`). The network predicts the token of every slot from the slot itself
and those before it, where LlamaGen predicts the token after.

    x      = [label | slot_embed(slots)] + mark(data or noise)
    x      = block(x)                               LlamaGen's, causal
    logits = head(RMSNorm(x))                       of the codes, as LlamaGen's
    codes  = proj(LN(x) (1 + scale) + shift)        vectors, modulated by the label

FLOPs of an image of N tokens: 2 (N + 1) d (4 C^2 + 3 C F) for the linear layers of d blocks with
MLPs of F channels, 4 P C d for attention to P = (N + 1) (N + 2) / 2 pairs, 2 N C V for the head.
There is no guidance, since that is in what the student learns.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.context import Layout
from effjax.fields import Count, Natural, Positive
from effjax.layers.linear import Linear
from effjax.models.distilled_var import NEW, VectorHead, check_starts, chosen, holding
from effjax.models.llamagen import LlamaGen, LlamaGenConfig


@dataclasses.dataclass(frozen=True)
class DistilledLlamaGenConfig(LlamaGenConfig):
    """Shape and numerics of a student, and how it is sampled.

    Attributes:
        code_channels: of a code.
        starts: the first token that each call predicts, 0 for the first call. It is trained for
            these.
        split: the first token that stays a vector; those before become codes. The number of tokens
            for none.
        noise_std: standard deviation of the noise in slots, that of the pairs it was trained with.

    Raises:
        ValueError: for a text-to-image model.
    """

    code_channels: Count = 8
    starts: tuple[Natural, ...] = (0,)
    split: Natural = 80
    noise_std: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_classes:
            raise ValueError("students are made of LlamaGens of classes, and this one has captions")
        check_starts(self.starts, self.split, self.image_tokens, "tokens")


class DistilledLlamaGen(LlamaGen):
    """The network: predicts the tokens of slots that hold noise."""

    Config: ClassVar[type] = DistilledLlamaGenConfig

    def __init__(self, config: DistilledLlamaGenConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        del self.embed_tokens  # slots hold vectors
        width, dtype = config.hidden_size, jnp.dtype(config.param_dtype)
        options: dict[str, Any] = {"param_dtype": dtype, "init": NEW, "rngs": rngs}
        self.slot_embed = Linear(config.code_channels, width, role="embedding", **options)
        self.marks = nnx.Param(NEW(rngs.params(), (2, width), dtype))
        self.vectors = VectorHead(config, rngs=rngs)

    def example_inputs(self) -> tuple[Any, ...]:
        config = self.config
        slots = jax.ShapeDtypeStruct((2, config.image_tokens, config.code_channels), jnp.float32)
        return slots, *(jax.ShapeDtypeStruct((2,), jnp.int32),) * 2

    def layout(self, slots: Array, labels: Array, known: Array) -> Layout:
        grid = self.config.grid
        return Layout(grid=(1, grid, grid), text=1, text_first=True)

    def valid_tokens(self, slots: Array, *_: Any) -> None:
        return None

    def __call__(
        self,
        slots: Float[Array, "B N Z"],
        labels: Int[Array, " B"],
        known: Int[Array, " B"],
    ) -> tuple[Float[Array, "B N V"], Float[Array, "B N Z"]]:
        """Run the network.

        Args:
            slots: codes of the first tokens, and the noise of all that follow.
            labels: class of each image.
            known: how many slots hold codes.

        Returns:
            Of every slot the logits of its token, float32[B, N, vocab_size], and the code that is
            expected, float32[B, N, code_channels].

        Raises:
            ValueError: for another number of slots, or vectors of another width.
        """
        config = self.config
        data = holding(slots, known, config.image_tokens, config.code_channels)
        label = self.embedded(labels)
        x = jnp.concatenate([label, self.slot_embed(slots.astype(label.dtype))], axis=1)
        marks = self.marks.get_value().astype(label.dtype)
        x = x + chosen(jnp.broadcast_to(marks, (slots.shape[0], *marks.shape)), data)
        positions = jnp.broadcast_to(jnp.arange(data.shape[1]), data.shape)
        x = self.blocks(x, positions)[:, 1:]
        return self.logits(self.norm(x)).astype(jnp.float32), self.vectors(x, label[:, 0])


MODEL = DistilledLlamaGen
