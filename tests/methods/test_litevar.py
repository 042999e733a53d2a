"""LiteVAR: the paper's formulas, windows, sharing, calibration, bits, errors."""

import dataclasses
import itertools
import json
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import effjax
from effjax import testing
from effjax.calibration import Trajectory
from effjax.cli import main
from effjax.cost import sampler_cost, state_bytes
from effjax.guidance import Guidance, guided_by
from effjax.layers.linear import Linear
from effjax.layers.scales import ScaleAttention, ScaleCore, Scales, token_starts
from effjax.methods import distilled_decoding, litevar
from effjax.methods.attention.litevar.patch import SharedAttention, WindowedCore
from effjax.methods.attention.litevar.search import diagonal_masses, half_widths, measured
from effjax.methods.quantization import round_to_nearest
from effjax.methods.quantization.blocks import along
from effjax.models.var import PATCH_NUMS
from effjax.pipelines import NextScalePipeline
from effjax.quant import QTensor
from pallas_kernels import use_implementation
from pallas_kernels.block_mask import MultiDiagonal, block_mask, dense_mask, visible_pairs

SIDES = (1, 2, 3, 4)
SIZES = tuple(side**2 for side in SIDES)
STARTS = token_starts(SIDES)


@pytest.fixture(scope="module")
def subject():
    return testing.tiny_var(patch_nums=SIDES)


@pytest.fixture(scope="module")
def plan():
    """Windows that differ by scale, layer and head; the first scale is dense for all."""
    rng = np.random.default_rng(0)
    windows = tuple(
        (i, j, tuple(map(tuple, rng.integers(0, SIZES[j] + 1, (2, 2)).tolist())))
        for i, j in litevar.windowed_pairs(4, first=1)
    )
    return litevar.LiteVARPlan(SIDES, 2, 2, windows, "none")


def band(i, j, width, sides=PATCH_NUMS[256]):
    """M_ij of the paper, element by element."""
    n, m = sides[i] ** 2, sides[j] ** 2
    x, y = np.arange(n)[:, None], np.arange(m)
    return np.abs(x * (m / n) - y) < width - 1e-9


# --- closed forms -------------------------------------------------------------------------------


def test_pairs_and_savings_are_those_of_the_paper():
    sides = PATCH_NUMS[256]
    pairs = litevar.windowed_pairs(10)
    assert len(pairs) == 30
    assert pairs[:5] == ((3, 3), (3, 2), (4, 4), (4, 3), (4, 2))
    assert pairs[-7:] == tuple((9, j) for j in range(9, 2, -1))
    windowed = sum(sides[i] ** 2 * sides[j] ** 2 for i, j in pairs)
    assert (windowed, sum(litevar.scale_pairs(sides))) == (277_332, 286_434)
    for (i, j), width, kept in (
        ((9, 8), 15, 7335),
        ((9, 9), 32, 15_136),
        ((8, 7), 13, 4108),
        ((6, 5), 9, 1005),
    ):
        skipped = [0] * i + [0]
        skipped[j] = width
        sizes = tuple(side**2 for side in sides[: i + 1])
        rule = MultiDiagonal(sizes, tuple(skipped))
        assert visible_pairs(rule, sizes[-1], sum(sizes)) == band(i, j, width).sum() == kept
    # What is kept of the paper's windows: 84,956 pairs, 27.35 % of those that windows are for.
    dense = 286_434 - 277_332
    kept = 84_956 / 286_434
    assert (84_956 - dense) / windowed == pytest.approx(0.2735, abs=1e-4)
    for share, saved in (("none", 0.7034), ("map", 0.7776), ("output", 0.8517)):
        assert litevar.attention_saving(kept, share) == pytest.approx(saved, abs=1e-4)


def test_a_rule_sees_what_the_formula_says():
    widths = (1, (4, 0), (2, 9), (0, 5))
    rule = MultiDiagonal(SIZES, widths)
    rows = [np.broadcast_to(width, 2) for width in widths]
    expected = np.stack(
        [
            np.concatenate([band(3, j, rows[j][head], SIDES) for j in range(4)], axis=1)
            for head in range(2)
        ]
    )
    mask = block_mask(rule, 16, 30, block=(4, 8))
    chex.assert_trees_all_equal(dense_mask(mask)[0], expected)
    assert mask.seen == visible_pairs(rule, 16, 30) == expected.sum()
    row, column = jnp.arange(16)[:, None], jnp.arange(30)  # as within kernels
    for head, own in enumerate(rule.parameters):
        chex.assert_trees_all_equal(
            np.asarray(rule.visible(row, column, 30, *jnp.asarray(own))), expected[head]
        )
    with pytest.raises(ValueError, match="a rule for 16 queries and 30 keys, got 16 and 29"):
        rule.check(1, 16, 2, 29)
    with pytest.raises(ValueError, match="one width for each of 4 levels, got 1"):
        MultiDiagonal(SIZES, (1,))
    with pytest.raises(ValueError, match=r"widths\[1\] must be at least 0, got -1"):
        MultiDiagonal((1, 4), (1, -1))


