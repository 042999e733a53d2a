"""A method in a folder of its own is found by contract, commands and pages: no file is touched."""

import importlib
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

import effjax.methods
from effjax import registry
from effjax.cli import main
from effjax.generate import DECODERS
from tests.test_pipelines import write_pipeline

ROOT = Path(__file__).parent.parent
SOURCE = '''"""Skipped attention: layers whose attention is left out.

Buys: the attention of these layers, their projections included.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from effjax import testing
from effjax.calibration import Trajectory
from effjax.context import Context
from effjax.fields import Checked, Count, Natural
from effjax.forward import Forward, Params
from effjax.layers.attention import attentions
from effjax.targets import Wrapper, wrap
from effjax.transform import Method, Pair, Plan, Shorthand, Transform


@dataclasses.dataclass(frozen=True)
class SkipPlan(Plan):
    """Which layers.

    Attributes:
        layers: numbers of the layers whose attention is left out.
    """

    layers: tuple[Natural, ...]


@dataclasses.dataclass(frozen=True)
class Last(Shorthand):
    """The last layers.

    Attributes:
        last: how many of them.
    """

    last: Count = 1

    def plan(self, forward: Forward, params: Params) -> SkipPlan:
        count = len(attentions(forward.module(params), "self"))
        return SkipPlan(tuple(range(count - self.last, count)))


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """What a search aims at.

    Attributes:
        skipped: how many layers are left out.
    """

    skipped: Count = 1


def transform(plan: SkipPlan) -> Transform:
    def apply(forward: Forward, params: Params) -> Pair:
        return forward.patch(Skip(plan.layers)), params

    return Transform(METHOD.name, plan, apply)


@dataclasses.dataclass(frozen=True)
class Skip:
    layers: tuple[int, ...]

    def __call__(self, module: nnx.Module, context: Context) -> None:
        for number, target in enumerate(attentions(module, "self")):
            if number in self.layers:
                wrap(module, target.path, Skipped)


class Skipped(Wrapper):
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x)


def search(goals: Goals, forward: Forward, params: Params, data: Trajectory) -> SkipPlan:
    """The layers without which, one by one, samples change least."""

    def samples(plan: SkipPlan) -> jax.Array:
        pair = transform(plan)(forward, params)
        return data.sampler(*pair, data.cond, data.key, uncond=data.uncond)

    dense = samples(SkipPlan(()))
    count = len(attentions(forward.module(params), "self"))
    losses = [float(jnp.abs(samples(SkipPlan((n,))) - dense).sum()) for n in range(count)]
    best = sorted(range(count), key=losses.__getitem__)[: goals.skipped]
    return SkipPlan(tuple(sorted(best)))


METHOD = Method(
    name="skipped_attention",
    paper="in the manner of LayerSkip, arXiv 2404.16710",
    seams=("patches",),
    domain="images",
    plan=SkipPlan,
    transform=transform,
    identity=lambda subject: SkipPlan(()),
    ladder=lambda subject: tuple(SkipPlan(tuple(range(n))) for n in (1, 2, 3)),
    tiny=lambda **options: testing.tiny_dit(num_layers=3, **options),
    systems=("Skipped attention",),
    shorthands=(Last,),
    data=Trajectory,
    goals=Goals,
    search=search,
)
'''


def add(folder, family, name, source):
    """Put a method into a folder that is a further place of families."""
    (folder / family).mkdir(parents=True)
    (folder / family / "__init__.py").touch()
    (folder / family / f"{name}.py").write_text(source)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder on `effjax.methods.__path__`."""
    folder = tmp_path / "methods"
    folder.mkdir()
    monkeypatch.setattr(effjax.methods, "__path__", [*effjax.methods.__path__, str(folder)])
    registry.clear()
    yield folder
    registry.clear()
    for name in [name for name in sys.modules if name.startswith("effjax.methods.others")]:
        del sys.modules[name]


@pytest.fixture
def method(place):
    add(place, "others", "skipped", SOURCE)
    return registry.method("skipped_attention")


def pages():
    """The hooks of mkdocs."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_imported_by_its_name(method):
    from effjax.methods import skipped

    assert skipped.METHOD is method
    assert registry.module_of(method.name) == "effjax.methods.others.skipped"


