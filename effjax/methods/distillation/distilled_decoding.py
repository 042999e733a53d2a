"""Distilled Decoding 1: images of an autoregressive model in one or two calls (arXiv 2412.17153).

Use it where calls are what costs: small batches, on machines that read weights slower than they
multiply. It takes training, without any data but what the model makes itself, and loses quality: on
ImageNet, 256 pixels, one call of VAR-d16's student has FID 9.94 and two have 7.82, where ten calls
of VAR-d16 have 4.19.

    pairs    (noise, tokens, label): the model samples, with tokens that follow from noise by the
             flow map (`effjax.autoregression.flow_map`) of the law after guidance, top-k and top-p
    student  a model that is given the codes of the first tokens and the noise of all others, and
             predicts all tokens (`effjax.models.distilled_var`, `distilled_llamagen`); it begins as
             a copy of the model
    loss     cross entropy of the tokens that are not given, and the distance of the images of what
             it predicts as vectors; where it is given codes up to is drawn among `starts`
    sampling `effjax.autoregression.few_step`

The plan is static, and so is the student; where calls start is data while it samples. Weights are
those of the model with new rows, marks and a second head: 24 L C^2 d + 4 P C d + 2 L C V FLOPs a
call, for P visible pairs of L slots, where VAR's calls have twice the first and third term for
guidance.

The paper's distance is LPIPS, whose weights are not here: images are compared by their squared
error, or latents or codes are. Training and pairs are not among the released code; they follow the
paper's description.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax import testing
from effjax.autoregression import (
    FewScales,
    FewStep,
    FewTokens,
    FlowSolver,
    MappedScales,
    MappedTokens,
    NextScale,
    NextToken,
)
from effjax.autoregression.few_step import quantizer_of
from effjax.calibration import Samples
from effjax.fields import Checked, Count, Natural, NotNegative, Positive
from effjax.forward import Forward, Params, abstract, flatten_params, nest_params
from effjax.loops import Loop
from effjax.models.distilled_llamagen import DistilledLlamaGen
from effjax.models.distilled_var import DistilledVAR, grown
from effjax.models.llamagen import LlamaGen
from effjax.models.var import VAR
from effjax.quant import QTensor
from effjax.samplers import sample_keys
from effjax.transform import Method, Pair, Plan, Transform

NAME = "distilled_decoding"
CHUNK = 64  # samples of a program that makes pairs

Distance = Literal["images", "latents", "codes"]


def _copied(name: str, given: Any, new: Any, config: Any) -> Any:
    """A table that student and model share, or a new one."""
    return new if given is None else given


@dataclasses.dataclass(frozen=True)
class Kind:
    """What belongs to a kind of model.

    Attributes:
        loop: that samples it.
        student: the class of its students.
        few: the loop of these.
        mapped: the model's with the flow map, for pairs.
        grown: makes a table of a student of that of the model.
        held: fields of a student that a plan says and the model does not.
    """

    loop: type[Loop]
    student: Any
    few: Any
    mapped: Any
    grown: Callable[[str, Any, Any, Any], Any] = _copied
    held: tuple[str, ...] = ()


KINDS = {
    VAR: Kind(NextScale, DistilledVAR, FewScales, MappedScales, grown),
    LlamaGen: Kind(NextToken, DistilledLlamaGen, FewTokens, MappedTokens, held=("code_channels",)),
}


@dataclasses.dataclass(frozen=True)
class DistilledPlan(Plan):
    """How a student samples, and how its pairs are made.

    Attributes:
        starts: the first scale (of LlamaGen: token) that each call predicts; 0 alone for one call.
        split: the first one whose tokens stay vectors; the number of scales or tokens for none.
        kind: solver of the flow map, "euler" or "2m" (of second order).
        solver_steps: its steps; "euler" needs four times as many as "2m".
        noise_std: standard deviation of the noise, see `FlowSolver`: take that of the codes where
            it is much smaller than 1.
        code_channels: of a code of the VQ model of a LlamaGen, which does not know it.
    """

    starts: tuple[Natural, ...] = (0, 5)
    split: Natural = 5
    kind: Literal["euler", "2m"] = "2m"
    solver_steps: Count = 50
    noise_std: Positive = 1.0
    code_channels: Count = 8

    @property
    def solver(self) -> FlowSolver:
        """Of the flow map."""
        return FlowSolver(self.kind, self.solver_steps, noise_std=self.noise_std)

    def describe(self) -> str:
        """Calls in a line."""
        calls = ", ".join(f"from {start}" for start in self.starts)
        return f"{len(self.starts)} calls ({calls}); vectors from {self.split} on"


def transform(plan: DistilledPlan, learned: Params | None = None) -> Transform:
    """The transform of a VAR or a LlamaGen to its student.

    Args:
        plan: how it samples.
        learned: the student's parameters, of `fit`; those that training begins with if None.

    The transform raises a ValueError for another model, one that methods changed, and plans that do
    not fit it.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        student, start = initial(plan, forward, params)
        return student, start if learned is None else learned

    return Transform(NAME, plan, apply, shapes=lambda forward, params: (forward, params))


