"""A walk through the blocks of a model, with all inputs that batches give them.

Methods that fit quantized values look at one block at a time, so that what is held are the inputs
of one block. Any model will do whose blocks stand in a `Stack`: language models, diffusion
transformers with one stream or several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool
from tqdm.auto import tqdm

from effjax.calibration import Sequences, Trajectory
from effjax.capture import stack_inputs
from effjax.context import Layout, PyTree, tokens_as
from effjax.forward import METHODS, Forward, Params, flatten_params, nest_params
from effjax.generate import Prompts
from effjax.generate.arguments import padded
from effjax.layers.linear import Linear
from effjax.layers.stack import Stack
from effjax.quant import QTensor
from effjax.targets import TargetModule, original, target_modules

Batches = Sequence[tuple[PyTree, ...]]
"""Tuples of a forward's inputs."""


@dataclasses.dataclass(frozen=True)
class BlockInputs:
    """What one batch gives the blocks of a stack.

    Attributes:
        inputs: (x, *conditioning) of the next block.
        valid: which tokens count; None for all.
        layout: what the tokens are.
    """

    inputs: tuple[PyTree, ...]
    valid: Bool[Array, "B S"] | None
    layout: Layout | None


# A block and the inputs that every batch gives it, to new kernels by their layers' paths in it.
Visit = Callable[[TargetModule, Sequence[BlockInputs]], Mapping[str, QTensor]]


def walk(
    forward: Forward,
    params: Params,
    batches: Batches,
    visit: Visit,
    *,
    name: str,
    progress: bool = True,
) -> None:
    """Visit every block in the order in which the model calls them.

    Kernels that a visit returns take their layers' places, so that later blocks are given what the
    blocks before them make with these kernels. Patches of the forward are left out.

    Args:
        forward, params: the model.
        batches: tuples of the forward's inputs.
        visit: called once for each block.
        name, progress: of a bar over the blocks, and whether to show it.

    Raises:
        ValueError: without batches.
    """
    if not len(batches):
        raise ValueError("there are no batches to calibrate with")
    plain = dataclasses.replace(forward, patches=())
    found = stacks(plain.target_modules(params))
    bar = tqdm(
        total=sum(len(stack.module) for stack in found),  # pyright: ignore[reportArgumentType]
        desc=name,
        disable=not progress,
        leave=False,
    )
    with bar:
        for stack in found:
            assert isinstance(stack.module, Stack)
            held = [_entering(plain, params, stack.path, inputs) for inputs in batches]
            changed: dict[str, QTensor] = {}
            for place, block in enumerate(stack.module):
                target = TargetModule(f"{stack.path}.{place}", original(block))
                own = visit(target, held)
                for layer in target_modules(target.module, Linear):
                    if layer.path in own:
                        leaf = changed[f"{target.path}.{layer.path}"] = own[layer.path]
                        setattr(layer.module, "kernel", nnx.Param(leaf))  # noqa: B010
                graph, variables = nnx.split(target.module)
                for number, batch in enumerate(held):
                    x = _run(graph, batch.layout, variables, batch.inputs)
                    inputs = (x, *batch.inputs[1:])
                    held[number] = dataclasses.replace(batch, inputs=inputs)
                bar.update()
            made = {path: partial(_instead, leaf) for path, leaf in changed.items()}
            params = with_kernels(params, made)


def stacks(targets: Sequence[TargetModule]) -> list[TargetModule]:
    """The stacks of a model that stand in no block of another."""
    found: list[TargetModule] = []
    for target in targets:
        inside = any(target.path.startswith(f"{outer.path}.") for outer in found)
        if isinstance(target.module, Stack) and not inside:
            found.append(target)
    return found


def with_kernels(
    params: Params, made: Mapping[str, Callable[[jax.Array], jax.Array | QTensor]]
) -> Params:
    """Parameters with other kernels, each made from the old one, by the path of its layer."""
    flat = flatten_params({name: leaf for name, leaf in params.items() if name != METHODS})
    flat |= {f"{path}.kernel": make(flat[f"{path}.kernel"]) for path, make in made.items()}
    learned = {METHODS: params[METHODS]} if METHODS in params else {}
    return nest_params(flat) | learned


def valid_rows(x: Array, valid: Array | None) -> tuple[Array, Array]:
    """Float32 values [..., C] with zeros for padding, and which tokens count, float32[...].

    Args:
        x: [..., C].
        valid: [B, S], of values [..., B, S, C]; others have no padding.
    """
    x = x.astype(jnp.float32)
    if valid is None or x.shape[-3:-1] != valid.shape:
        return x, jnp.ones(x.shape[:-1], jnp.float32)
    kept = jnp.broadcast_to(valid, x.shape[:-1])
    return jnp.where(kept[..., None], x, 0), kept.astype(jnp.float32)


def texts(rows: Prompts) -> tuple[PyTree, ...]:
    """One batch of a language model's inputs, of texts of any lengths: each token counts once.

    Args:
        rows: token ids, a row for every text.
    """
    tokens, lengths = padded(rows)
    if lengths.min() == lengths.max():
        return (jnp.asarray(tokens),)
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return jnp.asarray(tokens), jnp.where(columns < lengths[:, None], columns, -1)


def along(forward: Forward, params: Params, data: Trajectory) -> Batches:
    """What a sampler gives a model, at each of its calls.

    Of a loop whose calls read what earlier ones kept it is one call of the whole run.

    Args:
        forward, params: the model.
        data: what is sampled.
    """
    sampler, cond = data.sampler.alone, data.cond
    uncond = sampler.unconditional(forward, cond, data.uncond)
    if sampler.apart:
        return [_whole(sampler, forward, params, cond, data.key, uncond)]
    carry = sampler.init(forward, params, cond, data.key, uncond=uncond)
    step = jax.jit(sampler.step)
    found = []
    for number in range(sampler.calls):
        found.append(sampler.inputs(carry.x, cond, uncond, number))
        carry = step(forward, params, carry, cond, uncond, number)
    return found


def inputs_of(forward: Forward, params: Params, data: Sequences | Trajectory) -> Batches:
    """What a model is called with: texts of a language model, or what a sampler gives it."""
    if isinstance(data, Trajectory):
        return along(forward, params, data)
    return [(jnp.asarray(data.calibration()),)]


@jax.jit
def _whole(
    sampler: Any, forward: Forward, params: Params, cond: PyTree, key: Array, uncond: PyTree
) -> tuple[PyTree, ...]:
    carry = sampler.init(forward, params, cond, key, uncond=uncond)
    return sampler.whole(sampler.run(forward, params, carry, cond, uncond), cond, uncond)


def _entering(
    forward: Forward, params: Params, path: str, inputs: tuple[PyTree, ...]
) -> BlockInputs:
    inputs = jax.tree.map(jnp.asarray, inputs)
    given, valid = _first(forward, path, params, inputs)
    return BlockInputs(given, valid, forward.layout(params, *inputs))


@partial(jax.jit, static_argnums=1)
def _first(
    forward: Forward, path: str, params: Params, inputs: tuple[PyTree, ...]
) -> tuple[tuple[PyTree, ...], Array | None]:
    valid = forward.module(params).valid_tokens(*inputs)
    return stack_inputs(forward, params, inputs, path), valid


@partial(jax.jit, static_argnums=(0, 1))
def _run(
    graph: nnx.GraphDef, layout: Layout | None, variables: Any, inputs: tuple[PyTree, ...]
) -> PyTree:
    with tokens_as(layout):
        return nnx.merge(graph, variables, copy=True)(*inputs)


def _instead(leaf: QTensor, kernel: Any) -> QTensor:
    return leaf
