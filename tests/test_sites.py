"""Sites and the order of wrappers."""

import pytest

from effjax.sites import Wrapper, canonical, original, sites, wrap
from tests.tiny import Toy, ToyBlock, toy


class Outer(Wrapper):
    def __init__(self, inner, name="outer"):
        super().__init__(inner)
        self.name = name

    def __call__(self, x):
        return self.inner(x)


class Opens(Wrapper):
    opens = True

    def __init__(self, inner):
        super().__init__(inner)
        self.width = inner.fc.kernel.get_value().shape[0]  # fails unless `inner` is the original

    def __call__(self, x):
        return x + self.inner.fc(x)


class AlsoOpens(Opens):
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
    before = [site.path for site in sites(module)]
    assert before == [
        "blocks",
        "blocks.0",
        "blocks.0.fc",
        "blocks.1",
        "blocks.1.fc",
    ]
    originals = {site.path: site.module for site in sites(module)}
    for path in before:
        wrap(module, path, Outer)
    assert [site.path for site in sites(module)] == before
    assert all(site.module is originals[site.path] for site in sites(module))
    assert [site.path for site in sites(module, ToyBlock)] == ["blocks.0", "blocks.1"]
    assert isinstance(original(module.blocks), type(originals["blocks"]))


def test_wrappers_stand_in_chain_order_and_openers_innermost(module):
    wrap(module, "blocks.0", Outer, "first")
    wrap(module, "blocks.0", Outer, name="second")
    wrap(module, "blocks.0", Opens)
    wrap(module, "blocks.0", Outer, "third")
    assert chain_of(module.blocks[0]) == ["third", "second", "first", "Opens", "ToyBlock"]


def test_two_openers_at_one_site_are_named(module):
    wrap(module, "blocks.1", Opens)
    wrap(module, "blocks.1", Outer)
    with pytest.raises(ValueError, match=r"AlsoOpens and Opens both open the site 'blocks\.1'"):
        wrap(module, "blocks.1", AlsoOpens)
    wrap(module, "blocks.0", AlsoOpens)


def test_wrapping_reaches_through_wrapped_parents(module):
    wrap(module, "blocks", Outer)
    wrap(module, "blocks.1", Opens)
    wrap(module, "blocks.1.fc", Outer)
    assert chain_of(original(original(module.blocks)[1]).fc) == ["outer", "Linear"]


@pytest.mark.parametrize("path", ["blocks.9", "blok", "blocks.0.fc.kernel", "blocks.x", ""])
def test_unknown_sites_list_the_known_ones(module, path):
    with pytest.raises(ValueError, match=r"Toy has no site .* it has blocks, blocks\.0"):
        wrap(module, path, Outer)


def test_canonical_paths_skip_inner():
    assert canonical(("blocks", 0, "inner", "inner", "fc")) == "blocks.0.fc"
    assert Toy.__name__ == "Toy"
