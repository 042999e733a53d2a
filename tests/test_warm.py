"""What one process compiled, the next one does not compile again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import effjax
from effjax import compat, warm
from effjax.cli import main

ROOT = Path(__file__).parent.parent
RUN = """
import json, sys
import jax
import effjax
from effjax.generate import generate
from effjax.testing import tiny_dit, tiny_llama

counts = {"hits": 0, "misses": 0}

def count(event, **_):
    name = event.rpartition("cache_")[2]
    if event.startswith("/jax/compilation_cache/") and name in counts:
        counts[name] += 1

jax.monitoring.register_event_listener(count)
jax.jit(lambda x: x + 1)(1)  # JAX has looked at its settings
effjax.compilation_cache(sys.argv[1])
text = tiny_llama(num_layers=1)
made = generate(text.forward, text.params, [[1, 2, 3]], max_new_tokens=3)
image = tiny_dit(steps=2, num_layers=1)
parts = image.forward, image.params, image.cond, jax.random.key(0)
x = image.sampler.stepwise(*parts, progress=False)
print(json.dumps([made.tokens.tolist(), float(x.sum()), counts]))
"""


def run(folder, count=1):
    """What so many processes at once print."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    ends = [(*process.communicate(), process.returncode) for process in started]
    assert all(code == 0 for _, _, code in ends), ends
    return [json.loads(out) for out, _, _ in ends]


def test_the_next_process_compiles_nothing(tmp_path):
    """Two processes that fill a folder at once do not disturb each other."""
    (*results, counts), (*_, other) = run(tmp_path, count=2)
    # One of the two may find what the other one has just compiled.
    assert counts["misses"] + other["misses"] > 5
    *again, counts = run(tmp_path)[0]
    assert counts["misses"] == 0
    assert counts["hits"] > 5
    assert again == results


@pytest.fixture
def restored():
    """JAX's settings as they were."""
    names = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    yield
    compat.use_compilation_cache(Path("unused"))
    for name, value in before.items():
        jax.config.update(name, value)


def programs(folder):
    return [path.name for path in folder.glob("*-cache")]


def test_small_programs_are_kept_and_another_call_changes_the_folder(tmp_path, restored):
    first = effjax.compilation_cache(tmp_path / "first")
    assert first.parent == tmp_path / "first"
    assert first.stat().st_mode & 0o777 == 0o700
    jax.jit(lambda x: x * 2 + 5)(jnp.arange(3))
    second = effjax.compilation_cache(tmp_path / "second")
    jax.jit(lambda x: x * 3 + 7)(jnp.arange(3))
    assert programs(first)
    assert programs(second)
    assert not set(programs(first)) & set(programs(second))


def test_other_instructions_and_versions_have_their_own_folder(monkeypatch):
    own, processor = warm._name.__wrapped__(), warm.processor()
    assert own.startswith(f"jax-{jax.__version__}-")
    assert own == warm._name.__wrapped__()
    for name, value in [
        ("processor", lambda: {**processor, "instructions": ["fma"]}),
        ("version", lambda name: "0.1" if name == "jaxlib" else jax.__version__),
    ]:
        with monkeypatch.context() as patched:
            patched.setattr(warm, name, value)
            assert warm._name.__wrapped__() != own


def test_the_folder_is_given_or_that_of_the_environment(tmp_path, restored, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert effjax.compilation_cache().parent == tmp_path / "user" / "effjax"
    monkeypatch.setenv("EFFJAX_CACHE", str(tmp_path / "named"))
    assert effjax.compilation_cache().parent == tmp_path / "named"
    assert effjax.compilation_cache(tmp_path / "given").parent == tmp_path / "given"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert effjax.compilation_cache("~/own").parent == tmp_path / "own"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, restored):
    (tmp_path / "file").touch()
    kept = jax.config.jax_compilation_cache_dir
    with pytest.raises(ValueError, match=r"file/jax-.* Not a directory. Give a folder that can be"):
        effjax.compilation_cache(tmp_path / "file")
    assert jax.config.jax_compilation_cache_dir == kept


def test_commands_take_a_folder(tmp_path, restored, monkeypatch, capsys):
    """As soon as they load a model; this one then asks for another command."""
    model = str(ROOT / "effjax" / "bundled" / "weights" / "llama_texts")
    command = ["sample", model, "--labels", "1"]
    for number, option in enumerate(([], ["--cache", str(tmp_path / "given")])):
        monkeypatch.setenv("EFFJAX_CACHE", str(tmp_path / "named"))
        assert main([*command, *option]) == 1
        assert "use `effjax generate`" in capsys.readouterr().err
        own = Path(jax.config.jax_compilation_cache_dir)
        assert own.parent == tmp_path / ("named", "given")[number]
