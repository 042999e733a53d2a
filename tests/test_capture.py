import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax import capture, testing
from effjax.capture import Observe, Tap, gradients, read_statistics, statistics, tap
from effjax.context import Model, State, switch
from effjax.forward import abstract, functional
from effjax.layers.attention import Attention, AttentionCore
from effjax.layers.embeddings import sincos_2d
from effjax.layers.linear import Linear
from effjax.layers.norms import modulate
from effjax.models.dit import DiT, DiTConfig
from effjax.targets import Wrapper, wrap
from tests.subjects.joint import tiny_joint

TRACES = []


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 3


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.first = Linear(3, 4, role="up", rngs=rngs)
        self.second = Linear(4, 2, role="down", rngs=rngs)

    def __call__(self, x, scale):
        return self.second(jnp.sin(self.first(x))) * scale


class Net(Model):
    def __init__(self, config, *, rngs):
        self.config = config
        self.pair = Pair(rngs)

    def __call__(self, x):
        TRACES.append(x.shape)
        return self.pair(x, jnp.float32(2.0)).sum(-1)


class Twice(Model):
    def __init__(self, config, *, rngs):
        self.config = config
        self.linear = Linear(3, 3, role="up", rngs=rngs)

    def __call__(self, x):
        return self.linear(self.linear(x))


@dataclasses.dataclass(frozen=True)
class ByStep:
    """At step 0 the pair runs, at step 1 it runs on twice the input, at step 2 it does not run."""

    def __call__(self, module, context):
        wrap(module, "pair", ByStepWrapper, context.step)


class ByStepWrapper(Wrapper):
    def __init__(self, inner, step):
        super().__init__(inner)
        self.step = nnx.data(step)
        self.calls = State()

    def __call__(self, x, scale):
        branches = {
            0: lambda self, x: self.inner(x, scale),
            1: lambda self, x: self.inner(2 * x, scale),
            2: lambda self, x: jnp.zeros((x.shape[0], 2)),
        }
        self.calls.write(self.calls.read((), jnp.float32) + 1)
        return switch(self.step, branches, self, x)


@pytest.fixture
def net():
    return functional(Net(Config(), rngs=nnx.Rngs(0)))


@pytest.fixture
def x(key):
    return jax.random.normal(key, (5, 3))


def weights(params):
    pair = params["pair"]
    return [pair[name][leaf] for name in ("first", "second") for leaf in ("kernel", "bias")]


def close(got, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), tolerance, tolerance)


def tiny_dit():
    """A DiT whose weights are all random: adaLN-Zero would start with closed gates."""
    config = DiTConfig(num_layers=1, num_heads=2, head_dim=8, num_classes=5, sample_size=8)
    forward, params = abstract(DiT, config)
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(0.2 * random.standard_normal(shape), jnp.float32)

    params = jax.tree.map(lambda leaf: normal(*leaf.shape), params)
    return forward, params, (normal(2, 8, 8, 4), jnp.array([10.0, 900.0]), jnp.array([1, 5]))