def initial(plan: DistilledPlan, forward: Forward, params: Params, *, seed: int = 0) -> Pair:
    """The student that training begins with: the model's parameters, and new ones.

    Raises:
        ValueError: as `transform`.
    """
    kind = KINDS.get(forward.model)
    if kind is None or forward.patches:
        methods = ", ".join(name for name, _ in forward.recipe)
        raise ValueError(
            f"students are made of {_either()} without other methods, got a "
            f"{forward.model.__name__}{f' with {methods}' if methods else ''}: distill first, then "
            f"apply others"
        )
    held = flatten_params(params)
    if packed := [name for name, leaf in held.items() if isinstance(leaf, QTensor)]:
        raise ValueError(
            f"students are made of floats, and {packed[0]} is quantized: load the model in floats"
        )
    own = {name: getattr(plan, name) for name in ("starts", "split", "noise_std", *kind.held)}
    config = kind.student.Config(**dataclasses.asdict(forward.config), **own)
    student, shapes = abstract(kind.student, config)
    rng = np.random.default_rng(seed)

    def new(name: str, shape: tuple[int, ...]) -> Array:
        scale = 0.0 if name.endswith("bias") else 0.02
        values = np.clip(rng.standard_normal(shape), -2, 2) * scale
        return jnp.asarray(values, config.param_dtype)

    made = {
        name: kind.grown(name, held.get(name), new(name, leaf.shape), forward.config)
        for name, leaf in flatten_params(shapes).items()
    }
    return student, nest_params(made)


def _either() -> str:
    return " or ".join(f"a {model.__name__}" for model in KINDS)


def _kind(loop: Loop) -> Kind:
    """What belongs to a loop.

    Raises:
        ValueError: for one whose models have no students.
    """
    for kind in KINDS.values():
        if isinstance(loop, kind.loop):
            return kind
    raise ValueError(
        f"pairs are samples of {_either()}, token by token or scale by scale; got a loop "
        f"{type(loop).__name__}"
    )


