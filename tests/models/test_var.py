"""VAR: parity with plain torch, the loop over scales, cost in closed form, methods, errors."""

import dataclasses
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from converters import convert, from_pretrained
from effjax import testing
from effjax.autoregression import NextScale, codes_of, teacher_forced
from effjax.calibration import Trajectory
from effjax.capture import tap
from effjax.cli import main
from effjax.context import Layout
from effjax.cost import sampler_cost, state_bytes
from effjax.forward import abstract, flatten_params, nest_params, parameter_count
from effjax.layers.folding import fold, folds
from effjax.layers.linear import Linear
from effjax.loops import Carry
from effjax.methods.quantization import awq, blocks, gptq, round_to_nearest, vidit_q
from effjax.models.var import VAR, VARConfig
from effjax.models.vqvae import VQVAE, VQVAEConfig, latents_of, quantizer_of
from effjax.parallel import device_mesh, shardings, tensor_parallel
from effjax.pipelines import NextScalePipeline
from effjax.quant import QTensor
from effjax.registry import methods
from pallas_kernels import use_implementation

SIDES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def subject():
    return testing.tiny_var()


@jax.jit
def sample(loop, forward, params, labels, key):
    return loop.sample(forward, params, labels, key)


def at_depth(measure, config):
    """What grows by the same number with each layer, at the depth of a configuration."""
    one, two = (measure(dataclasses.replace(config, num_layers=layers)) for layers in (1, 2))
    return one + (config.num_layers - 1) * (two - one)


def test_sizes_are_those_of_the_released_models():
    def parameters(config):
        return parameter_count(abstract(VAR, config)[1])

    wanted = {"d20": 600e6, "d24": 1.0e9, "d30": 2.0e9, "d36-s": 2.3e9}
    for name, rounded in wanted.items():
        assert at_depth(parameters, VARConfig.preset(name)) == pytest.approx(rounded, rel=0.04)
    assert VARConfig.preset("d16") == VARConfig()
    assert at_depth(parameters, VARConfig()) == 310_283_520
    assert VARConfig.preset("d36-s").tokens == 2240
    with pytest.raises(ValueError, match="no preset 'XL'"):
        VARConfig.preset("XL")


# --- parity -------------------------------------------------------------------------------------


def test_a_released_file_tells_everything(tmp_path):
    torch = pytest.importorskip("torch")
    from tests.models import var_reference as reference

    sd = reference.random_var(depth=3, width=24, heads=2, shared=True)
    torch.save(sd, tmp_path / "var.pth")
    forward, params = from_pretrained(tmp_path / "var.pth", progress=False)
    assert forward.config == VARConfig(
        num_layers=3,
        num_heads=2,
        head_dim=12,
        intermediate_size=96,
        num_classes=5,
        vocab_size=40,
        code_channels=6,
        shared_modulation=True,
    )
    # Scales of keys keep their logarithm; gates, scales and shifts have an order of their own.
    block = params["blocks"]["1"]
    theirs = sd["blocks.1.attn.scale_mul_1H11"][0, :, 0, 0]
    chex.assert_trees_all_equal(np.asarray(block["attn"]["q_norm"]["scale"]), theirs.numpy())
    gates = sd["blocks.1.ada_gss"][0, 0, :2].numpy()
    chex.assert_trees_all_equal(np.asarray(block["scale_shift_table"])[[2, 5]], gates)
    convert(tmp_path / "var.pth", tmp_path / "again", progress=False)
    again = from_pretrained(tmp_path / "again", progress=False)
    assert again[0] == forward
    chex.assert_trees_all_equal(again[1], params)

    def refuse(message, **changes):
        torch.save({**sd, **changes}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=message):
            from_pretrained(tmp_path / "other.pth", progress=False)

    refuse("cannot tell the sides of 10 scales with 679 tokens", pos_1LC=sd["pos_1LC"][:, 1:])
    mixed = {"blocks.0.ada_lin.1.weight": torch.zeros(144, 24)}
    refuse(r"blocks\.0\.ada_lin\.1\.weight: unexpected", **mixed)
    refuse(r"head\.bias: misshapen", **{"head.bias": torch.zeros(41)})


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """A VQVAE in the released layout, and the same loaded."""
    torch = pytest.importorskip("torch")
    from tests.models import var_reference as reference

    path = tmp_path_factory.mktemp("vae") / "vae.pth"
    sd = reference.random_vae(widths=(32, 32, 32, 32, 32))
    torch.save(sd, path)
    return sd, from_pretrained(path, progress=False)


