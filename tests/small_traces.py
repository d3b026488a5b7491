"""Small traces of a random model, as files, and the arguments of the environments that play them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

from lede_env.engine.acceptance import Sampling
from lede_env.engine.cost_model import load_cost_model
from lede_env.tasks import Prompt
from lede_env.tracing import record_trace

TEXTS = "5", "7 11 13 17", "19 3 23 29 31", "50", "60 61 62", "70 8"  # four end by an EOS, two go on
TOKENS = 24


class Numbers:
    """A tokenizer for models that have none: prompts are written as token ids."""

    def encode(self, text):
        return [int(word) for word in text.split()]


def small_traces(random_model, folder):
    """`greedy` and `sampled`: arguments for `gym.make` that play a trace of six prompts, some of which end by an EOS.

    The early layers of the model are often right, and wrong often enough. Of the second there are three samples each.
    """
    lm, _ = random_model("llama-gqa", late_scale=0.12, early=1)
    lm = replace(lm, tokenizer=Numbers(), eos_ids=tuple(range(40, 49)), candidate_layers=(1, 2, 4))
    layers, prompts = lm.candidate_layers, [Prompt(f"p{n}", "lm", text, "", "test") for n, text in enumerate(TEXTS)]
    costs = folder / "costs.json"
    costs.write_text(json.dumps(asdict(load_cost_model("tiny-cpu")) | {"name": "small", "n_layers": lm.n_layers}))
    common = dict(model="small", candidate_layers=layers, cost_model=str(costs), task="lm", split="test")
    made = {}
    for name, temperature, samples in (("greedy", 0.0, 1), ("sampled", 0.8, 3)):
        path = folder / f"{name}.h5"
        record_trace(lm, prompts, layers, TOKENS, Sampling(temperature), 0, samples=samples).save(path)
        made[name] = common | dict(
            backend="trace", trace=str(path), temperature=temperature, max_new_tokens=TOKENS, features="extended"
        )
    return SimpleNamespace(lm=lm, **made)