# --- pairs --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Tokens of a model, and the labels and noise that they follow from.

    Attributes:
        tokens: int32[M, L].
        labels: int32[M].
        key: of the noise of all pairs; that of pair i follows from it and i.
    """

    tokens: np.ndarray
    labels: np.ndarray
    key: Array

    def batches(self, rows: int, seed: int) -> Callable[[int], Iterator[tuple[np.ndarray, ...]]]:
        """What `effjax.training.train` takes: tokens, labels and numbers of pairs that are drawn.

        Every step draws among all pairs.
        """

        def start(step: int) -> Iterator[tuple[np.ndarray, ...]]:
            while True:
                rng = np.random.default_rng((seed, step))
                own = rng.integers(0, len(self.tokens), rows).astype(np.int32)
                yield self.tokens[own], self.labels[own], own
                step += 1

        return start


def make_pairs(
    plan: DistilledPlan,
    forward: Forward,
    params: Params,
    data: Samples,
    count: int,
    *,
    folder: Path | None = None,
    progress: bool = True,
) -> Pairs:
    """Sample a model with the flow map, so often.

    Args:
        plan: for the solver.
        forward, params: the model.
        data: its loop, and the labels that are drawn.
        count: pairs, at least; whole programs of `CHUNK` are run.
        folder: where parts are kept, so that another run goes on; None keeps none.
        progress: show a bar.

    Raises:
        ValueError: for the loop of a model that has no students, and a folder whose pairs were
            made otherwise.
    """
    from tqdm.auto import trange

    from effjax.training import same_run, write_whole  # takes optax

    loop = mapped_loop(plan, data.sampler)
    key = jax.random.key(data.seed)

    @jax.jit
    def sample(loop: Any, params: Params, labels: Array, keys: Array) -> Array:
        return loop.sample(forward, params, labels, keys)[1]

    tokens, labels = [], []
    if folder is not None:
        same_run(folder, _said(loop, forward, params, data))
    for part in trange(math.ceil(count / CHUNK), desc="pairs", disable=not progress):
        file = None if folder is None else folder / f"pairs_{part:06d}.npy"
        labels.append(np.asarray(data.conditions(CHUNK, part)))
        if file is not None and file.is_file():
            tokens.append(np.load(file))
            continue
        keys = sample_keys(key, CHUNK, first=part * CHUNK)
        tokens.append(np.asarray(sample(loop, params, labels[-1], keys)))
        if file is not None:
            write_whole(file, lambda partial: np.save(partial, tokens[-1]))
    return Pairs(np.concatenate(tokens), np.concatenate(labels), key)


def _said(loop: Any, forward: Forward, params: Params, data: Samples) -> dict[str, str]:
    """What pairs depend on."""
    from effjax.training import digest

    values = {field.name: getattr(loop, field.name) for field in dataclasses.fields(loop)}
    decoder, codes = values.pop("vae")
    return {
        "model": f"{forward.model.__name__}({forward.config})",
        "autoencoder": f"{decoder.model.__name__}({decoder.config})",
        "weights": digest(params, codes),
        "labels": digest(data.conditions(CHUNK, 0)),
        "seed": str(data.seed),
        **{name: str(value) for name, value in values.items()},
    }


# --- training -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fitting(Checked):
    """Training of a student.

    Attributes:
        pairs: noise and tokens that the model makes before training begins.
        steps: of AdamW.
        learning_rate: rises in the first steps, then falls to a hundredth along a cosine.
        batch: pairs of a step.
        distance: what is compared of predicted vectors: decoded "images", "latents" or "codes".
        weight: of that distance, beside the cross entropy. Latents and codes are compared as a
            share of their own mean square, so that no scale of codes matters.
    """

    pairs: Count = 100_000
    steps: Count = 20_000
    learning_rate: Positive = 1e-4
    batch: Count = 32
    distance: Distance = "images"
    weight: NotNegative = 1.0


def student_loss(
    forward: Forward,
    params: Params,
    loop: FewStep,
    tokens: Int[Array, "B L"],
    noise: Float[Array, "B L Z"],
    labels: Int[Array, " B"],
    known: Int[Array, " B"],
    *,
    distance: Distance = "images",
    weight: float = 1.0,
) -> Float[Array, ""]:
    """Cross entropy and distance of what a student predicts of the tokens that it is not given.

    Args:
        forward, params: the student.
        loop: the student's.
        tokens, noise, labels: of pairs.
        known: how many first tokens are given.
        distance, weight: see `Fitting`.
    """
    data = quantizer_of(loop.vae).vectors(tokens)
    given = jnp.arange(tokens.shape[1]) < known[:, None]
    slots = jnp.where(given[..., None], data, noise)
    logits, vectors = forward(params, {}, slots, labels, known)[0]
    entropies = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    asked = jnp.logical_not(given).astype(jnp.float32)
    entropy = jnp.sum(entropies * asked) / jnp.sum(asked)
    made = jnp.where(given[..., None], data, vectors)
    if distance == "codes":
        own = jnp.sum(jnp.square(data) * asked[..., None])
        return entropy + weight * jnp.sum(jnp.square(made - data)) / own
    pair = [loop.latents(each) for each in (made, data)]
    if distance == "images":
        decoder, weights = loop.vae
        pair = [decoder(weights, {}, each)[0].astype(jnp.float32) for each in pair]
    own = 1.0 if distance == "images" else jnp.mean(jnp.square(pair[1]))
    return entropy + weight * jnp.mean(jnp.square(pair[0] - pair[1])) / own


def fit(
    plan: DistilledPlan,
    fitting: Fitting,
    forward: Forward,
    params: Params,
    data: Samples,
    *,
    checkpoints: Path | None = None,
    progress: bool = True,
) -> tuple[Params, dict[str, Any]]:
    """Make pairs, and train a student on them.

    Args:
        plan, fitting: what is trained, and how.
        forward, params: the model.
        data: its loop and labels.
        checkpoints: folder of pairs and orbax checkpoints; a second run resumes. None keeps none.
        progress: show bars.

    Returns:
        The moving average of the student's parameters, and the log of `effjax.training.train`.

    Raises:
        ValueError: as `transform` and `make_pairs`.
    """
    import optax  # not wanted by those who only sample

    from effjax.training import train

    student, start = initial(plan, forward, params)
    folder = None if checkpoints is None else Path(checkpoints)
    made = make_pairs(
        plan,
        forward,
        params,
        data,
        fitting.pairs,
        folder=None if folder is None else folder / "pairs",
        progress=progress,
    )
    few: Any = student_loop(data.sampler, student)
    firsts = jnp.asarray(few.bounds, jnp.int32)[np.asarray(plan.starts)]

    def loss(params: Params, batch: Any, key: Array, codes: Params, noise_key: Array) -> Array:
        tokens, labels, numbers = batch
        keys = jax.vmap(lambda number: jax.random.fold_in(noise_key, number))(numbers)
        noise = few.noise(keys, student.config.code_channels)
        known = firsts[jax.random.randint(key, labels.shape, 0, len(firsts))]
        loop = dataclasses.replace(few, vae=(few.vae[0], codes))
        options = {"distance": fitting.distance, "weight": fitting.weight}
        return student_loss(student, params, loop, tokens, noise, labels, known, **options)

    warm = min(500, fitting.steps // 10 + 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, fitting.learning_rate, warm, max(fitting.steps, warm + 1), fitting.learning_rate / 100
    )
    trained = train(
        loss,
        start,
        made.batches(fitting.batch, data.seed),
        steps=fitting.steps,
        key=jax.random.key(data.seed),
        transform=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95)),
        constants=(few.vae[1], made.key),
        checkpoints=None if folder is None else folder / "training",
        progress=progress,
    )
    return trained.average, trained.log


def _fit(
    plan: DistilledPlan,
    fitting: Fitting,
    forward: Forward,
    params: Params,
    data: Samples,
    *,
    checkpoints: Path | None = None,
) -> Params:
    return fit(plan, fitting, forward, params, data, checkpoints=checkpoints)[0]


def mapped_loop(plan: DistilledPlan, loop: Loop) -> Any:
    """The loop of a model with the flow map in place of draws."""
    return _kind(loop).mapped.of(loop, plan.solver)


def student_loop(loop: Loop, forward: Forward) -> FewStep:
    """The loop of a student, in the place of its model's."""
    return _kind(loop).few.of(loop, forward.config)


def _ladder(subject: testing.Subject) -> tuple[DistilledPlan, ...]:
    return tuple(DistilledPlan(starts, split=3) for starts in ((0, 1, 2), (0, 2), (0,)))


METHOD = Method(
    name=NAME,
    paper="Distilled Decoding 1: One-step Sampling of Image Auto-regressive Models with Flow "
    "Matching, arXiv 2412.17153",
    seams=("leaves", "patches", "loops"),
    domain="images",
    plan=DistilledPlan,
    transform=transform,
    identity=lambda subject: DistilledPlan((0, 1, 2, 3), split=4),
    ladder=_ladder,
    tiny=partial(testing.tiny_var, patch_nums=(1, 2, 2, 3)),
    systems=("Distilled Decoding",),
    data=Samples,
    fitting=Fitting,
    fit=_fit,
    loop=student_loop,
)
