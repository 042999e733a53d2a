"""The sampling loop: noise to samples with any schedule, guided or not, in one program or stepwise.

A `Sampler` only calls `forward` and the schedule; it knows no model and no method. Its pieces
(`init`, `inputs`, `network`, `update`) are public, so that a search can drive them itself.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from effjax.buckets import Buckets, cut, joined, rows
from effjax.context import PyTree, Step
from effjax.executables import Program
from effjax.forward import Forward, Params, StateDict
from effjax.guidance import Guidance
from effjax.loops import Branches, Carry, Loop
from effjax.samplers.schedule import Schedule
from effjax.samplers.tables import at


class Part(NamedTuple):
    """What a part of a batch is sampled from, as `Sampler.__call__` takes it."""

    cond: PyTree
    key: Array
    uncond: PyTree
    noise: Array | np.ndarray | None
    image: Array | np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Sampler(Loop):
    """The loop that makes samples of noise with a diffusion model.

    A sampler has a noise schedule and guidance (classifier-free: Ho & Salimans, arXiv 2207.12598).
    `jax.jit(sampler)(forward, params, cond, key)` runs the whole loop as one program.
    `sampler.stepwise(...)` gives the same samples from a loop on the host, which can show progress
    and call a callback. Both return float32[B, *shape] in the model's sample space (latents, for
    latent models). A sampler costs `calls` network calls on B samples, or on B samples for each
    branch if it guides.

    Attributes:
        schedule: when the network is called, and how its output moves the sample.
        guidance: the scale s in uncond + s (cond - uncond). 1 means no guidance: the network then
            sees B samples in place of 2B. For other branches give weights w by the names of all
            branches but one, the last: last + sum w_i (branch_i - last). Perturbed attention (arXiv
            2403.17377) of scale p beside s is {"cond": s + p, "perturbed": -p} with "uncond" as the
            last.
        arrangement: the branches and how they stand in a guided batch.
        shape: shape of one sample, for models that take several; the model's `sample_shape` if
            None.
    """

    schedule: Schedule
    guidance: float | Mapping[str, float] | tuple[tuple[str, float], ...] = 1.0
    arrangement: Guidance = dataclasses.field(default=Guidance())
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise TypeError(
                f"schedule must be a noise schedule such as DDIM(steps=50), got {self.schedule!r}"
            )
        if not isinstance(self.arrangement, Guidance):
            raise TypeError(f"arrangement must be a Guidance, got {self.arrangement!r}")
        if isinstance(self.guidance, Mapping):
            object.__setattr__(self, "guidance", tuple(sorted(self.guidance.items())))
        self._check_guidance()
        sides = self.shape or ()
        if self.shape is not None and (
            not isinstance(self.shape, tuple)
            or not self.shape
            or any(type(side) is not int or side < 1 for side in sides)
        ):
            raise ValueError(
                f"shape must be a tuple of whole numbers of at least 1, such as (64, 64, 4), got "
                f"{self.shape!r}"
            )

    @property
    def calls(self) -> int:
        """Number of network calls of a whole trajectory."""
        return self.schedule.calls

    def _check_guidance(self) -> None:
        branches = self.arrangement.branches
        if isinstance(self.guidance, tuple):
            names = [name for name, _ in self.guidance]
            left = [name for name in branches if name not in names]
            if len(left) != 1 or len(names) != len(branches) - 1:
                raise ValueError(
                    f"weights of guidance are for all branches but one of {branches}, got {names}"
                )
            if wrong := [w for _, w in self.guidance if not _finite(w)]:
                raise ValueError(f"weights of guidance are finite numbers, got {wrong}")
            return
        scale = self.guidance
        if not _finite(scale) or scale < 0:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(
                f"guidance must be a finite scale of at least 0 (1 is no guidance), got "
                f"{self.guidance!r}"
            )
        if self.guided and set(branches) != {"cond", "uncond"}:
            raise ValueError(
                f"one scale guides two branches, cond and uncond; for {branches} give weights, "
                f'such as {{"cond": 7.0, "perturbed": -3.0}}'
            )

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the branches but the last one."""
        if isinstance(self.guidance, tuple):
            return {name: float(weight) for name, weight in self.guidance}
        return {"cond": float(self.guidance)}  # pyright: ignore[reportArgumentType]

    @property
    def scale(self) -> float | None:
        """The scale of classifier-free guidance; None without, and for weights of branches."""
        return None if isinstance(self.guidance, tuple) or not self.guided else self.weights["cond"]

    @property
    def guided(self) -> bool:
        """True if every call runs several branches."""
        return self.guidance != 1.0

    @property
    def joined(self) -> Guidance | None:
        """The arrangement of the batches that the network sees, None if they are not guided."""
        return self.arrangement if self.guided else None

    def __call__(
        self,
        forward: Forward,
        params: Params,
        cond: PyTree,
        key: Array,
        *,
        uncond: PyTree = None,
        noise: Array | np.ndarray | None = None,
        image: Array | np.ndarray | None = None,
    ) -> Float[Array, "B ..."]:
        """Make samples in one `lax.scan`.

        Args:
            forward: the network, possibly patched. It must not be fixed at one step.
            params: its parameters.
            cond: conditions, a tree of arrays [B, ...] (labels int32[B] for class models).
            key: one key (`jax.random.key`), or keys [B] from `sample_keys`. Sample i depends on the
                key and on i, not on how many samples there are.
            uncond: unconditional counterpart of `cond`; the model's null condition if None.
            noise: unit noise [B, ...] to start from, which the schedule scales. None draws noise
                from the key.
            image: samples [B, ...] to change, for a schedule that begins late: they get the noise
                of the first call's time.

        Returns:
            float32[B, *shape].
        """
        uncond = self.unconditional(forward, cond, uncond)
        carry = self.init(forward, params, cond, key, uncond=uncond, noise=noise, image=image)
        return self.run(forward, params, carry, cond, uncond).x

    def stepwise(
        self,
        forward: Forward,
        params: Params,
        cond: PyTree,
        key: Array,
        *,
        uncond: PyTree = None,
        noise: Array | np.ndarray | None = None,
        image: Array | np.ndarray | None = None,
        progress: bool = True,
        callback: Callable[[int, Array], Any] | None = None,
        watch: Callable[[int, Sequence[StateDict]], Any] | None = None,
        buckets: Buckets = None,
    ) -> Float[Array, "B ..."]:
        """Make samples in a loop on the host, which runs one compiled step after the other.

        Args:
            forward, params, cond, key, uncond, noise, image: as for `__call__`.
            progress: show a progress bar.
            callback: called as `callback(step, x)` after every step. If it returns an array like
                x, sampling goes on from that.
            watch: called as `watch(step, states)` after every step, with the state of each part of
                the batch. The next step overwrites them.
            buckets: sizes of batches that are compiled, see `effjax.buckets`. Other batches are cut
                into parts of these sizes, which take turns in every step. A batch that is spread
                over devices is not cut.
        """
        from tqdm.auto import tqdm

        parts = self.parts(forward, Part(cond, key, uncond, noise, image), buckets)
        carries = [_compiled_init(self, forward, params, *part) for part in parts]
        batch = _batch(cond)
        segments = forward.segments(0, self.calls)
        for step in tqdm(range(self.calls), desc="sampling", disable=not progress):
            own = next(segment for segment, _, stop in segments if step < stop)
            for place, (part, (x, memory, state, keys)) in enumerate(zip(parts, carries)):
                inputs = part.cond, part.uncond, x, memory, keys, np.int32(step)
                # The state is donated, caches can be large; x is not, a callback may keep it.
                carries[place] = _compiled_step(self, own, params, *inputs, state=state)
            if watch is not None:
                watch(step, [carry.state for carry in carries])
            if progress:
                jax.block_until_ready([carry.x for carry in carries])
            if callback is not None:
                changed = callback(step, joined([carry.x for carry in carries], batch))
                if changed is not None:
                    carries = _moved_to(
                        carries, self._given(forward, batch, changed, "latents of a callback")
                    )
        return joined([carry.x for carry in carries], batch)

    def parts(self, forward: Forward, whole: Part, buckets: Buckets) -> list[Part]:
        """Cut a batch into parts of a few sizes.

        Returns:
            For each part, what it is sampled from.
        """
        cond, key, uncond, noise, image = whole
        _check_key(key)
        batch = _batch(cond)
        sizes = cut(batch, buckets, *whole)
        if sizes == [batch]:
            return [whole._replace(uncond=self.unconditional(forward, cond, uncond))]
        found = []
        for start, size in zip(itertools.accumulate(sizes, initial=0), sizes):
            own, other, *given = rows((cond, uncond, noise, image), start, size)
            keys = keys_of(key, batch, start, size)
            found.append(Part(own, keys, self.unconditional(forward, own, other), *given))
        return found

    def init(
        self,
        forward: Forward,
        params: Params,
        cond: PyTree,
        key: Array,
        *,
        uncond: PyTree = None,
        noise: Array | np.ndarray | None = None,
        image: Array | np.ndarray | None = None,
    ) -> Carry:
        """Make the initial noise, memory, state and keys for these conditions.

        Raises:
            ValueError: if the forward is planned for another number of network calls, or noise or
                an image is given that does not fit, or none for a schedule that begins late.
        """
        try:
            forward.check_calls(self.calls)
        except ValueError as error:
            if not self.schedule.begin:
                raise
            left_out = f"{self.schedule.begin} of {self.schedule.steps} steps"
            raise ValueError(f"{error} The image to change leaves out {left_out}.") from None
        batch = _batch(cond)
        pairs = jax.vmap(jax.random.split)(sample_keys(key, batch))
        if noise is None:
            shape = self.sample_shape(forward)
            noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(pairs[:, 0])
        else:
            noise = self.given_noise(forward, batch, noise)
        if image is not None:
            image = self._given(forward, batch, image, "an image to change")
            x = self.schedule.start(image, noise)
        elif self.schedule.begin:
            raise ValueError(
                f"the schedule leaves out {self.schedule.begin} steps at the start, so sampling "
                f"begins with an image: give image="
            )
        else:
            x = self.schedule.initial_scale * noise
        uncond = self.unconditional(forward, cond, uncond)
        state = forward.init(params, *self.inputs(x, cond, uncond, 0), guidance=self.joined)
        return Carry(x, self.schedule.init(x), state, pairs[:, 1])

    def output(
        self, raw: Float[Array, "N ..."], x: Float[Array, "B ..."], step: Step
    ) -> Float[Array, "B ..."]:
        """The guided output, from the raw output of all branches."""
        return self.guide(raw, x.shape[-1])

    def inputs(
        self, x: Float[Array, "B ..."], cond: PyTree, uncond: PyTree, step: Step
    ) -> tuple[Float[Array, "N ..."], Float[Array, " N"], PyTree]:
        """The network's inputs (sample, time, condition) at a step, all branches in one batch."""
        if self.guided:
            x = self.arrangement.duplicate(x)
            cond = self.arrangement.join(self._conditions(cond, uncond))
        (time,) = at((self.schedule.times,), step)
        return x, jnp.full(x.shape[:1], time), cond

    def guide(self, raw: Float[Array, "N ..."], channels: int) -> Float[Array, "B ..."]:
        """Make the guided output from the raw output of all branches.

        Guidance applies to the first `channels`, those of the sample. The rest holds a learned
        variance, which is taken from the conditional branch.
        """
        if not self.guided:
            return raw
        parts = self.arrangement.split(raw.astype(jnp.float32))
        rest, weights = parts["cond"][..., channels:], self.weights
        (last,) = (part[..., :channels] for name, part in parts.items() if name not in weights)
        guided = last
        for name, weight in weights.items():
            guided = guided + weight * (parts[name][..., :channels] - last)
        return jnp.concatenate([guided, rest], axis=-1)

    def _conditions(self, cond: PyTree, uncond: PyTree) -> dict[str, PyTree]:
        """Conditions of all branches by name."""
        others = uncond.conditions if isinstance(uncond, Branches) else {"uncond": uncond}
        return {
            name: others.get(name, cond) for name in self.arrangement.branches if name != "cond"
        } | {"cond": cond}

    def update(self, carry: Carry, out: Float[Array, "B ..."], step: Step) -> Carry:
        """Move samples and memory by a guided output. `carry.state` must be the new state."""
        x, memory = self.schedule.update(carry.x, out, step, carry.memory, carry.keys)
        return carry._replace(x=x, memory=memory)

    def sample_shape(self, forward: Forward) -> tuple[int, ...]:
        """Shape of one sample of this network."""
        return forward.config.sample_shape if self.shape is None else self.shape

    def given_noise(
        self, forward: Forward, batch: int, noise: Array | np.ndarray
    ) -> Float[Array, "B ..."]:
        """Check initial noise that a caller gives, and return it as float32.

        Raises:
            ValueError: if it is not an array of floats with the shape of the samples.
        """
        return self._given(forward, batch, noise, "initial noise (latents)")

    def _given(self, forward: Forward, batch: int, noise: Any, who: str) -> Float[Array, "B ..."]:
        shape = (batch, *self.sample_shape(forward))
        array = isinstance(noise, jax.Array | np.ndarray)
        if not array or not jnp.issubdtype(noise.dtype, jnp.floating) or noise.shape != shape:
            what = f"{noise.dtype}{list(noise.shape)}" if array else type(noise).__name__
            raise ValueError(
                f"{who} must be float{list(shape)}: batch, height, width, channels for images; "
                f"got {what}"
            )
        return jnp.asarray(noise, jnp.float32)

    def unconditional(self, forward: Forward, cond: PyTree, uncond: PyTree = None) -> PyTree:
        """`uncond`, or the model's null condition; None if the sampler does not guide."""
        if not self.guided:
            return None
        named = uncond.conditions if isinstance(uncond, Branches) else {}
        if "uncond" not in self.arrangement.branches or "uncond" in named:
            return Branches({}) if uncond is None else uncond
        if uncond is not None and not isinstance(uncond, Branches):
            return uncond
        if not hasattr(forward.config, "null_condition"):
            raise ValueError(
                f"{type(forward.config).__name__} has no null condition: pass uncond=, or sample "
                f"with guidance=1.0"
            )
        null = forward.config.null_condition(cond)
        return Branches({**named, "uncond": null}) if named else null


