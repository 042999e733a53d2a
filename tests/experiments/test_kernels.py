"""The kernels' benchmark scripts run from end to end, at sizes that say nothing of speed."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from experiments import report, tpu
from experiments.kernels import (
    arrow,
    attention_cpu,
    cases,
    gpu,
    gpu_compile,
    tpu_bundles,
    tpu_table,
)
from experiments.kernels.timing import best_seconds
from pallas_kernels import use_implementation
from pallas_kernels.quantized_attention import quantized_attention


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def test_the_best_of_programs_that_take_turns():
    calls = []
    programs = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = best_seconds(programs, 2, calls=3)
    assert calls == ["a", "b", *"aaabbb" * 2]
    assert all(0 <= taken < 1 for taken in seconds.values())


def test_attention_on_a_cpu(results, monkeypatch):
    monkeypatch.setattr(attention_cpu, "HEADS", 1)
    monkeypatch.setattr(attention_cpu, "DENSITIES", (2,))
    attention_cpu.main(["--tokens", "128", "--repeats", "1", "--block", "32"])
    written = json.loads((results / "kernels_attention_cpu.json").read_text())
    assert "--tokens 128 --repeats 1 --block 32" in written["command"]
    assert set(written["tables"]) == {
        "by_dtype",
        "of_a_tiny_model",
        "block_sparse_against_the_fastest_dense",
    }
    rows = {row["program"]: row for row in written["tables"].popitem()[1]}
    assert {"dense, effjax", "dense, jax.nn", "band, 1 in 2", "random, 1 in 2"} <= set(rows)
    assert rows["random, 1 in 2"]["density"] == 0.5


def test_arrow_windows(results, monkeypatch):
    monkeypatch.setattr(arrow, "MODELS", {"SD3": arrow.MODELS["SD3"] | {"text": 20}})
    arrow.main(["--image", "128", "--heads", "2", "--repeats", "1"])
    written = json.loads((results / "kernels_arrow_cpu.json").read_text())
    assert "--image 128 --heads 2 --repeats 1" in written["command"]
    rows = {(row["heads"], row["windows"]): row for row in written["tables"].popitem()[1]}
    assert rows["half dense, half kept", "static"]["visible"] == 0.5
    visible = 1 - (128 - 8 - 1) * (128 - 8) / 148**2
    assert rows["window, f = 8", "at run time"]["visible"] == pytest.approx(visible)


def test_kernels_on_a_gpu_without_one(results, monkeypatch):
    monkeypatch.setattr(gpu, "HEADS", 1)
    monkeypatch.setattr(gpu, "DENSITIES", (2,))
    small = {name: case for name, case in cases.CASES.items() if name == "W4A8, uneven"}
    monkeypatch.setattr(gpu, "CASES", small)
    monkeypatch.setattr(gpu.arrow, "MODELS", {})
    gpu.main(["--tokens", "128", "--repeats", "1", "--scale", "512"])
    tables = json.loads((results / "kernels_cpu.json").read_text())["tables"]
    assert set(tables) == {"products", "programs_bound_by_memory", "attention"}
    tables = json.loads((results / "kernels_cpu_values.json").read_text())["tables"]
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "speed"])
    [row] = tables["against_the_reference"]
    assert row["runs"] == "XLA"
    assert row["largest_difference_over_largest_value"] < 1e-5


def test_gpus_that_are_not_there_need_a_compiler(monkeypatch):
    assert "major: 8 minor: 0" in gpu_compile.description("a100")
    with pytest.raises(SystemExit):
        gpu_compile.main(["--gpus", "b100"])

    def unknown(*_, platform, **__):
        raise NotImplementedError(f"topology not implemented for {platform}")

    monkeypatch.setattr(gpu_compile.topologies, "get_topology_desc", unknown)
    with pytest.raises(SystemExit, match=r"is not installed \(.* cuda\): make aot-gpu"):
        gpu_compile.main(["--gpus", "h100"])


@pytest.mark.parametrize("name", cases.CASES)
def test_cases_are_functions_of_their_shapes(name):
    function, operands = cases.CASES[name]
    for implementation in (None, "xla"):
        out = jax.eval_shape(partial(function, implementation=implementation), *operands)
        assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(out))


@pytest.mark.aot_tpu
def test_the_table_reads_what_the_compiler_says(results, monkeypatch):
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    row = tpu_table.row("v5e", "W8A8, DiT-XL")
    assert row["GFLOP"] == pytest.approx(2 * 4096 * 1152 * 4608 / 1e9, rel=0.01)
    assert 0 < row["VMEM_KiB"] < 128 * 1024
    assert row["memory_MB"] > (4096 * 1152 + 1152 * 4608) / 1e6


@pytest.mark.aot_tpu
@pytest.mark.parametrize("name", ["W8A8, uneven", "W4A8, uneven", "attention"])
def test_a_v4_multiplies_int8_without_kernels(name):
    """As docs/kernels.md says: a chip that Mosaic refuses int8 for, and XLA does not."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    tokens = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    own = {"attention": (quantized_attention, (tokens,) * 3)}
    function, operands = {**cases.CASES, **own}[name]
    program, shapes = jax.jit(function), tpu.on_chip("v4", operands)
    with pytest.raises(Exception, match="Unsupported matmul RHS type"):
        program.lower(*shapes).compile()
    with use_implementation("xla"):
        assert "tpu_custom_call" not in program.lower(*shapes).compile().as_text()


@pytest.mark.parametrize(("first", "second"), [(20, 90), (20, 20)])
def test_regions_of_a_scheduled_kernel(first, second):
    """A loop of 200 bundles, a start of 60 in a branch beside or in that of a product of 80."""
    marks = {0: "Start region 1", 79: "End region 2", 199: "End region 1"}
    marks[first] = "Start region 2"
    marks[second] = marks.get(second, "") + " :: Start region 3"
    marks[second + 79 + 60 * (first == second)] = "End region 3"
    work = {100: "vmatmul.bf16", 101: "vpow2.f32"}
    lines = [f"{i:#x} : > {{ {work.get(i, 'nop')} }} /* {marks.get(i, '')} */" for i in range(200)]
    every_step, [(size, text)], ends = tpu_bundles.regions("\n".join(["note", *lines]))
    assert (every_step, size, ends) == (60, 80, 60)
    assert text.count("vpow2") == 1


@pytest.mark.aot_tpu
def test_bundles_of_fewer_heads_and_without_the_bound():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    both = tpu_bundles.rows_of("v6e", "DiT-XL/2 256", "ours")
    [neither] = tpu_bundles.rows_of("v6e", "DiT-XL/2 256", "ours, neither")
    assert [row["program"] for row in both] == ["ours, norms small", "ours, norms large"]
    small, large = (row["bundles_M"] for row in both)
    assert small < large < neither["bundles_M"]