@pytest.mark.parametrize("variant", ["own", "shared", "not unit"])
def test_logits_and_samples_equal_plain_torch(variant, codes, tmp_path):
    """Teacher-forced logits; and guided greedy samples, scale by scale through the caches."""
    torch = pytest.importorskip("torch")
    from tests.models import var_reference as reference

    options = {"shared": variant == "shared", "unit": variant != "not unit"}
    sd = reference.random_var(width=24, heads=2, sides=SIDES, **options)
    vae_sd, vae = codes
    torch.save(sd, tmp_path / "var.pth")
    config = {
        "_class_name": "VAR",
        "patch_nums": SIDES,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "intermediate_size": 96,
        "num_classes": 5,
        "vocab_size": 40,
        "code_channels": 6,
        "shared_modulation": options["shared"],
        "qk_norm": options["unit"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    forward, params = from_pretrained(tmp_path / "var.pth", progress=False)
    labels = torch.tensor([3, 0])
    tokens = torch.randint(40, (2, 30), generator=torch.Generator().manual_seed(0))
    inputs = reference.inputs_of(vae_sd, tokens, SIDES)
    wanted = reference.logits_of(sd, inputs, labels, heads=2).numpy()
    given = jnp.asarray(tokens.numpy(), jnp.int32), jnp.asarray(labels.numpy(), jnp.int32)
    got = jax.jit(teacher_forced)(forward, params, vae, *given)
    chex.assert_trees_all_close(got, wanted, atol=1e-4)
    if variant != "shared":  # the others' samples follow from the tests below
        return
    drawn, _, latents = reference.sampled(
        sd, vae_sd, labels, guidance=3.0, heads=2, sides=SIDES, classes=5
    )
    loop = NextScale(vae, SIDES, guidance=3.0, top_k=1)
    x, own = sample(loop, forward, params, given[1], jax.random.key(0))
    np.testing.assert_array_equal(own, drawn.numpy())
    chex.assert_trees_all_close(x, latents.permute(0, 2, 3, 1).numpy(), atol=1e-4)


# --- the loop -----------------------------------------------------------------------------------


def test_cached_calls_give_what_one_call_gives(subject):
    """At every scale, and the latents are those of the tokens."""
    forward, params, cond = subject.forward, subject.params, subject.cond
    loop = dataclasses.replace(subject.sampler, guidance=None)

    @jax.jit
    def both(params, loop):
        carry, logits = loop.init(forward, params, cond, jax.random.key(1)), []
        for scale in range(loop.calls):
            out, _, state = loop.network(forward, params, carry.state, carry.x, cond, None, scale)
            logits.append(out)
            carry = loop.update(carry._replace(state=state), out, scale)
        whole = teacher_forced(forward, params, loop.vae, carry.memory, cond)
        made = latents_of(*loop.vae, carry.memory, loop.patch_nums)
        codes = codes_of(quantizer_of(*loop.vae), carry.memory, loop.patch_nums)
        other = forward(params, {}, codes.at[:, 4].add(1.0), cond)[0]  # the last of its scale
        # The first scales in one call, the last one after them.
        keeping, scales = loop.ready(forward), forward.config.scales
        first, last = (codes[:, :5], cond, scales(0, 2)), (codes[:, 5:], cond, scales(2, 3))
        begun, state = keeping(params, keeping.init(params, *first), *first, step=0)
        ended, _ = keeping(params, state, *last, step=1)
        logits = jnp.concatenate(logits, axis=1), jnp.concatenate([begun, ended], axis=1)
        return *logits, whole, carry.x, made, other

    cached, in_two, whole, x, made, other = both(params, loop)
    chex.assert_trees_all_close(cached, whole, atol=1e-4)
    chex.assert_trees_all_close(in_two, whole, atol=1e-4)
    chex.assert_trees_all_close(x, made, atol=1e-5)
    # A scale sees all of itself and of those before, and nothing that follows.
    chex.assert_trees_all_equal(other[:, :1], whole[:, :1])
    changed = jnp.abs(other - whole).max(axis=(0, 2))
    assert float(changed[1:].min()) > 1e-4


def test_one_program_for_all_labels_keys_and_guidance(subject):
    traces = []

    @jax.jit
    def run(loop, forward, params, labels, keys):
        traces.append(None)
        return loop.sample(forward, params, labels, keys)

    keys, found = jax.random.split(jax.random.key(0), 2), []
    for guidance, top_p, temperature, change in [(0.0, 0.9, 1.0, 0), (4.0, 1.0, 1.2, 1)]:
        numbers = {"guidance": guidance, "top_p": top_p, "temperature": temperature}
        loop = dataclasses.replace(subject.sampler, **numbers)
        labels = (subject.cond + change) % 5
        found.append(run(loop, subject.forward, subject.params, labels, keys))
    # A sample does not depend on its neighbor.
    other = run(loop, subject.forward, subject.params, labels.at[0].set(4), keys.at[0].set(keys[1]))
    assert len(traces) == 1
    assert (found[0][1] != found[1][1]).any()
    assert (found[1][1][0] != other[1][0]).any()
    chex.assert_trees_all_equal(found[1][1][1], other[1][1])
    # Without guidance half the batch gives the same; so does one program for each scale, in which
    # sampling goes on from what a callback returns.
    loop = dataclasses.replace(subject.sampler, guidance=None, top_p=0.9)
    args, seen = (subject.forward, subject.params, subject.cond, keys), []

    def look(scale, x):
        seen.append((scale, x))
        return 0 * x if scale == 2 else None

    x, tokens = loop.stepwise(*args, callback=look)
    chex.assert_trees_all_equal(tokens, found[0][1])
    chex.assert_trees_all_close(seen[2][1], found[0][0], atol=1e-5)
    assert [scale for scale, _ in seen] == [0, 1, 2]
    assert float(jnp.abs(x).max()) == 0
    with pytest.raises(ValueError, match=r"callback returns latents float\[2, 3, 3, 4\] or None"):
        loop.stepwise(*args, callback=lambda scale, x: x[:1])


def test_what_is_drawn(subject):
    """Top-k and top-p from their definitions; the mixture of codes from its formula."""
    loop = dataclasses.replace(subject.sampler, guidance=None, top_k=3, top_p=0.8)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 40)), jnp.float32) * 2
    keys = jax.random.split(jax.random.key(0), 2)
    zeros = jnp.zeros((2, 3, 3, 4)), jnp.zeros((2, 14), jnp.int32)
    carry = Carry(*zeros, {}, keys)
    update = jax.jit(lambda loop, carry: loop.update(carry, logits, 1))
    tokens = np.asarray(update(loop, carry).memory[:, 1:5])
    for row, column in itertools.product(range(2), range(4)):
        kept = np.argsort(-logits[row, column])[:3]
        shares = np.exp(np.asarray(logits[row, column])[kept])
        sums = np.cumsum(shares / shares.sum())
        assert tokens[row, column] in kept[: int(np.sum(sums < 0.8)) + 1]

    smooth = dataclasses.replace(loop, top_k=None, top_p=None, more_smooth=True)

    @jax.jit
    def by_formula(vae):
        quantizer = quantizer_of(*vae)
        own = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 1), 3))(keys)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (4, 40)))(own)
        sharpness = 0.27 * (1 - 0.95 / 2)
        weights = jax.nn.softmax((logits * (3 / 2) + noise) / sharpness)
        return quantizer.enlarged(weights @ quantizer.codes(), 1, loop.patch_nums)

    chex.assert_trees_all_close(update(smooth, carry).x, by_formula(loop.vae), atol=1e-4)
    by_scale = dataclasses.replace(loop, temperature=(1.0, 0.5, 1.0))
    chex.assert_trees_all_close(by_scale.tempered(logits, 1), 2 * logits)


