"""The exit MDP as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lede_env.envs.exit_config import ExitConfig
from lede_env.envs.exit_mdp import make_exit_mdp
from lede_env.envs.forking import fork
from lede_env.envs.rendering import ACCEPTED, REJECTED, RENDER_FPS, RENDER_MODES, WALKED, Column, Scene, Screen
from lede_env.envs.texts import CLOSED, draw_key, draw_texts, known_options, prompt_index
from lede_env.errors import LedeError
from lede_env.policies import EXIT


class SpeculativeExitEnv(gym.Env[np.ndarray, np.int64]):
    """
    ## Description
    A large language model decodes a prompt by self-speculation: its own early layers draft each token, the full
    depth verifies it. For every token the agent walks the candidate layers from shallow to deep and decides at each
    whether the draft is good enough to leave there. Leaving early is cheap; a draft that the full depth would not
    have produced is wasted. This is the MDP of section 3.1 of the LEDE paper.

    The context always holds the full-depth token, which is what verification guarantees, so the agent's actions never
    change the text: every token is a stopping problem of its own.

    ## Action Space
    `Discrete(2)`: 0 continues to the next candidate layer, 1 exits here. At the last candidate either action exits;
    `info["forced"]` says that one did against the action.

    ## Observation Space
    `Box(float32)` of the chosen features of the next-token distribution at the layer just reached, always at
    temperature 1. `features="paper"` is the first three, which hide the layer (a POMDP); `"extended"` is all eight; a
    tuple of names picks.

    | Num | Feature    | Meaning                                                         | Min | Max    |
    |-----|------------|-----------------------------------------------------------------|-----|--------|
    | 0   | confidence | mean of -log p over the 5 most probable tokens                  | 0   | 30     |
    | 1   | entropy    | entropy of the distribution, nats                               | 0   | ln V   |
    | 2   | trace      | mean of -log p_max at full depth over the last 8 tokens; 0 first | 0  | 30     |
    | 3   | layer      | layers run over all layers, e / L                               | 0   | 1      |
    | 4   | margin     | log p of the best token minus log p of the second               | 0   | 30     |
    | 5   | top1       | -log p of the best token                                        | 0   | 30     |
    | 6   | match      | of the last 8 tokens, the share (8, 4 or 2) found earlier in the text | 0 | 1  |
    | 7   | echo       | log p of the best token minus that of what followed there; 30: nothing found | 0 | 30 |

    ## Rewards
    `reward="paper"`: an exit at layer e whose draft is accepted pays `1 + (1 - e / L)`, an exit whose draft is
    rejected -1, each continue -0.05. The constants are `reward_kwargs` (`accept, depth, reject, continue_`); the
    paper gives only their signs. The return of a policy is the undiscounted sum over a prompt.

    An exit carries `info["discount"] = 0` and a continue 1: use `gamma * discount` in every bootstrap and n-step sum.
    Bootstrapping across tokens only adds noise, because nothing carries over.

    ## Starting State
    The first candidate layer of the first new token of a prompt. `np_random` gives a key once a seed; the n-th prompt
    after that, and its draws, are a hash of (key, n). `reset(options={"prompt_id": "code/0001"})` chooses the prompt
    instead. `info["prompt_id"]` names it; `prompt_ids` lists them all.
    A prompt too long for the model's context is cut, as `lede_env.tasks.fit_prompt` says.
    On a CPU the live model keeps what it computed of the prompts it has read, up to 1 GiB in all, and reads none twice.

    ## Episode End
    Termination: the full-depth token of the exit was an end-of-sequence token. Truncation: `max_new_tokens` tokens
    have been produced. With `episode="token"` every exit ends an episode (terminates it, but for the last token's), and
    the next `reset()` without seed and `prompt_id` goes on to the next token of the same prompt, or to a new prompt
    where there is none. After an end-of-sequence token the observation is all zeros, and means nothing.
    An episode has at most `max_new_tokens * len(candidate_layers)` steps; no `TimeLimit` is registered.

    ## Info
    Of the observation returned: `prompt_id, token_index, layer`. Of the action taken: `cost` (modelled, in
    autoregressive steps: the layers and the exit check that led to the observation it was taken on), `discount`,
    `forced`, `reward_terms` (a dict of `accepted`, `rejected` and `continue`, which add up to the reward); and if it
    exited, `exit_layer, draft_token, target_token, accepted`, never earlier.

    ## Arguments
    Every value pinned by the id can be overridden: `gym.make("LEDE-Tiny-v0", task="code", max_new_tokens=64)`.

    | Name                            | Default          | Meaning                                                  |
    |---------------------------------|------------------|----------------------------------------------------------|
    | `model`                         | by id            | zoo name, Hugging Face hub id, or local folder           |
    | `weights`                       | by id            | `"auto"`: the model's own; `"twin"`: its geometry twin's |
    | `candidate_layers`              | by id            | where the agent may exit, ascending, within 1..L-1       |
    | `cost_model`                    | by id            | a shipped one's name, or a JSON file; for `info["cost"]` |
    | `backend`                       | `"live"`         | `"live"`: the language model; `"trace"`: a recording     |
    | `trace`                         | `None`           | a shipped trace's name, or a file; `None`: the shipped one of this model and temperature |
    | `task`                          | `"all"`          | prompts: a task, or the path of a `.jsonl` file          |
    | `split`                         | `"train"`        | `train`, `validation`, `test` or `all`                   |
    | `features`                      | `"paper"`        | `"paper"`, `"extended"`, or a tuple of names             |
    | `reward`, `reward_kwargs`       | `"paper"`, `{}`  | see Rewards                                              |
    | `temperature`, `top_k`, `top_p` | 0, 0, 1          | of the tokens' draws; 0 is greedy                        |
    | `max_new_tokens`                | 128              | tokens until truncation                                  |
    | `episode`                       | `"prompt"`       | `"prompt"` or `"token"`, see Episode End                 |
    | `device`, `dtype`               | `"auto"`, `None` | of the model; float32 on the CPU, bfloat16 on CUDA       |
    | `render_mode`                   | `None`           | `"human"`, `"ansi"` or `"rgb_array"`, see Rendering      |

    A trace is a recording of the texts with everything the environment shows of them, so nothing needs the language
    model, nor a GPU: `device` and `dtype` are only checked. Greedily it plays what the model plays, step by step; at a
    temperature, the continuations it holds. `lede record --trace` makes one of any prompts, `python -m
    lede_env.openings` prompts of any texts, and `lede_env.load_trace` gives one as arrays.

    At a temperature above 0 the target token is drawn at full depth and each layer's draft is coupled to it, so that
    it has the layer's distribution and equals the target as often as speculative sampling accepts.

    ## Shifts
    Environments that differ in one argument have the same spaces, so a policy learned in one can be judged in the
    other: `task="code"` and then `task="lm"` (Python to prose), `temperature=0` and then 0.6 (text that loops less).
    `lede_env.evaluate(policy, "LEDE-Tiny-v0", task="lm", temperature=0.6)` does it exactly; both traces ship.

    ## Rendering
    `"human"` keeps a picture of the text so far on the terminal, tokens by layers; `"ansi"` returns it as text,
    `"rgb_array"` as an image, (384, 640, 3) uint8, for `gymnasium.wrappers.RecordVideo` too.

    ## What if
    `env.unwrapped.fork()` returns an independent environment in the same state, for search. On a trace only.

    ## Version History
    * v0: initial version.
    """  # noqa: E501 - a table's rows

    metadata = {"render_modes": RENDER_MODES, "render_fps": RENDER_FPS}  # noqa: RUF012 - Gymnasium's form
    fork = fork

    def __init__(self, *, render_mode: str | None = None, **kwargs: Any):
        self._screen = Screen(render_mode)
        self._mdp = make_exit_mdp(ExitConfig.parse(kwargs), lanes=1)
        self.render_mode = render_mode
        self.observation_space = self._mdp.observation_space
        self.action_space = spaces.Discrete(2)
        self._table = self._mdp.backend
        self.prompt_ids = self._table.prompt_ids
        self.features = self._mdp.features
        self.attributes = self._mdp.attributes
        self._prompt_over = True  # the next reset begins a prompt, whatever `episode` says
        self._running = self._closed = False
        self._prompt_id = ""
        self._key = np.zeros(1, np.uint64)  # of the texts to come; and how many it has given
        self._texts = np.zeros(1, np.uint64)
        self._has_key = False
        self._token = self._candidate = 0
        self._exited: tuple[int, bool] | None = (
            None  # layer and outcome of the last exit, and every token's, for rendering
        )
        self._columns: list[Column] = []

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if self._closed:
            raise LedeError(CLOSED)
        prompt_id = known_options(options, ["prompt_id"]).get("prompt_id")
        super().reset(seed=seed)
        chosen = None if prompt_id is None else prompt_index(self.prompt_ids, prompt_id)
        if seed is not None or not self._has_key:
            self._key[0], self._texts[0], self._has_key = draw_key(self.np_random), 0, True
        if self._prompt_over or not self._mdp.token_episodes or seed is not None or chosen is not None:
            prompts, draw_seeds = draw_texts(len(self.prompt_ids), self._key, self._texts)
            self._texts += 1
            prompt = int(prompts[0]) if chosen is None else chosen
            self._table.start(0, prompt, int(draw_seeds[0]))
            self._prompt_id, self._token, self._prompt_over = self.prompt_ids[prompt], 0, False
            self._columns = []
        self._candidate, self._running, self._exited = 0, True, None
        if self.render_mode == "human":
            self.render()
        return self._observation(), self._info()

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        outcome = self._play(action)
        if self.render_mode == "human":
            self.render()
        return outcome

    def _play(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if not self._running:
            hint = "step() before reset(), or after the episode ended; call reset() first"
            raise LedeError(CLOSED if self._closed else hint)
        if not self.action_space.contains(action):
            raise LedeError(f"action {action!r} is not in the action space: 0 continues, 1 exits")
        cost = float(self._mdp.step_cost[self._candidate])
        if action == EXIT or self._candidate == len(self._mdp.candidate_layers) - 1:
            return self._exit(cost, forced=bool(action != EXIT))
        self._candidate += 1
        reward = self._mdp.reward.continue_
        return self._observation(), reward, False, False, self._info({"continue": reward}, cost=cost)

    def _exit(self, cost: float, forced: bool) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Leave at the current candidate, score the draft, move to the next token."""
        mdp, table, token, candidate = self._mdp, self._table, self._token, self._candidate
        row = table.base[0] + token
        accepted = bool(table.accepted[row, candidate])
        reward = float(mdp.reward.accepted[candidate]) if accepted else mdp.reward.rejected
        ended = bool(table.ends[row])
        truncated = not ended and token + 1 == mdp.max_new_tokens
        self._exited = (mdp.candidate_layers[candidate], accepted)
        if self.render_mode is not None:
            self._columns.append(Column(mdp.candidate_layers[candidate], ACCEPTED if accepted else REJECTED))
        self._prompt_over = ended or truncated
        self._running = not (self._prompt_over or mdp.token_episodes)
        self._token, self._candidate = token + 1, 0
        observation = np.zeros(len(mdp.features), np.float32) if ended else self._observation()
        terms = {"accepted" if accepted else "rejected": reward}
        info = self._info(terms, cost=cost, discount=0.0, forced=forced) | {
            "exit_layer": mdp.candidate_layers[candidate],
            "draft_token": int(table.drafts[row, candidate]),
            "target_token": int(table.targets[row]),
            "accepted": accepted,
        }
        return observation, reward, ended or (mdp.token_episodes and not truncated), truncated, info

    def _observation(self) -> np.ndarray:
        self._table.ensure(0, self._token)
        return self._table.observations[self._table.base[0] + self._token, self._candidate].copy()

    def _info(
        self,
        reward_terms: Mapping[str, float] | None = None,
        cost: float = 0.0,
        discount: float = 1.0,
        forced: bool = False,
    ) -> dict[str, Any]:
        """The info of where the environment stands, and of the action that led there (none: a reset)."""
        return {
            "prompt_id": self._prompt_id,
            "token_index": self._token,
            "layer": self._mdp.candidate_layers[self._candidate],
            "cost": cost,
            "discount": discount,
            "forced": forced,
            "reward_terms": {"accepted": 0.0, "rejected": 0.0, "continue": 0.0, **(reward_terms or {})},
        }

    def render(self) -> str | np.ndarray | None:
        if self.render_mode is None:
            return None
        layers, layer = self._mdp.candidate_layers, self._mdp.candidate_layers[self._candidate]
        walk = " ".join(f"[{each}]" if each == layer else str(each) for each in layers)
        last = ""
        if self._exited is not None:
            last = f"  last exit: layer {self._exited[0]}, {'accepted' if self._exited[1] else 'rejected'}"
        status = f"token {self._token:4d}  layers {walk} of {self._mdp.n_layers}{last}"
        walking = [] if self._prompt_over else [Column(layer, WALKED)]
        return self._screen.show(Scene(self._mdp.n_layers, layers, status, [*self._columns, *walking]))

    def close(self) -> None:
        self._screen.close()
        self._running, self._closed = False, True
