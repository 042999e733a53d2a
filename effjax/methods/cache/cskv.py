"""CSKV: low-rank features of keys and values in place of keys and values.

Buys: at a mean density of 0.2 a fifth of the cache, with 4-bit values a twentieth; attention
itself gets no cheaper, and keys are rebuilt tile by tile at every step.

    c_k = x A_k,  k = rotary(c_k B_k)      R_k = int(k_density D) K features for all heads together
    c_v = x A_v,  v = c_v B_v              R_v likewise

Tokens of the window that is being filled (see `residual_buffer`) stay exact, and so does all of a
prompt while it reads itself. B_v is applied to what attention gives, not to every token:
softmax(s) (C B) = (softmax(s) C) B. Between keys and B_k stands the rotation, so they are rebuilt.

A and B begin as a singular value decomposition of the projection, weighted by the mean magnitudes
of its inputs (ASVD): diag(s) W = U S V^T, s = mean|x|^alpha; A = diag(1/s) U sqrt(S),
B = sqrt(S) V^T. `fit` then trains them, and nothing else, to rebuild what the layers' projections
make of their inputs; with `bits` it rounds in the middle, with gradients straight through.

Static: ranks, window, bits. Dynamic: scales. Cost: for each token and layer (R_k + R_v) bits / 8
bytes, with quantized values two floats a channel and window (keys) and a token and head (values);
one window of floats. Projections with biases have one feature that is always 1.

Source: CSKV, arXiv 2409.10593, with the offsets of quantized values as floats (the released code
    clips a
group whose values share a sign). ASVD: arXiv 2312.05821.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax import capture, testing
from effjax.calibration import Sequences
from effjax.context import CacheLength, Context, PyTree
from effjax.fields import Checked, Count, Positive, Range
from effjax.forward import METHODS, Forward, Params, flatten_params, nest_params
from effjax.layers.attention import CausalAttention, CausalCore, Heads, KeyHeads
from effjax.layers.cache_quantization import FLOAT, Bits, pack, to_qvalues, unpack
from effjax.layers.kv_cache import Caches, Kind, Lengths
from effjax.layers.linear import dot
from effjax.layers.residual_buffer import Arrays, ResidualBufferCache, Tokens
from effjax.quant import QTensor
from effjax.targets import target_modules
from effjax.transform import Method, Pair, Plan, Transform
from pallas_kernels.decode_attention import low_rank_decode_attention

NAME = "cskv"

Density = Annotated[float, Range(0, 1, above=True)]

# By path of a core: down_k [C, R_k], up_k [R_k, K D], down_v [C, R_v], up_v [R_v, K D].
Factors = dict[str, dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class CSKVPlan(Plan):
    """Ranks, window and bits.

    Attributes:
        k_density, v_density: kept share of the channels of a head, rounded down to whole ones; keys
            need fewer than values.
        window: W tokens.
        bits: of the features: 16 (floats), 8 or 4.
    """

    k_density: Density = 0.25
    v_density: Density = 0.75
    window: Count = 32
    bits: Bits = FLOAT

    def ranks(self, head_dim: int, kv_heads: int) -> tuple[int, int]:
        """R_k and R_v, for all heads together.

        Raises:
            ValueError: if a density leaves no channel, or an odd number for 4-bit values.
        """
        found = []
        for name in ("k_density", "v_density"):
            # What a product of decimals lacks to a whole number is no channel less.
            rank = int(getattr(self, name) * head_dim + 1e-9) * kv_heads
            if rank == 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} keeps none of the {head_dim} channels of a "
                    f"head; take at least {1 / head_dim:g}"
                )
            if self.bits == 4 and rank % 2:
                raise ValueError(
                    f"{name}={getattr(self, name)} keeps {rank} channels of {kv_heads} heads "
                    f"together, and bits=4 puts two into a byte: take a density that keeps an even "
                    f"number, or bits=8"
                )
            found.append(rank)
        return found[0], found[1]

    def describe(self) -> str:
        """Densities and bits in a line."""
        share = (self.k_density + self.v_density) / 2 * self.bits / FLOAT
        return (
            f"keys {self.k_density:g}, values {self.v_density:g} of the channels, "
            f"{self.bits} bits: {share:.3f} of the cache; the last 1 ... {self.window} exact"
        )


def magnitudes(
    forward: Forward, params: Params, batches: Iterable[np.ndarray | Array]
) -> dict[str, Array]:
    """Mean magnitudes of the channels that keys and values are made of, by path of a core.

    Args:
        forward, params: the model, without a cache.
        batches: token ids int32[B, S].
    """
    inputs = ((jnp.asarray(tokens),) for tokens in batches)
    found = capture.statistics(forward, params, inputs, kind=CausalCore, what="input3")
    return {path: each.absmean for path, each in found.items()}


def factors(
    plan: CSKVPlan,
    forward: Forward,
    params: Params,
    magnitudes: Mapping[str, Array] | None = None,
    *,
    alpha: float = 0.5,
) -> Factors:
    """The start of `fit`: decompositions of the projections.

    Args:
        magnitudes: see the function of that name; None weighs all inputs alike (SVD).
        alpha: their exponent.

    Raises:
        ValueError: for ranks above those of the projections, statistics of another model, or a
            model whose keys are normalized.
    """
    made: Factors = {}
    for path, attn in _attentions(forward, params).items():
        if attn.q_norm is not None:
            raise ValueError(
                "this model normalizes keys after their projection (qk_norm), which low-rank "
                "features do not rebuild; use kivi or snap_kv"
            )
        if magnitudes is None:
            weights = None
        elif path in magnitudes and magnitudes[path].shape == (attn.to_k.kernel.shape[0],):
            weights = (magnitudes[path] + 1e-6) ** alpha
        else:
            raise ValueError(f"the magnitudes are those of another model: {path} does not fit")
        made[path] = {}
        ranks = plan.ranks(attn.head_dim, attn.kv_heads)
        for name, layer, rank in zip("kv", (attn.to_k, attn.to_v), ranks, strict=True):
            if rank > min(layer.kernel.shape):
                raise ValueError(
                    f"rank {rank} is above that of {path}'s projection {layer.kernel.shape}; take "
                    f"a lower {name}_density"
                )
            bias = None if layer.bias is None else layer.bias.get_value()
            pair = _decompose(layer.kernel.get_value(), bias, weights, rank)
            down, up = (part.astype(forward.config.param_dtype) for part in pair)
            made[path] |= {f"down_{name}": down, f"up_{name}": up}
    return made


@partial(jax.jit, static_argnums=3)
def _decompose(
    kernel: Float[Array, "I O"] | QTensor,
    bias: Float[Array, " O"] | None,
    weights: Float[Array, " I"] | None,
    rank: int,
) -> tuple[Float[Array, "I R"], Float[Array, "R O"]]:
    matrix = kernel.restore() if isinstance(kernel, QTensor) else kernel.astype(jnp.float32)
    scales = jnp.ones(matrix.shape[0]) if weights is None else weights
    left, singular, right = jnp.linalg.svd(scales[:, None] * matrix, full_matrices=False)
    root = jnp.sqrt(singular[:rank])
    down, up = left[:, :rank] * root / scales[:, None], root[:, None] * right[:rank]
    if bias is not None:  # the last feature is 1
        down, up = down.at[:, -1].set(0.0), up.at[-1].set(bias.astype(jnp.float32))
    return down, up


def fit(
    plan: CSKVPlan,
    forward: Forward,
    params: Params,
    start: Factors,
    batches: Callable[[int], Iterator[Any]],
    *,
    steps: int,
    learning_rate: float = 5e-5,
    checkpoints: Path | None = None,
    progress: bool = True,
) -> tuple[Factors, dict[str, Any]]:
    """Train factors to rebuild keys and values, each layer from its own exact inputs.

    The loss is the sum over layers of the mean squared errors of keys and of values. Keys are
    compared before their rotation, which changes no length.

    Args:
        forward, params: the model, without a cache; it stays as it is.
        start: of `factors`.
        batches: token ids int32[B, S] of all steps from the one with this number on; S is a
            multiple of the window if the plan has bits.
        steps, learning_rate: of AdamW, falling linearly to 0.
        checkpoints: folder of orbax checkpoints; a second run resumes. None keeps none.
        progress: show a bar.

    Returns:
        The trained factors, and the log of `effjax.training.train`.

    Raises:
        ValueError: for texts that are no whole windows.
    """
    import optax  # not wanted by those who only decode

    from effjax.training import train

    def loss(trained: Factors, batch: Array, key: Array, params: Params) -> Array:
        return reconstruction_loss(plan, forward, params, trained, batch)

    schedule = optax.linear_schedule(learning_rate, 0.0, steps)
    trained = train(
        loss,
        start,
        batches,
        steps=steps,
        key=jax.random.key(0),
        transform=optax.adamw(schedule),
        constants=(params,),
        checkpoints=checkpoints,
        progress=progress,
    )
    return trained.params, trained.log


def reconstruction_loss(
    plan: CSKVPlan,
    forward: Forward,
    params: Params,
    trained: Factors,
    tokens: Int[Array, "B S"],
) -> Float[Array, ""]:
    """Sum over layers of the mean squared errors of rebuilt keys and values.

    Raises:
        ValueError: for texts that are no whole windows, if the plan has bits.
    """
    if plan.bits != FLOAT and tokens.shape[1] % plan.window:
        raise ValueError(
            f"texts of {tokens.shape[1]} tokens are no whole windows of {plan.window}; cut them"
        )
    inputs = capture.tap(forward, params, (tokens,), kind=CausalCore, what="input3")
    total = jnp.float32(0.0)
    for path, attn in _attentions(forward, params).items():
        x = inputs[path]
        for name, layer in {"k": attn.to_k, "v": attn.to_v}.items():
            c = _features(x, trained[path][f"down_{name}"], constant=forward.config.qkv_bias)
            if plan.bits != FLOAT:
                c = _rounded(c, plan, attn.kv_heads, keys=name == "k")
            rebuilt = dot(c, trained[path][f"up_{name}"])
            total += jnp.mean(jnp.square((layer(x) - rebuilt).astype(jnp.float32)))
    return total


def _features(
    x: Float[Array, "B S C"], down: Float[Array, "C R"], *, constant: bool
) -> Float[Array, "B S R"]:
    c = dot(x, down)
    return c.at[..., -1].set(1) if constant else c


def _grouped(
    c: Float[Array, "B S R"], plan: CSKVPlan, heads: int, *, keys: bool
) -> tuple[Float[Array, "B N W G"], int]:
    """Features with those that share a scale along the axis that is returned.

    Keys: the tokens of a window; alone in it, a token is quantized as values are: a head's
        features.
    """
    batch, tokens, rank = c.shape
    if keys and plan.window > 1:
        return c.reshape(batch, tokens // plan.window, plan.window, rank), 2
    return c.reshape(batch, tokens, heads, rank // heads), 3


def _rounded(
    c: Float[Array, "B S R"], plan: CSKVPlan, heads: int, *, keys: bool
) -> Float[Array, "B S R"]:
    """Rounded features, with gradients straight through but at the ends of each group's range."""
    grouped, axis = _grouped(c, plan, heads, keys=keys)
    qvalues, scale, offset = to_qvalues(grouped, plan.bits, axis=axis)
    rounded = (qvalues.astype(jnp.float32) * scale + offset).astype(c.dtype)
    ends = (f(grouped, axis, keepdims=True) for f in (jnp.min, jnp.max))
    inside = jnp.logical_not(jnp.logical_or(*(grouped == end for end in ends)))
    passed = jnp.where(inside, grouped, jax.lax.stop_gradient(grouped))
    return (passed + jax.lax.stop_gradient(rounded - grouped)).reshape(c.shape)