# --- cost ---------------------------------------------------------------------------------------


def test_cost_is_that_of_the_formulas():
    """A layer of VAR-d16 at 256 pixels with guidance: FLOPs of layers, attention, head; caches."""

    def formulas(config, layers):
        width, tokens = config.hidden_size, config.tokens
        linear = 24 * 2 * tokens * width**2 * layers
        attention = 4 * 2 * 286_434 * width * layers
        return linear, attention, 2 * 2 * tokens * width * 4096, 4 * 2 * tokens * width * layers

    wanted = {"d16": (547.608, 37.543, 11.409, 85.0), "d30": (3609.723, 131.989, 21.391, 298.8)}
    for name, figures in wanted.items():
        config = VARConfig.preset(name)
        *flops, held = formulas(config, config.num_layers)
        own = *(each / 1e9 for each in flops), held / 2**20
        assert own == pytest.approx(figures, rel=6e-4)

    config = VARConfig.preset("d16", num_layers=1, dtype="float16")
    forward, shapes = abstract(VAR, config)
    loop = NextScale(abstract(VQVAE, VQVAEConfig()), config.patch_nums, guidance=1.5)
    cost = sampler_cost(loop, forward, shapes, jax.ShapeDtypeStruct((1,), jnp.int32))
    linear, attention, head, held = formulas(config, 1)
    assert cost.scope("attention").flops == attention
    width, channels = config.hidden_size, config.code_channels
    embedding = 2 * 2 * (config.tokens - 1) * channels * width
    modulation = 2 * 2 * (6 + 2) * width**2  # once, of the block and the head
    # What the latents are at the tokens of a scale: rows, then columns; not for the last one.
    averages = sum(2 * p * 16 * (16 + p) * channels for p in config.patch_nums[:-1])
    assert cost.flops == linear + attention + head + embedding + modulation + averages
    labels, key = jnp.zeros(1, jnp.int32), jax.random.key(0)
    carry = jax.eval_shape(lambda params: loop.init(forward, params, labels, key), shapes)
    caches = {name: value for name, value in carry.state.items() if ".core." in name}
    assert state_bytes(caches) == held


