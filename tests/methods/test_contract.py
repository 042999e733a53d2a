"""What every method promises, checked on everything in the registry."""

import dataclasses
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax import fields, recipe, registry
from effjax.autoregression import NextScale
from effjax.cost import compiled_memory, sampler_cost, state_bytes, weight_bytes
from effjax.layers.mlp import MLP
from effjax.layers.stack import Stack
from effjax.registry import methods
from effjax.samplers import sample_keys
from pallas_kernels import use_implementation
from tests.subjects import token_merging
from tests.subjects.joint import Joint, tiny_joint
from tests.test_fields import NOWHERE

METHODS = list(methods().values())
# A sketch of what comes next, on a model of two streams.
SKETCHES = [token_merging.declaration(tiny_joint)]


@pytest.fixture(scope="module", autouse=True)
def _known():
    """Saved models name their model and methods: the sketch is among them here."""
    known = {**methods(), **{method.name: method for method in SKETCHES}}
    models = {**registry.models(), "Joint": Joint}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "methods", lambda: known)
        patch.setattr(registry, "models", lambda: models)
        yield


@pytest.fixture(autouse=True)
def _what_runs_here():
    """The programs of this machine: tracing the kernels of others beside them takes long."""
    with use_implementation("xla"):
        yield


@pytest.fixture(scope="module", params=METHODS + SKETCHES, ids=lambda method: method.name)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def subject(method):
    return method.tiny()


@pytest.fixture(scope="module")
def strongest(method, subject):
    """The subject under the strongest plan of the ladder."""
    transform = transform_of(method, method.ladder(subject)[-1], subject)
    return transform(subject.forward, subject.params)


def transform_of(method, plan, subject):
    """The transform of a plan, with what stands for a file's contents where it takes some."""
    if method.given is None:
        return method.transform(plan)
    return method.transform(plan, method.given(plan, subject.forward, subject.params))


def sample(subject, forward, params, *, rows=slice(None), key=None):
    """Samples of some rows of the subject's conditions."""
    cond, uncond = jax.tree.map(lambda x: x[rows], (subject.cond, subject.uncond))
    options = {} if uncond is None else {"uncond": uncond}
    key = jax.random.key(0) if key is None else key
    return jax.jit(sampler_of(subject, forward))(forward, params, cond, key, **options)


def sampler_of(subject, forward):
    """The subject's loop, or that of the model which a method put in its place."""
    sampler = subject.sampler
    for name, _ in forward.recipe:
        loop = registry.method(name).loop
        sampler = sampler if loop is None else loop(sampler, forward)
    return sampler


def test_identity_changes_nothing_to_the_bit(method, subject):
    if method.loop is not None:
        pytest.skip("it puts another model in the place of the given one")
    plan = method.identity(subject)
    forward, params = transform_of(method, plan, subject)(subject.forward, subject.params)
    assert forward.patches != subject.forward.patches or params is not subject.params
    chex.assert_trees_all_equal(
        sample(subject, forward, params), sample(subject, subject.forward, subject.params)
    )


def test_a_transform_is_pure(method, subject):
    before = jax.tree.map(jnp.copy, subject.params)
    plan = method.ladder(subject)[0]
    one = transform_of(method, plan, subject)(subject.forward, subject.params)
    two = transform_of(method, plan, subject)(subject.forward, subject.params)
    assert one[0] == two[0]
    chex.assert_trees_all_equal(one[1], two[1])
    chex.assert_trees_all_equal(subject.params, before)
    assert one[0].recipe == ((method.name, plan),)


def test_the_second_call_does_not_trace(method, subject):
    traces = []

    @jax.jit
    def run(forward, params, cond):
        traces.append(None)
        options, sampler = {"uncond": subject.uncond}, sampler_of(subject, forward)
        carry = sampler.init(forward, params, cond, jax.random.key(0), **options)
        uncond = sampler.unconditional(forward, cond, subject.uncond)
        return sampler.step(forward, params, carry, cond, uncond, min(1, sampler.calls - 1))

    for _ in range(2):  # made anew each time: equal by value is enough
        plan = method.ladder(subject)[-1]
        run(*transform_of(method, plan, subject)(subject.forward, subject.params), subject.cond)
    assert len(traces) == 1


def test_a_sample_does_not_depend_on_its_neighbors(method, subject):
    """Under every plan of the ladder, unless the method decides for whole batches and says so."""
    if method.decides == "batch":
        pytest.skip("it decides for the whole batch")
    keys = sample_keys(jax.random.key(0), 3)
    leaves = method.seams == ("leaves",)
    plans = method.ladder(subject)
    for plan in (plans[0], plans[-1]) if leaves else plans:  # leaves differ by bits alone
        pair = transform_of(method, plan, subject)(subject.forward, subject.params)
        one, other = (
            sample(subject, *pair, rows=np.array([row, 0]), key=keys[np.array([row, 2])])
            for row in (0, 1)
        )
        assert float(jnp.abs(one[0] - other[0]).max()) > 0
        if leaves:  # what is rounded at a boundary may fall on either side
            assert jnp.linalg.norm(one[1] - other[1]) < 1e-3 * jnp.linalg.norm(one[1])
        else:
            chex.assert_trees_all_close(one[1], other[1], atol=1e-4)


