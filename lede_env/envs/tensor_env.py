"""A vector environment for agents that live on a GPU: torch tensors in and out, and no way through the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import Tensor

from lede_env.envs.draft_mdp import DraftMDP
from lede_env.envs.tensor_draft import TensorDrafts
from lede_env.envs.tensor_exit import TensorExits
from lede_env.envs.tensor_texts import TensorTexts
from lede_env.envs.texts import CLOSED
from lede_env.envs.trace_backend import TraceBackend
from lede_env.envs.vector_env import TextVectorEnv, masked
from lede_env.errors import LedeError
from lede_env.models.loading import resolve_device
from lede_env.policies import EXIT

WHOLE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


class TensorVectorEnv(VectorWrapper):
    """
    ## Description
    `TensorVectorEnv(gym.make_vec("LEDE-Tiny-v0", num_envs=4096, backend="trace"), device="cuda")`: the same MDP, exit
    or draft, played on the device. The trace's tables are put there once. Observations, rewards, flags and infos are
    tensors on the device, made there from actions that are there; `step` neither waits for the device nor copies from
    or to it, so an agent may queue whole rollouts.

    With the same seed and actions it brings what the wrapped environment brings: the same values, but for rewards,
    which are its float64 rounded to float32, as agents want them. `device` is "auto" (a GPU where there is one),
    "cpu", "cuda" or "cuda:N"; on a CPU the arrays of the wrapped environment take less time.

    The wrapped environment says what is played, and is not played itself: its own state neither counts nor moves. It
    must come straight from `gym.make_vec`, with `backend="trace"`. A language model's environment (`backend="live"`)
    is refused, for its steps end on the host. Most of Gymnasium's own vector wrappers, `RecordEpisodeStatistics` among
    them, compute in numpy and fail on tensors: sum rewards by `torch` instead.

    ## Actions
    (N,) of a whole type or booleans, on the device. 1 exits. Values are not looked at, since that would wait for the
    device: any other one continues.

    ## Resets
    `reset(seed=, options=)` and all modes of autoreset are those of the wrapped environment. A reset that is asked for
    may wait for the device, one that `step` brings does not. `reset_mask` may be a tensor.

    ## Info
    The wrapped environment's, with two differences. Text does not go on a device: instead of `prompt_id` there is
    `prompt`, (N,) int64, the index of each prompt in `envs.prompt_ids`. And under `SAME_STEP` every step has
    `final_obs` and `final_info`; as always their rows count where `_final_obs` is true, which may be nowhere.

    What is returned is never written again, and infos are not for writing: lanes stand on some of their tensors.
    """

    def __init__(self, envs: VectorEnv, device: str = "auto"):
        if not isinstance(envs, TextVectorEnv) or not isinstance(envs._table, TraceBackend):
            raise LedeError(
                f"TensorVectorEnv plays recorded traces on the device; {envs!r} is no vector environment of a trace; "
                'wrap what gym.make_vec(ID, num_envs=N, backend="trace") returns, and around that only what takes '
                "tensors; a language model's environment gives arrays, which torch.as_tensor takes"
            )
        super().__init__(envs)
        self.device = resolve_device(device)
        self.prompt_ids = envs.prompt_ids
        self._mode, self._in_parts, self._asked = envs.autoreset_mode, envs._in_parts, envs._asked
        mdp, lanes = envs._mdp, envs.num_envs
        play = TensorDrafts if isinstance(mdp, DraftMDP) else TensorExits
        self._player: TensorDrafts | TensorExits = play(mdp, lanes, self.device)
        self._texts = TensorTexts(envs._table, envs._keys, self.device)
        self._nothing = self._put(mdp.observation_space.low)  # (F,) what is seen where there is no text to see
        self._everyone = torch.ones(lanes, dtype=torch.bool, device=self.device)
        self._nobody = ~self._everyone
        self._prompt_over = self._everyone  # the next reset begins a prompt, whatever `episode` says
        self._over = self._everyone  # the episode ended and was not reset
        self._blank = self._everyone  # the text ended (or never began): there is no observation
        self._begun = self._all_begun = False  # lanes were reset: some, all

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:  # type: ignore[override]
        if isinstance(options, Mapping):
            options = {name: _on_host(value) for name, value in options.items()}
        asked = self._asked(seed, options)
        lanes, chosen, seeded = self._put(asked.lanes), self._put(asked.prompts), self._put(asked.seeded)
        self._texts.seed(seeded, self._put(asked.keys.view("int64")))
        self._prompt_over = self._prompt_over | seeded | (lanes & (chosen >= 0))
        self._begin(lanes, chosen)
        self._begun, self._all_begun = True, self._all_begun or bool(asked.lanes.all())
        idle = self._player.play(self._nobody, self._nobody)
        return self._observations(), self._infos() | idle.info

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:  # type: ignore[override]
        self._check(actions)
        asleep = self._over
        same_step = self._mode is AutoresetMode.SAME_STEP
        if self._mode is AutoresetMode.NEXT_STEP or (same_step and not self._all_begun):
            self._begin(asleep)
            self._all_begun = True
        played = self._player.play(actions == EXIT, ~asleep)
        truncated = played.truncated
        self._prompt_over = self._prompt_over | played.ended | truncated
        self._blank = self._blank | played.ended
        terminated = (played.parted & ~truncated) if self._in_parts else played.ended
        over = self._over = terminated | truncated
        if self._mode is AutoresetMode.DISABLED:
            self._over = over | asleep
        observations, info = self._observations(), self._infos() | played.info
        if same_step:
            final = masked({"final_info": info, "final_obs": observations}, over)
            self._begin(over)
            observations, info = self._observations(), self._infos() | played.info | final
        return observations, played.rewards.float(), terminated, truncated, info

    def _check(self, actions: Tensor) -> None:
        if not isinstance(actions, Tensor):
            raise LedeError(f"actions must be a tensor on {self.device}, got {actions!r}; put it there by torch.tensor")
        if actions.shape != (self.num_envs,) or actions.dtype not in WHOLE or actions.device != self.device:
            raise LedeError(
                f"actions must be a tensor of shape ({self.num_envs},), of a whole type or booleans, on {self.device}; "
                f"got {tuple(actions.shape)}, {actions.dtype}, on {actions.device}; "
                f"give one action an environment, 0 (continue) or 1 (exit), by .to({str(self.device)!r}) where needed"
            )
        if self.closed or not self._begun:
            raise LedeError(CLOSED if self.closed else "step() before reset(); call reset() first")

    def _begin(self, lanes: Tensor, chosen: Tensor | None = None) -> None:
        """Start the next episodes of the lanes of a mask, on new prompts but where parts are to go on with the old."""
        new, others = (lanes & self._prompt_over) if self._in_parts else lanes, ~lanes
        self._texts.begin(new, chosen)
        self._prompt_over, self._over = self._prompt_over & others, self._over & others
        self._blank = self._blank & others
        self._player.begin(lanes, new, self._texts.base)

    def _observations(self) -> Tensor:
        return torch.where(self._blank[:, None], self._nothing, self._player.observations())

    def _infos(self) -> dict[str, Any]:
        return masked({"prompt": self._texts.prompt} | self._player.infos(), self._everyone)

    def _put(self, array: Any) -> Tensor:
        return torch.tensor(array, device=self.device)


def _on_host(value: Any) -> Any:
    return value.cpu().numpy() if isinstance(value, Tensor) else value
