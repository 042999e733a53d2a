"""Programs that were compiled ahead of time run without a trace, and only where they fit."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax import compat, descriptions, executables
from effjax.cli import main
from effjax.executables import ExecutablesWarning, Program
from effjax.generate import decoding, generate, prefix_cache
from effjax.methods import dit_fast_attn, vidit_q
from effjax.samplers import DPMSolver, Sampler, sampler
from effjax.testing import tiny_dit, tiny_llama
from experiments import tpu
from pallas_kernels import use_implementation
from tests.test_pipelines import write_pipeline
from tests.test_text_pipeline import write_language_model

ROOT = Path(__file__).parent.parent
PROMPTS = [[1, 2, 3], [4, 5]]
PROGRAMS = (
    sampler._compiled_init,
    sampler._compiled_step,
    prefix_cache._read_first,
    decoding._begin,
    decoding._decode,
)


class Work:
    """Images with state, static values in leaves and a solver's memory; texts that are drawn."""

    def __init__(self):
        subject, self.text = tiny_dit(steps=2, num_layers=1), tiny_llama(num_layers=1)
        transform = effjax.chain(
            dit_fast_attn.transform(dit_fast_attn.METHOD.ladder(subject)[-1]),
            vidit_q.transform(vidit_q.uniform(8, alpha=None)),
        )
        self.cond, self.pair = subject.cond, transform(subject.forward, subject.params)
        self.sampler = Sampler(DPMSolver(steps=2), 2.0)

    def draw(self, count=2):
        key = jax.random.key(0)
        return self.sampler.stepwise(*self.pair, self.cond[:count], key, progress=False)

    def write(self, prompts=PROMPTS):
        options = {"temperature": 0.5, "key": jax.random.key(1), "max_new_tokens": 3}
        return generate(self.text.forward, self.text.params, prompts, **options).tokens

    def all(self):
        return [np.asarray(self.draw()).tolist(), self.write().tolist()]


@pytest.fixture(scope="module")
def work():
    return Work()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, work):
    """A directory with the programs of all that work."""
    folder = tmp_path_factory.mktemp("model")
    with executables.record() as calls:
        work.all()
    assert [call.program for call in calls] == list(PROGRAMS)
    executables.save(folder, calls)
    return folder


RUN = """
import json, sys, warnings
from effjax import compat, descriptions, executables
from tests.test_executables import PROGRAMS, Work

warnings.simplefilter("error")
with executables.load(sys.argv[1]).using():
    results = Work().all()
print(json.dumps([results, [each._cache_size() for each in PROGRAMS]]))
"""


def test_another_process_gets_the_same_and_traces_nothing(saved, work):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    command = [sys.executable, "-c", RUN, str(saved)]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    results, traced = json.loads(ran.stdout)
    assert results == work.all()
    assert traced == [0] * len(PROGRAMS)


def test_other_shapes_are_compiled_with_a_warning_that_says_why(saved, work):
    loaded = executables.load(saved)
    expected = work.draw(count=1)
    with loaded.using():
        with pytest.warns(ExecutablesWarning) as warned:
            found = work.draw(count=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            work.draw(count=1)  # it says so once
    np.testing.assert_array_equal(found, expected)
    first, second = (str(each.message) for each in warned)
    assert first.startswith("no saved executable fits this call of _compiled_init, so it is")
    assert "differs in 2 places: argument cond is int32[1], not int32[2]" in first
    assert "argument x is float32[1,16,16,4], not float32[2,16,16,4]" in second


def test_another_model_is_compiled_with_a_warning_that_says_why(saved, work):
    other = tiny_llama(num_layers=1, rope_theta=500.0)
    with executables.load(saved).using(), pytest.warns(ExecutablesWarning) as warned:
        generate(other.forward, other.params, PROMPTS, max_new_tokens=3)
    assert "config.rope_theta is" in str(warned[0].message)


def test_settings_around_a_call_are_part_of_it(saved, work):
    refused = pytest.warns(ExecutablesWarning, match="implementation is xla, not None")
    with executables.load(saved).using(), use_implementation("xla"), refused:
        work.write()


def test_a_call_within_a_trace_is_traced(saved):
    program = Program(jnp.sin, name="within")
    with executables.load(saved).using(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jax.eval_shape(program, jnp.ones(3)).shape == (3,)


@pytest.fixture
def changed(saved, tmp_path):
    """Change the index in a copy of the directory."""
    shutil.copytree(saved, tmp_path / "copy")
    (index,) = (tmp_path / "copy" / "executables").glob("*/executables.json")

    def change(patch):
        contents = json.loads(index.read_text())
        patch(contents)
        index.write_text(json.dumps(contents))
        return tmp_path / "copy"

    return change


@pytest.mark.parametrize(
    ("name", "value"),
    [("jaxlib", "0.1"), ("chip", "TPU v5 lite"), ("effjax", "0"), ("XLA_FLAGS", "--xla_a --xla_b")],
)
def test_what_was_made_for_something_else_is_refused_by_name(changed, name, value):
    folder = changed(lambda index: index["target"].update({name: value}))
    with pytest.raises(ValueError, match=rf"(?s)made for this process.*{name} is .*, not {value}"):
        executables.load(folder)


def test_instructions_that_are_missing_here_are_named(changed):
    def more(index):
        index["target"]["instructions"] += " avx1024"

    with pytest.raises(ValueError, match="instructions is less, not avx1024"):
        executables.load(changed(more))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("file", "../../config.json", "no executable '../../config.json' in its folder"),
        ("returns", {"kind": "os:system", "of": ["ls"]}, "results cannot be a 'os:system'"),
        ("returns", {"kind": "effjax.cli:main", "of": []}, "no value of this library"),
        ("returns", {"kind": "list", "of": 3}, "000.xla returns no tree"),
        ("returns", [1], "000.xla returns no tree"),
        ("call", {}, "000.xla names no program"),
    ],
)
def test_damaged_indexes_are_named(changed, field, value, message):
    folder = changed(lambda index: index["programs"][0].update({field: value}))
    with pytest.raises(ValueError, match=r"executables\.json") as error:
        executables.load(folder)
    assert message in str(error.value)


