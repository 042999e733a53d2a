"""Stacks of matrices: each is what it would be alone, everywhere a leaf goes."""

import dataclasses
import json
import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import effjax
from effjax import registry, testing
from effjax.compat import relaxed_promotion
from effjax.context import Model
from effjax.cost import weight_bytes
from effjax.fields import Checked, FloatName
from effjax.forward import abstract, flatten_params
from effjax.layers.linear import Linear, dot
from effjax.methods import awq, gptq, round_to_nearest, vidit_q
from effjax.parallel import device_mesh, leaf_sharding, shard, shardings, tensor_parallel
from effjax.quant import (
    Activations,
    QTensor,
    Quantizer,
    Rotation,
    qdot,
    quantize_matrix,
    quantize_stack,
)
from effjax.quant.disk import QValues
from effjax.samplers import DDIM, Sampler
from effjax.search.sensitivity import Preparation, rounded_samples
from effjax.transform import on_shapes
from tests.subjects.moe import MoE, tiny_moe

E, INPUTS, OUTPUTS = 3, 64, 24
W = (
    jax.random.normal(jax.random.key(0), (E, INPUTS, OUTPUTS))
    * jnp.array([1, 5, 0.2])[:, None, None]
)
X = jax.random.normal(jax.random.key(1), (E, 5, INPUTS))
UNEVEN = Quantizer(4, symmetric=False)
RNG = np.random.default_rng(0)
PERM = jnp.asarray(np.stack([RNG.permutation(INPUTS) for _ in range(E)]))
SMOOTHING = jnp.asarray(RNG.uniform(0.5, 2, (E, INPUTS)), jnp.float32)
STATIC = Activations(Quantizer(8, symmetric=False), dynamic=False)

CASES = {
    "W8A8": {"activations": Activations()},
    "W4A16 groups": {"quantizer": UNEVEN, "group_size": 32},
    "W3A16": {"quantizer": Quantizer(3)},
    "ordered": {"quantizer": Quantizer(4), "group_size": 32, "perm": PERM},
    "prepared": {
        "quantizer": UNEVEN,
        "activations": Activations(),
        "smoothing_scale": SMOOTHING,
        "rotation": Rotation(INPUTS),
    },
    "static": {
        "activations": STATIC,
        "input_range": (jnp.array([-3.0, -2, -4]), jnp.array([4.0, 3, 2])),
    },
    "float8": {"quantizer": Quantizer(levels="e4m3"), "group_size": 32},
}


def alone(case, number):
    """The leaf of one matrix of the stack."""
    options = dict(CASES[case])
    for name in {"perm", "smoothing_scale", "input_range"} & set(options):
        options[name] = jax.tree.map(lambda part: part[number], options[name])
    return quantize_matrix(W[number], **options)


def part(leaf, number):
    return jax.tree.map(lambda array: array[number], leaf)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def stack(case):
    return quantize_stack(W, **CASES[case])


@pytest.fixture(scope="module")
def leaves(case):
    return [alone(case, number) for number in range(E)]


def test_each_matrix_is_the_leaf_that_it_would_be_alone(stack, leaves):
    assert stack.shape == W.shape
    assert stack.leading == (E,)
    assert stack.matrix == (INPUTS, OUTPUTS)
    for number, leaf in enumerate(leaves):
        own = part(stack, number)
        if leaf.column_sums is not None:  # many numbers are summed in another order than few
            floats = {name: getattr(leaf, name) for name in ("input_scale", "column_sums")}
            found = {name: getattr(own, name) for name in floats}
            chex.assert_trees_all_close(found, floats, rtol=1e-5, atol=1e-5)
            own = dataclasses.replace(own, **floats)
        chex.assert_trees_all_equal(own, leaf)
    assert stack.group_size == leaves[0].group_size
    assert stack.logical_bytes == sum(leaf.logical_bytes for leaf in leaves)
    np.testing.assert_array_equal(
        np.asarray(stack.qvalues(), np.float32),
        np.stack([np.asarray(leaf.qvalues(), np.float32) for leaf in leaves]),
    )
    restored = jnp.stack([leaf.restore() for leaf in leaves])
    chex.assert_trees_all_close(stack.restore(), restored, rtol=1e-5, atol=1e-5)
    # Mapped over, each step has the leaf of one matrix.
    mapped = jax.lax.map(lambda leaf: leaf.restore(), stack)
    chex.assert_trees_all_close(mapped, restored, rtol=1e-5, atol=1e-5)