def _finite(value: Any) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and math.isfinite(value)


def sample_keys(key: Array, batch: int, *, first: int = 0) -> Key[Array, " B"]:
    """Make one key for each sample of a batch.

    Use it to make a large set in small batches: `sampler(forward, params, labels[i:j],
    sample_keys(key, j - i, first=i))` gives the samples i ... j - 1 of the whole set.

    Args:
        key: one key; or keys [batch], which are returned as they are.
        batch: how many samples there are.
        first: index of the first sample in the whole set.

    Raises:
        TypeError: if `key` is not a key array.
        ValueError: if it holds keys for another batch.
    """
    check_keys(key, batch)
    if key.shape:
        return key
    on = np if isinstance(batch, int) else jnp  # an export may leave the batch open
    indices = on.arange(first, first + batch, dtype=np.uint32)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(indices)


def check_keys(key: Array, batch: int) -> None:
    """Raise what `sample_keys` raises."""
    _check_key(key)
    if key.shape not in ((), (batch,)):
        raise ValueError(
            f"key must be one key or one for each of the {batch} samples; it has the shape "
            f"{list(key.shape)}"
        )


def keys_of(key: Array, batch: int, start: int, size: int) -> Key[Array, " N"]:
    """Keys of the samples start, start + 1, ... of a batch; beyond it any.

    Args:
        key: one key, or one for each sample of the batch.
        batch: how many samples there are.
        start, size: of which samples.

    Raises:
        TypeError, ValueError: as `sample_keys`.
    """
    check_keys(key, batch)
    if not key.shape:
        return sample_keys(key, size, first=start)
    return key[np.minimum(np.arange(start, start + size), batch - 1)]


