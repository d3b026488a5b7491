"""Prompts that live environments prefill once: the same bits, within bounds."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import lede_env  # noqa: F401 - registers the ids
from lede_env.envs import prompt_memory
from lede_env.envs.prompt_memory import PromptMemory, memory_of

PROMPTS = ([1, 17, 40, 5, 23, 8], [1, 9, 9], [1, 30, 31, 32, 33], [])


def test_what_is_given_back_is_what_was_computed(random_model):
    lm, _ = random_model("llama-gqa")
    memory, session, plain = PromptMemory(), lm.session(3, 32), lm.session(1, 32)
    with torch.inference_mode():
        for times in range(2):
            for row, ids in ((0, PROMPTS[0]), (2, PROMPTS[1]), (1, PROMPTS[0]), (0, PROMPTS[3])):
                memory.prefill(session, row, ids)
                plain.prefill(0, ids)
                assert session.lengths[row] == len(ids)
                assert torch.equal(session.kept(row), plain.kept(0)), (times, row)
            session.feed([0, 1, 2], [4, 5, 6])  # a round in between writes into the rows, not into what is kept
            session.finish([0, 1, 2])
            for row in range(3):
                session.close_round(row, 1)
    assert (memory.hits, memory.misses) == (5, 3)


def test_a_restored_row_forgets_its_open_round(random_model):
    lm, _ = random_model("llama-gqa")
    memory, session = PromptMemory(), lm.session(2, 32)
    with torch.inference_mode():
        memory.prefill(session, 0, PROMPTS[0])
        session.feed([0], [4])
        memory.prefill(session, 0, PROMPTS[0])
    assert session.depth[0] == [] and session.lengths[0] == len(PROMPTS[0])


def test_memory_is_bounded_and_the_least_used_goes_first(random_model):
    lm, _ = random_model("llama-gqa")
    session = lm.session(1, 32)
    with torch.inference_mode():
        session.prefill(0, PROMPTS[0])
        size = session.kept(0).nbytes // len(PROMPTS[0])  # a token's
        memory = PromptMemory(limit=11 * size)
        for ids, hits in ((PROMPTS[0], 0), (PROMPTS[2], 0), (PROMPTS[0], 1), (PROMPTS[1], 1), (PROMPTS[0], 2)):
            memory.prefill(session, 0, ids)
            assert memory.hits == hits and memory.used <= memory.limit
        memory.prefill(session, 0, PROMPTS[2])  # went for PROMPTS[1]
        assert memory.hits == 2
        memory.prefill(session, 0, list(range(1, 13)))  # longer than all there is room for: not kept
        assert memory.used <= memory.limit


@pytest.mark.parametrize("env_id", ["LEDE-Tiny-v0", "LEDE-Tiny-Draft-v0"])
def test_environments_share_it_and_play_the_same(tiny, env_id, monkeypatch):
    def play():
        envs = gym.make_vec(env_id, num_envs=3, task="parse", max_new_tokens=4, device="cpu", features="extended")
        seen = [envs.reset(seed=0)[0]]
        rng = np.random.default_rng(0)
        seen += [envs.step(rng.integers(2, size=3))[0] for _ in range(40)]
        return np.stack(seen)

    monkeypatch.setattr(prompt_memory, "_MEMORIES", type(prompt_memory._MEMORIES)())
    first = play()
    memory = memory_of(tiny)
    misses, hits = memory.misses, memory.hits
    assert misses > 3
    np.testing.assert_array_equal(play(), first)
    assert memory.misses == misses and memory.hits >= hits + misses