def test_it_changes_the_samples_and_keeps_them_finite(method, subject, strongest):
    compressed = sample(subject, *strongest)
    chex.assert_tree_all_finite(compressed)
    dense = sample(subject, subject.forward, subject.params)
    assert compressed.shape == dense.shape
    if method.exact:
        chex.assert_trees_all_close(compressed, dense, atol=1e-5 * float(jnp.abs(dense).max()))
    else:
        assert float(jnp.abs(compressed - dense).max()) > 0


def test_scanned_blocks_give_the_same_samples(subject, strongest):
    """Runs of equal blocks in one program: see `effjax.scanning`."""
    forward, params = strongest
    small, _ = effjax.scan_blocks()(forward, params)
    got, wanted = sample(subject, small, params), sample(subject, forward, params)
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_kept(method, dtype):
    with use_implementation(None):  # by the kernels of all platforms
        check_dtype(method, dtype)


def check_dtype(method, dtype):
    subject = method.tiny(dtype=dtype)
    forward, params = transform_of(method, method.ladder(subject)[-1], subject)(
        subject.forward, subject.params
    )
    sampler = sampler_of(subject, forward)
    carry = jax.eval_shape(
        lambda p: sampler.init(forward, p, subject.cond, jax.random.key(0), uncond=subject.uncond),
        params,
    )
    uncond = sampler.unconditional(forward, subject.cond, subject.uncond)
    _, raw, state = jax.eval_shape(
        lambda p, s, x: sampler.network(forward, p, s, x, subject.cond, uncond, 0),
        params,
        carry.state,
        carry.x,
    )
    # Logits of codes are float32, whatever the blocks compute in.
    of_codes = isinstance(sampler, NextScale) or method.loop is not None
    wanted = jnp.dtype("float32" if of_codes else dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(raw)} == {wanted}
    assert jax.tree.map(lambda s: (s.shape, s.dtype), state) == jax.tree.map(
        lambda s: (s.shape, s.dtype), carry.state
    )


def test_gradients_are_finite(subject, strongest):
    forward, params = strongest
    sampler = sampler_of(subject, forward)
    uncond = sampler.unconditional(forward, subject.cond, subject.uncond)
    options = {"uncond": subject.uncond}
    carry = sampler.init(forward, params, subject.cond, jax.random.key(0), **options)

    def loss(params):
        out, _, _ = sampler.network(forward, params, carry.state, carry.x, subject.cond, uncond, 0)
        return sum(jnp.mean(jnp.square(part)) for part in jax.tree.leaves(out))

    gradients = jax.jit(jax.grad(loss, allow_int=True))(params)
    # QValues have none.
    floats = [g for g in jax.tree.leaves(gradients) if g.dtype != jax.dtypes.float0]
    chex.assert_tree_all_finite(floats)
    assert sum(float(jnp.abs(leaf).sum()) for leaf in floats) > 0


def test_plans_survive_json(method, subject):
    for plan in (method.identity(subject), *method.ladder(subject)):
        again = method.plan.from_dict(json.loads(json.dumps(plan.to_dict())))
        assert again == plan
        assert hash(again) == hash(plan)
        assert plan.describe()


def test_a_plan_says_what_its_calls_compute(method, subject):
    """Shares of 0 ... 1, one a call; the identity leaves nothing out."""
    calls = sampler_of(subject, subject.forward).calls
    for plan in (method.identity(subject), *method.ladder(subject)):
        said = plan.computed(calls)
        assert all(len(each) == calls for each in said.values())
        assert all(0 <= share <= 1 for each in said.values() for share in each)
    assert all(np.all(each) for each in method.identity(subject).computed(calls).values())


def test_unknown_options_are_named(method, subject):
    values = {**method.identity(subject).to_dict(), "speed": 9000}
    with pytest.raises(ValueError, match=r"unknown fields \['speed'\]"):
        method.plan.from_dict(values)


def test_wrong_fields_are_named(untyped, method, subject):
    plan = method.ladder(subject)[-1]
    for name, wrong in itertools.product(fields.annotated(method.plan), NOWHERE):
        with pytest.raises(ValueError, match=rf"{method.plan.__name__}: .*\b{name}\b"):
            dataclasses.replace(plan, **{name: wrong})


def test_saved_models_load_as_they_were(method, subject, strongest, tmp_path):
    forward, params = strongest
    effjax.save(tmp_path / "model", forward, params)
    loaded, loaded_params = effjax.load(tmp_path / "model")
    assert loaded == forward
    chex.assert_trees_all_equal(loaded_params, params)
    steps = json.loads((tmp_path / "model" / recipe.RECIPE).read_text())["steps"]
    assert [step["method"] for step in steps] == [method.name]


