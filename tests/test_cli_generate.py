"""`lede generate` as a person runs it."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from lede_env import LayerSkip, cli, generate, stream
from lede_env.display.terminal import layer_style, printable, show_stream
from lede_env.engine.round import Counts

ARGUMENTS = ["--max-new-tokens", "8", "--device", "cpu", "--strategy"]
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["lede", "generate", *arguments])
    cli.main()


def test_off_a_terminal_there_is_only_the_text_and_the_figures(tiny, monkeypatch, capsys):
    run(monkeypatch, "def f(x):", *ARGUMENTS, "layerskip:4,3")
    out = capsys.readouterr().out
    text = generate(tiny, "def f(x):", strategy=LayerSkip(4, 3), max_new_tokens=8).text
    assert out.startswith(text + "\ntiny (embedded), layerskip: 8 tokens in ") and "\x1b" not in out
    assert out.count("E 4.00") == 1 and "tokens a round" in out


def test_figures_that_do_not_exist_are_left_out(monkeypatch, capsys):
    run(monkeypatch, "def f(x):", *ARGUMENTS, "autoregressive")
    out = capsys.readouterr().out
    assert "nan" not in out and "acceptance" not in out and "1.00 tokens a round" in out


class Recorder:
    """A file that is a terminal."""

    def __init__(self):
        self.parts = []

    def write(self, text):
        self.parts.append(text)

    def flush(self):
        pass

    def isatty(self):
        return True


def shown(lm, monkeypatch, stop=(), **environment):
    """What a terminal gets of a stream, and the generation."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLORTERM": "truecolor", **environment}.items():
        monkeypatch.setenv(name, value)
    options = dict(strategy=LayerSkip(3, 4), max_new_tokens=32, stop=stop)
    screen, counts = Recorder(), Counts()
    show_stream(Console(file=screen), lm, stream(lm, "def fib(n):", **options), counts)
    out = generate(lm, "def fib(n):", **options)
    assert counts == out.counts
    return "".join(screen.parts), out


def test_a_terminal_shows_colours_and_the_same_text(tiny, monkeypatch):
    screen, out = shown(tiny, monkeypatch)
    legend, _, text = ESCAPE.sub("", screen).partition("\n")
    assert legend == "drafted at layer 3 4 6 8 and accepted · corrected · bonus · plain step"
    assert text == printable(out.text) + "\n"
    colour = ";".join(map(str, layer_style(3, tiny.candidate_layers).color.get_truecolor()))
    assert screen.count(f"38;2;{colour}m") > out.counts.accepted / 2
    assert screen.count("\x1b[4;") == 1 + sum(r.accepted < len(r.drafts) for r in out.rounds)  # the legend's, and each


def test_no_color(tiny, monkeypatch):
    screen, out = shown(tiny, monkeypatch, NO_COLOR="1")
    assert "38;" not in screen and ESCAPE.sub("", screen).endswith(printable(out.text) + "\n")
    screen, out = shown(tiny, monkeypatch, TERM="dumb")
    assert screen == printable(out.text) + "\n"


def test_layers_have_colours_of_their_own():
    candidates = (3, 4, 6, 8)
    assert len({layer_style(layer, candidates).color for layer in candidates}) == 4
    assert layer_style(7, candidates) == layer_style(6, candidates)  # between two candidates: the one below
    assert layer_style(1, (5,)) == layer_style(5, (5,))


def test_model_text_cannot_steer_the_terminal():
    assert printable("a\x1b[31mb\r\x07\tc\nd\x9b é🦊\u202e") == "a[31mb\tc\nd é🦊"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["def f(\udcff):"], "is not Unicode text"),
        (["x", "--compare", "--report", "r.html"], "ask for one of them"),
        (["x", "--report", "no/such/folder/r.html"], "is not a file in an existing folder"),
    ],
    ids=["invalid UTF-8", "compare and report", "folder"],
)
def test_bad_arguments(monkeypatch, capsys, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err.replace("\n", " ") and not list(tmp_path.iterdir())


def test_report(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "def f(x):", *ARGUMENTS, "lede", "--report", str(tmp_path / "r.html"))
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "r.html" in capsys.readouterr().out.splitlines()[-1]


def test_compare(monkeypatch, capsys):
    monkeypatch.setattr(cli.console, "width", 160)
    monkeypatch.setattr("lede_env.display.compare.REPEATS", 1)
    run(monkeypatch, "def f(x):", "--compare", *ARGUMENTS, "layerskip:3,2")
    out = capsys.readouterr().out
    assert "layerskip:3,2" in out and "autoregressive" in out and "differs" not in out and "nan" not in out
