import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.names import LAYOUTS, Buffer, Layout, Rule, Table, affine

TABLE = Table(
    rules=(
        *affine("stem", "patch", "conv"),
        *affine("h.{i}.attn.{j}.qkv", "blocks.{i}.attn.{j}.q", part="0/2"),
        *affine("h.{i}.attn.{j}.qkv", "blocks.{i}.attn.{j}.k", part="1/2"),
        Rule("h.{i}.embed", "label.embedding_table"),
    ),
    buffers=(Buffer("positions", lambda config: np.zeros(3), lambda config: (3,)),),
)
SHAPES = {
    "patch.kernel": (2, 3, 4, 5),
    "patch.bias": (5,),
    "label.embedding_table": (7, 2),
    **{f"blocks.{i}.attn.0.{name}.kernel": (6, 4) for i in (0, 11) for name in "qk"},
    **{f"blocks.{i}.attn.0.{name}.bias": (4,) for i in (0, 11) for name in "qk"},
}


def arrays(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_every_tensor_is_named_with_its_shape():
    binding = TABLE.bind(SHAPES)
    assert binding.source_shapes(SHAPES) == {
        "stem.weight": (5, 4, 2, 3),
        "stem.bias": (5,),
        "h.0.embed": (7, 2),
        "h.11.embed": (7, 2),
        "h.0.attn.0.qkv.weight": (8, 6),
        "h.11.attn.0.qkv.weight": (8, 6),
        "h.0.attn.0.qkv.bias": (8,),
        "h.11.attn.0.qkv.bias": (8,),
    }
    assert [piece.source for piece in binding.targets["label.embedding_table"]] == [
        "h.0.embed",
        "h.11.embed",
    ]


def test_round_trip_from_parameters_is_exact():
    params = arrays(SHAPES)
    binding = TABLE.bind(SHAPES)
    tensors = {name: binding.assemble(name, params.__getitem__) for name in binding.sources}
    assert {name: x.shape for name, x in tensors.items()} == binding.source_shapes(SHAPES)
    for path, pieces in binding.targets.items():
        for piece in pieces:
            np.testing.assert_array_equal(piece.read(tensors[piece.source]), params[path])


def test_round_trip_from_tensors_is_exact():
    binding = TABLE.bind(SHAPES)
    tensors = arrays(binding.source_shapes(SHAPES))
    tensors["h.11.embed"] = tensors["h.0.embed"]
    params = {
        path: pieces[0].read(tensors[pieces[0].source]) for path, pieces in binding.targets.items()
    }
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(binding.assemble(name, params.__getitem__), tensor)


def test_parts_are_rows_of_the_source():
    binding = TABLE.bind(SHAPES)
    tensor = np.arange(48.0).reshape(8, 6)
    (piece,) = binding.targets["blocks.0.attn.0.k.kernel"]
    np.testing.assert_array_equal(piece.read(tensor), tensor[4:].T)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_layouts_are_two_way_and_copy_nothing(name, data):
    ranks = {"linear": 2, "swapped-linear": 2, "conv": 4, "pointwise": 4, "linears": 3}
    rank = ranks[name] if name in ranks else data.draw(st.integers(1, 4))
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * rank))
    shape = (*shape[:2], 1, 1) if name == "pointwise" else shape
    shape = (1, *shape) if name == "first" else shape
    shape = (2 * shape[0], *shape[1:]) if name.startswith("swapped") else shape
    source = np.zeros(shape)
    layout = LAYOUTS[name]
    target = layout.forward(source)
    assert layout.shape(target.shape) == source.shape
    assert layout.inverse(target).shape == source.shape
    assert np.shares_memory(target, source) != name.startswith("swapped")
    source[...] = np.arange(source.size).reshape(source.shape)
    np.testing.assert_array_equal(layout.inverse(layout.forward(source)), source)


def test_parameters_without_a_rule_and_lost_parts_are_all_named():
    shapes = {"patch.kernel": (1, 1, 1, 1), "other": (1,), "more": (1,)}
    shapes["blocks.0.attn.0.k.bias"] = (4,)
    with pytest.raises(
        ValueError, match=r"(?s)other: no rule.*more: no rule.*h\.0\.attn\.0\.qkv\.bias"
    ):
        TABLE.bind(shapes)


def test_copies_of_nothing_are_an_error():
    with pytest.raises(ValueError, match=r"label\.embedding_table: no rule"):
        TABLE.bind({"label.embedding_table": (7, 2)})


def test_unknown_layout():
    with pytest.raises(ValueError, match=r"unknown layout.*conv"):
        Table((Rule("a", "b", "linaer"),)).bind({"b": (2,)})


def test_layouts_of_one_table_are_no_others():
    added = Layout(lambda x: x[0], lambda x: x[None], lambda shape: (1, *shape))
    rules = (Rule("a", "b", "own"),)
    binding = Table(rules, layouts={"own": added}).bind({"b": (2,)})
    assert binding.source_shapes({"b": (2,)}) == {"a": (1, 2)}
    with pytest.raises(ValueError, match="unknown layout"):
        Table(rules).bind({"b": (2,)})
    with pytest.raises(TypeError):
        LAYOUTS["own"] = added  # pyright: ignore[reportIndexIssue]


def test_a_stack_is_a_tensor_for_each_matrix():
    """As many as its first axis counts; each in its place, both ways."""
    rules = (Rule("h.{i}.up.{e}.weight", "blocks.{i}.up.kernel", "linear each e"),)
    shapes = {f"blocks.{i}.up.kernel": (12, 2, 3) for i in (0, 11)}
    binding = Table(rules).bind(shapes)
    names = [f"h.{i}.up.{e}.weight" for i in (0, 11) for e in range(12)]
    assert binding.source_shapes(shapes) == dict.fromkeys(names, (3, 2))
    params = arrays(shapes)
    for path, pieces in binding.targets.items():
        assert [piece.place for piece in pieces] == [*range(12)]
        for piece in pieces:
            tensor = binding.assemble(piece.source, params.__getitem__)
            np.testing.assert_array_equal(tensor, params[path][piece.place].T)
            np.testing.assert_array_equal(piece.read(tensor), params[path][piece.place])


def test_recognized_counts_known_names_only():
    names = ["stem.bias", "h.3.embed", "positions", "h.x.embed", "h.3.embed.weight", "hx3.embed"]
    assert TABLE.recognized(names) == 3