# --- methods ------------------------------------------------------------------------------------


def test_weights_are_quantized_and_saved(tmp_path):
    """As the contract of methods asks for: fewer bits, saved and loaded, scanned."""
    subject = testing.tiny_var(patch_nums=(1, 2))
    args = subject.cond, jax.random.key(0)
    plan = round_to_nearest.RoundToNearestPlan(rules=(("role:qkv|modulation", 4, 8),))
    small = round_to_nearest.transform(plan)(subject.forward, subject.params)
    assert isinstance(small[1]["blocks"]["0"]["modulation"]["kernel"], QTensor)
    # One block for both, with the caches and the modulations of each.
    scanned, _ = effjax.scan_blocks("blocks")(subject.forward, subject.params)
    with use_implementation("xla"):
        dense, _ = sample(subject.sampler, subject.forward, subject.params, *args)
        x, _ = sample(subject.sampler, *small, *args)
        of_one, _ = sample(subject.sampler, scanned, subject.params, *args)
    chex.assert_tree_all_finite(x)
    assert float(jnp.abs(x - dense).max()) > 0
    chex.assert_trees_all_close(of_one, dense, atol=1e-4)
    effjax.save(tmp_path / "small", *small)
    again = effjax.load(tmp_path / "small")
    assert again[0] == small[0]
    chex.assert_trees_all_equal(again[1], small[1])


