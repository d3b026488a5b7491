"""A generation as one self-contained HTML page: no network, no framework, works without a mouse.

The page's data travel as JSON in a block that no browser runs, and its script puts them into the page as text, so
nothing that a prompt or a model says can become markup; a content security policy stands behind that.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import platform
import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from lede_env.decoding.generate import Generation, Metrics, generate
from lede_env.decoding.strategies import Strategy
from lede_env.display.compare import describe
from lede_env.display.explain import DraftNote, Explained, Look, Noting
from lede_env.display.origins import Alignment, origins
from lede_env.display.terminal import printable
from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.round import Round
from lede_env.errors import LedeError

TITLE = b"<title>LEDE: one text, token by token</title>"  # by which a page is known
WEIGHTS = {
    "embedded": "embedded: the small model that ships with the package",
    "twin": "twin: a large model's shapes around the embedded model's function",
    "checkpoint": "checkpoint: trained weights from the hub or a folder",
}


def check_report_path(path: Path) -> None:
    """Raise a LedeError, before any work is done, unless a page can be written there; it replaces none but a page."""
    if path.is_dir() or not path.parent.is_dir():
        raise LedeError(f"--report {str(path)!r} is not a file in an existing folder; make the folder, or name a file")
    if path.is_file() and not is_report(path):
        raise LedeError(f"--report {str(path)!r} exists and is no earlier report; name another file, or delete it")


def is_report(path: Path) -> bool:
    """Whether a file begins as our page does."""
    with path.open("rb") as file:
        return TITLE in file.read(4096)


def write_report(path: Path, lm: LayeredLM, prompt: str, strategy: Strategy, **options: Any) -> None:
    """Decode the prompt three times, alike, and write the page.

    Once for the speed, once with the profile, once with notes on what the strategy sees, which slow it down. The
    first call on a model is slower: warm it up before. `options` are those of `generate`.
    """
    timed = _one(generate(lm, prompt, strategy=strategy, **options))
    profiled = _one(generate(lm, prompt, strategy=strategy, profile=True, **options))
    explained = _one(generate(lm, prompt, strategy=Explained(strategy), **options))
    data = report_data(lm, prompt, explained, timed.metrics, profiled.profile or {})
    data["settings"] = settings(lm, strategy, explained, options)
    if timed.token_ids != explained.token_ids:  # rounding of a GPU at work, say
        data["warning"] = "The timed run and the run shown here produced different tokens; read the speed with care."
    path.write_text(render(data), encoding="utf-8")


def _one(out: Generation | list[Generation]) -> Generation:
    assert isinstance(out, Generation)
    return out


def report_data(
    lm: LayeredLM, prompt: str, explained: Generation, timed: Metrics, profile: dict[str, float]
) -> dict[str, Any]:
    """What the page shows, as JSON values; `explained` is a generation of an Explained strategy."""
    control = explained.control
    assert isinstance(control, Noting)
    rounds = [_round(lm, round_, control.notes(round_)) for round_ in explained.rounds]
    return {
        "prompt": prompt,
        "text": explained.text,
        "tokens": _tokens(lm, explained),
        "rounds": rounds,
        "layers": lm.n_layers,
        "candidates": list(lm.candidate_layers),
        "metrics": figures(explained, timed),
        "profile": [[part, seconds] for part, seconds in profile.items()],
        "finish": explained.finish_reason,
    }


def _tokens(lm: LayeredLM, out: Generation) -> list[dict[str, Any]]:
    """Each emitted token: its characters of the text, how it came about, and its place."""
    alignment = Alignment(lm)
    alignment.push(out.token_ids)
    texts = dict(alignment.parts(out.text))
    tokens: list[dict[str, Any]] = []
    for number, round_ in enumerate(out.rounds):
        for place, origin in enumerate(origins(round_)):
            token, text = round_.emitted[place], texts.get(len(tokens), "")
            # An end of text, or a part of a character, has no text of its own.
            raw = "" if text else str(lm.tokenizer.convert_ids_to_tokens(token))
            about = {"id": token, "text": text, "raw": raw, "kind": origin.kind, "layer": origin.layer}
            tokens.append({**about, "round": number})
    return tokens


def _round(lm: LayeredLM, round_: Round, notes: list[DraftNote]) -> dict[str, Any]:
    drafts = [
        {
            "id": token,
            "text": lm.decode([token]) or str(lm.tokenizer.convert_ids_to_tokens(token)),
            "layer": layer,
            "looks": [_look(look) for look in note.looks],
            "goesOn": note.goes_on,
            "q": _rounded(note.q),
        }
        for token, layer, note in zip(round_.drafts, round_.exits, notes, strict=True)
    ]
    return {"drafts": drafts, "accepted": round_.accepted, "emitted": round_.emitted, "bonus": round_.bonus}


def _look(look: Look) -> dict[str, Any]:
    signals = {name: round(value, 4) for name, value in look.signals.items() if name != "layer"}
    signals["p"] = round(math.exp(-look.signals["top1"]), 4)
    return {"layer": look.layer, "left": look.left, "q": _rounded(look.q), **signals}


def _rounded(q: tuple[float, float] | None) -> list[float] | None:
    return q and [round(value, 4) for value in q]


def figures(out: Generation, timed: Metrics) -> list[dict[str, str]]:
    """The metrics as the page shows them; those that do not exist without drafts are left out."""
    metrics = out.metrics
    rows = [
        ("tokens/s", f"{timed.tokens_per_second:.1f}", "prefill included"),
        ("tokens a round", f"{metrics.tokens_per_round:.2f}", f"{metrics.tokens} tokens in {metrics.rounds} rounds"),
    ]
    if out.counts.drafted:
        rows += [
            ("acceptance", f"{metrics.acceptance:.3f}", f"{out.counts.accepted} of {out.counts.drafted} drafts kept"),
            ("exit layer, E", f"{metrics.E:.2f}", "mean over the drafts"),
            ("drafts a round, d", f"{metrics.d:.2f}", "mean over the rounds"),
        ]
    return [dict(zip(("name", "value", "note"), row, strict=True)) for row in rows]


def settings(lm: LayeredLM, strategy: Strategy, out: Generation, options: dict[str, Any]) -> list[list[str]]:
    """What it takes to do it again, as pairs of name and value."""
    temperature = options.get("temperature", 0.0)
    sampling = f"T = {temperature:g}, top-k {options.get('top_k', 0) or 'off'}, top-p {options.get('top_p', 1.0):g}"
    cuda = lm.device.type == "cuda"
    device = torch.cuda.get_device_name(lm.device) if cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    policy = getattr(strategy, "policy", None) or getattr(getattr(out.control, "inner", None), "policy", None)
    rows = {
        "model": f"{lm.name}, {lm.n_layers} layers, fingerprint {lm.fingerprint}",
        "weights": WEIGHTS[lm.weights],
        "strategy": describe(strategy),
        "policy": policy and f"{type(policy).__name__} on {', '.join(policy.features) or 'nothing'}",
        "decoding": "greedy" if temperature == 0 else sampling,
        "seed": str(out.seed),
        "tokens": f"{len(out.prompt_ids)} of the prompt, {len(out.token_ids)} new; ended by {out.finish_reason}",
        "stop strings": ", ".join(map(repr, options.get("stop", ()))),
        "device": f"{device}, {str(lm.dtype).removeprefix('torch.')}",
        "versions": f"lede-env {version('lede-env')}, torch {torch.__version__}, "
        f"transformers {version('transformers')}, Python {platform.python_version()}",
    }
    return [[name, value] for name, value in rows.items() if value]


def render(data: dict[str, Any]) -> str:
    """The page around the data."""
    folder = files("lede_env.display") / "page"
    names = ("page.html", "page.css", "page.js", "charts.js")
    page, style, *scripts = ((folder / name).read_text(encoding="utf-8") for name in names)
    script = "".join(scripts)
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {
        "policy": policy,
        "style": style,
        "script": script,
        "data": embed(data),
        "plain": html.escape(printable(data["prompt"] + data["text"])),
    }
    # One pass: what is filled in is not searched.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], page)


def embed(data: Any) -> str:
    """JSON that can stand inside a script element: pure ASCII, and no character with which markup begins or ends."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(source: str) -> str:
    """What a content security policy calls this inline source."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
