"""NBP: models of this library's own training, with the tensors of a LlamaGen (arXiv 2502.07737).

A config.json says the blocks: without one a file is taken for a LlamaGen's.
"""

from __future__ import annotations

from typing import Any

from converters import llamagen
from converters.family import Family, Json, Keys, read_keys, write_keys
from effjax.models.nbp import NBP, NBPConfig

_KEYS: Keys = {**llamagen.KEYS, "frames": ("frames", 1), "block": ("block", (1, 1, 16))}


def read_config(config: Json) -> NBPConfig:
    """config.json to the configuration; absent keys have LlamaGen-B's values, and rows."""
    return NBPConfig(**read_keys(config, NBPConfig, _KEYS))


def write_config(config: NBPConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return write_keys(config, _KEYS)


FAMILY = Family(
    class_name="NBP",
    model=NBP,
    config=NBPConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"original": llamagen.ORIGINAL},
    library="effjax",
)
