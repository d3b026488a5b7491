"""Rendering: what the pictures show, and that Gymnasium's wrappers can use them."""

from __future__ import annotations

import pickle
import re

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import RecordVideo, RenderCollection

from lede_env.envs.rendering import (
    ACCEPTED,
    BLUE,
    DRAFTED,
    GREY,
    HEIGHT,
    INK,
    MARKS,
    PALE,
    PAPER,
    RED,
    REJECTED,
    TARGET,
    TOKENS_A_FRAME,
    WALKED,
    WIDTH,
    Column,
    Scene,
    Screen,
    as_ansi,
    draw_frame,
)
from lede_env.errors import LedeError
from tests.small_traces import small_traces

IDS = ["LEDE-Tiny-v0", "LEDE-Tiny-Draft-v0"]
LAYERS = (1, 2, 4)


@pytest.fixture(scope="module")
def traces(random_model, tmp_path_factory):
    return small_traces(random_model, tmp_path_factory.mktemp("traces"))


def scene(*columns):
    return Scene(6, LAYERS, "status", [Column(*column) for column in columns])


def count(frame, colour):
    """Pixels of a colour."""
    return int((frame == np.frombuffer(bytes.fromhex(colour[1:]), np.uint8)).all(-1).sum())


def plain(text):
    """Without escape codes."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_frame_has_one_size_and_type():
    for columns in ([], [(1, WALKED)], [(4, ACCEPTED)] * 500):
        frame = draw_frame(scene(*columns))
        assert (frame.shape, frame.dtype) == ((HEIGHT, WIDTH, 3), np.uint8) and frame.flags.writeable
    assert HEIGHT % 16 == WIDTH % 16 == 0


def test_bars_are_as_high_as_drafts_went():
    one, two = (count(draw_frame(scene((layer, ACCEPTED))), BLUE) for layer in (2, 4))
    assert two == pytest.approx(2 * one, rel=0.01)
    assert count(draw_frame(scene(*[(2, ACCEPTED)] * 3)), BLUE) == 3 * one


def test_every_kind_looks_different_without_colours():
    looks = [draw_frame(scene((4, kind))).mean(-1) > 128 for kind in MARKS]
    assert len({look.tobytes() for look in looks}) >= 4  # drafted and target are bright
    frames = [draw_frame(scene((4, kind))) for kind in MARKS]
    assert len({frame.tobytes() for frame in frames}) == len(MARKS)
    colours = {ACCEPTED: BLUE, REJECTED: RED, DRAFTED: PALE, TARGET: GREY, WALKED: INK}
    empty = draw_frame(scene())
    for kind, frame in zip(MARKS, frames, strict=True):
        assert count(frame, colours[kind]) > count(empty, colours[kind])
    crossed = count(draw_frame(scene((4, REJECTED))), PAPER) - count(draw_frame(scene((4, ACCEPTED))), PAPER)
    assert 10 < crossed < 40


def test_a_frame_follows_the_newest_tokens():
    old, new = [(1, ACCEPTED)] * 100, [(4, REJECTED)] * TOKENS_A_FRAME
    assert count(draw_frame(scene(*old, *new)), BLUE) == 0
    assert count(draw_frame(scene(*new, *old)), RED) == 0


def test_frames_do_not_share_memory():
    first = draw_frame(scene())
    first[:] = 0
    assert draw_frame(scene()).any()


def test_text_shows_the_same():
    lines = plain(as_ansi(scene((1, ACCEPTED, True), (1, REJECTED), (2, DRAFTED, True), (4, WALKED)))).splitlines()
    assert lines[:5] == ["status", "   6 · · ", "   4 · ·▸", "   2 · ○│", "   1 ●✕││"]
    assert all(f"{mark} {kind}" in lines[5] for kind, mark in MARKS.items())


@pytest.mark.parametrize("env_id", IDS)
def test_frames_of_an_episode(traces, env_id):
    env = gym.make(env_id, **traces.greedy, render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    rng, over, infos, frames = np.random.default_rng(0), False, [], [env.render()]
    while not over:
        *_, terminated, truncated, info = env.step(rng.integers(2))
        over = terminated or truncated
        infos.append(info)
        frames.append(env.render())
    assert {frame.shape for frame in frames} == {(HEIGHT, WIDTH, 3)}
    assert len({frame.tobytes() for frame in frames}) == len(frames)  # every step shows
    kinds = [column.kind for column in env._columns]
    done = [info for info in infos if "accepted" in info]
    assert len(kinds) == infos[-1]["token_index"]
    assert kinds.count(ACCEPTED) == sum(info["accepted"] for info in done)
    env.reset()
    assert not env._columns and not np.array_equal(env.render(), frames[-1])


def test_rounds_are_parted(traces):
    env = gym.make(IDS[1], **traces.greedy, render_mode="ansi").unwrapped
    env.reset(seed=0)
    rounds = 0
    for _ in range(12):
        *_, terminated, truncated, info = env.step(0)  # walks to the last candidate: one draft a round
        rounds += info.get("rounds", 0)
        if terminated or truncated:
            break
    assert rounds == sum(column.opens for column in env._columns)
    assert plain(env.render()).startswith("token ") and f"last round: layer {LAYERS[-1]}, " in env.render()


@pytest.mark.parametrize("env_id", IDS)
def test_terminal(traces, env_id, capsys, monkeypatch):
    """In mode human the environment shows itself, at a speed to look at."""
    naps = []
    monkeypatch.setattr("lede_env.envs.rendering.time.sleep", naps.append)
    env = gym.make(env_id, **traces.greedy, render_mode="human").unwrapped
    env.reset(seed=0)
    for _ in range(5):
        env.step(1)
    assert env.render() is None
    twin = env.fork()
    twin.reset()
    assert twin.render_mode is None and env.render_mode == "human"
    env.close()
    env.close()
    assert len(naps) == 7 and 0 < max(naps) <= 1 / env.metadata["render_fps"]
    assert "accepted" in capsys.readouterr().out


@pytest.mark.parametrize("env_id", IDS)
def test_an_environment_on_the_terminal_pickles(traces, env_id, capsys):
    env = gym.make(env_id, **traces.greedy, render_mode="human").unwrapped
    env.reset(seed=0)
    again = pickle.loads(pickle.dumps(env))
    assert again.step(1)[4] == env.step(1)[4]
    again.close()
    env.close()


@pytest.mark.parametrize("env_id", IDS)
def test_wrappers(traces, env_id, tmp_path):
    made = dict(**traces.greedy, render_mode="rgb_array")
    env = RenderCollection(gym.make(env_id, **made))
    env.reset(seed=0)
    env.step(1)
    frames = env.render()
    assert len(frames) == 2 and frames[0].shape == (HEIGHT, WIDTH, 3)
    assert env.metadata["render_fps"] > 0 and {"human", "ansi", "rgb_array"} <= set(env.metadata["render_modes"])
    pytest.importorskip("moviepy")
    video = RecordVideo(gym.make(env_id, **made), str(tmp_path), episode_trigger=lambda _: True)
    video.reset(seed=0)
    for _ in range(3):
        video.step(1)
    video.close()
    assert list(tmp_path.glob("*.mp4"))


def test_no_mode_and_unknown_modes():
    assert Screen(None).show(scene()) is None
    with pytest.raises(LedeError, match=r"render_mode='rgb'.*human, ansi, rgb_array"):
        Screen("rgb")
