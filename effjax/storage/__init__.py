"""Tensors on disk: safetensors files read and written one tensor at a time, complete or not at all.

Files are mapped, so a tensor is a view of the file and costs no memory of its own; the header is
checked first. (The safetensors package copies what it reads and wants all tensors to write any.)
"""

from effjax.storage.directories import (
    check_destination,
    new_directory,
)
from effjax.storage.json_files import (
    parse_json,
    read_json,
    stand_in,
    write_json,
)
from effjax.storage.reading import (
    Tensor,
    index_files,
    is_index,
    open_safetensors,
    open_shards,
)
from effjax.storage.tensors import (
    DTYPES,
    FLOATS,
    Inspection,
    Shape,
    Spec,
    float_dtype,
    place,
    to_host,
)
from effjax.storage.writing import (
    write_safetensors,
    write_shards,
)

__all__ = [
    "DTYPES",
    "FLOATS",
    "Inspection",
    "Shape",
    "Spec",
    "Tensor",
    "check_destination",
    "float_dtype",
    "index_files",
    "is_index",
    "new_directory",
    "open_safetensors",
    "open_shards",
    "parse_json",
    "place",
    "read_json",
    "stand_in",
    "to_host",
    "write_json",
    "write_safetensors",
    "write_shards",
]
