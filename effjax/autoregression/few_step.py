"""Sampling with a student of Distilled Decoding (arXiv 2412.17153): all tokens in one or two calls.

    e ~ N(0, 1)                                     a vector for every slot; x = e
    for t in starts:                                the first scale of each call, 0 for the first
        x = x before t, e from t on                 the noise of the beginning, never drawn anew
        logits, vectors = student(x, labels, t)
        x = codebook[argmax logits] before split, vectors from there on;  before t as it was

The last scales stay vectors, which lie between codes. What all vectors add up to are latents, as
VAR's tokens do. A teacher may sample some scales between two calls: it reads the codes of the
scales before, and the student predicts all after.

The noise of a sample follows from its key, for pairs (`MappedScales`) as for students: the teacher
with the flow map and its student make the same image of a key, as far as the student has learned
it.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.autoregression.flow_map import FlowSolver, flow_map
from effjax.autoregression.next_scale import NextScale
from effjax.context import Step
from effjax.forward import Forward, Params
from effjax.layers.scales import Sides, token_starts
from effjax.loops import Carry, Loop
from effjax.models.distilled_var import DistilledVAR, check_starts
from effjax.models.vqvae import VQVAEConfig, quantizer_of
from effjax.samplers import sample_keys
from effjax.transform import Pair

_NOISE = 1 << 20  # what keys of noise are folded with; those of tokens are their scales'


def noise_of_scale(keys: Array, tokens: int, channels: int) -> Float[Array, "B T Z"]:
    """The noise of a scale, of the keys that its tokens would be drawn with."""

    def draw(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, _NOISE), (tokens, channels))

    return jax.vmap(draw)(keys)


def noise_of_slots(keys: Array, patch_nums: Sides, channels: int) -> Float[Array, "B L Z"]:
    """The noise of all scales, of the keys of samples."""
    parts = []
    for scale, side in enumerate(patch_nums):
        own = jax.vmap(lambda key, scale=scale: jax.random.fold_in(key, scale))(keys)
        parts.append(noise_of_scale(own, side**2, channels))
    return jnp.concatenate(parts, axis=1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("vae", "guidance", "top_p", "temperature"),
    meta_fields=("patch_nums", "top_k", "more_smooth", "solver"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class MappedScales(NextScale):
    """`NextScale` in which tokens are no draws, but follow from noise by the flow map.

    Attributes:
        solver: of the map.
    """

    solver: FlowSolver = dataclasses.field(default=FlowSolver())

    @classmethod
    def of(cls, loop: NextScale, solver: FlowSolver) -> MappedScales:
        """The same loop with the map.

        Raises:
            ValueError: for `more_smooth`, which mixes codes, so that no tokens follow.
        """
        if loop.more_smooth:
            raise ValueError("more_smooth mixes codes, so that no tokens follow from noise")
        held = {field.name: getattr(loop, field.name) for field in dataclasses.fields(NextScale)}
        return cls(**held, solver=solver)

    def draw(self, keys: Array, logits: Float[Array, "B T V"]) -> Int[Array, "B T"]:
        codes = quantizer_of(*self.vae).codes()
        noise = noise_of_scale(keys, logits.shape[1], codes.shape[1])
        return flow_map(noise, logits, codes, self.solver)[0]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("vae", "starts", "split"),
    meta_fields=("patch_nums",),
)
@dataclasses.dataclass(frozen=True, eq=False)
class FewStep(Loop):
    """The loop that samples latents with a student, in as many calls as there are `starts`.

    `jax.jit(loop)(forward, params, labels, key)` gives the latents of images, float32[B, s, s, Z].
    Where calls start, and where vectors begin, are data: other ones do not compile again where the
    loop is an argument of a program.

    Attributes:
        vae: forward and parameters of the VQVAE whose codes the student predicts.
        patch_nums: sides of the maps of tokens, those of the student.
        starts: the first scale that each call predicts, 0 for the first call.
        split: the first scale whose tokens stay vectors; the number of scales for none.
    """

    vae: Pair
    patch_nums: Sides
    starts: tuple[int | Array, ...] = (0,)
    split: int | Array = 5

    @property
    def calls(self) -> int:
        """Number of network calls."""
        return len(self.starts)

    @property
    def guided(self) -> bool:
        """False: what guidance does is in what the student learned."""
        return False

    def __call__(
        self,
        forward: Forward,
        params: Params,
        cond: Int[Array, " B"],
        key: Array,
        *,
        uncond: None = None,
    ) -> Float[Array, "B S S Z"]:
        """Sample latents.

        Args:
            forward: the student, possibly patched.
            params: its parameters.
            cond: labels.
            key: one key, or keys [B]. Sample i depends on the key and on i, not on how many
                samples there are.
            uncond: there is none.
        """
        return self.sample(forward, params, cond, key)[0]

    def sample(
        self, forward: Forward, params: Params, cond: Int[Array, " B"], key: Array
    ) -> tuple[Float[Array, "B S S Z"], Int[Array, "B L"]]:
        """Sample latents, and the tokens whose codes are next to what they are the sum of."""
        carry = self.init(forward, params, cond, key)
        vectors = self.run(forward, params, carry, cond).x
        return self.latents(vectors), quantizer_of(*self.vae).nearest(vectors)

    def latents(self, vectors: Float[Array, "B L Z"]) -> Float[Array, "B S S Z"]:
        """What the vectors of all slots add up to."""
        return quantizer_of(*self.vae).sums_of_vectors(vectors, self.patch_nums)[-1]

    def init(
        self,
        forward: Forward,
        params: Params,
        cond: Int[Array, " B"],
        key: Any = None,
        *,
        uncond: None = None,
    ) -> Carry:
        """Slots of noise.

        Raises:
            ValueError: if student and VQVAE do not belong together, and for calls that it cannot
                make.
        """
        self.check(forward)
        forward.check_calls(self.calls)
        keys = sample_keys(key, cond.shape[0])
        noise = noise_of_slots(keys, self.patch_nums, forward.config.code_channels)
        state = forward.init(params, *self.inputs(noise, cond, None, 0))
        return Carry(noise, noise, state, keys)

    def check(self, forward: Forward) -> None:
        """Raise what `init` raises of the loop and the model."""
        config, codes = forward.config, self.vae[0].config
        if not issubclass(forward.model, DistilledVAR) or not isinstance(codes, VQVAEConfig):
            raise ValueError(
                f"a few calls sample a DistilledVAR with the VQVAE of its codes, got "
                f"{forward.model.__name__} and {self.vae[0].model.__name__}"
            )
        theirs = codes.vocab_size, codes.latent_channels, self.patch_nums
        if theirs != (config.vocab_size, config.code_channels, config.patch_nums):
            raise ValueError(
                f"the student predicts {config.vocab_size} codes of {config.code_channels} "
                f"channels at the scales {config.patch_nums}, and the VQVAE and the loop have "
                f"{theirs[0]} of {theirs[1]} at {theirs[2]}: they belong to different models"
            )
        known = tuple(each for each in self.starts if isinstance(each, int))
        if len(known) == self.calls and isinstance(self.split, int):
            check_starts(known, self.split, len(self.patch_nums), "scales")

    def slots(self, scale: int | Int[Array, ""]) -> Int[Array, ""]:
        """The first slot of a scale."""
        return jnp.asarray(token_starts(self.patch_nums), jnp.int32)[scale]

    def first(self, step: Step) -> Int[Array, ""]:
        """The first slot that a call predicts; behind the last call, how many slots there are."""
        every = [jnp.asarray(start, jnp.int32) for start in (*self.starts, len(self.patch_nums))]
        return self.slots(jnp.stack(every)[step])

    def inputs(
        self, x: Float[Array, "B L Z"], cond: Int[Array, " B"], uncond: None, step: Step
    ) -> tuple[Float[Array, "B L Z"], Int[Array, " B"], Int[Array, " B"]]:
        """Slots, labels, and how many slots hold codes."""
        return x, cond, jnp.full(cond.shape, self.first(step))

    def update(
        self, carry: Carry, out: tuple[Float[Array, "B L V"], Float[Array, "B L Z"]], step: Step
    ) -> Carry:
        """Take what a call predicts, and the noise of the beginning from the next call on."""
        logits, vectors = out
        codes = quantizer_of(*self.vae).vectors(jnp.argmax(logits, axis=-1))
        slot = np.arange(vectors.shape[1])[:, None]
        made = jnp.where(slot < self.slots(self.split), codes, vectors)
        made = jnp.where(slot < self.first(step), carry.x, made)
        x = jnp.where(slot < self.first(step + 1), made, carry.memory)
        return carry._replace(x=x)

    def with_teacher(
        self,
        student: Pair,
        teacher: Pair,
        loop: NextScale,
        cond: Int[Array, " B"],
        key: Array,
        *,
        start: int,
    ) -> tuple[Float[Array, "B S S Z"], Int[Array, "B L"]]:
        """Sample as `sample` does, in two calls, with a teacher's scales between them.

        The scales start ... starts[1] - 1 are the teacher's, one call for each. With start 0 the
        student's first call is left out.

        Args:
            student, teacher: forwards and parameters.
            loop: the teacher's.
            cond: labels.
            key: one key, or keys [B]; the student's noise is that of a run without a teacher.
            start: the teacher's first scale, static, as `starts` must be.

        Raises:
            ValueError: unless there are two calls, and start lies before the second one.
        """
        start = self.teacher_start(start)
        bounds, second = token_starts(self.patch_nums), int(self.starts[1])
        carry = self.init(*student, cond, key)
        noise, quantizer = carry.memory, quantizer_of(*self.vae)
        if start:
            carry = self.run(*student, carry, cond, stop=1)
        known = quantizer.nearest(carry.x[:, : bounds[start]])
        drawn = loop.after(*teacher, known, cond, carry.keys, stop=second).memory
        codes = quantizer.vectors(drawn[:, : bounds[second]])
        x = jnp.concatenate([codes, noise[:, bounds[second] :]], axis=1)
        vectors = self.run(*student, carry._replace(x=x), cond, start=1).x
        return self.latents(vectors), quantizer.nearest(vectors)

    def teacher_start(self, start: int | None) -> int:
        """A teacher's first scale; the last one before the second call if None.

        Raises:
            ValueError: unless there are two calls, and start lies before the second one.
        """
        second = int(self.starts[1]) if self.calls == 2 else 0
        start = second - 1 if start is None else start
        if not 0 <= start < second:
            raise ValueError(
                f"a teacher samples the scales start ... t - 1 between two calls, at 0 and t: "
                f"start is 0 ... t - 1; got {start} for the calls at {self.starts}"
            )
        return start

    def teacher_calls(self, start: int) -> int:
        """Network calls of `with_teacher`, of both models together."""
        return (start > 0) + int(self.starts[1]) - start + 1