def test_products_are_those_of_each_matrix(stack, leaves):
    want = jnp.stack([qdot(x, leaf, path="reference") for x, leaf in zip(X, leaves, strict=True)])
    found = jax.jit(qdot)(X, stack)
    chex.assert_trees_all_close(found, want, atol=2e-3, rtol=1e-4)
    every = qdot(X[:, None], stack, path="reference")
    chex.assert_trees_all_close(every[:, 0], want, atol=1e-4, rtol=1e-5)
    for wrong in (X[0], X[:2], X[..., :32]):
        with pytest.raises(ValueError, match=r"do not fit a matrix .* in a stack: they are \[\*E"):
            qdot(wrong, stack)


def test_descriptions_and_disks_hold_stacks(stack):
    again = QTensor.from_dict(json.loads(json.dumps(stack.to_dict())))
    assert again == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stack)
    host = jax.tree.map(np.asarray, stack.qvalue)
    stored = QValues(host, stack.shape, stack.bits).to_disk()
    for number in range(E):
        one = QValues(part(host, number), stack.matrix_shape, stack.bits).to_disk()
        np.testing.assert_array_equal(stored[number], one)
    template = QValues(again.qvalue, stack.shape, stack.bits)
    assert template.disk_shape == stored.shape
    chex.assert_trees_all_equal(template.from_disk(stored), host)


def test_exported_programs_take_stacks():
    stack = quantize_stack(W, **CASES["W4A16 groups"])
    exported = jax.export.export(jax.jit(qdot))(X, stack)
    again = jax.export.deserialize(exported.serialize())
    chex.assert_trees_all_equal(again.call(X, stack), jax.jit(qdot)(X, stack))


def test_what_is_no_stack():
    with pytest.raises(ValueError, match=r"smoothing_scale must have the leading axes \[3\]"):
        quantize_stack(W, smoothing_scale=SMOOTHING[0])
    with pytest.raises(ValueError, match="Stacks of matrices are for quantize_stack"):
        quantize_matrix(W)
    with pytest.raises(ValueError, match=r"stack of matrices \[3, 64, 24\]: they are \[\*E"):
        dot(X[0], W)
    described = quantize_stack(W).to_dict()
    for wrong in ({"stack": [0]}, {"stack": ["3"]}, {"shape": [3, 3, 8, 8]}):
        with pytest.raises(ValueError, match="describes no quantized leaf"):
            QTensor.from_dict(described | wrong)
    # Four axes are no convolution by themselves: who quantizes says what they are.
    four = jnp.ones((2, 2, 32, 8))
    stack, kernel = quantize_stack(four), quantize_matrix(four)
    assert (stack.leading, stack.convolution) == ((2, 2), False)
    assert (kernel.leading, kernel.convolution) == ((), True)
    assert stack.shape == kernel.shape


def test_qwix_reads_stacks():
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    leaf = quantize_stack(W, UNEVEN, group_size=32)
    with relaxed_promotion():
        found = qwix.dequantize(leaf.to_qwix())
    chex.assert_trees_all_close(found, leaf.dequantize(), atol=1e-5)


def test_parts_of_a_stack_are_cut_by_experts():
    leaf = quantize_stack(jnp.ones((4, 64, 32)), UNEVEN, group_size=16, packed=True)
    got = leaf_sharding(leaf, device_mesh(expert=2, model=2), ("expert", "model", None))
    assert got.scale.spec == got.zero_point.spec == PartitionSpec("expert", "model", None)
    assert all(plane.spec == PartitionSpec("expert", "model", None) for plane in got.qvalue)


@pytest.mark.parametrize(
    "options", [{"activations": Activations()}, {"quantizer": UNEVEN}], ids=str
)
def test_experts_are_multiplied_where_they_lie(options):
    """No weight or token moves between devices: each multiplies by its own matrices."""
    mesh = device_mesh(expert=4)
    x, leaf = jnp.ones((4, 5, 64)), quantize_stack(jnp.ones((4, 64, 32)), **options)
    places = leaf_sharding(leaf, mesh, ("expert", None, None))
    x = jax.device_put(x, leaf_sharding(x, mesh, ("expert", None, None)))
    text = jax.jit(qdot).lower(x, jax.device_put(leaf, places)).compile().as_text()
    assert not {"all-gather", "all-to-all", "all-reduce", "collective-permute"} & set(
        re.findall(r"[a-z]+-[a-z]+", text)
    )


