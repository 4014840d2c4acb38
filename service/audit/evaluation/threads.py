"""Threads of an audit. Members are many and small: each thread runs whole ones, and torch itself runs on one thread."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerThreads:
    """A map over threads. Results come in order, and do not depend on `count`."""

    count: int = 1

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(
            self.count, thread_name_prefix="audit", initializer=torch.set_num_threads, initargs=(1,)
        )

    def map(self, function: Callable[..., T], *arguments: Iterable[Any]) -> Iterator[T]:
        """Arguments of different lengths are an error, as with zip(strict=True)."""
        rows = zip(*arguments, strict=True)
        if self.count == 1:
            return (function(*row) for row in rows)
        return self.pool.map(lambda row: function(*row), list(rows))
