"""The peers benchmark keeps its figures whatever one method does."""

from __future__ import annotations

import time

import pytest

from benchmarks.engine_peers import EAGER, OutOfTime, agreement, table, time_alone, time_limit


def timing(*texts):
    return time_alone(lambda prompt: (prompt[1], None), list(enumerate(texts)), [], 2, synchronise=False)


def test_what_takes_too_long_is_interrupted_and_nothing_afterwards():
    with pytest.raises(OutOfTime, match=r"0\.05 s"), time_limit(0.05):
        while True:
            try:
                time.sleep(1)
            except Exception:  # as compilers do
                continue
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_rows_say_what_is_known_and_errors_stand_in_their_own():
    timings = {"ours": timing([1, 2, 3, 4], [5, 6]), EAGER: timing([1, 2, 9, 4], [5, 6])}
    rows = table(timings, {"transformers, compiled": "OutOfTime: more than 9 s"})
    assert [row["method"] for row in rows] == ["ours", EAGER, "transformers, compiled"]
    assert rows[0]["as the eager text"] == 0.75 and "95 %" not in rows[0]
    assert rows[2] == {"method": "transformers, compiled", "error": "OutOfTime: more than 9 s"}
    assert agreement([1, 2], [1, 2, 3, 4]) == 0.5
    timings["transformers, assistant_early_exit=6"] = timing([1], [5])
    assert all(row["over the best early exit"] > 0 for row in table(timings, {}))
