"""Sampling stage by stage (ECAR, arXiv 2412.14170): a call of the backbone, then a flow.

    for k in 1 ... S:
        z = backbone(x, labels)                        the token map of stage k, kept in a cache
        x = (s_k / e_{k-1}) U(x) + alpha n'            new noise; all of it for k = 1
        for j in 0 ... N_k - 1:                        Euler steps of the stage's own time
            v = head(x, s_k + (j / N_k) (e_k - s_k), z)
            x = x + (v_uncond + g_k (v_cond - v_uncond)) / N_k

Windows s_k ... e_k and new noise are those of the model (`effjax.layers.stages`). Guidance grows by
stage, from 1 (none) at the first one to g at the last.

All stages are one program: S calls of the backbone, whose shapes differ, and S scans of the head.
Latents have the size of the last stage all the time, those of a stage with their pixels repeated.

FLOPs of an image, with b branches of guidance, a backbone of d layers of width C and a head of m
layers of width W (an MLP inside of I channels): b 24 n C^2 d and b 4 n L C d for a stage of n
tokens after which L are there; for each step of it b n (m (6 W^2 + 4 W I) + 4 W^2 + 4 W P), and in
a head that attends b n m (14 W^2 + 4 n W) more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from effjax.autoregression.maps import MapLoop, check_kept
from effjax.caches import StageCaches
from effjax.context import PyTree, Step, is_static
from effjax.forward import Forward, Params, StateDict
from effjax.layers.scales import Scales
from effjax.layers.stages import LOWEST_GAMMA, Stages, by_token, enlarged
from effjax.loops import Carry, Loop
from effjax.models.ecar import ECARConfig
from effjax.samplers import sample_keys

Inputs = tuple[Array | None, Array | None, Array, Array | None, Scales]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("guidance", "traced_steps"),
    meta_fields=("stages", "channels", "steps", "gamma", "noise_scale", "traced"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class NextStage(MapLoop):
    """The loop that samples latents stage by stage.

    `jax.jit(loop)(forward, params, labels, key)` gives the latents of images, float32[B, H, W, I].
    Guidance is data: where the loop is an argument of a program, other numbers do not compile it
    again.

    Attributes:
        stages: those of the model.
        channels: of an image.
        steps: Euler steps of every stage.
        guidance: g of the last stage, or one number for each of them; None for no guidance, which
            halves the cost.
        gamma: covariance of new noise in a block of 2 x 2 pixels; None for that of training.
        traced: the stage of whose flow traced steps are; None where steps are static.
        traced_steps: how many steps that flow takes, float32[], in place of those of `steps`; a
            search has them as data.
    """

    stages: Stages
    channels: int
    steps: tuple[int, ...]
    guidance: float | Array | tuple[float | Array, ...] | None = None
    gamma: float | None = None
    noise_scale: float = 1.0
    traced: int | None = None
    traced_steps: Array | None = None

    @property
    def starts(self) -> tuple[int, ...]:
        """Calls of the backbone, one for each stage, and the number of all calls."""
        return (0, *accumulate(1 + steps for steps in self.steps))

    @property
    def calls(self) -> int:
        """A call of the backbone and the steps of the flow, for each stage."""
        return self.starts[-1]

    @property
    def apart(self) -> tuple[int, ...]:
        return super().apart if self.traced is None else ()

    def place(self, step: Step) -> tuple[int, Step | None]:
        """The stage of a call, and its step in the flow; None for the call of the backbone."""
        if not is_static(step):
            if self.traced is None:
                raise ValueError(
                    "stages differ in their numbers of tokens: a call's step is static"
                )
            return self.traced, step - self.starts[self.traced] - 1
        stage = sum(int(step) >= start for start in self.starts[1:])
        own = int(step) - self.starts[stage] - 1
        return stage, None if own < 0 else own

    def alike(self, step: int) -> Hashable:
        stage, own = self.place(step)
        return stage, own is None

    def program(self, call: int) -> tuple[Loop, Step]:
        stage, own = self.place(call)
        if own is None:
            return self, call
        return dataclasses.replace(self, traced=stage), np.int32(call)

    def init(
        self,
        forward: Forward,
        params: Params,
        cond: Int[Array, " B"],
        key: Any = None,
        *,
        uncond: Int[Array, " B"] | None = None,
    ) -> Carry:
        """Latents of zeros, empty caches and the keys.

        Raises:
            ValueError: if the loop is for another model or does not fit it.
        """
        self.check(forward)
        forward.check_calls(self.calls)
        batch, side = cond.shape[0], self.stages.sample_size
        x = jnp.zeros((batch, side, side, self.channels), jnp.float32)
        uncond = self.unconditional(forward, cond, uncond)
        state = self._state(forward, params, x, cond, uncond, 0)
        if forward.patches:
            last = self._state(forward, params, x, cond, uncond, self.stages.count - 1)
            check_kept(forward, state, last)
        return Carry(x, (), state, sample_keys(key, batch))

    def _state(
        self, forward: Forward, params: Params, x: Array, cond: Array, uncond: Any, stage: int
    ) -> StateDict:
        """An initial state, as the calls of a stage shape it: of the backbone and of the head."""
        first = self.starts[stage]
        _, _, labels, before, scales = self.inputs(x, cond, uncond, first)
        noisy, times, *_ = self.inputs(x, cond, uncond, first + 1)
        inputs = noisy, times, labels, before, scales
        return self.ready(forward).init(params, *inputs, guidance=self.joined)

    def check(self, forward: Forward) -> None:
        """Raise what `init` raises of the loop and the model."""
        config, count = forward.config, self.stages.count
        if not isinstance(config, ECARConfig):
            raise ValueError(f"stages are sampled of an ECAR, got {forward.model.__name__}")
        if (config.stages, config.in_channels) != (self.stages, self.channels):
            raise ValueError(
                f"the model has {config.stages} of {config.in_channels} channels, and the loop is "
                f"for {self.stages} of {self.channels}: give stages=forward.config.stages"
            )
        if len(self.steps) != count or not all(
            isinstance(each, int) and not isinstance(each, bool) and each >= 1
            for each in self.steps
        ):
            raise ValueError(
                f"steps are whole numbers of at least 1, one for each of {count} stages; got "
                f"{self.steps}"
            )
        given = self.guidance
        shape = (len(given),) if isinstance(given, tuple) else getattr(given, "shape", ())
        if shape not in ((), (count,)):
            raise ValueError(
                f"guidance is a number, or one for each of {count} stages; got {self.guidance}"
            )
        if self.gamma is not None and not LOWEST_GAMMA <= self.gamma <= 1:
            raise ValueError(
                f"gamma, the covariance of new noise in a block, lies in -1/3 ... 1; got "
                f"{self.gamma}"
            )

    def inputs(
        self,
        x: Float[Array, "B H W I"],
        cond: Int[Array, " B"],
        uncond: Int[Array, " B"] | None,
        step: Step,
    ) -> Inputs:
        """What the backbone or the head is given: tokens, times, labels, which stage it is."""
        stage, own = self.place(step)
        tokens = self.stages.tokens(self.stages.part(x, stage))
        if self.joined is not None:
            tokens = self.joined.duplicate(tokens)
            cond = self.joined.join({"cond": cond, "uncond": uncond})
        scales = self.stages.scales(stage, stage + 1)
        if own is None:
            return None, None, cond, tokens, scales
        time = jnp.asarray(own, jnp.float32) / self.flow_steps(stage)
        time = self.stages.starts[stage] + time * self.stages.span(stage)
        return tokens, jnp.full((tokens.shape[0], 1), time), cond, None, scales

    def output(
        self, raw: Float[Array, "N S O"], x: Float[Array, "B H W I"], step: Step
    ) -> Float[Array, "..."]:
        """The guided velocity of an image of a stage; token maps of the backbone as they are."""
        stage, own = self.place(step)
        if own is None:
            return raw
        if self.joined is not None:
            parts = self.joined.split(raw)
            raw = parts["uncond"] + self.scale(stage) * (parts["cond"] - parts["uncond"])
        return self.stages.image(raw, stage)

    def flow_steps(self, stage: int) -> int | Array:
        """How many steps the flow of a stage takes."""
        return self.steps[stage] if self.traced_steps is None else self.traced_steps

    def scale(self, stage: int) -> Float[Array, ""]:
        """The guidance scale of a stage."""
        given, last = jnp.asarray(self.guidance, jnp.float32), self.stages.count - 1
        if given.ndim:
            return given[stage]
        return 1 + (given - 1) * (stage / last if last else 1.0)

    def update(self, carry: Carry, out: Float[Array, "..."], step: Step) -> Carry:
        """Begin a stage with new noise, or do a step of its flow."""
        stage, own = self.place(step)
        x = self.stages.part(carry.x, stage)
        if own is None:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, stage))(carry.keys)
            noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], jnp.float32))(keys)
            noise = noise if stage == 0 else self.noise_scale * noise
            x = self.stages.jump(x, noise, stage, gamma=self.gamma)
        else:
            x = x + out / self.flow_steps(stage)
        return carry._replace(x=self.stages.whole(x, stage))

    def run(
        self,
        forward: Forward,
        params: Params,
        carry: Carry,
        cond: PyTree,
        uncond: PyTree = None,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> Carry:
        """Do the calls `start ... stop - 1`, the steps of each stage in a scan of their own.

        Raises:
            ValueError: for calls that the loop does not make.
        """
        stop, uncond = self.last(start, stop), self.unconditional(forward, cond, uncond)
        for stage, (first, after) in enumerate(zip(self.starts, self.starts[1:])):
            if start <= first < stop:
                own = forward.segments(first, first + 1)[0][0]
                carry = self.step(own, params, carry, cond, uncond, first)
            begin, end = max(first + 1, start), min(after, stop)
            if begin < end:
                flow = dataclasses.replace(self, traced=stage)
                carry = Loop.run(flow, forward, params, carry, cond, uncond, start=begin, stop=end)
        return carry

    def ready(self, forward: Forward, cond: PyTree = None) -> Forward:
        """The forward with caches."""
        if any(isinstance(patch, StageCaches) for patch in forward.patches):
            return forward
        return forward.patch(StageCaches())


def stage_loss(
    forward: Forward,
    params: Params,
    x: Float[Array, "B H W I"],
    labels: Int[Array, " B"],
    key: Key[Array, ""],
    *,
    draws: int = 1,
    coupled: bool = False,
    logit_normal: bool = False,
) -> Float[Array, ""]:
    """Sum over stages of the mean squared error of velocities, end - start; all in one call.

    The backbone reads the noisy ends of the stages before, which is what it reads in sampling.

    Args:
        forward: an ECAR without caches.
        params: its parameters.
        x: images, or latents, of full size.
        labels: class of each image, `num_classes` for none.
        key: for noise and times.
        draws: times of each token (a head that attends: of each stage) for one call of the
            backbone.
        coupled: make the noise of a stage of that of the stage before as sampling does (see
            `Stages.noises`), in place of noise that is independent.
        logit_normal: draw times as the sigmoid of normal numbers, in place of evenly.
    """
    config, stages = forward.config, forward.config.stages
    key_noise, key_time = jax.random.split(key)
    noises = stages.noises(key_noise, x.shape[0], config.in_channels, coupled=coupled)
    ends = [stages.end(x, noise, stage) for stage, noise in enumerate(noises)]
    starts = [stages.start(x, noise, stage) for stage, noise in enumerate(noises)]
    read = [jnp.zeros_like(ends[0]), *(enlarged(end, 2) for end in ends[:-1])]
    before, start, end = (
        jnp.concatenate([stages.tokens(each) for each in maps], axis=1)
        for maps in (read, starts, ends)
    )
    scales = stages.scales(0, stages.count)
    windows = [jnp.asarray(each)[None, :, None] for each in (stages.starts, stages.ends)]
    if config.head != "dit":
        windows = [by_token(each, scales) for each in windows]
    first, last = windows
    shape = draws * x.shape[0], first.shape[1], 1
    local = (
        jax.nn.sigmoid(jax.random.normal(key_time, shape))
        if logit_normal
        else jax.random.uniform(key_time, shape)
    )
    times, local = first + local * (last - first), by_token(local, scales)
    start, velocity = (jnp.tile(each, (draws, 1, 1)) for each in (start, end - start))
    noisy = start + local * velocity
    found, _ = forward(params, {}, noisy, times[..., 0], labels, before, scales)
    by_place = jnp.mean(jnp.square(found - velocity), axis=(0, 2))
    sizes = np.asarray(scales.sizes)
    return jnp.sum(by_place / np.repeat(sizes, sizes).astype(np.float32))
