"""Dense attention and the part of it that a rule lets be seen, in one pass over the keys.

DiTFastAttn keeps the residual (dense - window): a step that refreshes it needs both. A kernel keeps
two running softmaxes, over the keys that the rule shows and over the others, and merges them at the
end. Logits are computed once, and only blocks that the rule cuts meet the values twice. In XLA,
short sequences share their logits too; long ones are two attentions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array

from pallas_kernels.attention import WHOLE, dense_attention
from pallas_kernels.block_mask import Rule
from pallas_kernels.block_sparse_attention import block_sparse_attention, xla
from pallas_kernels.block_sparse_attention.heads import Arithmetic, Heads
from pallas_kernels.block_sparse_attention.operation import (
    Problem,
    check,
    heads_first,
    logit_scale,
    programs,
    refusal,
    split_mask,
)
from pallas_kernels.block_sparse_attention.steps import runs
from pallas_kernels.implementation import Implementation, dispatch
from pallas_kernels.marks import useful
from pallas_kernels.on_mesh import Cut


def dense_and_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    rule: Rule,
    *,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Attend to all keys, and attend to the keys that a rule shows.

    Use it where you need both results: kernels make them in one pass. "reference" runs two
    attentions. "xla" does so where a head has more than `attention.WHOLE` logits, or where a block
    of queries sees more than one run of keys.

    Args:
        q: [B, S, H, D], float32, bfloat16 or float16.
        k, v: [B, T, K, D] and [B, T, K, E] in q's dtype.
        rule: which keys the second result sees.
        implementation: see `pallas_kernels.implementation`.
        interpret: run a named kernel in interpret mode.

    Returns:
        `dense_attention(q, k, v)` and `block_sparse_attention(q, k, v, rule)`.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
        NotImplementedError: if the named implementation cannot run these operands.
    """
    check(q, k, v)
    split_mask(rule, q, k)
    problem = Problem(
        operation="dense_and_sparse_attention",
        mask=rule,
        arithmetic=Arithmetic(logit_scale(None, q), v.dtype.name),
        implementation=implementation,
        interpret=interpret,
        rest=True,
    )

    return _differentiable(problem, q, k, v)


# Jitted, so that the equal layers of a model trace it once.
@partial(jax.jit, static_argnums=0)
def _forward(problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    rule = problem.mask
    assert isinstance(rule, Rule)
    return dispatch(
        problem.operation,
        problem.implementation,
        {
            "reference": partial(_apart, problem, "reference"),
            "xla": partial(_xla, problem),
            "pallas_tpu": partial(_together, problem, "pallas_tpu"),
            "pallas_gpu": partial(_together, problem, "pallas_gpu"),
        },
        *(q, k, v),
        refusal=partial(refusal, problem, Heads(*heads_first(q, k, v)), None),
        cut=Cut(("b.h.",) * 3, ("b.h.",) * 2, whole="h" * (len(rule.parameters) > 1)),
        interpret=problem.interpret,
    )


def _apart(
    problem: Problem, name: Implementation, q: Array, k: Array, v: Array
) -> tuple[Array, Array]:
    assert problem.mask is not None
    dense = dense_attention(q, k, v, implementation=name)
    return dense, block_sparse_attention(q, k, v, problem.mask, implementation=name)


def _xla(problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    heads = Heads(*heads_first(q, k, v))
    mask = problem._replace(rest=False).lists(None, heads, xla)
    if q.shape[1] * k.shape[1] > WHOLE or runs(mask) is None:
        return _apart(problem, "xla", q, k, v)
    forward = partial(xla.forward_with_rest, mask, problem.arithmetic)
    dense, sparse = useful(forward, *xla.flops_with_rest(mask, heads))(heads)
    return dense.swapaxes(1, 2), sparse.swapaxes(1, 2)


def _together(problem: Problem, name: str, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    (sparse, _), (dense, _) = programs(problem)[name](Heads(*heads_first(q, k, v)), None)
    return dense.swapaxes(1, 2), sparse.swapaxes(1, 2)


def _forward_and_save(problem: Problem, *operands: Array) -> tuple[Any, Any]:
    return _forward(problem, *operands), operands


def _backward(problem: Problem, saved: Any, gradients: Any) -> Any:
    return jax.vjp(partial(_apart, problem, "xla"), *saved)[1](gradients)


_differentiable = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_differentiable.defvjp(_forward_and_save, _backward)