@pytest.mark.parametrize("share", ["none", "map", "output"])
def test_attention_costs_the_kept_pairs(subject, plan, share):
    """4 C d b' for each, b' = 2, 3/2 or 1 branches; caches hold what branches do not share."""
    plan = dataclasses.replace(plan, share=share)
    seen = visible(plan).sum((0, 1)) / 4
    kept = [seen[begin:end].sum() for begin, end in itertools.pairwise(STARTS)]
    assert plan.kept_pairs == pytest.approx(kept)
    assert plan.kept == pytest.approx(sum(kept) / sum(litevar.scale_pairs(SIDES)))
    share_of = {"none": 1, "map": 3 / 4, "output": 1 / 2}[share]
    dense = litevar.scale_pairs(SIDES)
    assert plan.computed(4)["attention"] == pytest.approx(share_of * np.divide(kept, dense))
    assert plan.computed(3) == {}
    forward, params = litevar.transform(plan)(subject.forward, subject.params)
    with use_implementation("xla"):
        counted = sampler_cost(subject.sampler, forward, params, subject.cond[:1])
        plain = sampler_cost(subject.sampler, subject.forward, params, subject.cond[:1])
    attention, width, layers = counted.scope("attention"), 16, 2
    branches = 2 * share_of
    assert attention.useful_flops == pytest.approx(4 * width * layers * branches * sum(kept))
    # Projections: of queries and keys of one branch, with outputs of all four.
    saved = {"none": 0, "map": 2, "output": 4}[share]
    linear = plain.flops - plain.scope("attention").flops - counted.flops + attention.flops
    assert linear == 2 * saved * width**2 * STARTS[-1] * layers
    states = subject.sampler.init(forward, params, subject.cond[:1], jax.random.key(0)).state
    held = {"none": 4, "map": 3, "output": 2}[share]
    keys_and_values = {name: leaf for name, leaf in states.items() if ".core." in name}
    assert state_bytes(keys_and_values) == held * width * STARTS[-1] * layers * 4


def visible(plan):
    """What every token sees, bool[layers, heads, L, L]."""
    found = np.zeros((plan.layers, plan.heads, STARTS[-1], STARTS[-1]), bool)
    for i, side in enumerate(SIDES):
        found[:, :, STARTS[i] : STARTS[i] + side**2, : STARTS[i + 1]] = True
    for i, j, widths in plan.windows:
        rows, columns = slice(STARTS[i], STARTS[i + 1]), slice(STARTS[j], STARTS[j + 1])
        for layer, head in np.ndindex(plan.layers, plan.heads):
            found[layer, head, rows, columns] = band(i, j, widths[layer][head], SIDES)
    return found


# --- attention ----------------------------------------------------------------------------------


def operands(rows=2, width=8):
    keys = jax.random.split(jax.random.key(1), 3)
    return [jax.random.normal(key, (rows, STARTS[-1], 2, width)) for key in keys]


