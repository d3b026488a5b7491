"""The draft MDP as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lede_env.engine.round import draft_limit
from lede_env.envs.draft_config import DraftConfig
from lede_env.envs.draft_mdp import make_draft_mdp
from lede_env.envs.forking import fork
from lede_env.envs.rendering import (
    ACCEPTED,
    DRAFTED,
    REJECTED,
    RENDER_FPS,
    RENDER_MODES,
    TARGET,
    WALKED,
    Column,
    Scene,
    Screen,
)
from lede_env.envs.texts import CLOSED, draw_key, draw_texts, known_options, prompt_index
from lede_env.errors import LedeError
from lede_env.policies import EXIT

HERE, NOBODY = np.ones(1, bool), np.zeros(1, bool)  # masks of the only lane there is


class SpeculativeDraftEnv(gym.Env[np.ndarray, np.int64]):
    """
    ## Description
    A large language model decodes a prompt by self-speculation, round by round: its own early layers draft some
    tokens, the full depth verifies them all in one pass. The agent has both controls of section 3.3 of the LEDE paper:
    which layer drafts, and how many tokens. Here its own drafts, right or wrong, are what it drafts on from, as in
    deployment; `SpeculativeExitEnv` is the simpler problem in which every token is a problem of its own.

    A round has two phases. In phase 1 the agent walks the candidate layers with the round's first draft and fixes the
    layer e. In phase 2 it is asked after every further draft whether to go on.

    | Phase    | Observation                                        | Continue                                | Exit                                  |
    |----------|----------------------------------------------------|-----------------------------------------|---------------------------------------|
    | 1, walk  | candidate c, for the round's first draft           | next candidate; at the last: fix e there, keep draft 1, verify | fix e = c, keep draft 1, make draft 2 |
    | 2, draft | layer e, the draft just made (number 2, 3, ...)    | verify all drafts, this one too         | make the next draft                   |

    A round drafts at most min(`cap`, tokens left - 1) tokens. A draft that fills it, and a draft that is an
    end-of-sequence token, is verified at once: nothing is asked where nothing is left to decide. With one token left
    there is no round: that token is a plain step of the full depth, played as part of the step before it.
    Verification keeps the drafts up to the first wrong one and adds a token of its own.

    ## Action Space
    `Discrete(2)`: 0 continues, 1 exits, as the table says.

    ## Observation Space
    `Box(float32)` of the chosen features of the next-token distribution of the draft in view, always at temperature
    1. `features="paper"` is the first three, which hide layer and phase (a POMDP); `"extended"` is the first fourteen; a
    tuple of names picks, of the last three too, where the model has an acceptance head.

    | Num | Feature    | Meaning                                                         | Min | Max    |
    |-----|------------|-----------------------------------------------------------------|-----|--------|
    | 0   | confidence | mean of -log p over the 5 most probable tokens                  | 0   | 30     |
    | 1   | entropy    | entropy of the distribution, nats                               | 0   | ln V   |
    | 2   | trace      | mean of -log p_max over the last 8 tokens, those of this round by their drafts; 0 first | 0 | 30 |
    | 3   | layer      | layers run over all layers, e / L                               | 0   | 1      |
    | 4   | margin     | log p of the best token minus log p of the second               | 0   | 30     |
    | 5   | top1       | -log p of the best token                                        | 0   | 30     |
    | 6   | match      | of the last 8 tokens, the share (8, 4 or 2) found earlier in the text | 0 | 1  |
    | 7   | echo       | log p of the best token minus that of what followed there; 30: nothing found | 0 | 30 |
    | 8   | phase      | 1 or 2                                                          | 1   | 2      |
    | 9   | position   | drafts made in this round before the one in view / `cap`        | 0   | 1      |
    | 10  | doubt      | sum over those of log(1 + exp(-margin)) + drawn: nearly -log p of their tokens | 0 | 30 |
    | 11  | temperature | T / (1 + T) of the sampling temperature                        | 0   | 1      |
    | 12  | drawn      | log p of the best token minus that of the token drawn; in phase 1, before the draw: 0 | 0 | 30 |
    | 13  | peril      | how likely a draft is to be rejected, below      | -30 | 30 |
    | 14  | risk       | -log of the chance that all drafts drawn in this round are accepted | 0 | 30 |
    | 15  | odds       | log-odds that the draft in view is                              | -30 | 30    |
    | 16  | ahead      | log-odds that the next one would be, should it be               | -30 | 30    |

    `peril` is the largest, over the drafts drawn in this round, of log(1 + exp(-margin)) + drawn + log(coin); -30 in
    phase 1. The coin is the uniform number by which speculative sampling will accept the draft, where it is below
    p / q. Decoding stays lossless: the coin is drawn after its token, which is verified whatever is decided then.
    Greedy decoding leaves nothing to chance: a coin of 1.

    `risk`, `odds` and `ahead` are what the model's acceptance head says (`lede_env.engine.acceptance_head`) of its state
    at the layer, the draft and its coin; 0 in phase 1. The embedded model and its twins have one, and so do the traces
    that ship; others are trained by `python -m agents.acceptance_head`.

    ## Rewards
    All paid at verification, which carries `info["discount"] = 0`; all other steps are worth 0 and carry 1. Use
    `gamma * discount` in every bootstrap and n-step sum: a round is a problem of its own.

    `reward="paper"`: `2 - e / L` for each accepted draft, -1 for each other, -0.05 for each continue of phase 1. The
    constants are `reward_kwargs` (`accept, depth, reject, continue_`), as on the exit MDP.

    `reward="throughput"`: `emitted - rho * cost`, cost in autoregressive steps by the named cost model. The text does
    not depend on the policy, so over a whole prompt every `rho` ranks policies alike; round by round, `rho` at the best
    rate known makes the sum over rounds a comparison with that rate.

    The return of a policy is the undiscounted sum over a prompt; tokens over summed cost is its modelled speedup.

    ## Starting State
    The first candidate layer of the first draft of a prompt. `np_random` gives a key once a seed; the n-th prompt
    after that, and its draws, are a hash of (key, n). `reset(options={"prompt_id": "code/0001"})` chooses the prompt
    instead. `info["prompt_id"]` names it; `prompt_ids` lists them all.
    A prompt too long for the model's context is cut, as `lede_env.tasks.fit_prompt` says.
    On a CPU the live model keeps what it computed of the prompts it has read, up to 1 GiB in all, and reads none twice.

    ## Episode End
    Termination: verification emitted an end-of-sequence token. Truncation: `max_new_tokens` tokens have been emitted.
    With `episode="round"` every verification ends an episode (terminates it, but for the text's last), and the next
    `reset()` without seed and `prompt_id` goes on to the next round of the same prompt, or to a new prompt where there
    is none. After an end-of-sequence token the observation is the lowest of the space, and means nothing.
    A round has at most `len(candidate_layers) + cap - 1` steps and an episode `max_new_tokens` rounds; no `TimeLimit`
    is registered.

    ## Info
    Of the observation returned: `prompt_id, token_index` (new tokens emitted), `layer, phase, drafts` (made in this
    round before the one in view). Of the action taken: `cost` (modelled, in autoregressive steps, of what the action
    had verified), `discount`, `reward_terms` (a dict, `accepted, rejected, continue` or `emitted, cost`, which add up
    to the reward); and if it led to verification, `exit_layer, drafted, accepted, emitted, rounds`, never earlier.
    `rounds` is 1, or 2 where a plain step followed: `emitted` and `cost` include it. Sums over an episode give the
    decoder's metrics: d = drafted / rounds, acceptance = accepted / drafted, tokens per round = emitted / rounds.
    Where an end-of-sequence token cuts a round, drafts after it are not counted, in any of these.

    ## Arguments
    Every value pinned by the id can be overridden: `gym.make("LEDE-Tiny-Draft-v0", task="code", reward="paper")`.

    | Name                            | Default          | Meaning                                                  |
    |---------------------------------|------------------|----------------------------------------------------------|
    | `model`                         | by id            | zoo name, Hugging Face hub id, or local folder           |
    | `candidate_layers`              | by id            | where phase 1 may exit, ascending, at least two          |
    | `cost_model`                    | by id            | a shipped one's name, or a JSON file                     |
    | `cap`                           | 12               | most drafts a round                                      |
    | `task`                          | `"all"`          | prompts: a task, or the path of a `.jsonl` file          |
    | `split`                         | `"train"`        | `train`, `validation`, `test` or `all`                   |
    | `features`                      | `"paper"`        | `"paper"`, `"extended"`, or a tuple of names             |
    | `reward`, `reward_kwargs`       | `"paper"`, `{}`  | see Rewards                                              |
    | `rho`                           | by id            | of `reward="throughput"`                                 |
    | `temperature`, `top_k`, `top_p` | 0, 0, 1          | of the tokens' draws; 0 is greedy                        |
    | `max_new_tokens`                | 128              | tokens until truncation, at least 2                      |
    | `episode`                       | `"prompt"`       | `"prompt"` or `"round"`, see Episode End                 |
    | `backend`                       | `"live"`         | `"live"`: the language model; `"trace"`: a recording     |
    | `trace`                         | `None`           | a shipped trace's name, or a file; `None`: the shipped one of this model and temperature |
    | `weights`                       | by id            | `"auto"`: the model's own; `"twin"`: its geometry twin's |
    | `device`, `dtype`               | `"auto"`, `None` | of the model; float32 on the CPU, bfloat16 on CUDA       |
    | `render_mode`                   | `None`           | `"human"`, `"ansi"` or `"rgb_array"`, see Rendering      |

    At a temperature above 0 the live model samples speculatively, draft by draft. A trace was drawn once, each layer's
    draft coupled to the target token: the two agree in distribution. In greedy decoding they agree step by step.

    ## Shifts
    Environments that differ in one argument have the same spaces, so a policy learned in one can be judged in the
    other: `task="code"` and then `task="lm"` (Python to prose), `temperature=0` and then 0.6 (text that loops less),
    `cost_model="tiny-cpu"` and then `"tiny-h200"` (another machine), each under `reward="throughput"`.
    `lede_env.evaluate(policy, "LEDE-Tiny-Draft-v0", task="lm", reward="throughput")` does it exactly.

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
        self._mdp = make_draft_mdp(DraftConfig.parse(kwargs), lanes=1)
        self.render_mode = render_mode
        self.observation_space = self._mdp.observation_space
        self.action_space = spaces.Discrete(2)
        self._table = self._mdp.backend
        self.prompt_ids = self._table.prompt_ids
        self.features = self._mdp.features
        self.attributes = self._mdp.attributes
        self._no_terms = dict.fromkeys(self._mdp.reward.terms, 0.0)
        self._last = len(self._mdp.candidate_layers) - 1
        self._prompt_over = True  # the next reset begins a prompt, whatever `episode` says
        self._running = self._closed = False
        self._prompt_id = ""
        self._key = np.zeros(1, np.uint64)  # of the texts to come; and how many it has given
        self._texts = np.zeros(1, np.uint64)
        self._has_key = False
        self._token = 0  # new tokens emitted
        self._candidate = self._cell = self._node = self._limit = self._decisions = 0  # of the open round
        self._draft = 1  # number of the draft in view
        self._verified: dict[str, Any] = {}  # outcome of the last round, and every token's, for rendering
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
        if self._prompt_over or not self._mdp.round_episodes or seed is not None or chosen is not None:
            prompts, draw_seeds = draw_texts(len(self.prompt_ids), self._key, self._texts)
            self._texts += 1
            prompts = prompts if chosen is None else np.array([chosen])
            self._table.start_many(np.zeros(1, np.int64), prompts, draw_seeds)
            self._prompt_id, self._token, self._prompt_over = self.prompt_ids[prompts[0]], 0, False
            self._columns = []
            self._open()
        elif self._decisions:  # the open round again, from its beginning
            self._open()
        self._running, self._verified = True, {}
        if self.render_mode == "human":
            self.render()
        return self._observation(), self._info()

    def _open(self) -> None:
        """Begin a round, at the first candidate."""
        self._candidate = self._continues = self._decisions = 0
        self._draft = 1
        self._cell = self._node = int(self._table.cell(0, self._token))
        self._limit = draft_limit(self._mdp.cap, self._mdp.max_new_tokens - self._token)
        self._table.open(HERE)

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
        self._decisions += 1
        moved = self._exit() if action == EXIT else self._continue()
        drawn = self._draft > 1 or self._candidate == self._last
        if not moved or (drawn and self._full()):
            return self._verify()
        return self._observation(), 0.0, False, False, self._info()

    def _exit(self) -> bool:
        """Keep the draft in view and make the next one; false if there can be none."""
        if self._draft == 1:
            self._table.keep(HERE)
        if self._full():
            return False
        self._node = int(self._table.after[self._node])
        self._draft += 1
        self._table.move(NOBODY, HERE)
        return True

    def _continue(self) -> bool:
        """Walk to the next candidate; false in phase 2, and at the last: there the round's drafts are made."""
        if self._draft > 1:
            return False
        self._continues += 1
        if self._candidate == self._last:
            return False
        self._candidate += 1
        self._cell += 1
        self._node += 1
        self._table.move(HERE, NOBODY)
        return True

    def _full(self) -> bool:
        """Whether no draft can follow the one in view, which is drawn: it is an EOS, or the last the round may have."""
        return self._draft >= self._limit or self._table.after[self._node] < 0

    def _verify(self) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Settle the round, pay for it, and begin the next one."""
        mdp, candidate = self._mdp, self._candidate
        accepted, emitted, ended = (count.item() for count in self._table.settle(HERE, self._cell, self._draft))
        drafted = min(self._draft, emitted) if ended else self._draft  # nothing after an EOS counts
        cost = float(mdp.costs[candidate, drafted]) + self._decisions * mdp.decision_cost
        rounds = 1
        self._token += emitted
        if not ended and self._token == mdp.max_new_tokens - 1:  # nothing to draft: a plain step
            ended = self._table.step(HERE, np.array([self._token]))[0]
            self._token, emitted, rounds, cost = self._token + 1, emitted + 1, 2, cost + mdp.plain_cost
        values = mdp.reward.of_round(candidate, self._continues, drafted, accepted, emitted, cost)
        terms = dict(zip(mdp.reward.terms, map(float, values), strict=True))
        self._verified = {
            "exit_layer": mdp.candidate_layers[candidate],
            "drafted": drafted,
            "accepted": accepted,
            "emitted": emitted,
            "rounds": rounds,
        }
        if self.render_mode is not None:
            self._columns += self._settled(drafted, accepted, emitted, rounds)
        ended, truncated = bool(ended), not ended and self._token == mdp.max_new_tokens
        self._prompt_over = ended or truncated
        self._running = not (self._prompt_over or mdp.round_episodes)
        self._candidate, self._draft = 0, 1
        if not ended:
            self._open()
        observation = mdp.observation_space.low.copy() if ended else self._observation()
        info = self._info(terms, cost=cost, discount=0.0) | self._verified
        return observation, sum(terms.values()), ended or (mdp.round_episodes and not truncated), truncated, info

    def _observation(self) -> np.ndarray:
        return self._table.observe(self._node, self._cell, self._draft)

    def _info(
        self, reward_terms: dict[str, float] | None = None, cost: float = 0.0, discount: float = 1.0
    ) -> dict[str, Any]:
        """The info of where the environment stands, and of the action that led there (none: a reset)."""
        return {
            "prompt_id": self._prompt_id,
            "token_index": self._token,
            "layer": self._mdp.candidate_layers[self._candidate],
            "phase": min(self._draft, 2),
            "drafts": self._draft - 1,
            "cost": cost,
            "discount": discount,
            "reward_terms": reward_terms or self._no_terms.copy(),
        }

    def _settled(self, drafted: int, accepted: int, emitted: int, rounds: int) -> list[Column]:
        """What became of the tokens that a round emitted, and the plain step after it if there was one."""
        layer, depth = self._mdp.candidate_layers[self._candidate], self._mdp.n_layers
        kinds = ([ACCEPTED] * accepted + [REJECTED] * (drafted > accepted) + [TARGET] * emitted)[:emitted]
        opening = {0, emitted - 1} if rounds == 2 else {0}
        return [
            Column(depth if kind == TARGET else layer, kind, opens=place in opening) for place, kind in enumerate(kinds)
        ]

    def render(self) -> str | np.ndarray | None:
        if self.render_mode is None:
            return None
        layers, layer = self._mdp.candidate_layers, self._mdp.candidate_layers[self._candidate]
        walk = " ".join(f"[{each}]" if each == layer else str(each) for each in layers)
        last = "  last round: layer {exit_layer}, {accepted} of {drafted} drafts accepted"
        last = last.format(**self._verified) if self._verified else ""
        status = f"token {self._token:4d}  layers {walk} of {self._mdp.n_layers}  draft {self._draft}" + last
        kinds = [] if self._prompt_over else [DRAFTED] * (self._draft - 1) + [WALKED]
        open_round = [Column(layer, kind, opens=place == 0) for place, kind in enumerate(kinds)]
        return self._screen.show(Scene(self._mdp.n_layers, layers, status, [*self._columns, *open_round]))

    def close(self) -> None:
        self._screen.close()
        self._running, self._closed = False, True
