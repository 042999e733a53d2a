"""Target modules and the order of wrappers."""

import pytest

from effjax.targets import Wrapper, canonical, original, target_modules, wrap
from tests.tiny import Toy, ToyBlock, toy


class Outer(Wrapper):
    def __init__(self, inner, name="outer"):
        super().__init__(inner)
        self.name = name

    def __call__(self, x):
        return self.inner(x)


class Replaces(Wrapper):
    replaces_internals = True

    def __init__(self, inner):
        super().__init__(inner)
        self.width = inner.fc.kernel.get_value().shape[0]  # fails unless `inner` is the original

    def __call__(self, x):
        return x + self.inner.fc(x)


class AlsoReplaces(Replaces):
    pass


@pytest.fixture
def module():
    forward, params, _ = toy()
    return forward.module(params)


def chain_of(module):
    names = []
    while isinstance(module, Wrapper):
        names.append(getattr(module, "name", type(module).__name__))
        module = module.inner
    return [*names, type(module).__name__]


def test_sites_keep_their_names_when_wrapped(module):
    before = [target.path for target in target_modules(module)]
    assert before == [
        "blocks",
        "blocks.0",
        "blocks.0.fc",
        "blocks.1",
        "blocks.1.fc",
    ]
    originals = {target.path: target.module for target in target_modules(module)}
    for path in before:
        wrap(module, path, Outer)
    assert [target.path for target in target_modules(module)] == before
    assert all(target.module is originals[target.path] for target in target_modules(module))
    assert [target.path for target in target_modules(module, ToyBlock)] == ["blocks.0", "blocks.1"]
    assert isinstance(original(module.blocks), type(originals["blocks"]))


def test_wrappers_stand_in_chain_order_and_openers_innermost(module):
    wrap(module, "blocks.0", Outer, "first")
    wrap(module, "blocks.0", Outer, name="second")
    wrap(module, "blocks.0", Replaces)
    wrap(module, "blocks.0", Outer, "third")
    assert chain_of(module.blocks[0]) == ["third", "second", "first", "Replaces", "ToyBlock"]


def test_two_openers_at_one_site_are_named(module):
    wrap(module, "blocks.1", Replaces)
    wrap(module, "blocks.1", Outer)
    with pytest.raises(
        ValueError, match=r"AlsoReplaces and Replaces both replace the internals of 'blocks\.1'"
    ):
        wrap(module, "blocks.1", AlsoReplaces)
    wrap(module, "blocks.0", AlsoReplaces)


def test_wrapping_reaches_through_wrapped_parents(module):
    wrap(module, "blocks", Outer)
    wrap(module, "blocks.1", Replaces)
    wrap(module, "blocks.1.fc", Outer)
    assert chain_of(original(original(module.blocks)[1]).fc) == ["outer", "Linear"]


@pytest.mark.parametrize("path", ["blocks.9", "blok", "blocks.0.fc.kernel", "blocks.x", ""])
def test_unknown_sites_list_the_known_ones(module, path):
    with pytest.raises(ValueError, match=r"Toy has no target module .* it has blocks, blocks\.0"):
        wrap(module, path, Outer)


def test_canonical_paths_skip_inner():
    assert canonical(("blocks", 0, "inner", "inner", "fc")) == "blocks.0.fc"
    assert Toy.__name__ == "Toy"
