"""NAR: the files as they were released (arXiv 2503.10696), those of LlamaGen with a second head.

The block before the lower head is the last one of `layers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

from converters import llamagen
from converters.family import Family, Json, read_keys, write_keys
from converters.names import Binding, Rule, Shape, Table
from effjax.models.nar import NAR, NARConfig


def read_config(config: Json) -> NARConfig:
    """config.json to the configuration; absent keys have LlamaGen-B's values."""
    return NARConfig(**read_keys(config, NARConfig, llamagen.KEYS))


def write_config(config: NARConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return write_keys(config, llamagen.KEYS)


class _Released(Table):
    """The table of a model of any depth: the last of `layers` is the block below."""

    def bind(self, targets: Mapping[str, Any], held: Container[str] = ()) -> Binding:
        depth = len({path.split(".")[1] for path in targets if path.startswith("blocks.")})
        last = llamagen.block_rules(f"layers.{depth}", "below")
        whole = dataclasses.replace(self, rules=(*last, *self.rules))
        return Table.bind(whole, targets, held)


def _infer(shapes: Mapping[str, Shape]) -> NARConfig:
    found = llamagen.infer(shapes)
    own = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return NARConfig(**{**own, "num_layers": found.num_layers - 1})


ORIGINAL = _Released(
    rules=(
        *llamagen.RULES,
        Rule("medusa_norm.weight", "below_norm.scale"),
        Rule("medusa_output.weight", "below_head.kernel", "linear"),
    ),
    infer=_infer,
    stem="model",
)

FAMILY = Family(
    class_name="NAR",
    model=NAR,
    config=NARConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"original": ORIGINAL},
    library="effjax",
)
