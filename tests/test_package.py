"""What is installed: three packages, with all that the demo and the commands need."""

import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.test_import_graph import imports

ROOT = Path(__file__).parent.parent
USES_WHAT_SHIPS = """
import sys
import effjax
from effjax.cli import bench, transforming
from effjax.bundled import demo, judge, llm_demo

judge.load()
assert effjax.pipeline(demo.MODEL, progress=False).names[10] == "A"
assert effjax.pipeline(llm_demo.MODEL, progress=False).tokenizer("put amber fox")
assert "experiments" not in sys.modules
import experiments
print(effjax.__file__, experiments.MINE)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_three_packages_and_the_bundled_weights(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {each.filename: each.file_size for each in archive.infolist()}
    packages = {name.split("/")[0] for name in sizes if ".dist-info/" not in name}
    assert packages == {"effjax", "pallas_kernels", "converters"}
    models = {"dit_glyphs/transformer/diffusion_pytorch_model", "judge/model", "llama_texts/model"}
    bundled = {f"effjax/bundled/weights/{name}.safetensors" for name in models}
    assert {name for name in sizes if name.endswith(".safetensors")} == bundled
    assert sum(sizes.values()) < 10e6
    assert "effjax/py.typed" in sizes


def test_it_works_beside_a_users_own_experiments(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    (tmp_path / "work" / "experiments").mkdir(parents=True)
    (tmp_path / "work" / "experiments" / "__init__.py").write_text("MINE = 'mine'")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", USES_WHAT_SHIPS],
        cwd=tmp_path / "work",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    installed = tmp_path / "installed" / "effjax" / "__init__.py"
    assert result.stdout.split() == [str(installed), "mine"]


def imported(statement, folder):
    """What a program of one line says in a folder."""
    return subprocess.run(
        [sys.executable, "-c", statement],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("statement", "file"),
    [
        ("import effjax", "converters.py"),
        ("import converters, effjax", "converters/__init__.py"),
        ("import effjax", "pallas_kernels/__init__.py"),
    ],
)
def test_a_users_file_that_hides_a_package_is_named(tmp_path, statement, file):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.touch()
    message = imported(statement, tmp_path).stderr.splitlines()[-1]
    hidden = tmp_path / file.split("/")[0]
    assert message.startswith(f"ImportError: effjax needs its own package '{hidden.stem}', {ROOT}")
    assert f"but Python finds {path} first; rename {hidden}, or" in message


def test_a_users_folder_without_modules_hides_nothing(tmp_path):
    (tmp_path / "converters").mkdir()
    assert imported("import effjax, converters", tmp_path).returncode == 0


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "constraints").iterdir()), ids=lambda path: path.stem
)
def test_constraints_are_versions_inside_the_bounds(path):
    """Names and versions alone, of everything that is declared."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    versions = {canonicalize_name(name): Version(v) for name, v in (x.split("==") for x in lines)}
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["torch"], *extras["test"], *extras["docs"]]
    for each in map(Requirement, wanted):
        if each.marker is None or each.marker.evaluate({"python_version": path.stem[6:]}):
            assert versions[canonicalize_name(each.name)] in each.specifier, each


def test_what_is_imported_is_declared():
    """What comes with something else may go with it."""
    declared = {canonicalize_name(Requirement(each).name) for each in PROJECT["dependencies"]}
    paths = [
        path
        for package in ("effjax", "converters", "pallas_kernels")
        for path in (ROOT / package).rglob("*.py")
    ]
    imported = {name.partition(".")[0] for path in paths for name in imports(path)}
    extras = {"torch", "qwix"}
    outside = imported - extras - {"effjax", "converters", "pallas_kernels"}
    distributions = packages_distributions()
    for name in sorted(outside - sys.stdlib_module_names):
        assert declared & set(map(canonicalize_name, distributions[name])), name