def _check_key(key: Any) -> None:
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return
    if np.shape(key)[-1:] == (2,) and getattr(key, "dtype", None) == jnp.uint32:
        got = "a legacy key of uint32; write jax.random.wrap_key_data(key)"
    elif isinstance(key, int | np.integer):
        got = f"{key}; write jax.random.key({key})"
    else:
        got = type(key).__name__
    raise TypeError(f"key must come from jax.random.key(seed), got {got}")


def _moved_to(carries: Sequence[Carry], x: Float[Array, "B ..."]) -> list[Carry]:
    """The parts of a batch with other samples."""
    if len(carries) == 1 and len(carries[0].x) == len(x):
        return [carries[0]._replace(x=jax.device_put(x, carries[0].x.sharding))]
    sizes = [len(carry.x) for carry in carries]
    starts = itertools.accumulate(sizes, initial=0)
    return [
        carry._replace(x=rows(x, start, size)) for carry, start, size in zip(carries, starts, sizes)
    ]


def _batch(cond: PyTree) -> int:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(cond)]
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"conditions must be arrays with the same leading batch axis, such as int32[B] labels; "
            f"got the shapes {shapes}"
        )
    return shapes[0][0]


@functools.partial(Program, static_argnums=(0,))
def _compiled_init(
    sampler: Sampler,
    forward: Forward,
    params: Params,
    cond: PyTree,
    key: Array,
    uncond: PyTree,
    noise: Array | np.ndarray | None,
    image: Array | np.ndarray | None = None,
) -> Carry:
    return sampler.init(forward, params, cond, key, uncond=uncond, noise=noise, image=image)


@functools.partial(Program, static_argnums=(0,), donate_argnames=("state",))
def _compiled_step(
    sampler: Sampler,
    forward: Forward,
    params: Params,
    cond: PyTree,
    uncond: PyTree,
    x: Array,
    memory: PyTree,
    keys: Array,
    step: Array,
    *,
    state: StateDict,
) -> Carry:
    carry = Carry(x, memory, state, keys)
    return sampler.step(forward, params, carry, cond, uncond, step)
