"""Exit policies: what a rule must offer, the simple rules, learned networks and their file format."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from lede_env.errors import LedeError
from lede_env.policies.files import DEFAULT, SHIPPED, load_policy
from lede_env.policies.networks import MaskedMLPPolicy, MLPPolicy
from lede_env.policies.rules import (
    CONTINUE,
    EXIT,
    EpsilonGreedy,
    ExitPolicy,
    RandomPolicy,
    StaticPolicy,
    StaticRounds,
    ThresholdPolicy,
)
from lede_env.policies.trained import TrainedPolicy, check_bonus, made_for
from lede_env.policies.tree import TreePolicy

__all__ = [
    "CONTINUE",
    "DEFAULT",
    "EXIT",
    "SHIPPED",
    "EpsilonGreedy",
    "ExitPolicy",
    "MLPPolicy",
    "MaskedMLPPolicy",
    "Oracle",
    "RandomPolicy",
    "StaticPolicy",
    "StaticRounds",
    "ThresholdPolicy",
    "TrainedPolicy",
    "TreePolicy",
    "check_bonus",
    "check_compatible",
    "load_policy",
    "made_for",
    "parse_policy",
]


def __getattr__(name: str) -> object:
    """`Oracle` lies with the tables that it looks into, above this package: resolved on first use, as in `lede_env`."""
    if name != "Oracle":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("lede_env.oracles").Oracle


def check_compatible(
    policy: ExitPolicy,
    fingerprint: str,
    candidate_layers: Sequence[int],
    features: Sequence[str],
    mdp: str,
) -> None:
    """Raise `LedeError` unless `policy` can run on this model, at these layers, from these features.

    A policy trained on the exit MDP also runs on the draft MDP: the paper deploys it so (section 3.3).
    """
    if isinstance(policy, EpsilonGreedy):
        policy = policy.policy
    if isinstance(policy, TrainedPolicy) and policy.mdp != mdp and (policy.mdp, mdp) != ("exit", "draft"):
        raise LedeError(f"the policy was trained on the {policy.mdp} MDP, but this is the {mdp} MDP; train one for it")
    unseen = [name for name in policy.features if name not in features]
    if unseen:
        raise LedeError(
            f"the policy observes {tuple(policy.features)}, but here there is only {tuple(features)}: "
            f"{unseen} missing; pass features='extended' or train a policy on these features"
        )
    if isinstance(policy, StaticPolicy | StaticRounds) and policy.layer not in candidate_layers:
        raise LedeError(
            f"the policy exits at layer {policy.layer}, but the candidate layers here are "
            f"{tuple(candidate_layers)}; choose one of these"
        )
    if not isinstance(policy, TrainedPolicy):
        return
    if policy.model_fingerprint != fingerprint:
        raise LedeError(
            f"the policy was trained for {policy.model_name!r} (fingerprint {policy.model_fingerprint}), but "
            f"this model has fingerprint {fingerprint}; load that model or train a policy for this one"
        )
    if list(policy.candidate_layers) != list(candidate_layers):
        raise LedeError(
            f"the policy was trained with candidate layers {policy.candidate_layers}, but they are "
            f"{tuple(candidate_layers)} here; pass candidate_layers={policy.candidate_layers} or train again"
        )


def parse_policy(text: str, n_layers: int, candidates: Sequence[int]) -> ExitPolicy:
    """A policy from a command line: ``random``, ``static:<layer>``, or what `load_policy` takes."""
    if text == "random":
        return RandomPolicy()
    if not text.startswith("static:"):
        return load_policy(text)
    layer = text.removeprefix("static:")
    if not layer.isdecimal() or int(layer) not in candidates:
        raise LedeError(f"policy {text!r}: {layer!r} is not one of the candidate layers {tuple(candidates)}")
    return StaticPolicy(int(layer), n_layers)
