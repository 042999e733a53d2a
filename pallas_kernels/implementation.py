"""Which program runs an operation: the named one, or the best one for the platform.

Every operation of this package exists several times, with equal results:

===================  ============================================================
`reference`          plain jnp: the specification
`xla`                blockwise jnp, on every platform; skipped work is not done
`pallas_tpu`         a Mosaic kernel
`pallas_gpu`         a Triton kernel
`pallas_mosaic_gpu`  a Mosaic kernel for Hopper GPUs, of some operations
===================  ============================================================

The platform is that of the *lowering*, not of the machine that traces: a program compiled ahead of
time for a TPU on a computer without one has the TPU's kernel in it. Which chip it is, the lowering
does not say; a program for CUDA has Hopper's kernels if the GPU that JAX runs on is one, or the
device of JAX's abstract mesh. `use_implementation("xla")` keeps a whole program free of kernels:
for chips that they do not compile for, and for one export that several platforms share. On several
devices kernels need to know the mesh: see `pallas_kernels.on_mesh`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib import cuda_versions  # what JAX's own kernels ask
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pallas_kernels.on_mesh import Cut, by_device

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu", "pallas_mosaic_gpu"]

_PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda", "pallas_mosaic_gpu": "cuda"}

_CHOSEN = ("pallas_tpu", "pallas_mosaic_gpu", "pallas_gpu")  # the first that can, of a platform

PyTree = Any

_unnamed = jax.make_user_context(None)  # what None stands for; a part of what JAX caches by


@contextlib.contextmanager
def use_implementation(name: Implementation | None) -> Iterator[None]:
    """Run this implementation for operations that name none, within this context.

    A function that was jitted outside of the context is traced again.

    Args:
        name: "xla" or "reference", which every operation has on every platform; None for the kernel
            of the platform, as without the context.

    Raises:
        ValueError: for another name.
    """
    if name not in ("reference", "xla", None):
        raise ValueError(
            f'use_implementation takes "xla", "reference" or None, which every operation has on '
            f"every platform; got {name!r}. Name a kernel in the call of the operation that has it"
        )
    with _unnamed(name):
        yield


def unnamed_implementation() -> Implementation | None:
    """What `use_implementation` says here."""
    return _unnamed.value


def dispatch(
    operation: str,
    implementation: Implementation | None,
    programs: Mapping[str, Callable[..., PyTree]],
    *operands: PyTree,
    refusal: Callable[[str], str | None],
    cut: Cut | None = None,
    interpret: bool = False,
) -> PyTree:
    """Run one of an operation's programs.

    Args:
        operation: name of the operation, for messages.
        implementation: which program; None takes what `use_implementation` says, without it the
            platform's kernel where it can run these operands and "xla" elsewhere. A named one that
            cannot run them is an error.
        programs: implementation -> function of the operands; all return equal shapes and dtypes.
        operands: trees of arrays.
        refusal: why a kernel (its name) cannot run these operands; None if it can.
        cut: how operands may be cut among the devices of a mesh; None leaves that to XLA's program.
        interpret: run a named Pallas kernel in interpret mode, on any platform.

    Raises:
        ValueError: for an unknown name, or `interpret` without a named kernel.
        NotImplementedError: if the named program cannot run these operands; while lowering, if it
            is a kernel of another platform, or if there are kernels in a program that is lowered
            for several platforms at once.
    """
    if interpret and implementation not in _PLATFORMS:
        raise ValueError(
            f"interpret mode needs a named kernel, one of {sorted(_PLATFORMS)}; "
            f"got implementation={implementation!r}"
        )
    if implementation is None:
        implementation = unnamed_implementation()
    if implementation is None:
        kernels: dict[str, Callable[..., PyTree]] = {}
        own = by_device(cut, *operands) if has_sizes(operands) else None
        for name in _CHOSEN if own else ():
            fits = name in programs and (name != "pallas_mosaic_gpu" or for_hopper())
            if own and fits and _PLATFORMS[name] not in kernels and not refusal(name):
                kernels[_PLATFORMS[name]] = own(_for_one_platform(operation, programs[name]))
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
    if own := by_device(cut, *operands):
        program = own(program)
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
    program = _for_one_platform(operation, program)
    return jax.lax.platform_dependent(*operands, default=instead, **{platform: program})


def for_hopper() -> bool:
    """Whether the GPU that is traced for, as far as JAX knows one, is a Hopper.

    Not under CUDA 12.8 and 12.9: JAX's own kernel says that their assembler gets masks wrong, but
    for a version that CUDA's number does not tell from others.
    """
    version = cuda_versions.cuda_runtime_get_version() if cuda_versions else 0
    if 12080 <= version < 12091:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    if device is not None:
        return re.search(r"\bG?H(20|100|200|800)\b", device.device_kind) is not None
    if jax.default_backend() != "gpu":
        return False
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def _for_one_platform(operation: str, program: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """A kernel's program, with an error of ours where it is lowered for several platforms.

    JAX lowers all branches of such a program for all of its platforms, and Pallas then complains of
    a kernel on a platform that was never meant to run it.
    """

    def checked(*operands: PyTree) -> PyTree:
        (first, *rest), tree = jax.tree.flatten(operands)
        return program(*tree.unflatten([_one_platform.bind(first, operation=operation), *rest]))

    return checked


def has_sizes(operands: PyTree) -> bool:
    """Whether shapes are numbers, as kernels need them; an export may have symbols there."""
    return all(isinstance(n, int) for leaf in jax.tree.leaves(operands) for n in leaf.shape)


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

# The identity, which is lowered for one platform alone, and for arrays of one device.
_one_platform = Primitive("one_platform")


def _lower_once(context: Any, x: Any, *, operation: str) -> list[Any]:
    platforms = tuple(context.module_context.platforms)
    if len(platforms) > 1:
        raise NotImplementedError(
            f"{operation} runs another kernel on each platform, and JAX cannot lower Pallas "
            f"kernels for several platforms {platforms} at once. Export one program for each, or "
            f'trace and export within pallas_kernels.use_implementation("xla"): a program without '
            f"kernels, which all of them share."
        )
    devices = getattr(context.module_context.axis_context, "num_devices", 1)
    if devices not in (None, 1):
        raise NotImplementedError(
            f"{operation} runs a kernel, which the compiler cannot cut for {devices} devices. "
            f"Trace the program within jax.set_mesh(mesh), the mesh that its arrays lie on, with "
            f"the axes 'data' for rows and 'model' for heads, of the type Auto; or within "
            f'pallas_kernels.use_implementation("xla"), without kernels.'
        )
    return [x]


_one_platform.def_impl(lambda x, *, operation: x)
_one_platform.def_abstract_eval(lambda x, *, operation: x)
ad.deflinear2(_one_platform, lambda gradient, x, *, operation: [gradient])
batching.defvectorized(_one_platform)
mlir.register_lowering(_one_platform, _lower_once)