def by_hand(q, k, v, seen, *, renormalize=True):
    """softmax with a mask, of all scales at once."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    levels = np.repeat(np.arange(4), SIZES)
    causal = levels[:, None] >= levels
    logits = np.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(logits) * causal
    if not renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    weights = weights * seen
    if renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    return np.einsum("bhst,bthd->bshd", weights, v)


@pytest.mark.parametrize("renormalize", [True, False])
def test_windows_are_masks(plan, renormalize):
    q, k, v = operands()
    seen = visible(plan)[0]
    core = WindowedCore(ScaleCore(), plan.rules_of_attention[0], 16, renormalize)
    wanted = by_hand(q, k, v, seen, renormalize=renormalize)
    with use_implementation("xla"):
        chex.assert_trees_all_close(core(q, k, v, Scales(SIDES, 0, 4)), wanted, atol=1e-5)
        last = slice(STARTS[3], None)
        own = core(q[:, last], k, v, Scales(SIDES, 3, 4))
        chex.assert_trees_all_close(own, wanted[:, last], atol=1e-5)
        if not renormalize:
            return
        # In 8 bits nearly the same, and a single key gives its value.
        coded = WindowedCore(ScaleCore(), plan.rules_of_attention[0], 8, True)
        found = np.asarray(coded(q, k, v, Scales(SIDES, 0, 4)))
        chex.assert_trees_all_equal(found[:, 0], np.asarray(v)[:, 0])
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert 1e-4 < error < 0.02


def test_branches_share_maps_or_outputs():
    options = {"heads": 2, "head_dim": 8, "unit_norm": True, "rngs": nnx.Rngs(0)}
    attention, scales = ScaleAttention(16, **options), Scales(SIDES, 0, 4)
    x = jax.random.normal(jax.random.key(2), (4, STARTS[-1], 16))
    guidance = Guidance(("uncond", "cond"))
    uncond, cond = x[:2], x[2:]
    full = attention(x, scales)
    with guided_by(guidance), use_implementation("xla"):
        shared = SharedAttention(attention, "output")(x, scales)
        chex.assert_trees_all_close(shared, jnp.concatenate([full[2:]] * 2), atol=1e-6)
        mapped = SharedAttention(attention, "map")(x, scales)
        # Conditional maps times unconditional values.
        q, k, _ = attention.project(cond)
        _, _, v = attention.project(uncond)
        wanted = attention.merge(attention.core(q, k, v, scales))
        chex.assert_trees_all_close(mapped, jnp.concatenate([wanted, full[2:]]), atol=1e-5)
        # Equal branches have nothing to lose.
        same = jnp.concatenate([cond, cond])
        for share in ("map", "output"):
            chex.assert_trees_all_close(
                SharedAttention(attention, share)(same, scales), attention(same, scales), atol=1e-5
            )
    with pytest.raises(ValueError, match="but this call is not guided"):
        SharedAttention(attention, "map")(x, scales)
    others = guided_by(Guidance(("cond", "perturbed", "uncond")))
    with others, pytest.raises(ValueError, match="this call has perturbed too"):
        SharedAttention(attention, "output")(x[:3], scales)


def test_scales_of_few_tokens_stay_dense(plan):
    few = dataclasses.replace(plan, min_tokens=10)
    rules = few.rules_of_attention
    assert all(layer[:3] == (None,) * 3 for layer in rules)
    assert [layer[3] for layer in rules] == [layer[3] for layer in plan.rules_of_attention]


# --- calibration --------------------------------------------------------------------------------


def test_masses_and_widths_are_those_of_the_maps():
    """Against the masks of all candidates, on the map summed over a batch."""
    (q, k, _), floor, tau = operands(), 0.02, 0.8
    q = 3 * q
    masses = []
    levels = np.repeat(np.arange(4), SIZES)
    logits = np.einsum("bshd,bthd->bhst", q, k) * 8**-0.5
    logits = np.where(levels[:, None] >= levels, logits, -np.inf)
    maps = np.asarray(jax.nn.softmax(logits, axis=-1)).sum(0)
    maps = np.where(maps < floor, 0, maps)
    for i in range(4):
        rows = slice(STARTS[i], STARTS[i + 1])
        own = diagonal_masses(q[:, rows], k[:, : STARTS[i + 1]], Scales(SIDES, i, i + 1), floor)
        masses.append(np.pad(own, [(0, 0), (0, STARTS[-1] - own.shape[1])]))
    layers = [np.stack(masses)]
    for i, j in litevar.windowed_pairs(4, first=1):
        rows, columns = slice(STARTS[i], STARTS[i + 1]), slice(STARTS[j], STARTS[j + 1])
        for head in range(2):
            block, total = maps[head, rows, columns], maps[head, rows].sum()
            widths = [w for w in range(1, SIZES[j] + 1) if kept(block, i, j, w) >= tau]
            for skip in (0.0, 0.3):
                wanted = 0 if block.sum() / total < skip else widths[0]
                assert half_widths(layers, SIDES, (i, j), tau, skip)[0, head] == wanted


def kept(block, i, j, width):
    return block[band(i, j, width, SIDES)].sum() / block.sum()


def test_pairs_with_little_mass_are_skipped():
    """The paper's shares of ten scales: the newest pair needs both of two to be small."""
    sides = PATCH_NUMS[256]
    starts = token_starts(sides)

    def widths(pair, shares, **options):
        masses = np.zeros((10, 1, starts[-1]))
        for scale, share in shares.items():
            masses[pair[0], 0, starts[scale]] = share
        return int(half_widths([masses], sides, pair, 0.95, **options)[0, 0])

    assert widths((9, 8), {8: 0.09, 0: 0.91}) == 0
    assert widths((9, 8), {8: 0.11, 0: 0.89}) == 1
    assert widths((9, 3), {3: 0.051, 0: 0.949}) == 1
    assert widths((8, 3), {3: 0.021, 0: 0.979}) == 1
    assert widths((8, 4), {4: 0.021, 0: 0.979}) == 0
    assert widths((3, 2), {2: 0.09, 0: 0.91}) == 0
    assert widths((9, 9), {9: 0.19, 8: 0.1, 7: 0.05, 0: 0.66}) == 0
    assert widths((9, 9), {9: 0.19, 8: 0.1, 7: 0.15, 0: 0.56}) == 1
    assert widths((9, 9), {9: 0.19, 0: 0.81}, skip=0.1) == 1
    # A pair without any mass that is not skipped is left dense.
    assert widths((9, 5), {0: 1.0}, skip=0.0) == 36