def test_a_damaged_executable_is_not_run(changed, work):
    folder = changed(lambda index: None)
    (file,) = folder.glob("executables/*/000.xla")
    file.write_bytes(file.read_bytes()[:-1])
    with executables.load(folder).using(), pytest.raises(ValueError, match="xla is damaged"):
        work.draw()


def test_what_is_in_the_compilation_cache_is_saved_whole(tmp_path):
    """A CPU's executable that came out of the cache lacks parts once it is serialized again."""
    program = Program(lambda x: jnp.sin(x).sum(axis=0)[1:] * jnp.cumsum(x[0, :-1]), name="waves")
    x = jnp.ones((8, 8))
    before = jax.config.jax_compilation_cache_dir
    compat.use_compilation_cache(tmp_path / "cache")
    try:
        with executables.record() as calls:
            program(x)
        calls[0].on(descriptions.here()).program.lower().compile()  # is in the cache from here on
        executables.save(tmp_path, calls)
        with executables.load(tmp_path).using():
            np.testing.assert_array_equal(program(x), program.jitted(x))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_what_cannot_be_saved_is_an_error(saved, tmp_path):
    with pytest.raises(ValueError, match="no program was recorded"):
        executables.save(tmp_path, [])
    with pytest.raises(ValueError, match="has no executables; make some with `effjax compile`"):
        executables.load(tmp_path)
    with pytest.raises(ValueError, match=r"lambda.* cannot be saved: it is no dataclass"):
        descriptions.stable(lambda: 0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    write_pipeline(folder)
    return folder


def test_commands_compile_and_run(pipeline, capsys, tmp_path):
    command = ["compile", str(pipeline), "--steps", "2", "--batch", "2", "--json"]
    assert main(command) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["programs"][:2] == ["_compiled_init", "_compiled_step"]
    assert Path(figures["folder"]).parent == pipeline / "executables"
    assert main(command) == 1  # it is there
    assert figures["folder"] in capsys.readouterr().err
    sample = ["sample", str(pipeline), "--labels", "1,2", "--steps", "2"]
    jax.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExecutablesWarning)
        assert main([*sample, "--executables", "-o", str(tmp_path / "fast")]) == 0
    assert sampler._compiled_step._cache_size() == 0
    assert main([*sample, "-o", str(tmp_path / "dense")]) == 0
    for path in (tmp_path / "dense").iterdir():
        assert path.read_bytes() == (tmp_path / "fast" / path.name).read_bytes()
    pipe = effjax.pipeline(pipeline, executables=True)
    assert pipe.executables is not None
    assert pipe.transform(effjax.identity).executables is None


def test_language_models_are_compiled_for_lengths(capsys, tmp_path):
    """Which are buckets: a shorter prompt runs the same programs."""
    folder = tmp_path / "model"
    write_language_model(folder)
    command = ["compile", str(folder), "--tokens", "8", "--new", "4", "--json"]
    assert main(command) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["programs"] == ["_read_first", "_choose", "_decode"]
    write = ["generate", str(folder), "--prompt", "a b c", "--max-new-tokens", "4", "--json"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExecutablesWarning)
        assert main([*write, "--executables"]) == 0
    fast = json.loads(capsys.readouterr().out)
    assert main(write) == 0
    assert json.loads(capsys.readouterr().out) == fast


def test_commands_refuse(pipeline, capsys, tmp_path, monkeypatch):
    assert main(["compile", str(tmp_path / "none")]) == 1
    assert "is no directory, in which programs could be saved" in capsys.readouterr().err
    from effjax.cli import compiling

    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    assert main(["compile", str(pipeline), "--chip", "v5e"]) == 1
    assert "compiling for v5e needs libtpu" in capsys.readouterr().err


@pytest.mark.aot_tpu
def test_programs_for_a_tpu_are_written_and_refused_here(work, tmp_path):
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    with executables.record() as calls:
        work.all()
    folder = executables.save(tmp_path, calls, tpu.chip("v5e"))
    assert folder.name.startswith("tpu-v5-lite-")
    assert len(list(folder.glob("*.xla"))) == len(PROGRAMS)
    with pytest.raises(ValueError, match=r"platform is cpu, not tpu; chip is .*, not TPU v5 lite"):
        executables.load(tmp_path)
