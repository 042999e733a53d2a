"""Reading files that are whole, and refusing those that are not."""

import json
import pickle
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import from_pretrained
from converters.checkpoint import open_checkpoint
from effjax.storage import (
    Spec,
    check_destination,
    new_directory,
    read_json,
    write_safetensors,
    write_shards,
)

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "c.0": np.float16([[1.5]]),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(7.0, np.float32),
}
SPECS = {name: Spec(array.shape, array.dtype) for name, array in ARRAYS.items()}


@pytest.fixture
def file(tmp_path):
    save_file(ARRAYS, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def header_file(path, header, data=b""):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def assert_holds_arrays(tensors):
    assert tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        held = tensors[name].read()
        assert (tensors[name].shape, tensors[name].dtype) == (array.shape, array.dtype)
        assert held.dtype == array.dtype
        np.testing.assert_array_equal(held, array)


def test_reads_what_safetensors_writes(file):
    assert_holds_arrays(open_checkpoint(file))


def test_safetensors_reads_what_is_written(tmp_path):
    write_safetensors(tmp_path / "own.safetensors", SPECS, ARRAYS.__getitem__)
    for name, array in load_file(tmp_path / "own.safetensors").items():
        np.testing.assert_array_equal(array, ARRAYS[name])
    assert_holds_arrays(open_checkpoint(tmp_path / "own.safetensors"))


def test_tensors_are_views_of_the_file(file):
    held = open_checkpoint(file)["a"].read()
    assert not held.flags.writeable
    assert not held.flags.owndata


def test_shards_and_index(tmp_path):
    files = write_shards(
        tmp_path, "w", SPECS, ARRAYS.__getitem__, max_shard_bytes=24, progress=False
    )
    assert files == ["w-00001-of-00002.safetensors", "w-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / "w.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    assert_holds_arrays(open_checkpoint(tmp_path / "w.safetensors.index.json"))


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"weights\.safetensors is truncated"):
        open_checkpoint(file)


def test_trailing_bytes(file):
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(ValueError, match="truncated or corrupt"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "corrupt"),
        (b"\xff\xfe\x00", "corrupt"),
        ([], "corrupt"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, r"a of shape \[2\] has 4"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "corrupt"),
        ({"a": {"dtype": "F9", "shape": [1], "data_offsets": [0, 4]}}, "unknown dtype.*F9"),
        (
            {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
            "a has the unknown dtype",
        ),
        ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, r"a must .*as shape"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, r"a must .*as shape"),
        ({"a": {"dtype": "F32", "shape": [10**40], "data_offsets": [0, 4]}}, r"a must .*as shape"),
        ({"a": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}, r"a must .*as shape"),
        ({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, r"a must .*as shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}, r"a must .*offsets"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, r"a must .*offsets"),
        (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', r"a must .*as shape"),
        (b'{"a": {}, "a": {}}', r"keys stand twice: \['a'\]"),
        (b'{"a": ' + b"9" * 5000 + b"}", "limit"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"\xff": {}}', "codec"),
        ({"a": 1}, "a must be an object, got 1"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "leave gaps"),
        (
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            "overlap",
        ),
    ],
)
def test_corrupt_header(tmp_path, header, message):
    header_file(tmp_path / "x.safetensors", header, b"\0" * 4)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("start", [0x0280, 0x0380, 0x0480, 0x0580, 0x04034B50])
def test_headers_whose_length_looks_like_another_kind_of_file(tmp_path, start):
    """A file begins with the length of its header: 896 bytes read as a pickle, 64 MB as a zip."""
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", start) + text.ljust(start) + b"\7")
    assert open_checkpoint(tmp_path / "x.safetensors")["a"].read() == 7
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", start) + text)
    with pytest.raises(ValueError, match=r"is truncated"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_pickle_and_lfs_pointer_with_the_wrong_name(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps({"a": list(range(100))}))
    with pytest.raises(ValueError, match="is a pickle, not safetensors"):
        open_checkpoint(path)
    path.write_bytes(b"PK\x03\x04\0\0\x08\x08" + b"\0" * 100)
    with pytest.raises(ValueError, match="is a pickle, not safetensors"):
        open_checkpoint(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for name in ("x.safetensors", "x.bin", "x.safetensors.index.json"):
        path.rename(path := tmp_path / name)
        with pytest.raises(ValueError, match="git lfs pull"):
            open_checkpoint(path)
    path.write_bytes(b"<!DOCTYPE html><html>")
    with pytest.raises(ValueError, match="is a web page"):
        open_checkpoint(path)


def test_missing_shards_are_all_named(tmp_path):
    write_shards(tmp_path, "w", SPECS, ARRAYS.__getitem__, max_shard_bytes=1, progress=False)
    (tmp_path / "w-00001-of-00005.safetensors").unlink()
    (tmp_path / "w-00003-of-00005.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 2 of its 5 shards: w-00001.*w-00003"):
        open_checkpoint(tmp_path / "w.safetensors.index.json")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "w.safetensors", "lost": "w.safetensors"}, "lost is not in w"),
        ({"a": "w.safetensors", "b": "v.safetensors"}, "a stands in w"),
        ({"a": "../w.safetensors"}, "not beside it"),
        ({"a": 1}, "not beside it.*gives a: 1"),
        ({"a": ["w.safetensors"]}, "not beside it"),
        ({"a": "w.safetensors.index.json"}, "not beside it"),
        ({}, "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_index_that_lies(tmp_path, weight_map, message):
    save_file({"a": ARRAYS["a"]}, tmp_path / "w.safetensors")
    save_file({"a": ARRAYS["a"], "b": ARRAYS["b"]}, tmp_path / "v.safetensors")
    index = tmp_path / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff{}", "codec"),
        (b"[]", "must be a JSON object, got a list"),
        (b'{"a": 1, "b": 2, "a": 1}', r"keys stand twice: \['a'\]"),
        (b'{"a": {"b": 1, "b": 2}}', r"keys stand twice: \['b'\]"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "limit"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"x\.json is not valid JSON: .*{message}"):
        read_json(tmp_path / "x.json")


def test_json_that_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ValueError, match=f"{path} cannot be read"):
            read_json(path)


def test_unknown_suffix(tmp_path):
    (tmp_path / "w.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no weight file.*\.safetensors"):
        open_checkpoint(tmp_path / "w.onnx")


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    state = {
        "a": torch.arange(6.0).reshape(2, 3).T,
        "b": torch.arange(5).to(torch.bfloat16),
        "scalar": torch.tensor(2.0, requires_grad=True),
    }
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    tensors = open_checkpoint(tmp_path / "w.pt")
    assert tensors["b"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensors["a"].read(), ARRAYS["a"].T)
    np.testing.assert_array_equal(tensors["b"].read(), ARRAYS["b"])
    assert tensors["scalar"].read() == 2.0


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["sparse", "float8", "empty"])
def test_tensors_of_pickles_that_are_no_arrays_are_named(kind, tmp_path):
    torch = pytest.importorskip("torch")
    made = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "float8": lambda: torch.ones(3).to(torch.float8_e5m2),
        "empty": lambda: torch.empty(3, device="meta"),
    }
    torch.save({"a": torch.ones(2), "odd": made[kind](), 3: torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: odd is a tensor of torch\.float"):
        open_checkpoint(tmp_path / "w.pt")


class Code:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.torch
def test_bad_pickles(tmp_path, capfd):
    torch = pytest.importorskip("torch")
    torch.save({"a": Code()}, tmp_path / "code.pt")
    (tmp_path / "broken.bin").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("code.pt", "broken.bin", "empty.pth"):
        with pytest.raises(ValueError, match=f"torch cannot read .*{name}"):
            open_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="holds a list"):
        open_checkpoint(tmp_path / "list.pt")
    assert "this must not run" not in capfd.readouterr().out


def test_pickle_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(ImportError, match="install torch"):
        open_checkpoint(tmp_path / "w.pt")


def test_new_directory_appears_whole_or_not_at_all(tmp_path):
    with new_directory(tmp_path / "deep" / "done") as directory:
        (directory / "file").write_text("x")
        assert not (tmp_path / "deep" / "done").exists()
    assert [path.name for path in (tmp_path / "deep").rglob("*")] == ["done", "file"]

    def fail():
        with new_directory(tmp_path / "failed") as directory:
            (directory / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_occupied_destination(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty") as directory:
        (directory / "file").write_text("x")
    for occupied in (tmp_path / "empty", tmp_path / "empty" / "file"):
        with pytest.raises(ValueError, match="exists and is not empty"):
            new_directory(occupied).__enter__()
    assert len(list(tmp_path.iterdir())) == 1


def test_links_lead_to_their_destination(tmp_path):
    (tmp_path / "empty").mkdir()
    for target in ("empty", "new"):
        link = tmp_path / f"to {target}"
        link.symlink_to(target)
        with new_directory(link) as directory:
            (directory / "file").write_text("x")
        assert link.is_symlink()
        assert (tmp_path / target / "file").read_text() == "x"
        with pytest.raises(ValueError, match=f"{target} exists and is not empty"):
            check_destination(link)


def test_directories_that_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for here in (Path(), Path("."), tmp_path):
        with pytest.raises(ValueError, match="where this program runs; give the name of a"):
            check_destination(here)
    monkeypatch.chdir("/")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(ValueError, match="as it is a mount point"):
        new_directory(tmp_path).__enter__()
    assert tmp_path.is_dir()


def test_tensor_that_is_not_as_announced(tmp_path):
    with pytest.raises(ValueError, match=r"a was announced as float32\[3\] and is float64\[2\]"):
        write_safetensors(
            tmp_path / "x", {"a": Spec((3,), np.dtype(np.float32))}, lambda name: np.zeros(2)
        )


def test_gguf_is_refused_by_its_name(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    named = r"model\.gguf in .* is GGUF, which is not read: .*gguf_file='model\.gguf'"
    sources = (tmp_path / "model.gguf", tmp_path, "owner/name/model.gguf")
    for source in sources:
        with pytest.raises(ValueError, match=named):
            from_pretrained(source)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=named):
        from_pretrained(tmp_path)
