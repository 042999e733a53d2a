"""What a converter declares: one file of this folder per model family, each with a `FAMILY`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from converters.names import Table
from effjax import fields
from effjax.context import Model, check_counts

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family and its checkpoints.

    Attributes:
        class_name: `_class_name` in its config.json.
        model: the `flax.nnx.Module`, built by `model(config, rngs=...)`.
        config: its configuration, a dataclass with `dtype` and `param_dtype`.
        read_config: config.json to configuration; ValueError for what the model does not have.
        write_config: the inverse, without `_class_name`.
        tables: layouts of its checkpoints by name.
        claims: whether a config.json with another `_class_name` belongs here (legacy classes).
        keys: names in config.json of the fields that `model.counts` lists, where they differ; a dot
            stands before one of a section.
        parts: further models that its checkpoints hold, by name.
        beside: files beside config.json whose keys it is read with.
        library: what has the class, as a model_index.json names it.
        beyond: how names of tensors begin that stand behind the last layer of a model of this
            configuration and are no part of it; None for none.
        writes: the layout that a model of this configuration is written in; the first one if None.
    """

    class_name: str
    model: type[Model]
    config: type
    read_config: Callable[[Json], Any]
    write_config: Callable[[Any], dict[str, Any]]
    tables: Mapping[str, Table]
    claims: Callable[[Json], bool] = lambda config: False
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parts: Mapping[str, Family] = dataclasses.field(default_factory=dict)
    beside: tuple[str, ...] = ()
    library: str = "diffusers"
    beyond: Callable[[Any], str] | None = None
    writes: Callable[[Any], str] | None = None

    def written_layout(self, config: Any) -> str:
        """The layout that a model of this configuration is written in."""
        return next(iter(self.tables)) if self.writes is None else self.writes(config)

    def layout(self, names: Iterable[str]) -> str:
        """The layout whose table knows most of these tensor names."""
        names = list(names)
        return max(self.tables, key=lambda layout: self.tables[layout].recognized(names))

    def check_counts(self, config: Json, layout: str, names: Iterable[str]) -> None:
        """Refuse a config.json that counts more layers than the tensors of these names make.

        Raises:
            ValueError: naming its key, before anything of that size is made.
        """
        counts = {self.keys.get(field, field): path for field, path in self.model.counts.items()}
        said = {key: _held(config, key) for key in counts}
        check_counts(said, counts, self.tables[layout].paths(names))

    def part(self, name: str | None) -> Family:
        """The family of a further model by its name; this one if None.

        Raises:
            ValueError: for a part that its checkpoints do not hold.
        """
        if name is None:
            return self
        if name not in self.parts:
            held = f"they are {', '.join(self.parts)}" if self.parts else "it has none"
            raise ValueError(f"a {self.class_name} has no part {name!r}: {held}")
        return self.parts[name]


def _held(config: Json, key: str) -> Any:
    """The value of a key, or of one of a section; None where there is none."""
    section, _, own = key.rpartition(".")
    within = config.get(section) if section else config
    return within.get(own) if isinstance(within, Mapping) else None


@functools.cache
def families() -> tuple[Family, ...]:
    """Every `FAMILY` that a module of this folder declares."""
    package = importlib.import_module(__name__.rpartition(".")[0])
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [
        importlib.import_module(f"{package.__name__}.{name}")
        for name in names
        if not name.startswith("_")
    ]
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def _known() -> str:
    return ", ".join(sorted(family.class_name for family in families()))


def family_of_json(config: Json) -> Family:
    """The family that a config.json belongs to."""
    name = read_value(config, "_class_name", str | None)
    read_value(config, "model_type", str | None)  # what `claims` looks at
    for family in families():
        if name == family.class_name or family.claims(config):
            return family
    raise ValueError(f"no converter for _class_name={name!r} of config.json; there are: {_known()}")


def family_of_config(config: Any) -> Family:
    """The family of the models that have this configuration."""
    for family in families():
        if type(config) is family.config:
            return family
    raise ValueError(f"no converter for models with {type(config).__name__}; there are: {_known()}")


def family_of_names(names: Iterable[str]) -> Family:
    """The family that knows most of these tensor names, for a file without config.json."""
    names = list(names)
    if not names:
        raise ValueError("there are no tensors in it")

    def known(family: Family) -> int:
        return family.tables[family.layout(names)].recognized(names)

    best = max(families(), key=known)
    if 2 * known(best) <= len(names):
        raise ValueError(
            f"no converter knows these {len(names)} tensors ({', '.join(names[:3])}, ...); there "
            f"are: {_known()}. If this is one of them, put its config.json beside the file."
        )
    return best


# Attribute of a configuration and value of files that lack the key, by key of config.json.
Keys = Mapping[str, tuple[str, Any]]


def read_keys(config: Json, kind: type, keys: Keys, *, null: Iterable[str] = ()) -> dict[str, Any]:
    """Attributes of a configuration from a config.json, of the types that it says.

    Args:
        config: what the file holds.
        kind: class of the configuration.
        keys: which key is which attribute.
        null: keys whose null stands for the value of files that lack them.

    Raises:
        ValueError: for values that do not fit, all named by their keys.
    """
    kinds, found, wrong = fields.annotated(kind), {}, []
    for key, (attribute, default) in keys.items():
        value = config.get(key, default)
        value = default if value is None and key in null else value
        found[attribute] = fields.from_json(kinds[attribute], value, key)
        wrong += fields.problems(kinds[attribute], found[attribute], key)
    if wrong:
        raise ValueError("; ".join(wrong))
    return found


def read_value(config: Json, key: str, kind: Any, default: Any = None) -> Any:
    """One value of a config.json, of the type that an annotation says.

    Raises:
        ValueError: for another value.
    """
    value = fields.from_json(kind, config.get(key, default), key)
    if wrong := fields.problems(kind, value, key):
        raise ValueError("; ".join(wrong))
    return value


def write_keys(config: Any, keys: Keys) -> dict[str, Any]:
    """The inverse of `read_keys`."""
    values = {key: getattr(config, attribute) for key, (attribute, _) in keys.items()}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def require(config: Json, **fixed: Any) -> None:
    """Reject values that the model does not implement; absent ones are taken to be right."""
    wrong = [
        f"{name}={config[name]!r} (only {value!r})"
        for name, value in fixed.items()
        if name in config and not fields.same(config[name], value)
    ]
    if wrong:
        raise ValueError("config.json asks for what the model does not have: " + ", ".join(wrong))