@pytest.mark.parametrize("method", [awq, gptq], ids=["awq", "gptq"])
def test_weights_are_fitted_to_samples(method, tmp_path):
    """On all scales of samples in one call, nearer than rounding; and by a command."""
    subject = testing.tiny_var(patch_nums=(1, 2))
    pair = subject.forward, subject.params
    data = dataclasses.replace(subject.data(Trajectory), cond=jnp.arange(5, dtype=jnp.int32))
    (batch,) = blocks.along(*pair, data)
    assert batch[0].shape == (10, 5, 4)  # both branches of guidance
    assert batch[2] == subject.forward.config.scales()
    plan = method.uniform(3)
    learned = method.METHOD.calibrate(plan, *pair, data)
    run = jax.jit(lambda params: pair[0](params, {}, *batch)[0])
    nearest, fitted = (
        jnp.mean(jnp.square(run(method.transform(plan, given)(*pair)[1]) - run(pair[1])))
        for given in (None, learned)
    )
    assert fitted < 0.97 * nearest
    if method is gptq:
        pipe = NextScalePipeline(*pair, subject.sampler.vae)
        pipe.save(tmp_path / "var")
        command = ["apply", str(tmp_path / "var"), str(tmp_path / "small"), "gptq", "--labels", "1"]
        assert main([*command, "--tokens", "9"]) == 1
        assert main(command) == 0
        small = effjax.pipeline(tmp_path / "small", progress=False)
        assert small.forward.recipe[0][0] == "gptq"


def test_methods_for_other_attention_are_refused(untyped, subject):
    """By name, before work: whatever a method searches, calibrates or trains."""
    others = {"litevar", "vidit_q", "gptq", "awq", "distilled_decoding"}  # run on VAR
    for name, method in methods().items():
        ways = [way for way in (method.search, method.calibrate, method.fit) if way is not None]
        if name in others or method.read is not None or not ways:
            continue
        own = method.tiny()
        data = (subject if method.data is Trajectory else own).data(method.data)
        pair, plan = (subject.forward, subject.params), method.ladder(own)[-1]
        if method.search is not None:
            with pytest.raises(ValueError, match=r"is for models with|trajectories|times of"):
                method.search(method.goals(), *pair, data)
        if method.fit is not None:
            with pytest.raises(ValueError, match="is for models with"):
                method.fit(plan, method.fitting(), *pair, data, checkpoints=None)
    for name in ("moa", "cskv"):
        method = methods()[name]
        with pytest.raises(ValueError, match="is for models with causal attention; that of VAR is"):
            method.transform(method.ladder(method.tiny())[0])(subject.forward, subject.params)


def test_ranges_of_inputs_are_those_of_all_calls():
    """ViDiT-Q looks at every call; the maxima are those of one call with the same tokens."""
    subject = testing.tiny_var(patch_nums=(1, 2))
    forward, params, cond = subject.forward, subject.params, subject.cond
    loop, key = dataclasses.replace(subject.sampler, guidance=None), jax.random.key(0)
    plan = vidit_q.uniform(8, 8, alpha=0.5)
    with use_implementation("xla"):
        found = vidit_q.calibrate(plan, forward, params, loop, cond, key=key, progress=False)
        _, tokens = sample(loop, forward, params, cond, key)
        codes = codes_of(quantizer_of(*loop.vae), tokens, loop.patch_nums)
        wanted = {"kind": Linear, "pattern": r"blocks\.1\.mlp\.fc2", "what": "input"}
        seen = jax.jit(lambda params, codes: tap(forward, params, (codes, cond), **wanted))(
            params, codes
        )
    (path,) = seen
    chex.assert_trees_all_close(found[path][0], jnp.abs(seen[path]).max(axis=(0, 1)), rtol=1e-4)


