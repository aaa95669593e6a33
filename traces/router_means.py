"""The mean input of every router, in a form that a trace's header can hold.

Look-ahead can be corrected by it: a layer's router input plus the difference of two layers' means is a better guess at
the later layer's input than the router input alone.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def packed(means: Array) -> str:
    """``means`` [L, H] as text: little-endian float16, in base64."""
    return base64.b64encode(np.ascontiguousarray(means, dtype="<f2").tobytes()).decode("ascii")


def unpacked(text: str, layers: int) -> Array:
    """The means float32 [``layers``, H] in ``text``; raises ValueError unless it holds some, all finite."""
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"router_means must be base64, got {text[:16]!r}...") from error
    if not data or len(data) % (2 * layers):
        raise ValueError(f"router_means must hold float16 for each of {layers} layers, got {len(data)} bytes")
    means: Array = np.frombuffer(data, dtype="<f2").astype(np.float32).reshape(layers, -1)
    if not np.isfinite(means).all():
        raise ValueError("router_means must be finite, got others among them")
    return means