def test_cost_falls_along_the_ladder(method, subject):
    ladder = method.ladder(subject)
    assert len(ladder) >= 3

    def cost(forward, params, share=1.0):
        if method.seams == ("leaves",):  # as many products, of fewer bits
            return weight_bytes(params)
        if method.exact:  # what the program of a call holds
            return compiled_memory(_one_call(subject, forward), params)["temp_bytes"]
        if method.loop is not None:  # how often another model is called
            return sampler_of(subject, forward).calls
        if method.domain == "language models":  # what a cache holds
            state = subject.sampler.init(forward, params, subject.cond).state
            return state_bytes(state)
        # Of what depends on values, what is expected to be computed: less at a higher threshold.
        branch = "max" if method.decides is None else share
        options = {"uncond": subject.uncond, "branch": branch}
        loop = sampler_of(subject, forward)
        return sampler_cost(loop, forward, params, subject.cond, **options).flops

    costs = []
    for place, plan in enumerate(ladder):
        share = 1 - (place + 1) / (len(ladder) + 1)
        costs.append(
            cost(*transform_of(method, plan, subject)(subject.forward, subject.params), share)
        )
    dense = cost(subject.forward, subject.params)
    assert (dense > costs[0]) == method.saves
    assert all(stronger < weaker for weaker, stronger in itertools.pairwise(costs)), costs


def _one_call(subject, forward):
    """The network of a call, as a function of parameters."""
    sampler = subject.sampler
    uncond = sampler.unconditional(forward, subject.cond, subject.uncond)
    x = jnp.zeros((len(subject.cond), *sampler.sample_shape(forward)))

    def call(params):
        return sampler.network(forward, params, {}, x, subject.cond, uncond, 0)[0]

    return call


def test_stateful_neighbors_keep_their_state(method, subject):
    """Another stateful patch around the same blocks, with a traced step."""
    from tests.test_forward import MemoryPatch

    plan = method.ladder(subject)[-1]
    forward, params = transform_of(method, plan, subject)(subject.forward, subject.params)
    (stack, *_) = (t.module for t in forward.target_modules(params, Stack))
    path = "blocks.1"
    if stack.streams:  # of one of them
        path = forward.target_modules(params, MLP, r"blocks\.1\..*")[0].path
    both = forward.patch(MemoryPatch(path))
    assert f"{path}.total" in _initial_state(subject, both, params)
    chex.assert_tree_all_finite(sample(subject, both, params))


def _initial_state(subject, forward, params):
    options, sampler = {"uncond": subject.uncond}, sampler_of(subject, forward)
    return sampler.init(forward, params, subject.cond, jax.random.key(0), **options).state


def test_the_declaration_is_complete(method, subject):
    assert set(method.seams) <= {"leaves", "patches", "loops"}
    assert method.seams
    assert "arXiv" in method.paper
    assert dataclasses.is_dataclass(method.plan)
    assert isinstance(method.identity(subject), method.plan)


# Pairs --------------------------------------------------------------------------------------


# Each pair takes long to compile: some stand for others of their kind.
STANDS = {
    "round_to_nearest": {"dit_fast_attn", "kivi", "snap_kv"},
    "vidit_q": {"dit_fast_attn"},
    "awq": {"moa"},
    "gptq": {"cskv"},
}
PAIRS = [
    (one, two)
    for leaves, other in itertools.product(METHODS, METHODS)
    if leaves.seams == ("leaves",) and "leaves" not in other.seams
    if other.name in STANDS.get(leaves.name, {other.name})  # a new method meets all others
    for one, two in [sorted((leaves, other), key=lambda method: method.name)]
]


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=lambda method: getattr(method, "name", None))
def test_methods_on_different_seams_compose(one, two, tmp_path):
    """In both orders the same model, saved and loaded as one recipe."""
    subject = (one if "patches" in one.seams else two).tiny()  # leaves are much the same in all
    first, second = (_strongest(method, subject) for method in (one, two))
    pair = effjax.chain(first, second)(subject.forward, subject.params)
    swapped = effjax.chain(second, first)(subject.forward, subject.params)
    chex.assert_trees_all_equal(pair[1], swapped[1])
    chex.assert_trees_all_close(sample(subject, *pair), sample(subject, *swapped), atol=1e-5)
    effjax.save(tmp_path / "pair", *pair)
    again = effjax.load(tmp_path / "pair")
    assert again[0] == pair[0]
    chex.assert_trees_all_equal(again[1], pair[1])


def _strongest(method, subject):
    """The last plan of the ladder, with what the method learns from the model as it was."""
    plan = method.ladder(subject)[-1]
    if method.calibrate is None:
        return transform_of(method, plan, subject)
    data = subject.data(method.data)
    return method.transform(plan, method.calibrate(plan, subject.forward, subject.params, data))


def test_leaves_are_changed_once():
    """Two methods on the leaves: the second says that it comes too late."""
    one, two, *_ = (method for method in METHODS if method.seams == ("leaves",))
    subject = one.tiny()
    first, second = (method.transform(method.ladder(subject)[0]) for method in (one, two))
    with pytest.raises(ValueError, match="quantized already"):
        effjax.chain(first, second)(subject.forward, subject.params)