def test_factors_fold_into_modulations(subject):
    """Inputs come out multiplied, their layers divided: the same logits."""
    forward, params, cond = subject.forward, subject.params, subject.cond
    codes = jax.random.normal(jax.random.key(2), (2, 14, 4))
    leaves = flatten_params(params)
    places = folds(forward.target_modules(params))
    assert len(places) == 6
    for number, place in enumerate(places):
        width = leaves[f"{place.readers[0]}.kernel"].shape[0]
        scale = jnp.exp(jax.random.normal(jax.random.key(number), (width,)))
        leaves = fold(leaves, place, scale)
        for reader in place.readers:
            leaves[f"{reader}.kernel"] = leaves[f"{reader}.kernel"] / scale[:, None]
    run = jax.jit(lambda params: forward(params, {}, codes, cond)[0])
    chex.assert_trees_all_close(run(nest_params(leaves)), run(params), atol=1e-4)


def test_methods_that_keep_tokens_are_refused(subject):
    method = methods()["even_steps"]
    forward, params = method.transform(method.ladder(subject)[-1])(subject.forward, subject.params)
    with pytest.raises(ValueError, match="even_steps keeps tokens of a call for the next one"):
        subject.sampler.init(forward, params, subject.cond, jax.random.key(0))


def test_layers_are_cut_by_their_roles(subject):
    mesh = device_mesh(data=2, model=2)
    rules = tensor_parallel(subject.forward)
    found = flatten_params(shardings(subject.params, mesh, rules))
    for name, axes in {
        "blocks.0.attn.to_v.kernel": (None, "model"),
        "blocks.1.mlp.fc2.kernel": ("model", None),
        "head.proj.kernel": (None, "model"),
        "positions": (None, None),
    }.items():
        assert found[name].spec == jax.sharding.PartitionSpec(*axes)


# --- errors -------------------------------------------------------------------------------------


def test_bad_input(subject):
    forward, params, loop = subject.forward, subject.params, subject.sampler
    labels, key = subject.cond, jax.random.key(0)

    def refuse(message, kind=ValueError, **changes):
        with pytest.raises(kind, match=message):
            dataclasses.replace(loop, **changes).init(forward, params, labels, key)

    refuse(r"maps of the sides \(1, 2, 3\), and the loop is for \(1, 2, 4\)", patch_nums=(1, 2, 4))
    refuse(r"top_k must be 1 \.\.\. 40, the number of codes", top_k=41)
    refuse("one for each of 3 scales", temperature=(1.0, 1.0))
    refuse("of a VAR with its VQVAE, got VAR and VAR", vae=(forward, params))
    refuse("40 codes of 5 channels", vae=testing.tiny_vqvae(latent_channels=5))
    with pytest.raises(TypeError, match="key must come from"):
        loop.init(forward, params, labels, jnp.arange(2))
    with pytest.raises(ValueError, match="whole scales are 1, 5, 14; got 6"):
        forward(params, {}, jnp.zeros((2, 6, 4)), labels)
    with pytest.raises(ValueError, match=r"of 4 channels;.*which are \[4, 4\]"):
        forward(params, {}, jnp.zeros((2, 9, 4)), labels, forward.config.scales(1, 2))
    with pytest.raises(ValueError, match="come from a cache"):
        forward(params, {}, jnp.zeros((2, 9, 4)), labels, forward.config.scales(2, 3))
    with pytest.raises(ValueError, match=r"some of 3, got 3 \.\.\. 4"):
        forward.config.scales(3, 5)
    with pytest.raises(ValueError, match="that do not fall"):
        VARConfig(patch_nums=(2, 1))
    assert forward.layout(params, jnp.zeros((2, 9, 4)), labels, forward.config.scales(2, 3)) == (
        Layout(grid=(1, 3, 3))
    )
    whole = forward.layout(params, jnp.zeros((2, 14, 4)), labels)
    with pytest.raises(ValueError, match="a call of several scales has left 14 tokens"):
        whole.raster("a window")