# A model with experts ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject():
    return tiny_moe()


@pytest.fixture
def _known(monkeypatch):
    models = {**registry.models(), "MoE": MoE}
    monkeypatch.setattr(registry, "models", lambda: models)


PLANS = {
    "W8A8": round_to_nearest.uniform(8, 8),
    "W4A16 groups": round_to_nearest.uniform(4, group_size=32),
}


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("name", PLANS)
def test_experts_are_quantized_saved_and_spread(name, subject, tmp_path):
    plan, pair = PLANS[name], (subject.forward, subject.params)
    forward, params = round_to_nearest.transform(plan)(*pair)
    experts, dense = (tree["blocks"]["1"]["moe"] for tree in (params, subject.params))
    bits = plan.decided(*pair)
    for layer in ("gate", "up", "down"):
        leaf = experts[layer]["kernel"]
        assert leaf.leading == (4,)
        for number in range(4):
            one = plan.leaf(bits[f"blocks.1.moe.{layer}"], dense[layer]["kernel"][number])
            chex.assert_trees_all_equal(part(leaf, number), one)
    assert not isinstance(experts["router"]["kernel"], QTensor)
    assert weight_bytes(params) < 0.5 * weight_bytes(subject.params)
    run = jax.jit(lambda forward, params: forward(params, {}, subject.cond)[0])
    want, exact = run(forward, params), run(*pair)
    error = jnp.linalg.norm(want - exact) / jnp.linalg.norm(exact)
    assert 0 < error < (0.05 if name == "W8A8" else 0.25)

    effjax.save(tmp_path / "m", forward, params, progress=False)
    again = effjax.load(tmp_path / "m", progress=False)
    assert again[0] == forward
    chex.assert_trees_all_equal(again[1], params)

    mesh, rules = device_mesh(expert=4), tensor_parallel(forward)
    places = shardings(params, mesh, rules)["blocks"]["0"]["moe"]
    assert places["up"]["kernel"].scale.spec == PartitionSpec("expert", None, None)
    assert places["router"]["kernel"].spec == PartitionSpec(None, None)
    spread = shard(params, mesh, rules)
    held = spread["blocks"]["0"]["moe"]["up"]["kernel"].scale.addressable_shards[0].data
    assert held.shape[0] == 1
    chex.assert_trees_all_close(np.asarray(run(forward, spread)), np.asarray(want), atol=2e-5)


@pytest.mark.usefixtures("_known")
def test_imported_stacks_are_described(subject, tmp_path):
    """A leaf that no method of the recipe made, such as one that a converter read."""
    params = jax.tree.map(lambda x: x, subject.params)
    up = params["blocks"]["0"]["moe"]["up"]
    up["kernel"] = quantize_stack(up["kernel"], UNEVEN, group_size=16)
    effjax.save(tmp_path / "m", subject.forward, params, progress=False)
    chex.assert_trees_all_equal(effjax.load(tmp_path / "m", progress=False)[1], params)


@pytest.mark.parametrize("method", [gptq, awq])
def test_experts_are_fitted(method, subject):
    """Each expert by the inputs that it is given; padding is left out."""
    pair = subject.forward, subject.params
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50, (4, 20)), jnp.int32)
    lengths, columns = jnp.array([20, 20, 20, 7])[:, None], jnp.arange(20)
    batch = tokens, jnp.where(columns < lengths, columns, -1)
    plan = method.uniform(3)
    learned = method.fit(plan, *pair, [batch], progress=False)
    run = jax.jit(lambda params: subject.forward(params, {}, tokens)[0])
    exact = run(subject.params)
    if method is awq:
        assert learned["blocks.0.moe.up"].shape == (4, 64)
        assert learned["blocks.0.norm2"].shape == (32,)
        same = run(awq._scaled(plan, learned, *pair))  # the router reads the scaled norm, too
        chex.assert_trees_all_close(same, exact, atol=1e-4)
    _, params = method.transform(plan, learned)(*pair)
    _, nearest = method.transform(plan)(*pair)
    noise = [float(jnp.mean(jnp.square(run(each) - exact)[:3])) for each in (params, nearest)]
    assert noise[0] < 0.95 * noise[1]