def test_a_search_takes_the_widest_windows_of_batches(subject):
    data = Trajectory(subject.sampler, jnp.arange(3, dtype=jnp.int32), jax.random.key(4))
    pair = subject.forward, subject.params
    goals = litevar.Goals(
        tau=0.7, first=1, batch=2, share="map", bits="w4a8", attention_bits=16, skip=0.1
    )
    with use_implementation("xla"):
        plan = litevar.search(goals, *pair, data, progress=False)
        batches = list(measured(*pair, data, floor=0.003, batch=2, bar=False))
    assert len(batches) == 2
    for i, j, widths in plan.windows:
        own = [half_widths(masses, SIDES, (i, j), 0.7, 0.1) for masses in batches]
        chex.assert_trees_all_equal(np.asarray(widths), np.maximum(*own))
    assert (plan.share, plan.tau, plan.patch_nums) == ("map", 0.7, SIDES)
    assert plan.rules == (("role:embedding|qkv|out|up|modulation|head", 4, 8),)
    # tau 1 without floor and skipping keeps what is there: the same attention.
    everything = litevar.Goals(
        tau=1.0, floor=0.0, skip=0.0, first=1, share="none", bits="w16", attention_bits=16
    )
    whole = litevar.search(everything, *pair, data, progress=False)
    forward, params = litevar.transform(whole)(*pair)
    with use_implementation("xla"):
        found, wanted = (
            jax.jit(subject.sampler.sample)(each, params, data.cond, data.key)
            for each in (forward, subject.forward)
        )
    assert (found[1] == wanted[1]).mean() > 0.9


def test_sensitivity_and_mixed_precision(subject):
    data = subject.data(Trajectory)
    losses = litevar.sensitivity(subject.forward, subject.params, data, progress=False)
    assert set(losses) == {"embedding", "qkv", "out", "up", "down", "modulation", "head"}
    # As of a model whose layers hold quantized values.
    rules = (("role:down", 4, 4), *litevar.mixed_precision(8, 8))
    rounded = round_to_nearest.transform(round_to_nearest.RoundToNearestPlan(rules))
    loop = subject.sampler
    (inputs,) = along(subject.forward, subject.params, data)
    assert inputs[0].shape == (4, STARTS[-1], 4)
    run = jax.jit(lambda forward, params: forward(params, {}, *inputs, guidance=loop.joined)[0])
    dense, noisy = (
        run(forward, params)
        for forward, params in (
            (subject.forward, subject.params),
            rounded(subject.forward, subject.params),
        )
    )
    noise, signal = (jnp.sum(jnp.square(x), (1, 2)) for x in (noisy - dense, dense))
    share = float(jnp.exp(jnp.mean(jnp.log(noise / signal))))
    assert losses["down"] == pytest.approx(share, rel=0.05)
    worst = max(losses, key=lambda role: losses[role])
    goals = litevar.Goals(first=1, floats=1, bits="w6a6", attention_bits=16)
    with use_implementation("xla"):
        plan = litevar.search(goals, subject.forward, subject.params, data, progress=False)
    ((selector, *bits),) = plan.rules
    assert bits == [6, 6]
    assert worst not in selector
    forward, params = litevar.transform(plan)(subject.forward, subject.params)
    for target in forward.target_modules(params, Linear):
        leaf = target.module.kernel.get_value()
        assert isinstance(leaf, QTensor) == (target.role != worst)


