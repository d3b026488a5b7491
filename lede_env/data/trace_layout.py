"""What a trace file holds, and in what form: names, types and bounds. What the arrays mean is in `Trace`."""

from __future__ import annotations

import numpy as np

FORMAT = "lede-trace"
FORMAT_VERSION = 3
TOP, RAW = 10, 12  # as in engine.signals, which imports torch
LOG_FLOOR = -30.0
QUANTUM = 2.0**-15  # raw signals, and what a head says, are multiples: they compress, and are at most 1.5e-5 off
CHUNK_BYTES = 1 << 20

STRINGS = ("prompt_ids", "prompt_tasks", "prompt_splits", "prompt_digests")  # (P,) each
# Dataset -> type on disk; the shapes are those of `Trace`.
ARRAYS: dict[str, np.dtype] = {
    "text_seeds": np.dtype("<i8"),
    "starts": np.dtype("<i8"),
    "targets": np.dtype("<i4"),
    "neg_log_p_max": np.dtype("<f4"),
    "raw": np.dtype("<f4"),
    "match": np.dtype("<f4"),
    "drafts": np.dtype("<i4"),
    "shortfall": np.dtype("<f4"),
    "accept_probability": np.dtype("<f4"),
    "coin": np.dtype("<f4"),
    "accepted": np.dtype("bool"),
    "branch": np.dtype("<i4"),
    "branch_starts": np.dtype("<i8"),
    "branch_tokens": np.dtype("<i4"),
    "branch_shortfall": np.dtype("<f4"),
    "branch_coin": np.dtype("<f4"),
    "branch_raw": np.dtype("<f4"),
    "branch_match": np.dtype("<f4"),
}
# What an acceptance head says of the drafts, in traces that hold it. Not part of the digest, which is of the texts.
OUTLOOKS = {"outlook": np.dtype("<f4"), "branch_outlook": np.dtype("<f4")}
SAID, MAX_SLOPE = 3, 150.0  # numbers a draft; the most a slope can be
