"""Sampling with a student of Distilled Decoding (arXiv 2412.17153): all tokens in one or two calls.

    e ~ N(0, noise_std^2)                           a vector for every slot; x = e
    for t in starts:                                the first scale of each call, 0 for the first
        x = x before t, e from t on                 the noise of the beginning, never drawn anew
        logits, vectors = student(x, labels, t)
        x = codebook[argmax logits] before split, vectors from there on;  before t as it was

A student of LlamaGen has tokens where one of VAR has scales. The last ones stay vectors, which lie
between codes. A teacher may sample some between two calls: it reads the codes of those before, and
the student predicts all after.

The noise of a sample follows from its key, for pairs (`MappedScales`, `MappedTokens`) as for
students: the teacher with the flow map and its student make the same image of a key, as far as the
student has learned it.
"""

from __future__ import annotations

import abc
import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.autoregression import next_token
from effjax.autoregression.flow_map import FlowSolver, flow_map
from effjax.autoregression.next_scale import NextScale
from effjax.autoregression.next_token import NextToken
from effjax.autoregression.stepwise import Stepwise
from effjax.context import Step
from effjax.finite import token_or_none
from effjax.forward import Forward, Params
from effjax.layers.scales import Sides, token_starts
from effjax.loops import Carry
from effjax.models.distilled_llamagen import DistilledLlamaGen
from effjax.models.distilled_var import DistilledVAR, check_starts
from effjax.models.vq_model import VQModelConfig
from effjax.models.vqvae import VQVAEConfig
from effjax.samplers import sample_keys
from effjax.transform import Pair

_NOISE = 1 << 20  # what keys of noise are folded with; those of tokens are their scales'


def noise_of_draw(keys: Array, tokens: int, channels: int) -> Float[Array, "B T Z"]:
    """The noise of tokens that are drawn at once, of the keys that they would be drawn with."""

    def draw(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, _NOISE), (tokens, channels))

    return jax.vmap(draw)(keys)


def _mapped(
    vae: Pair, solver: FlowSolver, keys: Array, logits: Float[Array, "B T V"]
) -> Int[Array, "B T"]:
    codes = quantizer_of(vae).codes()
    noise = solver.noise_std * noise_of_draw(keys, logits.shape[1], codes.shape[1])
    return token_or_none(flow_map(noise, logits, codes, solver)[0], logits)


