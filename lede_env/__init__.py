"""Offline-RL environments for exit control in self-speculative LLM decoding.

`import lede_env` registers the environment ids and stays cheap: torch and transformers load on first use of a name.
"""

from importlib import import_module

from lede_env.registration import register_all

__version__ = "0.1.0"

# Public name -> module that defines it, resolved on first use (PEP 562).
_PUBLIC = {
    "LedeError": "lede_env.errors",
    "load_model": "lede_env.models.loading",
    "generate": "lede_env.decoding.generate",
    "stream": "lede_env.decoding.generate",
    "Autoregressive": "lede_env.decoding.strategies",
    "LayerSkip": "lede_env.decoding.strategies",
    "FiniteStateMachine": "lede_env.decoding.strategies",
    "DraftVerify": "lede_env.decoding.strategies",
    "Lite": "lede_env.decoding.strategies",
    "Del": "lede_env.decoding.strategies",
    "Lede": "lede_env.decoding.strategies",
    "load_policy": "lede_env.policies",
    "Oracle": "lede_env.oracles",
    "load_dataset": "lede_env.offline.loading",
    "from_minari": "lede_env.data.exporters",
    "load_prompts": "lede_env.tasks",
    "SpeculativeExitEnv": "lede_env.envs.exit_env",
    "SpeculativeDraftEnv": "lede_env.envs.draft_env",
    "TensorVectorEnv": "lede_env.envs.tensor_env",
    "evaluate": "lede_env.evaluation",
    "evaluate_oracle": "lede_env.evaluation",
    "normalized_score": "lede_env.evaluation",
    "paired_bootstrap": "lede_env.evaluation",
    "validate": "lede_env.validation",
    "load_trace": "lede_env.data.registry",
    "record_trace": "lede_env.tracing",
    "read_trajectories": "lede_env.data.trajectory_file",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lede_env' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register_all()
