"""Arrays of a client's program as weights to be given (`hotreload/given.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hotreload.given import GivenTensor
from hotreload.shown import shown
from ipc.errors import BadCheckpoint

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""numpy's names (bfloat16: that of the package ml_dtypes) and safetensors'."""


def given_tensors(arrays: Mapping[str, Any]) -> dict[str, GivenTensor]:
    """numpy arrays, or whatever `numpy.asarray` makes one of; contiguous ones are not copied. `BadCheckpoint` names one
    that has another dtype than weights have."""
    import numpy as np  # here: most clients never need it

    given = {}
    for name, value in arrays.items():
        array = np.asarray(value)
        dtype = DTYPES.get(array.dtype.name)
        if dtype is None:
            raise BadCheckpoint(f"{shown(name)} has the dtype {array.dtype}; weights are one of {', '.join(DTYPES)}")
        # As bytes: of bfloat16 numpy gives no buffer.
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        given[name] = GivenTensor(dtype, array.shape, data.data)
    return given
