"""Which program runs an operation: the named one, or the best one for the platform.

Every operation of this package exists several times, with equal results:

===================  ============================================================
`reference`          plain jnp: the specification
`xla`                blockwise jnp, on every platform; skipped work is not done
`pallas_tpu`         a Mosaic kernel
`pallas_gpu`         a Triton kernel
`pallas_mosaic_gpu`  a Mosaic kernel for Hopper GPUs, of some operations; asked for
                     by name alone
===================  ============================================================

The platform is that of the *lowering*, not of the machine that traces: a program compiled ahead of
time for a TPU on a computer without one has the TPU's kernel in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu", "pallas_mosaic_gpu"]

_PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda", "pallas_mosaic_gpu": "cuda"}

# What a program is lowered for names no generation of GPUs, so Hopper's kernel is never chosen.
_CHOSEN = ("pallas_tpu", "pallas_gpu")

PyTree = Any


def dispatch(
    operation: str,
    implementation: Implementation | None,
    programs: Mapping[str, Callable[..., PyTree]],
    *operands: PyTree,
    refusal: Callable[[str], str | None],
    interpret: bool = False,
) -> PyTree:
    """Run one of an operation's programs.

    Args:
        operation: name of the operation, for messages.
        implementation: which program; None takes the platform's kernel where it can run these
            operands and "xla" elsewhere. A named one that cannot run them is an error.
        programs: implementation -> function of the operands; all return equal shapes and dtypes.
        operands: trees of arrays.
        refusal: why a kernel (its name) cannot run these operands; None if it can.
        interpret: run a named Pallas kernel in interpret mode, on any platform.

    Raises:
        ValueError: for an unknown name, or `interpret` without a named kernel.
        NotImplementedError: if the named program cannot run these operands; while lowering, if it
            is a kernel of another platform.
    """
    if interpret and implementation not in _PLATFORMS:
        raise ValueError(
            f"interpret mode needs a named kernel, one of {sorted(_PLATFORMS)}; "
            f"got implementation={implementation!r}"
        )
    if implementation is None:
        kernels = {
            _PLATFORMS[name]: programs[name]
            for name in _CHOSEN
            if name in programs and not refusal(name)
        }
        if not kernels:
            return programs["xla"](*operands)
        return jax.lax.platform_dependent(*operands, default=programs["xla"], **kernels)
    if implementation not in programs:
        raise ValueError(
            f"{operation} has no implementation {implementation!r}; there are {sorted(programs)}"
        )
    program = programs[implementation]
    if implementation not in _PLATFORMS:
        return program(*operands)
    if reason := refusal(implementation):
        raise NotImplementedError(f"{operation}, implementation {implementation!r}: {reason}")
    if interpret:
        return program(*operands)
    platform = _PLATFORMS[implementation]
    message = (
        f"{operation}: the kernel {implementation!r} runs on {platform} alone. Pass "
        f"implementation=None for the best program of each platform, or interpret=True to check "
        f"its values elsewhere."
    )

    def refuse(shapes: PyTree, *operands: PyTree) -> PyTree:
        leaves, tree = jax.tree.flatten(shapes)
        outs = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        return tree.unflatten(_refusal.bind(*jax.tree.leaves(operands), outs=outs, message=message))

    # With a gradient, so that what has one can be traced too, and is refused when lowered.
    @jax.custom_vjp
    def instead(*operands: PyTree) -> PyTree:
        return refuse(jax.eval_shape(program, *operands), *operands)

    def backward(operands: tuple[PyTree, ...], _: PyTree) -> tuple[PyTree, ...]:
        gradients = refuse(jax.eval_shape(lambda *x: x, *operands), *operands)
        return jax.tree.map(_as_gradient, gradients)

    instead.defvjp(lambda *operands: (instead(*operands), operands), backward)
    return jax.lax.platform_dependent(*operands, default=instead, **{platform: program})


def _as_gradient(x: jax.Array) -> jax.Array | np.ndarray:
    floating = jnp.issubdtype(x.dtype, jnp.inexact)
    return x if floating else np.zeros(x.shape, jax.dtypes.float0)


# An equation that can be traced, and batched, but not lowered: it stands for a kernel on the
# platforms that do not have it, so that the error names the kernel and what to do.
_refusal = Primitive("refusal")
_refusal.multiple_results = True


@_refusal.def_abstract_eval
def _(*_: Any, outs: tuple, message: str) -> list[ShapedArray]:
    return [ShapedArray(shape, dtype) for shape, dtype in outs]


def _batch(operands: Any, axes: Any, *, outs: tuple, message: str) -> tuple[list, list]:
    size = next(x.shape[axis] for x, axis in zip(operands, axes) if axis is not None)
    batched = tuple(((size, *shape), dtype) for shape, dtype in outs)
    return _refusal.bind(*operands, outs=batched, message=message), [0] * len(outs)


def _lower(_: Any, *__: Any, outs: tuple, message: str) -> Any:
    raise NotImplementedError(message)


def _evaluate(*_: Any, outs: tuple, message: str) -> Any:
    raise NotImplementedError(message)


_refusal.def_impl(_evaluate)
batching.primitive_batchers[_refusal] = _batch
mlir.register_lowering(_refusal, _lower)
