"""Short digests of what data was made with: two values of the same digest are the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a value as JSON, keys sorted.

    Arrays count by dtype, shape and content, whatever else JSON cannot hold by its repr.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if not hasattr(value, "__array__"):
        return repr(value)
    array = np.asarray(value)
    return [array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).hexdigest()]
