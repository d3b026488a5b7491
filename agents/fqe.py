"""Off-policy evaluation: what fitted Q evaluation (Le et al., 2019) makes of a policy, and what it is worth in truth.

FQE learns a policy's value from logged data alone. The trace knows that value exactly, so its error can be stated: at
the same discount, from the same states (the first candidate of every logged token), with the same boundary (a token).
"""

from __future__ import annotations

import numpy as np

from agents.d3rlpy_offline import GAMMA, HIDDEN, REWARD_SCALE, TARGET_EVERY, Offline, import_d3rlpy, learn, scalers
from agents.task import BATCH, Task
from lede_env.errors import LedeError
from lede_env.oracles import ExitTable
from lede_env.policies import ExitPolicy


def fitted_value(agent: Offline, task: Task, updates: int, learning_rate: float = 1e-3) -> float:
    """The estimate: mean Q(s, policy(s)) over the first states of the logged tokens."""
    d3rlpy = import_d3rlpy()
    config = d3rlpy.ope.FQEConfig(
        learning_rate=learning_rate, batch_size=BATCH, gamma=GAMMA, target_update_interval=TARGET_EVERY,
        # It hands its scaled observations to the policy's network as they are: the scalers must be the same.
        **scalers(task),
        encoder_factory=d3rlpy.models.encoders.VectorEncoderFactory(hidden_units=HIDDEN),
    )  # fmt: skip
    evaluation = d3rlpy.ope.DiscreteFQE(agent.algorithm, config)
    evaluation.create_impl((len(task.features),), 2)
    learn(evaluation, task, lambda step, loss: None, updates)
    first = task.transitions["observations"][first_rows(task)]
    return float(evaluation.predict_value(first, agent.algorithm.predict(first)).mean()) / REWARD_SCALE


def exact_value(policy: ExitPolicy, task: Task) -> float:
    """The truth: mean discounted return of the logged tokens, had the policy decided, from the trace."""
    table = task.table()
    if not isinstance(table, ExitTable):
        raise LedeError("the exact value a token is known on the exit MDP; choose a dataset of that MDP")
    rows = first_rows(task)
    values = token_values(table, table.decisions(policy), GAMMA)  # (X, T)
    if table.texts.samples > 1:
        raise LedeError("the log does not say which of a prompt's recorded samples it played; use a greedy dataset")
    place = {name: index for index, name in enumerate(table.mdp.backend.prompt_ids)}
    text = np.array([place.get(name, -1) for name in task.dataset.prompt_ids])[task.dataset["prompt_id"][rows]]
    if (text < 0).any():
        raise LedeError("the dataset has prompts that are not for training; load it with split='train'")
    return float(values[text, task.dataset["token_index"][rows]].mean())


def first_rows(task: Task) -> np.ndarray:
    """Rows of the dataset at which a token's walk begins."""
    ends = task.transitions["terminals"]
    return np.flatnonzero(np.append(True, ends[:-1]))


def token_values(table: ExitTable, exits: np.ndarray, gamma: float) -> np.ndarray:
    """(X, T) discounted return of each token under (X, T, C) decisions, by backward induction over the candidates."""
    reward = table.mdp.reward
    paid = table.chance * reward.accepted + (1.0 - table.chance) * reward.rejected  # (X, T, C) of exiting
    value = paid[..., -1]
    for candidate in reversed(range(paid.shape[-1] - 1)):
        onward = reward.continue_ + gamma * value
        value = exits[..., candidate] * paid[..., candidate] + (1.0 - exits[..., candidate]) * onward
    return value