@pytest.mark.slow
def test_it_keeps_the_contract(untyped, method, tmp_path):
    from tests.methods import test_contract as contract

    subject = method.tiny()
    strongest = method.transform(method.ladder(subject)[-1])(subject.forward, subject.params)
    given = {"untyped": None, "method": method, "subject": subject, "strongest": strongest}
    given |= {"dtype": "bfloat16", "tmp_path": tmp_path}
    run = 0
    for name, check in vars(contract).items():
        wanted = inspect.signature(check).parameters if name.startswith("test_") else {}
        if "method" in wanted or "strongest" in wanted:
            check(**{each: given[each] for each in wanted})
            run += 1
    assert run > 10


def test_the_commands_have_it(method, tmp_path, capsys):
    write_pipeline(tmp_path / "dit")
    model = str(tmp_path / "dit")
    for words, layers in (
        (("apply", "NEW", "--last", "2"), [0, 1]),
        (("apply", "NEW", "--layers", "1"), [1]),
        (("search", "NEW", "--skipped", "2", "--steps", "2", "--labels", "a"), [0, 1]),
    ):
        verb, _, *options = words
        new = tmp_path / "-".join(words)
        assert main([verb, model, str(new), method.name, *options, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["plan"] == {"layers": layers}
        assert main(["info", str(new), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["methods"] == [method.name]
    assert main(["apply", model, str(tmp_path / "x"), method.name]) == 0  # the last layer
    capsys.readouterr()
    assert main(["methods", method.name]) == 0
    said = capsys.readouterr().out
    assert "--last: how many of them" in said
    assert f"effjax search MODEL SMALLER {method.name} --skipped 1" in said
    assert main(["methods"]) == 0
    assert method.name in capsys.readouterr().out


def test_the_pages_have_it(method):
    made = pages()
    assert f"| [`{method.name}`](#{method.name}) | images | patches |" in made.methods_page()
    assert "::: effjax.methods.others.skipped\n" in made.reference_page()
    row = f"| Skipped attention | [`{method.name}`](methods.md#{method.name}) | {method.paper} |"
    assert row in made.coverage_page()


def test_every_system_has_a_state_and_every_declared_one_a_row():
    made = pages()
    rows = {row["name"]: row for row in made.coverage()}
    assert len(rows) > 80
    for method in registry.methods().values():
        for system in method.systems:
            assert rows[system]["method"] == method.name
    for name, decoder in DECODERS.items():
        for system in decoder.systems:
            assert (rows[system]["state"], rows[system]["decoder"]) == ("built", name)
    for name, model in registry.models().items():
        for system in model.systems:
            assert (rows[system]["state"], rows[system]["model"]) == ("built", name)
    assert {row["state"] for row in rows.values()} == {"built", *made.STATES}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('name = "A", paper = ""', "needs a paper"),
        ('name = "A", paper = "P", state = "too much work"', "one of the states"),
        ('name = "A", paper = "P", state = "not possible here"', "has a reason"),
        ('name = "A", paper = "P", reason = "no time"', "nothing else has"),
        ('name = "A", paper = "P" }, { family = "f", name = "A", paper = "P"', "twice: A"),
    ],
)
def test_systems_without_a_reason_are_refused(tmp_path, row, message):
    made = pages()
    made.SYSTEMS = tmp_path / "systems.toml"
    made.SYSTEMS.write_text(f'systems = [{{ family = "f", {row} }}]')
    with pytest.raises(ValueError, match=message):
        made.coverage()


def test_names_that_clash_are_errors(place):
    add(place, "others", "kivi", SOURCE)
    with pytest.raises(ImportError, match=r"several methods are called 'kivi'.*others\.kivi"):
        effjax.methods.kivi  # noqa: B018
    text = SOURCE.replace("skipped_attention", "snap_kv")
    (place / "others" / "kivi.py").write_text(text)
    with pytest.raises(ValueError, match=re.compile("two methods are named 'snap_kv'.*rename")):
        registry.methods()


def test_a_method_that_is_none_is_named(place):
    add(place, "others", "odd", "METHOD = 1\n")
    with pytest.raises(ValueError, match=r"METHOD of .*odd must be a Method, got 1"):
        registry.methods()
