"""The peers benchmark keeps its figures whatever one method does."""

from __future__ import annotations

import time

import pytest

import lede_env
from benchmarks.engine_peers import EAGER, OutOfTime, agreement, differing, table, time_alone, time_limit
from tests.small_models import save_random_model


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
    rows = table(timings, {"transformers, compiled": "OutOfTime: more than 9 s"}, {"ours": 0.25})
    assert [row["method"] for row in rows] == ["ours", EAGER, "transformers, compiled"]
    assert rows[0]["as the eager text"] == 0.75 and "95 %" not in rows[0]
    assert [row.get("tokens unlike transformers'") for row in rows] == [0.25, None, None]
    assert rows[2] == {"method": "transformers, compiled", "error": "OutOfTime: more than 9 s"}
    assert agreement([1, 2], [1, 2, 3, 4]) == 0.5
    timings["transformers, assistant_early_exit=6"] = timing([1], [5])
    assert all(row["over the best early exit"] > 0 for row in table(timings, {}, {}))


def test_tokens_that_differ_are_counted_after_the_same_tokens(tmp_path):
    model = save_random_model(tmp_path, "llama").float()
    lm = lede_env.load_model(tmp_path, dtype="float32", device="cpu")
    prompts = list(enumerate([[1, 17, 40, 5, 23], [1, 8, 9]]))
    texts = {index: lede_env.generate(lm, prompt, max_new_tokens=20).token_ids for index, prompt in prompts}
    assert differing(model, prompts, texts) == 0.0
    texts[1][-1] = (texts[1][-1] + 1) % lm.geometry.vocab
    assert differing(model, prompts, texts) == 1 / sum(map(len, texts.values()))