def test_gptq_of_a_stack_is_that_of_each_matrix():
    plan = gptq.uniform(4, group_size=32)
    rows = jax.random.normal(jax.random.key(2), (E, 200, INPUTS))
    moments = jnp.einsum("eni,enj->eij", rows, rows) / 200
    found = gptq._rounded(plan, W, moments, plan.leaf((4, 16), W))
    for number in range(E):
        own = plan.leaf((4, 16), W[number])
        one = gptq._rounded(plan, W[number], moments[number], own)
        chex.assert_trees_all_equal(part(found, number), one)


BALANCED = vidit_q.uniform(4, 8, alpha=0.5)


def magnitudes(plan, subject):
    """As `calibrate` gives them, of any inputs: float32[1, *E, I] by path."""
    kernels = flatten_params(subject.params)
    return {
        path: jax.random.uniform(jax.random.key(i), (1, *kernels[f"{path}.kernel"].shape[:-1]))
        + 0.1
        for i, path in enumerate(plan.decided(subject.forward, subject.params))
    }


def test_experts_are_balanced_one_by_one(subject):
    """All rotate as their width does; each has the smoothing scale that it would have alone."""
    absmax = magnitudes(BALANCED, subject)
    pair = vidit_q.transform(BALANCED, absmax)(subject.forward, subject.params)
    for layer in ("up", "down"):
        leaf, dense = (
            tree["blocks"]["1"]["moe"][layer]["kernel"] for tree in (pair[1], subject.params)
        )
        for number in (0, 3):
            seen = absmax[f"blocks.1.moe.{layer}"][0, number]
            weights = np.abs(np.asarray(dense[number])).max(1)
            chex.assert_trees_all_close(
                leaf.smoothing_scale[number], np.sqrt(weights / seen), rtol=1e-5
            )
            one = quantize_matrix(
                dense[number],
                UNEVEN,
                activations=Activations(),
                smoothing_scale=vidit_q.balance(dense[number], seen, 0.5),
                rotation=Rotation(len(seen)),
            )
            chex.assert_trees_all_close(
                part(leaf, number).dequantize(), one.dequantize(), rtol=1e-5
            )
    template = on_shapes(
        [vidit_q.transform(BALANCED)], subject.forward, subject.params
    )  # as `effjax.load` does
    chex.assert_trees_all_equal_shapes_and_dtypes(template[1], pair[1])
    one = {path: found[:, 0] if found.ndim > 2 else found for path, found in absmax.items()}
    with pytest.raises(ValueError, match=r"moe\.up \[1, 32\], must be \[1, 4, 32\]"):
        vidit_q.transform(BALANCED, one)(subject.forward, subject.params)


def test_scales_of_experts_are_folded_into_experts(subject):
    """What comes out is what comes out without folding, to the rounding of 8 bits."""
    run = jax.jit(lambda pair: pair[0](pair[1], {}, subject.cond)[0])
    exact = run((subject.forward, subject.params))
    for fold in (False, True):
        plan = vidit_q.uniform(8, alpha=0.5, rotate=False, fold=fold)
        absmax = magnitudes(plan, subject)
        pair = vidit_q.transform(plan, absmax)(subject.forward, subject.params)
        experts = pair[1]["blocks"]["0"]["moe"]
        assert (experts["down"]["kernel"].smoothing_scale is None) == fold
        assert experts["up"]["kernel"].smoothing_scale is not None  # the router stays as it is
        error = jnp.linalg.norm(run(pair) - exact) / jnp.linalg.norm(exact)
        assert 0 < error < 0.05


@dataclasses.dataclass(frozen=True)
class DenoiserConfig(Checked):
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"


class Denoiser(Model):
    """Predicts noise by the mean of three experts."""

    Config = DenoiserConfig

    def __init__(self, config, *, rngs):
        self.config = config
        self.up = Linear(8, 16, role="up", stack=3, rngs=rngs)
        self.down = Linear(16, 8, role="down", stack=3, rngs=rngs)

    def inner(self, x):
        every = jnp.broadcast_to(x, (3, *x.shape))
        return nnx.silu(self.up(every))

    def __call__(self, x, time, labels):
        return jnp.mean(self.down(self.inner(x)), axis=0)


