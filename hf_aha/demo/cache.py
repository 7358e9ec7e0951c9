"""A small cache that several threads may ask at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar


V = TypeVar("V")


class LruCache(Generic[V]):
    """Keeps the values used last. Threads that want the same new value wait for the first to make it.

    Args:
        size: values kept, at least 1.

    Raises:
        ValueError: the size is smaller.

    Example:
        >>> cache = LruCache(1)
        >>> cache.get_or_make("a", lambda: 1), cache.get_or_make("a", lambda: 2), cache.get_or_make("b", lambda: 3)
        (1, 1, 3)
        >>> "a" in cache
        False
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"A cache holds at least 1 value, but size is {size}.")
        self._size = size
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._values

    def get(self, key: Hashable) -> V | None:
        """The value of `key`, or None where it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def get_or_make(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of `key`, made if it is not kept. What `make` raises is passed on, and nothing is kept then."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            turn = self._making.setdefault(key, threading.Lock())
        with turn:
            with self._lock:
                # Whoever had the turn before may have made it.
                if key in self._values:
                    return self._values[key]
            try:
                value = make()
                self.put(key, value)
            finally:
                with self._lock:
                    self._making.pop(key, None)
            return value

    def put(self, key: Hashable, value: V) -> None:
        """Keep a value, and forget the one that was not used for longest if there are too many."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)