class TestTap:
    def test_values(self, net, x):
        forward, params = net
        w1, b1, w2, b2 = weights(params)
        hidden = x @ w1 + b1
        out = jnp.sin(hidden) @ w2 + b2
        outputs = tap(forward, params, (x,), kind=Linear)
        assert list(outputs) == ["pair.first", "pair.second"]
        close(outputs["pair.first"], hidden)
        close(outputs["pair.second"], out)
        inputs = tap(forward, params, (x,), kind=Linear, pattern=".*second", what="input")
        assert list(inputs) == ["pair.second"]
        close(inputs["pair.second"], jnp.sin(hidden))
        assert tap(forward, params, (x,), kind=Pair, what="input1") == {"pair": 2.0}
        assert set(tap(forward, params, (x,))) == {"pair", "pair.first", "pair.second"}

    def test_dit(self):
        forward, params, inputs = tiny_dit()

        def by_hand(params, image, times, labels):
            model = forward.module(params)
            tokens = model.patch(image) + jnp.asarray(sincos_2d(16, 4, 4))
            block, c = model.blocks[0], model.time(times) + model.label(labels)
            shift, scale, *_ = jnp.split(block.modulation(nnx.silu(c)), 6, axis=-1)
            normed = modulate(block.norm1(tokens), shift, scale)
            q, k, v = block.attn.project(normed)
            logits = jnp.einsum("bshd,bthd->bhst", q, k) / 8**0.5
            return normed, v, jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(logits, axis=-1), v)

        def tapped(params, *inputs):
            return (
                tap(forward, params, inputs, kind=Attention, what="input"),
                tap(forward, params, inputs, kind=AttentionCore, what="input2"),
                tap(forward, params, inputs, kind=AttentionCore),
            )

        expected = jax.jit(by_hand)(params, *inputs)
        for found, value in zip(jax.jit(tapped)(params, *inputs), expected, strict=True):
            (got,) = found.values()
            close(got, value, 1e-5)

    def test_inside_branches(self, net, x):
        forward, params = net
        w1, b1, *_ = weights(params)
        patched = forward.patch(ByStep())
        jitted = jax.jit(lambda step: tap(patched, params, (x,), kind=Linear, step=step))
        for step, factor in enumerate((1, 2)):
            expected = factor * x @ w1 + b1
            close(jitted(step)["pair.first"], expected)
            close(tap(patched.at(step), params, (x,), kind=Linear)["pair.first"], expected)
        assert jnp.isnan(jitted(2)["pair.first"]).all()
        close(tap(patched, params, (x,), kind=Pair, step=jnp.int32(2))["pair"], jnp.zeros((5, 2)))

    def test_given_state_is_used(self, net, x):
        forward, params = net
        patched = forward.patch(ByStep(), Tap(Pair, what="input"))
        _, state = patched(params, patched.init(params, x), x, step=0)
        assert tap(patched, params, (2 * x,), kind=Linear, state=state).keys() == {
            "pair.first",
            "pair.second",
        }
        with pytest.raises(ValueError, match=r"pair\.other"):
            tap(patched, params, (x,), kind=Linear, state={"pair.other": jnp.zeros(())})

    def test_second_call_does_not_retrace(self, net, x):
        forward, params = net
        jitted = jax.jit(lambda forward, params, x: tap(forward, params, (x,), kind=Linear))
        jitted(forward, params, x)
        seen = len(TRACES)
        again, _ = functional(Net(Config(), rngs=nnx.Rngs(1)))
        jitted(again, params, x + 1)
        assert len(TRACES) == seen

    def test_errors(self, net, x):
        forward, params = net
        with pytest.raises(ValueError, match=r"Linear matches 'no\\\.such'.*pair\.first"):
            tap(forward, params, (x,), kind=Linear, pattern=r"no\.such")
        with pytest.raises(ValueError, match=r"Attention matches.*pair"):
            tap(forward, params, (x,), kind=Attention)
        with pytest.raises(ValueError, match="got 'weights'"):
            tap(forward, params, (x,), what="weights")
        with pytest.raises(ValueError, match=r"pair\.first is called with 1 positional"):
            tap(forward, params, (x,), kind=Linear, what="input1")
        with pytest.raises(TypeError, match="tuple of a forward's inputs"):
            statistics(forward, params, iter([x]))

    def test_two_calls_of_one_site(self, x):
        forward, params = functional(Twice(Config(), rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match="linear is called more than once"):
            tap(forward, params, (x,))
        with pytest.raises(ValueError, match="linear is called more than once"):
            gradients(forward, params, jnp.sum, (x,))
        both = jnp.concatenate([x, x @ params["linear"]["kernel"]])
        found = statistics(forward, params, [(x,)], what="input")["linear"]
        close(found.mean, both.mean(0))
        assert (found.elements == 10).all()

    def test_a_site_that_is_never_called(self, net, x):
        forward, params = net
        bypassed = forward.patch(_bypass)
        for function in (tap, lambda f, p, i, **o: statistics(f, p, [i], **o)):
            with pytest.raises(ValueError, match=r"never calls pair\.first, pair\.second"):
                function(bypassed, params, (x,), kind=Linear)


class Bypass(Wrapper):
    def __call__(self, x, scale):
        return jnp.zeros((x.shape[0], 2))


def _bypass(module, context):
    wrap(module, "pair", Bypass)


class TestStatistics:
    @pytest.mark.parametrize("per", ["channel", "tensor"])
    def test_three_batches_equal_numpy_on_their_concatenation(self, net, key, per):
        forward, params = net
        w1, b1, *_ = weights(params)
        sizes = (5, 5, 2)
        batches = [jax.random.normal(jax.random.key(i), (n, 3)) + i for i, n in enumerate(sizes)]
        found = statistics(forward, params, ((batch,) for batch in batches), kind=Linear, per=per)
        assert list(found) == ["pair.first", "pair.second"]
        hidden = np.concatenate([np.asarray(batch @ w1 + b1) for batch in batches])
        axis = 0 if per == "channel" else None
        first = found["pair.first"]
        assert first.mean.shape == ((4,) if per == "channel" else ())
        assert (first.elements == hidden.size / first.mean.size).all()
        close(first.absmax, np.abs(hidden).max(axis))
        close(first.min, hidden.min(axis))
        close(first.max, hidden.max(axis))
        close(first.mean, hidden.mean(axis), 1e-5)
        close(first.mean_square, (hidden**2).mean(axis), 1e-5)

    def test_second_run_does_not_retrace(self, net, x):
        forward, params = net

        def run(forward):
            return statistics(forward, params, [(x,), (x,)], pattern=r"pair\.first", step=1)

        run(forward)
        seen = len(TRACES)
        run(functional(Net(Config(), rngs=nnx.Rngs(0)))[0])
        assert len(TRACES) == seen + 1  # the shapes of the initial state

    def test_inside_branches_and_along_a_loop(self, net, x):
        forward, params = net
        observing = forward.patch(ByStep(), Observe(Linear, r"pair\.first", "input"))

        def body(state, step):
            return observing(params, state, x, step=step)[1], None

        state, _ = jax.lax.scan(body, observing.init(params, x), jnp.arange(3))
        (found,) = read_statistics(state, what="input").values()
        seen = jnp.concatenate([x, 2 * x])
        close(found.max, seen.max(0))
        close(found.mean, seen.mean(0))
        assert (found.elements == 10).all()
        assert state["pair.calls"] == 3
        assert read_statistics(state, what="output") == {}

    def test_errors(self, net, x):
        forward, params = net
        with pytest.raises(ValueError, match="at least one batch"):
            statistics(forward, params, [])
        with pytest.raises(ValueError, match="no target module of kind Linear matches"):
            statistics(forward, params, [(x,)], kind=Linear, pattern="first")


class TestGradients:
    def test_values(self, net, x):
        forward, params = net
        w1, b1, w2, b2 = weights(params)
        hidden = x @ w1 + b1

        def rest(hidden):
            return jnp.sum(((jnp.sin(hidden) @ w2 + b2) * 2).sum(-1) ** 2)

        def from_activation(activation):
            return jnp.sum(((activation @ w2 + b2) * 2).sum(-1) ** 2)

        loss = lambda out: jnp.sum(out**2)  # noqa: E731
        found = jax.jit(lambda params, x: gradients(forward, params, loss, (x,), kind=Linear))(
            params, x
        )
        assert list(found) == ["pair.first", "pair.second"]
        close(found["pair.first"], jax.grad(rest)(hidden), 1e-5)
        inputs = gradients(forward, params, loss, (x,), pattern=r"pair\.second", what="input")
        close(inputs["pair.second"], jax.grad(from_activation)(jnp.sin(hidden)), 1e-5)

    def test_inside_branches(self, net, x):
        forward, params = net
        w1, b1, w2, b2 = weights(params)
        patched = forward.patch(ByStep())
        run = jax.jit(
            lambda step: gradients(
                patched, params, jnp.sum, (x,), pattern=r"pair\.first", step=step
            )
        )
        expected = jax.grad(lambda h: ((jnp.sin(h) @ w2 + b2) * 2).sum())(2 * x @ w1 + b1)
        close(run(1)["pair.first"], expected)
        close(run(2)["pair.first"], jnp.zeros((5, 4)))

    def test_dit(self):
        forward, params, inputs = tiny_dit()

        def rest(tokens, params, image, times, labels):
            model = forward.module(params)
            c = model.time(times) + model.label(labels)
            return jnp.sum(jnp.square(model.final(tokens, c)))

        loss = lambda out: jnp.sum(jnp.square(out))  # noqa: E731

        def both(params, *inputs):
            last = tap(forward, params, inputs, pattern="blocks")["blocks"]
            found = gradients(forward, params, loss, inputs, pattern="blocks")
            return found["blocks"], jax.grad(rest)(last, params, *inputs)

        close(*jax.jit(both)(params, *inputs), 1e-4)

    def test_integers_have_none(self):
        forward, params, inputs = tiny_dit()
        with pytest.raises(TypeError, match=r"no gradient at \['label'\]"):
            gradients(forward, params, jnp.sum, inputs, pattern="label", what="input")


def test_what_a_stack_is_given():
    """Two streams and their condition, under jit; the blocks make of it what the model does."""
    subject = tiny_joint()
    inputs = (jnp.ones((2, 16, 16, 4)), jnp.array([10.0, 500.0]), subject.cond)
    look = jax.jit(lambda params: capture.stack_inputs(subject.forward, params, inputs))
    x, c = look(subject.params)
    assert {name: tokens.shape for name, tokens in x.items()} == {
        "image": (2, 64, 16),
        "text": (2, 5, 16),
    }
    module = subject.forward.module(subject.params)
    tapped = tap(subject.forward, subject.params, inputs, pattern="norm", what="input")["norm"]
    chex.assert_trees_all_close(module.blocks(x, c)["image"], tapped, atol=1e-5)
    with pytest.raises(ValueError, match="has no target module 'layers'"):
        capture.stack_inputs(subject.forward, subject.params, inputs, "layers")


def test_calls_of_modules_in_a_module():
    subject = testing.tiny_llama()
    block = subject.forward.module(subject.params).blocks[0]
    x, positions = jnp.ones((2, 3, 16)), jnp.array([[0, 1, 2], [0, 1, -1]])
    seen = capture.calls(block, ["attn", "attn.to_q", "mlp.down"], x, positions)
    [((normed, given), options)] = seen["attn"]
    assert given is positions
    assert not options
    [((same,), _)] = seen["attn.to_q"]
    assert same is normed
    assert seen["mlp.down"][0][0][0].shape == (2, 3, 24)
