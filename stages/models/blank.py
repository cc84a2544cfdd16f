"""Modules without weights, which are bound to memory that is filled elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def blank() -> Iterator[None]:
    """What is built in this context is on the meta device, and nothing initialises it.

    torch does `normal_` of a meta tensor in Python, and loads its compiler for it, which was the half of a
    restarted stage's seconds (docs/reliability.md).
    """
    with torch.device("meta"), _Uninitialised():
        yield


class _Uninitialised(TorchFunctionMode):
    """What `torch.nn.init` would do in place is left out."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