def _attentions(forward: Forward, params: Params) -> dict[str, CausalAttention]:
    """The attention layers, by path of their cores."""
    found = {f"{s.path}.core": s.module for s in forward.target_modules(params, CausalAttention)}
    if not found:
        raise ValueError(f"{forward.model.__name__} has no causal attention")
    return {path: attn for path, attn in found.items() if isinstance(attn, CausalAttention)}


def transform(plan: CSKVPlan, learned: Factors | None = None) -> Transform:
    """Give every attention layer a cache of low-rank features.

    Args:
        learned: of `factors` or `fit`; None decomposes the projections as they are, without
            statistics: a baseline.

    Raises:
        ValueError: as `factors`, and for factors of another plan or model.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        shapes = jax.eval_shape(lambda params: factors(plan, forward, params), params)
        given = factors(plan, forward, params) if learned is None else learned
        _check(given, shapes)
        methods = {**params.get(METHODS, {}), NAME: nest_params(given)}
        return forward.patch(_Patch(plan, forward.config.qkv_bias)), {**params, METHODS: methods}

    return Transform(NAME, plan, apply)


def _check(given: Factors, shapes: PyTree) -> None:
    wrong = [
        f"{path}.{name} is {found.get(name)}, must be {list(shape.shape)}"
        for path, own in shapes.items()
        for found in [{n: list(leaf.shape) for n, leaf in given.get(path, {}).items()}]
        for name, shape in own.items()
        if found.get(name) != list(shape.shape)
    ]
    if wrong or set(given) != set(shapes):
        raise ValueError(
            "the factors are those of another plan or model:\n  "
            + "\n  ".join(wrong or [str(sorted(set(given) ^ set(shapes)))])
        )


@dataclasses.dataclass(frozen=True)
class _Patch:
    """Caches, each with the factors of its layer."""

    plan: CSKVPlan
    constant: bool
    caches: ClassVar[bool] = True

    def __call__(self, module: nnx.Module, context: Context) -> None:
        learned = flatten_params(context.learned[NAME])
        paths = [target.path for target in target_modules(module, CausalCore)]

        def choose(plan: CSKVPlan, core: CausalCore, cache_length: CacheLength, layer: int) -> Kind:
            names = ("down_k", "up_k", "down_v", "up_v")
            factors = {name: learned[f"{paths[layer]}.{name}"] for name in names}
            return CSKVCache, {"plan": plan, "factors": factors, "constant": self.constant}

        Caches(choose, self.plan)(module, context)


class CSKVCache(ResidualBufferCache):
    """Sealed windows as features of keys and values.

    Args:
        plan: bits and window.
        factors: of the layer.
        constant: whether the last feature is 1.
    """

    def __init__(
        self,
        inner: Any,
        *,
        plan: CSKVPlan,
        factors: Mapping[str, Array],
        constant: bool,
        first: bool,
        cache_length: CacheLength,
    ):
        names = ["k_features", "v_features"]
        if plan.bits != FLOAT:
            names += [f"{of}_{part}" for of in "kv" for part in ("scale", "offset")]
        super().__init__(
            inner,
            window=plan.window,
            sealed=names,
            parts=("k_features", "v_features"),
            first=first,
            cache_length=cache_length,
        )
        self.plan = plan
        self.constant = constant
        self.factors = nnx.Dict({name: nnx.Variable(leaf) for name, leaf in factors.items()})

    def factor(self, name: str, dtype: jax.typing.DTypeLike) -> Array:
        """One of the layer's four matrices."""
        return self.factors[name].get_value().astype(dtype)

    def more(self, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"]) -> Arrays:
        return {
            f"{name}_features": _features(
                x, self.factor(f"down_{name}", x.dtype), constant=self.constant
            )
            for name in "kv"
        }

    def seal(self, tokens: Tokens) -> Arrays:
        found = {name: tokens[name] for name in ("k_features", "v_features")}
        if self.plan.bits == FLOAT:
            return found
        heads = tokens["k"].shape[2]
        for name in "kv":
            c = found[f"{name}_features"]
            grouped, axis = _grouped(c, self.plan, heads, keys=name == "k")
            qvalues, scale, offset = to_qvalues(grouped, self.plan.bits, axis=axis)
            found[f"{name}_features"] = pack(qvalues.reshape(c.shape), self.plan.bits)
            found[f"{name}_scale"], found[f"{name}_offset"] = (
                jnp.squeeze(part, axis) for part in (scale, offset)
            )
        return found

    def attend_sealed(
        self, q: Heads, sealed: Arrays, lengths: Lengths
    ) -> tuple[Heads, Float[Array, "B S H"]]:
        k, v = (self._restored(sealed, name, q.dtype) for name in "kv")
        up_k, up_v = (self.factor(f"up_{name}", q.dtype) for name in "kv")
        rotary = self.core.rotary
        out, log_sum_exps = low_rank_decode_attention(
            q,
            k,
            up_k * jnp.asarray(rotary.factor, q.dtype),
            v,
            lengths,
            frequencies=jnp.asarray(rotary.frequencies, jnp.float32),
            return_lse=True,
        )
        batch, queries, heads, width = q.shape
        up_v = up_v.reshape(up_v.shape[0], -1, width)
        grouped = out.reshape(batch, queries, up_v.shape[1], -1, up_v.shape[0])
        values = jnp.einsum(
            "bskgr,rkd->bskgd", grouped, up_v, preferred_element_type=jnp.float32
        ).astype(up_v.dtype)
        return values.reshape(batch, queries, heads, -1), log_sum_exps

    def _restored(
        self, sealed: Arrays, name: str, dtype: jax.typing.DTypeLike
    ) -> Float[Array, "B T R"]:
        c = sealed[f"{name}_features"]
        if self.plan.bits == FLOAT:
            return c
        qvalues = unpack(c, self.plan.bits).astype(jnp.float32)
        scale, offset = (sealed[f"{name}_{part}"] for part in ("scale", "offset"))
        grouped, axis = _grouped(qvalues, self.plan, scale.shape[2], keys=name == "k")
        scale, offset = (jnp.expand_dims(part, axis) for part in (scale, offset))
        return (grouped * scale + offset).reshape(qvalues.shape).astype(dtype)


def _calibrate(plan: CSKVPlan, forward: Forward, params: Params, data: Sequences) -> Factors:
    seen = magnitudes(forward, params, [data.calibration()])
    return factors(plan, forward, params, seen)


@dataclasses.dataclass(frozen=True)
class Fitting(Checked):
    """Training of the factors.

    Attributes:
        steps: of AdamW.
        learning_rate: falls linearly to 0.
        batch: sequences of a step.
    """

    steps: Count = 400
    learning_rate: Positive = 5e-5
    batch: Count = 4


def _fit(
    plan: CSKVPlan,
    fitting: Fitting,
    forward: Forward,
    params: Params,
    data: Sequences,
    *,
    checkpoints: Path | None = None,
) -> Factors:
    start = _calibrate(plan, forward, params, data)
    options = {"steps": fitting.steps, "learning_rate": fitting.learning_rate}
    batches = data.batches(fitting.batch)
    return fit(plan, forward, params, start, batches, checkpoints=checkpoints, **options)[0]


def _identity(subject: testing.Subject) -> CSKVPlan:
    return CSKVPlan(1.0, 1.0, window=1 << 20)  # no window is ever full


def _ladder(subject: testing.Subject) -> tuple[CSKVPlan, ...]:
    return (
        CSKVPlan(0.5, 0.5, window=4),
        CSKVPlan(0.25, 0.25, window=4),
        CSKVPlan(0.25, 0.25, window=4, bits=4),
    )


METHOD = Method(
    name=NAME,
    paper="CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios, "
    "arXiv 2409.10593",
    seams=("patches",),
    domain="language models",
    plan=CSKVPlan,
    transform=transform,
    identity=_identity,
    ladder=_ladder,
    tiny=testing.tiny_llama,
    systems=("CSKV",),
    data=Sequences,
    calibrate=_calibrate,
    fitting=Fitting,
    fit=_fit,
)