def quantizer_of(vae: Pair) -> Any:
    """The quantizer of a VQVAE or a VQ model."""
    module: Any = vae[0].module(vae[1])
    return module.quantizer


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
            ValueError: for `more_smooth`, which mixes codes, so that no tokens follow, and for a
                loop of two models.
        """
        if loop.more_smooth:
            raise ValueError("more_smooth mixes codes, so that no tokens follow from noise")
        if loop.alone is not loop:
            raise ValueError(
                "pairs are samples of the model that the student begins as, and these are drawn by "
                "two: sample without a refiner"
            )
        held = {field.name: getattr(loop, field.name) for field in dataclasses.fields(NextScale)}
        return cls(**held, solver=solver)

    def draw(self, keys: Array, logits: Float[Array, "B T V"]) -> Int[Array, "B T"]:
        return _mapped(self.vae, self.solver, keys, logits)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=next_token.DATA,
    meta_fields=(*next_token.STATIC, "solver"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class MappedTokens(NextToken):
    """`NextToken` in which tokens are no draws, but follow from noise by the flow map.

    Attributes:
        solver: of the map.
    """

    solver: FlowSolver = dataclasses.field(default=FlowSolver())

    @classmethod
    def of(cls, loop: NextToken, solver: FlowSolver) -> MappedTokens:
        """The same loop with the map, one token a call."""
        held = {field.name: getattr(loop, field.name) for field in dataclasses.fields(NextToken)}
        return cls(**{**held, "decoder": None}, solver=solver)

    def draw(self, keys: Array, logits: Float[Array, "B T V"]) -> Int[Array, "B T"]:
        return _mapped(self.vae, self.solver, keys, logits)


def calls_of(config: Any) -> dict[str, Any]:
    """How a student is sampled, by its configuration."""
    return {name: getattr(config, name) for name in ("starts", "split", "noise_std")}


class FewStep(Stepwise):
    """A loop that samples latents with a student, in as many calls as there are `starts`.

    `jax.jit(loop)(forward, params, labels, key)` gives the latents of images, float32[B, s, s, Z].
    Where calls start, and where vectors begin, are data: other ones do not compile again where the
    loop is an argument of a program.

    Attributes:
        vae: forward and parameters of the autoencoder whose codes the student predicts.
        starts: the first unit that each call predicts, 0 for the first call.
        split: the first unit whose tokens stay vectors; the number of units for none.
        noise_std: standard deviation of the noise, that of the pairs that the student learned from.
        units: what starts and split count.
        models: the classes of students and of configurations of their autoencoders.
        teachers: the class of the loops of teachers.
    """

    units: ClassVar[str]
    models: ClassVar[tuple[type, type]]
    teachers: ClassVar[type]

    vae: Pair
    starts: tuple[int | Array, ...]
    split: int | Array
    noise_std: float | Array

    @property
    @abc.abstractmethod
    def bounds(self) -> tuple[int, ...]:
        """The first slot of every unit, and the number of all slots."""

    @property
    @abc.abstractmethod
    def shape(self) -> Any:
        """What the student's configuration must say of the slots."""

    @abc.abstractmethod
    def shape_of(self, config: Any) -> Any:
        """The same of a configuration."""

    @classmethod
    @abc.abstractmethod
    def of(cls, loop: Any, config: Any) -> FewStep:
        """The loop of a student, in the place of its model's."""

    @abc.abstractmethod
    def unit_noise(self, keys: Array, channels: int) -> Float[Array, "B L Z"]:
        """`noise` of standard deviation 1."""

    def noise(self, keys: Array, channels: int) -> Float[Array, "B L Z"]:
        """The noise of all slots, of the keys of samples."""
        return self.noise_std * self.unit_noise(keys, channels)

    @abc.abstractmethod
    def latents(self, vectors: Float[Array, "B L Z"]) -> Float[Array, "B S S Z"]:
        """What the vectors of all slots stand for."""

    @abc.abstractmethod
    def drawn(self, carry: Carry) -> Int[Array, "B L"]:
        """The tokens that a teacher's loop has drawn."""

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
        return self.made(self.run(forward, params, carry, cond))

    def made(self, carry: Carry) -> tuple[Float[Array, "B S S Z"], Int[Array, "B L"]]:
        return self.latents(carry.x), quantizer_of(self.vae).nearest(carry.x)

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
        noise = self.noise(keys, forward.config.code_channels)
        state = forward.init(params, *self.inputs(noise, cond, None, 0))
        return Carry(noise, noise, state, keys)

    def check(self, forward: Forward) -> None:
        """Raise what `init` raises of the loop and the model."""
        config, codes = forward.config, self.vae[0].config
        student, autoencoder = self.models
        if not issubclass(forward.model, student) or not isinstance(codes, autoencoder):
            raise ValueError(
                f"a few calls sample a {student.__name__} with the autoencoder of its codes, got "
                f"{forward.model.__name__} and {self.vae[0].model.__name__}"
            )
        own = config.vocab_size, config.code_channels, self.shape_of(config)
        theirs = codes.vocab_size, codes.latent_channels, self.shape
        if theirs != own:
            raise ValueError(
                f"the student predicts {own[0]} codes of {own[1]} channels for {self.units} of "
                f"{own[2]}, and the autoencoder and the loop have {theirs[0]} of {theirs[1]} for "
                f"{theirs[2]}: they belong to different models"
            )
        known = tuple(each for each in self.starts if isinstance(each, int))
        if len(known) == self.calls and isinstance(self.split, int):
            check_starts(known, self.split, len(self.bounds) - 1, self.units)

    def slots(self, unit: int | Int[Array, ""]) -> Int[Array, ""]:
        """The first slot of a unit."""
        return jnp.asarray(self.bounds, jnp.int32)[unit]

    def first(self, step: Step) -> Int[Array, ""]:
        """The first slot that a call predicts; behind the last call, how many slots there are."""
        starts = (*self.starts, len(self.bounds) - 1)
        return self.slots(jnp.stack([jnp.asarray(start, jnp.int32) for start in starts])[step])

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
        likeliest = token_or_none(jnp.argmax(logits, axis=-1), logits)
        codes = quantizer_of(self.vae).vectors(likeliest)
        slot = np.arange(vectors.shape[1])[:, None]
        made = jnp.where(slot < self.slots(self.split), codes, vectors)
        made = jnp.where(slot < self.first(step), carry.x, made)
        x = jnp.where(slot < self.first(step + 1), made, carry.memory)
        return carry._replace(x=x)

    def with_teacher(
        self,
        student: Pair,
        teacher: Pair,
        loop: NextScale | NextToken,
        cond: Int[Array, " B"],
        key: Array,
        *,
        start: int,
    ) -> tuple[Float[Array, "B S S Z"], Int[Array, "B L"]]:
        """Sample as `sample` does, in two calls, with a teacher's scales or tokens between them.

        The units start ... starts[1] - 1 are the teacher's, one call for each. With start 0 the
        student's first call is left out.

        Args:
            student, teacher: forwards and parameters.
            loop: the teacher's.
            cond: labels.
            key: one key, or keys [B]; the student's noise is that of a run without a teacher.
            start: the teacher's first unit, static, as `starts` must be.

        Raises:
            ValueError: unless there are two calls, and start lies before the second one.
        """
        start = self.teacher_start(start)
        self.check_teacher(student[0], teacher[0], loop)
        bounds, second = self.bounds, int(self.starts[1])
        carry = self.init(*student, cond, key)
        noise, quantizer = carry.memory, quantizer_of(self.vae)
        if start:
            carry = self.run(*student, carry, cond, stop=1)
        known = quantizer.nearest(carry.x[:, : bounds[start]])
        drawn = self.drawn(loop.after(*teacher, known, cond, carry.keys, stop=second))
        codes = quantizer.vectors(drawn[:, : bounds[second]])
        x = jnp.concatenate([codes, noise[:, bounds[second] :]], axis=1)
        return self.made(self.run(*student, carry._replace(x=x), cond, start=1))

    def check_teacher(self, forward: Forward, teacher: Forward, loop: Any) -> None:
        """Check that a teacher and its loop belong to a student.

        Raises:
            ValueError: for a loop of another kind, and other codes, maps or classes.
        """
        if not isinstance(loop, self.teachers):
            raise ValueError(
                f"the teacher of a {forward.model.__name__} is sampled by a "
                f"{self.teachers.__name__}, got a {type(loop).__name__}"
            )
        loop.check(teacher)
        wanted, found = (
            {"classes": model.config.num_classes, "codes": model.config.vocab_size, "maps": shape}
            for model, shape in (
                (forward, self.shape),
                (teacher, self.of(loop, forward.config).shape),
            )
        )
        if wanted != found:
            raise ValueError(f"the student has {wanted} and the teacher {found}: they do not fit")

    def teacher_start(self, start: int | None) -> int:
        """A teacher's first unit; the last one before the second call if None.

        Raises:
            ValueError: unless there are two calls, and start lies before the second one.
        """
        second = int(self.starts[1]) if self.calls == 2 else 0
        start = second - 1 if start is None else start
        if not 0 <= start < second:
            raise ValueError(
                f"a teacher samples the {self.units} start ... t - 1 between two calls, at 0 and "
                f"t: start is 0 ... t - 1; got {start} for the calls at {self.starts}"
            )
        return start

    def teacher_calls(self, start: int) -> int:
        """Network calls of `with_teacher`, of both models together."""
        return (start > 0) + int(self.starts[1]) - start + 1


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("vae", "starts", "split", "noise_std"),
    meta_fields=("patch_nums",),
)
@dataclasses.dataclass(frozen=True, eq=False)
class FewScales(FewStep):
    """`FewStep` of a student of VAR; vectors of all scales add up to latents.

    Attributes:
        vae: of the VQVAE.
        patch_nums: sides of the maps of tokens, those of the student.
        starts, split, noise_std: see `FewStep`; they count scales.
    """

    vae: Pair
    patch_nums: Sides
    starts: tuple[int | Array, ...] = (0,)
    split: int | Array = 5
    noise_std: float | Array = 1.0

    units = "scales"
    models = (DistilledVAR, VQVAEConfig)
    teachers = NextScale

    @classmethod
    def of(cls, loop: NextScale, config: Any) -> FewScales:
        """The loop of a student, in the place of its model's."""
        return cls(loop.vae, loop.patch_nums, **calls_of(config))

    @property
    def bounds(self) -> tuple[int, ...]:
        return token_starts(self.patch_nums)

    @property
    def shape(self) -> Sides:
        return self.patch_nums

    def shape_of(self, config: Any) -> Sides:
        return config.patch_nums

    def unit_noise(self, keys: Array, channels: int) -> Float[Array, "B L Z"]:
        parts = []
        for scale, side in enumerate(self.patch_nums):
            own = jax.vmap(lambda key, scale=scale: jax.random.fold_in(key, scale))(keys)
            parts.append(noise_of_draw(own, side**2, channels))
        return jnp.concatenate(parts, axis=1)

    def latents(self, vectors: Float[Array, "B L Z"]) -> Float[Array, "B S S Z"]:
        return quantizer_of(self.vae).sums_of_vectors(vectors, self.patch_nums)[-1]

    def drawn(self, carry: Carry) -> Int[Array, "B L"]:
        return carry.memory


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("vae", "starts", "split", "noise_std"),
    meta_fields=("grid",),
)
@dataclasses.dataclass(frozen=True, eq=False)
class FewTokens(FewStep):
    """`FewStep` of a student of LlamaGen; the vectors of all tokens are the latents.

    Attributes:
        vae: of the VQ model.
        grid: rows and columns of tokens, those of the student.
        starts, split, noise_std: see `FewStep`; they count tokens.
    """

    vae: Pair
    grid: tuple[int, int]
    starts: tuple[int | Array, ...] = (0,)
    split: int | Array = 80
    noise_std: float | Array = 1.0

    units = "tokens"
    models = (DistilledLlamaGen, VQModelConfig)
    teachers = NextToken

    @classmethod
    def of(cls, loop: NextToken, config: Any) -> FewTokens:
        """The loop of a student, in the place of its model's."""
        return cls(loop.vae, loop.grid, **calls_of(config))

    @property
    def bounds(self) -> tuple[int, ...]:
        return tuple(range(self.grid[0] * self.grid[1] + 1))

    @property
    def shape(self) -> tuple[int, int]:
        return self.grid

    def shape_of(self, config: Any) -> tuple[int, int]:
        return config.grid, config.grid

    def unit_noise(self, keys: Array, channels: int) -> Float[Array, "B L Z"]:
        def draw(token: Array) -> Array:
            own = jax.vmap(lambda key: jax.random.fold_in(key, token))(keys)
            return noise_of_draw(own, 1, channels)[:, 0]

        return jax.vmap(draw, out_axes=1)(jnp.arange(self.bounds[-1]))

    def latents(self, vectors: Float[Array, "B L Z"]) -> Float[Array, "B S S Z"]:
        return vectors.reshape(len(vectors), *self.grid, vectors.shape[-1])

    def drawn(self, carry: Carry) -> Int[Array, "B L"]:
        return carry.x
