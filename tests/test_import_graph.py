"""Who may import whom: arrows never run back; importing is quick, silent and touches no device."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up; a module may import its own layer and those before it.
LAYERS = [
    ["pallas_kernels"],
    [
        "effjax.buckets",
        "effjax.compat",
        "effjax.fields",
        "effjax.finite",
        "effjax.warm",
        "effjax.chips",
    ],
    [
        "effjax.context",
        "effjax.guidance",
        "effjax.quant",
        "effjax.rows",
        "effjax.stacking",
        "effjax.targets",
    ],
    ["effjax.layers"],
    ["effjax.caches"],
    ["effjax.models"],
    [
        "effjax.forward",
        "effjax.loops",
        "effjax.transform",
        "effjax.calibration",
        "effjax.capture",
        "effjax.descriptions",
        "effjax.executables",
        "effjax.metrics",
        "effjax.scanning",
        "effjax.storage",
    ],
    [
        "effjax.samplers",
        "effjax.cost",
        "effjax.search",
        "effjax.parallel",
        "effjax.generate",
        "effjax.autoregression",
        "effjax.training",
    ],
    ["effjax.testing"],
    ["effjax.methods"],
    ["effjax.registry", "effjax.recipe"],
    ["converters"],
    ["effjax.pipelines"],
    ["effjax.bundled"],
    ["effjax.cli"],
    ["experiments"],
]
ENTRY = "effjax"  # resolves its public names lazily, so only what lies above pipelines uses it


def layer_of(module):
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    return None


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if layer_of(deeper) is not None else node.module


def modules():
    for package in ("pallas_kernels", "effjax", "converters", "experiments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def test_every_module_has_a_layer():
    homeless = [name for name, _ in modules() if name != ENTRY and layer_of(name) is None]
    assert not homeless


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: str(value)[-40:])
def test_arrows_never_run_back(name, path):
    if name == ENTRY:
        return
    own = layer_of(name)
    targets = set(imports(path))
    if own <= layer_of("effjax.pipelines"):
        assert ENTRY not in targets, f"{name} must name the modules of effjax that it uses"
    backward = [
        target
        for target in targets
        if target.split(".")[0]
        in ("effjax", "converters", "experiments", "pallas_kernels", "tests")
        and (target.startswith("tests") or (layer_of(target) or 0) > own)
    ]
    assert not backward, f"{name} must not import {backward}"


def executed(tree):
    """Every node below one that runs: all but what stands behind TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from executed(node)


def imported(path, known):
    """Modules among `known` that a file imports, at its top or within its functions."""
    for node in executed(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found = {name if name in known else node.module for name in names}
            yield from found & known.keys()


def circle(graph):
    """Modules that import each other in this order, None if none do."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_no_circle_of_imports():
    """Not at the top of modules, nor through imports within functions."""
    known = {name: path for name, path in modules() if not name.startswith("experiments")}
    graph = {name: set(imported(path, known)) - {name} for name, path in known.items()}
    assert circle(graph) is None
    assert circle({**graph, "effjax.context": {"effjax.cli"}}) is not None


def test_import_is_silent_and_touches_no_device():
    code = (
        "import sys, effjax, converters, pallas_kernels\n"
        "import jax._src.xla_bridge as bridge\n"
        "assert not bridge._backends, 'a device was touched'\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
