"""A memory of what was computed last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values of the keys that were asked for last; threads may share it.

    Args:
        size: how many keys are remembered.
    """

    def __init__(self, size: int):
        self.size = size
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self.size,)  # a copy starts empty

    def get(self, keys: Sequence[Key], make: Callable[[list[Key]], Iterable[Value]]) -> list[Value]:
        """The values of these keys.

        Args:
            keys: any of them may repeat, and be more than are remembered.
            make: computes the values of those that are not remembered. It runs without the lock:
                threads that miss the same key at once both compute it.
        """
        with self._lock:
            values = {key: self._values[key] for key in keys if key in self._values}
        new = [key for key in dict.fromkeys(keys) if key not in values]
        if new:
            values.update(zip(new, make(new), strict=True))
        with self._lock:
            for key in dict.fromkeys(keys):
                self._values[key] = values[key]
                self._values.move_to_end(key)
            while len(self._values) > self.size:
                self._values.popitem(last=False)
        return [values[key] for key in keys]
