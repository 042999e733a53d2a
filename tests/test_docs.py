"""Generated pages are those that their sources make now, and the pages become a site."""

import dataclasses
import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import converters
import effjax
import effjax.parallel
import effjax.quant
import pallas_kernels
from effjax import registry, testing
from effjax.pipelines import families
from effjax.pipelines.family import DiffusionFamily
from experiments import report
from tests.test_pipelines import write_pipeline, write_text_pipeline

DOCS = Path(__file__).parent.parent / "docs"


def test_the_benchmark_page_is_current():
    """`make docs` writes it from experiments/results/."""
    assert report.page() + "\n" == (DOCS / "benchmarks.md").read_text()


@pytest.mark.slow
def test_the_code_of_the_page_on_pipelines_runs(tmp_path, monkeypatch):
    """On tiny models of random weights that have the names and texts of the page."""
    write_pipeline(tmp_path / "classes", channels=3)
    index = json.loads((tmp_path / "classes" / "model_index.json").read_text())
    index["id2label"] = {"0": "tench, Tinca tinca", "1": "golden retriever"}
    (tmp_path / "classes" / "model_index.json").write_text(json.dumps(index))
    write_text_pipeline(tmp_path / "texts")
    code = "\n".join(
        re.findall(r"```python\n(.*?)```", (DOCS / "pipelines.md").read_text(), flags=re.DOTALL)
    )
    changes = {
        "facebook/DiT-XL-2-512": "classes",
        "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": "texts",
        "num_inference_steps=20": "num_inference_steps=2",
        "height=512, width=768": "height=8, width=24",
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    table = families.table()
    quick = {
        name: dataclasses.replace(family, steps=2)
        for name, family in table.items()
        if isinstance(family, DiffusionFamily)
    }
    monkeypatch.setattr(families, "table", lambda: {**table, **quick})
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert len(names["images"]) == 4
    assert (tmp_path / "retriever.png").is_file()
    expected = np.asarray(names["pictures"][0], np.float32) / 255
    np.testing.assert_allclose(names["arrays"][0], expected, atol=0.5 / 255 + 1e-6)
    assert names["again"].forward == names["small"].forward


@pytest.mark.slow
def test_the_code_of_the_page_on_diffusion_runs(tmp_path, monkeypatch):
    """On a tiny PixArt of random weights, with an adapter of its first layer."""
    write_text_pipeline(tmp_path / "texts")
    pipe = effjax.pipeline(tmp_path / "texts", progress=False)
    width = pipe.forward.config.hidden_size
    ends = {"lora_A": (2, width), "lora_B": (width, 2)}
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    tensors = {f"{layer}.{end}.weight": np.ones(shape, np.float32) for end, shape in ends.items()}
    save_file(tensors, tmp_path / "style.safetensors")
    sampler = pipe.sampler(num_inference_steps=3)
    cond, uncond = pipe.conditions(["a red fox"])
    page = (DOCS / "diffusion.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {"jax": jax, "key": jax.random.key(0), "sampler": sampler, "cond": cond}
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        names |= {"pipe": pipe, "uncond": uncond}
        names |= {"forward": pipe.forward, "params": pipe.params}
        exec(block.replace("block=64", "block=16"), names)
    assert names["fast"].forward.recipe[0][0] == "even_steps"
    assert {"style", "louder", "merged", "plan", "found"} < set(names)


def test_another_kernel_can_be_the_core(monkeypatch):
    """The example of the page on kernels, with the kernel interpreted."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    interpreted = functools.partial(splash.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha_single_device", interpreted)
    page = (DOCS / "kernels.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (code,) = (block for block in blocks if "class SplashCore" in block)
    subject = testing.tiny_dit(sample_size=32, num_layers=1, head_dim=32)  # 256 tokens
    names = {"forward": subject.forward}
    exec(code, names)
    inputs = jnp.ones((1, 32, 32, 4)), jnp.ones(1), jnp.zeros(1, jnp.int32)
    dense, _ = subject.forward(subject.params, {}, *inputs)
    own, _ = names["forward"](subject.params, {}, *inputs)
    np.testing.assert_allclose(own, dense, atol=2e-4)
    assert "splash" in str(
        jax.make_jaxpr(lambda p: names["forward"](p, {}, *inputs))(subject.params)
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages; a link or a reference that leads nowhere is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_builds_and_its_links_lead_somewhere(site):
    assert (site / "quantization" / "index.html").is_file()


def public_names():
    """Names that are imported from a package, with where each of them is defined."""
    for name in effjax._PUBLIC:
        yield f"effjax.{name}", getattr(effjax, name)
    packages = [
        *(getattr(effjax, name) for name in effjax._MODULES),
        *(effjax.pipelines, effjax.quant, effjax.parallel, converters, pallas_kernels),
        *(
            importlib.import_module(f"pallas_kernels.{path.stem}")
            for path in Path(pallas_kernels.__file__).parent.iterdir()
            if path.stem in OPERATIONS
        ),
    ]
    for package in packages:
        own = [name for name, value in vars(package).items() if is_defined_in(package, name, value)]
        for name in getattr(package, "__all__", own):
            yield f"{package.__name__}.{name}", getattr(package, name)


OPERATIONS = {
    "attention",
    "block_mask",
    "block_sparse_attention",
    "decode_attention",
    "quantize_inputs",
    "merge",
    "quantized_attention",
    "quantized_matmul",
    "residual_attention",
}


def is_defined_in(module, name, value):
    return not name.startswith("_") and getattr(value, "__module__", None) == module.__name__


def test_every_public_name_is_in_the_reference(site):
    pages = "".join(page.read_text() for page in site.glob("api/*/index.html"))
    shown = set(re.findall(r'id="([\w.]+)"', pages))
    missing = [
        name
        for name, value in public_names()  # constants and aliases of types aside
        if (inspect.isfunction(value) or inspect.isclass(value))
        and not {name, f"{value.__module__}.{value.__qualname__}"} & shown
    ]
    assert not missing


def test_every_model_is_in_the_reference():
    page = (DOCS / "api" / "models.md").read_text()
    for model in registry.models().values():
        assert f"::: {model.__module__}\n" in page


def test_pages_of_methods_are_made(site):
    for name in registry.methods():
        assert f'id="{name}"' in (site / "methods" / "index.html").read_text()
    assert "not possible here" in (site / "coverage" / "index.html").read_text()