# --- users --------------------------------------------------------------------------------------


def test_commands_and_files(tmp_path, capsys):
    subject = testing.tiny_var()
    NextScalePipeline(subject.forward, subject.params, subject.sampler.vae).save(tmp_path / "var")
    source, small = str(tmp_path / "var"), tmp_path / "small"
    asked = ["--first", "1", "--labels", "0,1,2", "--guidance", "4", "--top-p", "0.95"]
    options = ["--batch", "2", "--share", "output", "--bits", "w8a8"]
    with use_implementation("xla"):
        assert main(["search", source, str(small), "litevar", *asked, *options]) == 0
        pipe = effjax.pipeline(small, progress=False)
        ((name, plan),) = pipe.forward.recipe
        assert (name, plan.share, plan.attention_bits, plan.tau) == ("litevar", "output", 8, 0.95)
        latents = pipe([1, 4], key=jax.random.key(0), output_type="latent", progress=False)
        chex.assert_tree_all_finite(latents)
        with pytest.raises(ValueError, match="Sample with guidance above 0"):
            pipe([1], key=jax.random.key(0), guidance_scale=0.0, progress=False)
        (tmp_path / "plan.json").write_text(plan.to_json())
        again = ["apply", source, str(tmp_path / "again"), "litevar"]
        assert main([*again, "--plan", str(tmp_path / "plan.json")]) == 0
        made = str(tmp_path / "uniform")
        assert main(["apply", source, made, "litevar", "--window", "0.3", "--first", "1"]) == 0
        assert main(["search", source, made + "2", "litevar", "--guidance", "0"]) == 1
    assert "windows begin at a scale 1 ... 2 of 3, got first=3" in capsys.readouterr().err
    saved = json.loads((tmp_path / "again" / "transformer" / "recipe.json").read_text())
    assert saved["steps"][0]["plan"]["patch_nums"] == [1, 2, 3]


def test_errors(subject, plan):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(plan, **changes)

    refused(r"windows\[0\]\[2\]\[0\]\[1\] must be .*at least 0", windows=((2, 1, ((1, -1),)),))
    refused("keys no later than queries", windows=((1, 2, ((1, 1),) * 2),))
    refused("each of 2 layers and 2 heads, got \\[1, 2\\]", windows=((2, 1, ((1, 1),)),))
    nothing = tuple((1, j, ((0, 1), (1, 1))) for j in (0, 1))
    refused("tokens of scale 1 see no key at all", windows=nothing)
    refused("attention_bits must be one of 8, 16", attention_bits=4)
    refused(r"rules\[0\]\[1\] must be", rules=(("role:qkv", 9, 8),))
    with pytest.raises(ValueError, match="a VAR has linear layers of the roles"):
        litevar.mixed_precision(8, 8, ["router"])
    for changes, message in (
        ({"patch_nums": (1, 2, 3)}, r"patch_nums \(1, 2, 3, 4\), not \(1, 2, 3\)"),
        ({"layers": 3}, "layers 2, not 3"),
        ({"heads": 4}, "heads 2, not 4"),
    ):
        other = dataclasses.replace(plan, windows=(), **changes)
        with pytest.raises(ValueError, match=message):
            litevar.transform(other)(subject.forward, subject.params)
    dit, stages = testing.tiny_dit(), testing.tiny_ecar()
    distill = distilled_decoding.transform(distilled_decoding.DistilledPlan((0,), split=2))
    data = dit.data(Trajectory)
    for other in (
        (dit.forward, dit.params),
        (stages.forward, stages.params),  # has attention over scales, as a student has
        distill(subject.forward, subject.params),
    ):
        for run in (
            litevar.transform(plan),
            partial(litevar.search, litevar.Goals(), data=data),
            litevar.METHOD.shorthands[0]().plan,
        ):
            name = other[0].model.__name__
            with pytest.raises(ValueError, match=rf"scale by scale \(VAR\), got a {name}"):
                run(*other)
    unguided = dataclasses.replace(subject.sampler, guidance=None)
    data = Trajectory(unguided, subject.cond, jax.random.key(0))
    with pytest.raises(ValueError, match="these samples are not guided"):
        litevar.search(litevar.Goals(), subject.forward, subject.params, data)
    data = Trajectory(dit.sampler, subject.cond, jax.random.key(0))
    with pytest.raises(ValueError, match="samples of a NextScale, got a Sampler"):
        litevar.search(litevar.Goals(), subject.forward, subject.params, data)