def test_experts_are_calibrated_along_a_trajectory():
    """Absolute maxima of what each expert is given; sensitivities round as leaves do."""
    forward, shapes = abstract(Denoiser, DenoiserConfig())
    params = testing.random_params(shapes)
    sampler, cond, key = Sampler(DDIM(steps=3), shape=(5, 8)), jnp.arange(2), jax.random.key(0)
    plan = vidit_q.uniform(8, alpha=0.5, layers="role:up|down")
    options = {"key": key, "progress": False}
    for decay in (None, 0.9):
        got = vidit_q.calibrate(plan, forward, params, sampler, cond, decay=decay, **options)
        assert {path: found.shape for path, found in got.items()} == {
            "up": (1, 3, 8),
            "down": (1, 3, 16),
        }
        carry, want = sampler.init(forward, params, cond, key), {}
        for step in range(3):
            x = carry.x
            inside = forward.module(params).inner(x)
            for path, each in (("up", jnp.broadcast_to(x, (3, *x.shape))), ("down", inside)):
                tokens = np.abs(np.asarray(each)).max(2)  # [E, B, I]
                new = tokens.max(1) if decay is None else tokens.mean(1)
                old = want.get(path, new)
                want[path] = np.maximum(old, new) if decay is None else 0.9 * old + 0.1 * new
            carry = sampler.step(forward, params, carry, cond, None, step)
        for path, found in got.items():
            chex.assert_trees_all_close(found[0], want[path], rtol=1e-4)
    prepared = {
        path: Preparation(
            vidit_q.balance(params[path]["kernel"], got[path][0], 0.5),
            Rotation(params[path]["kernel"].shape[-2]),
        )
        for path in ("up", "down")
    }
    rounded = rounded_samples(forward, params, sampler, cond, key=key, preparations=prepared)
    exact = sampler(forward, params, cond, key)
    chex.assert_trees_all_close(rounded(np.full((2, 2), 16, np.int32)), exact, atol=1e-4)
    leaves = sampler(*vidit_q.transform(plan, got)(forward, params), cond, key)
    error = jnp.linalg.norm(leaves - exact)
    assert error > 0
    assert jnp.linalg.norm(rounded(np.full((2, 2), 8, np.int32)) - leaves) < 0.2 * error


def test_a_stack_of_layers_is_initialized_matrix_by_matrix():
    layer = Linear(8, 6, role="up", stack=3, rngs=nnx.Rngs(0))
    kernel, bias = layer.kernel.get_value(), layer.bias.get_value()
    assert (kernel.shape, bias.shape) == ((3, 8, 6), (3, 6))
    limit = np.sqrt(6 / (8 + 6))  # Xavier's, of one matrix
    assert 0.7 * limit < float(jnp.abs(kernel).max()) <= limit
    layer.bias.set_value(jnp.arange(18.0).reshape(3, 6))
    out = layer(jnp.zeros((3, 2, 5, 8)))
    chex.assert_trees_all_equal(out[:, 1, 4], jnp.arange(18.0).reshape(3, 6))


# Programs for other platforms --------------------------------------------------------------------

KERNELS = {
    "W8A8": {"activations": Activations()},
    "W4A16 groups": {"quantizer": UNEVEN, "group_size": 128},
}


def large(name):
    """Shapes of inputs and of a stack that kernels run."""
    shape = jax.ShapeDtypeStruct((4, 512, 512), jnp.float32)
    leaf = jax.eval_shape(lambda w: quantize_stack(w, **KERNELS[name]), shape)
    return jax.ShapeDtypeStruct((4, 64, 512), jnp.bfloat16), leaf


@pytest.mark.aot_tpu
@pytest.mark.parametrize("name", KERNELS)
def test_products_of_stacks_compile_for_tpus(name, compile_for_tpu):
    assert "custom-call" in compile_for_tpu(jax.jit(qdot), *large(name)).as_text()


@pytest.mark.parametrize("name", KERNELS)
def test_products_of_stacks_are_lowered_for_gpus(name, lower_for_gpu):
    assert "triton" in lower_for_gpu(jax.jit(qdot), *large(name))
