"""Classes by index and by name, as diffusers' `id2label` holds them.

A class may have several names, with commas between them ("tench, Tinca tinca"), and a name may
belong to several classes (ImageNet has two cranes).
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from effjax.fields import naming
from effjax.pipelines import arguments
from effjax.pipelines.base import INDEX, BasePipeline
from effjax.pipelines.loading import Components

Label = SupportsIndex | str

_LISTED = 20  # names that an error lists


@dataclasses.dataclass(frozen=True, repr=False)
class OfClasses(BasePipeline):
    """What pipelines of classes share: labels by index or by name.

    Attributes:
        names: names of classes by their index. Several names of one class have commas between
            them. Some classes may have no name.

    Raises:
        ValueError: for names that are none of the model's classes.
    """

    names: Mapping[int, str] = dataclasses.field(default_factory=dict, kw_only=True)

    TASK = "unconditional-image-generation"  # hubs know no classes

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.names, self.forward.config.num_classes)

    @staticmethod
    def names_of(found: Components) -> dict[int, str]:
        """The names in the index of a directory.

        Raises:
            ValueError: if they are no names under whole numbers.
        """
        with naming(INDEX):
            return read_names((found.index or {}).get("id2label"))

    def example_condition(self) -> jax.Array:
        """The condition of one image."""
        return jnp.zeros(1, jnp.int32)

    def conditions(
        self, labels: Label | Sequence[Label] | np.ndarray | jax.Array
    ) -> tuple[jax.Array, None]:
        """Make the conditions `cond` and `uncond` that a sampler takes for these labels."""
        indices = [self.index(label) for label in arguments.listed("labels", labels)]
        return jnp.asarray(indices, jnp.int32), None

    def index(self, label: Any) -> int:
        """Find the class index of a label.

        Args:
            label: an index (also as text), one name of a class, or all names of a class.

        Raises:
            ValueError: for a value that is not a label, and for a name of no class or of several.
        """
        return index_of(label, self.names, self.forward.config.num_classes)

    def _components(self, directory: Path) -> dict[str, Any]:
        names = {str(index): name for index, name in self.names.items()}
        return {**super()._components(directory), "id2label": names}


def read_names(id2label: Any) -> dict[int, str]:
    """Names by class index of the `id2label` of a model_index.json, which may be missing.

    Raises:
        ValueError: if it is no object of names under whole numbers.
    """
    if id2label is None:
        return {}
    if not isinstance(id2label, Mapping):
        raise ValueError(
            f"model_index.json: id2label must be an object of names by class index, got "
            f"{type(id2label).__name__}"
        )
    wrong = [key for key in id2label if not key.isdecimal()]
    if wrong:
        raise ValueError(
            f"model_index.json: id2label has names by class index, such as "
            f'{{"0": "tench"}}; {wrong[0]!r} is no index'
        )
    return {int(key): name for key, name in id2label.items()}


def check_names(names: Mapping[int, str], classes: int) -> None:
    """Raise a ValueError for names that do not belong to one of so many classes."""
    for index, name in names.items():
        if isinstance(index, bool) or not isinstance(index, int):
            raise ValueError(
                f"names are given by class index, such as {{0: 'tench'}}; got the key {index!r}"
            )
        if not 0 <= index < classes:
            raise ValueError(
                f"the name {name!r} has the index {index}, but this model has {classes} classes "
                f"(0 ... {classes - 1}): are the names (id2label) those of another model?"
            )
        if not isinstance(name, str):
            raise ValueError(f"the name of class {index} must be a text, got {name!r}")


def index_of(label: Any, names: Mapping[int, str], classes: int) -> int:
    """Class index of a label: an index, also as text, one name of a class, or all its names.

    Raises:
        ValueError: for what is no label, and for a name of no class or of several.
    """
    index = -1
    if isinstance(label, str):
        asked = _synonyms(label)
        found = [
            number
            for number, name in names.items()
            if asked == (own := _synonyms(name)) or (len(asked) == 1 and asked[0] in own)
        ]
        if len(found) > 1:
            which = "; ".join(f"{number} ({names[number]})" for number in found)
            raise ValueError(f"{label!r} names {len(found)} classes: {which}. Give the index.")
        if found:
            return found[0]
        if label.strip().isdecimal():
            index = int(label)
    else:
        try:
            if isinstance(label, bool | np.bool_):
                raise TypeError
            index = operator.index(label)
        except TypeError:
            raise ValueError(
                f"a label is the index or the name of a class, got {label!r}"
            ) from None
    if not 0 <= index < classes:
        raise ValueError(
            f"no class {label!r}: a label is 0 ... {classes - 1}{_hint(str(label), names)}"
        )
    return index


def _synonyms(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def _hint(label: str, names: Mapping[int, str]) -> str:
    """Names that may have been meant."""
    if not names:
        return ""
    if len(names) <= _LISTED:
        return f", or one of {', '.join(names.values())}"
    known = list(dict.fromkeys(name for each in names.values() for name in _synonyms(each)))
    near = difflib.get_close_matches(label, known, n=3)
    return ", or the name of a class" + (f"; near it: {', '.join(near)}" if near else "")
