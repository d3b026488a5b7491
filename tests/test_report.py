"""The report page: its data are the generation's, what a model says stays text, and it works in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import pytest
import torch
from rich.console import Console

from lede_env import Lede, generate, load_policy
from lede_env.decoding.strategies import STRATEGIES, Autoregressive, LayerSkip
from lede_env.display.compare import comparison_table, contestants, describe, race
from lede_env.display.explain import Explained
from lede_env.display.origins import Alignment, Origin, StreamOrigins, origins
from lede_env.display.report import embed, render, report_data, settings, write_report
from lede_env.engine.round import Round
from lede_env.policies import SHIPPED
from tests.small_models import CoinPolicy, scripted_model

EVIL = "</script><script>alert(1)</script><!-- <b>&amp;\u2028\x00\x1b[31m ' \" 🦊 {{data}}"
OPTIONS = dict(max_new_tokens=40, temperature=0.6, seed=3)


@pytest.fixture(scope="module")
def explained(tiny):
    return generate(tiny, "def fib(n):", strategy=Explained(Lede()), **OPTIONS)


@pytest.fixture(scope="module")
def data(tiny, explained):
    made = report_data(tiny, "def fib(n):", explained, explained.metrics, {"prefill": 0.5, "rest": 0.25})
    return {**made, "settings": settings(tiny, Lede(), explained, OPTIONS)}


def test_origins():
    drafted = dict(drafts=[5, 6, 7], exits=[2, 3, 3])
    assert origins(Round(**drafted, accepted=1, emitted=[5, 8])) == [Origin("draft", 2), Origin("corrected")]
    kinds = [origin.kind for origin in origins(Round(**drafted, accepted=3, emitted=[5, 6, 7, 8]))]
    assert kinds == ["draft", "draft", "draft", "bonus"]
    assert origins(Round(emitted=[8])) == [Origin("plain")]
    cut = Round(**drafted, accepted=3, emitted=[5, 6, 7, 8])
    cut.cut(2)
    assert origins(cut) == [Origin("draft", 2), Origin("draft", 3)]


def test_characters_belong_to_the_token_that_completes_them(tiny):
    ids = tiny.encode("x = 'é🦊'  # done")
    text = tiny.decode(ids)
    alignment = Alignment(tiny)
    alignment.push(ids)
    assert alignment.ends == [len(tiny.decode(ids[: n + 1]).rstrip("\ufffd")) for n in range(len(ids))]
    parts = list(alignment.parts(text))
    assert "".join(part for _, part in parts) == text
    assert len(parts) < len(ids)  # the fox is several tokens, and one part
    for begin in range(len(text)):  # pieces may be cut anywhere
        tail = list(alignment.parts(text[begin:], begin))
        assert "".join(part for _, part in tail) == text[begin:]
        assert [token for token, _ in tail] == sorted({alignment.owner(at) for at in range(begin, len(text))})


@pytest.mark.parametrize("stop", [(), ("return",), ("nn: never", ".")])
def test_a_stream_splits_into_the_tokens_of_its_text(tiny, stop):
    from lede_env import stream

    options = dict(strategy=LayerSkip(3, 4), max_new_tokens=32, stop=stop)
    whole = generate(tiny, "def fib(n):", **options)
    splitter, runs = StreamOrigins(tiny), []
    for piece in stream(tiny, "def fib(n):", **options):
        split = splitter.split(piece)
        assert "".join(text for text, _ in split) == piece.text
        runs += split
    assert "".join(text for text, _ in runs) == whole.text
    alignment = Alignment(tiny)
    alignment.push(whole.token_ids)
    made = [origin for round_ in whole.rounds for origin in origins(round_)]
    owners = [made[alignment.owner(at)] for at in range(len(whole.text))]
    assert [origin for text, origin in runs for _ in text] == owners


@pytest.mark.parametrize("name", [*STRATEGIES, "tiny"])
def test_explaining_changes_nothing(tiny, name):
    """Of policies, the default, which gives up bonus tokens, and `tiny`, which does not."""
    strategy = Lede(load_policy(name)) if name in SHIPPED else contestants(tiny, Autoregressive())[0][name]
    plain = generate(tiny, "def fib(n):", strategy=strategy, **OPTIONS)
    noted = generate(tiny, "def fib(n):", strategy=Explained(strategy), **OPTIONS)
    assert noted.token_ids == plain.token_ids and noted.strategy == plain.strategy
    assert [vars(round_) for round_ in noted.rounds] == [vars(round_) for round_ in plain.rounds]
    for round_ in noted.rounds:
        notes = noted.control.notes(round_)
        assert [note.looks[-1].layer for note in notes] == round_.exits
        assert all(not look.left for note in notes for look in note.looks[:-1])
        assert sum(len(note.looks) - 1 for note in notes) <= round_.checks


def test_a_policy_with_coins_of_its_own_is_not_asked_twice(tiny):
    plain = generate(tiny, "def fib(n):", strategy=Lede(CoinPolicy()), **OPTIONS)
    assert generate(tiny, "def fib(n):", strategy=Explained(Lede(CoinPolicy())), **OPTIONS).token_ids == plain.token_ids


def test_the_notes_hold_what_the_policy_saw(explained):
    policy, asked = explained.control.inner.policy, 0
    for round_ in explained.rounds:
        for note in explained.control.notes(round_):
            for look in note.looks:
                asked += look.q is not None
                if look.q is not None:
                    assert (look.q[1] > look.q[0]) == look.left
                    assert set(policy.features) - {"phase", "position"} <= set(look.signals)
            if note.q is not None:
                asked += 1
                assert (note.q[1] > note.q[0]) == note.goes_on
    assert asked == explained.counts.decisions > 10


def test_a_rejected_draft_is_shown(tiny):
    """Tokens 2 and 5 of the script are drafted wrongly."""
    lm = scripted_model(tiny, list(range(40, 60)), wrong=(2, 5))
    out = generate(lm, [40], strategy=Explained(LayerSkip(2, 3)), max_new_tokens=8)
    page = report_data(lm, "", out, out.metrics, {})
    assert [token["kind"] for token in page["tokens"][:5]] == ["draft", "corrected", "draft", "draft", "corrected"]
    first = page["rounds"][0]
    assert first["accepted"] == 1 and len(first["drafts"]) == 3
    assert first["drafts"][1]["id"] != first["emitted"][1] == page["tokens"][1]["id"] == 42
    assert [len(draft["looks"]) for draft in first["drafts"]] == [1, 1, 1]


def test_the_data_are_the_generation(tiny, explained, data):
    shown = json.loads(re.search(r'id="data">(.*?)</script>', render(data), re.S)[1])
    assert shown == json.loads(json.dumps(data))
    for page, round_ in zip(shown["rounds"], explained.rounds, strict=True):
        assert [draft["id"] for draft in page["drafts"]] == round_.drafts
        assert [draft["layer"] for draft in page["drafts"]] == round_.exits
        assert (page["accepted"], page["emitted"]) == (round_.accepted, round_.emitted)
        for draft in page["drafts"]:
            look = draft["looks"][-1]
            assert look["left"] and math.isclose(look["p"], math.exp(-look["top1"]), abs_tol=1e-3)
    assert [token["id"] for token in shown["tokens"]] == explained.token_ids
    assert "".join(token["text"] for token in shown["tokens"]) == explained.text == shown["text"]
    kinds = [origin.kind for round_ in explained.rounds for origin in origins(round_)]
    assert [token["kind"] for token in shown["tokens"]] == kinds
    named = dict(shown["settings"])
    assert named["model"].startswith("tiny") and named["weights"].startswith("embedded") and named["seed"] == "3"
    assert f"torch {torch.__version__}" in named["versions"]


def test_no_figure_without_drafts(tiny, tmp_path):
    write_report(tmp_path / "r.html", tiny, "def f():", Autoregressive(), max_new_tokens=4)
    page = (tmp_path / "r.html").read_text()
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert [row["name"] for row in shown["metrics"]] == ["tokens/s", "tokens a round"] and "nan" not in str(shown)
    assert {token["kind"] for token in shown["tokens"]} == {"plain"} and sum(s for _, s in shown["profile"]) > 0


def tags_of(page):
    """The elements of a page, as an HTML parser finds them."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, attributes))
    parser.feed(page)
    return found


def test_nothing_a_model_says_becomes_markup(data):
    page = render({**data, "prompt": EVIL, "text": EVIL, "settings": [["model", EVIL]]})
    assert tags_of(page) == tags_of(render(data)) and "<script>alert" not in page
    assert page.count("{{data}}") == 5  # filled in once; these are text: three in the data, two in plain
    assert "\x00" not in page and "\x1b" not in page
    assert json.loads(embed({"x": EVIL})) == {"x": EVIL} and not set("<>&") & set(embed(EVIL))


def test_the_content_security_policy_names_what_is_inline(data):
    page = render(data)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for tag, directive in (("<script>", "script-src"), ("<style>", "style-src")):
        source = page.split(tag)[1].split("</")[0]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert not re.search(
        r"""(?:src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)|\sstyle=|\son\w+=""", page
    )


def test_the_comparison(tiny):
    strategies, unable = contestants(tiny, LayerSkip(3, 2))
    assert [*strategies, *unable] != [] and {*strategies, *unable} == set(STRATEGIES)
    assert strategies["layerskip"] == LayerSkip(3, 2)
    chosen = {name: strategies[name] for name in ("layerskip", "autoregressive")}
    done = []
    options = dict(max_new_tokens=6, temperature=0.0)
    results = race(tiny, "def f(x):", chosen, options, lambda *at: done.append(at))
    assert done[-1] == (8, 8)
    cells = {column.header: list(column.cells) for column in comparison_table(results, chosen, greedy=True).columns}
    assert cells["strategy"] == ["layerskip:3,2", "autoregressive"] and cells["text"] == ["same", "same"]
    assert cells["E"] == ["3.00", "-"] and cells["speedup"][1] == "1.00"
    assert describe(Lede(speculation=4)) == "lede:speculation=4"
    every = {name: results["layerskip"] for name in strategies}
    screen = Console(file=StringIO(), width=80)
    screen.print(comparison_table(every, strategies, greedy=False))
    shown = screen.file.getvalue()
    assert "…" not in shown and "autoregressive" in shown and shown.count("sampled") == len(every)
    odd = {**results, "layerskip": replace(results["layerskip"], token_ids=[1])}
    assert next(iter(comparison_table(odd, chosen, greedy=True).columns[1].cells)) == "differs"
    assert next(iter(comparison_table(odd, chosen, greedy=False).columns[1].cells)) == "sampled"


# ---------- in a browser

SIZES = [(width, scheme) for width in (1280, 400) for scheme in ("light", "dark")]
WATCH = """window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));"""
# WCAG contrast of an element's text over the nearest background, through a canvas: colours come as oklch().
CONTRAST = """(element) => {
  const pixel = (colour) => { const c = document.createElement("canvas").getContext("2d");
    c.fillStyle = colour; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data]; };
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let behind = element;
  while (behind && pixel(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
  const colours = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
  const [a, b] = colours.map((colour) => light(pixel(colour)));
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }"""


@pytest.fixture(scope="module")
def browser():
    """Chromium: the system's, or Playwright's own. LEDE_REQUIRE_BROWSER=1 makes its absence a failure."""
    give_up = pytest.fail if os.environ.get("LEDE_REQUIRE_BROWSER") == "1" else pytest.skip
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        give_up("no browser check: Playwright is not installed (pip install playwright)")
    with sync_playwright() as playwright:
        system = shutil.which("chromium") or shutil.which("google-chrome")
        # The page is our own file, and Chromium refuses its sandbox to root.
        flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        try:
            launched = playwright.chromium.launch(executable_path=system, args=flags)
        except Error as error:
            give_up(
                f"no browser check: Chromium does not start (apt-get install chromium): {str(error).splitlines()[0]}"
            )
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """open_page(data, width, scheme) -> (page, what went wrong, what was requested)"""
    opened = []

    def open_(data, width=1280, scheme="light"):
        file = tmp_path / "report.html"
        file.write_text(render(data), encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 850}, color_scheme=scheme)
        opened.append(page)
        wrong, requests = [], []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append("a dialog"), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.add_init_script(WATCH)
        page.goto(file.as_uri())
        return page, wrong, requests

    yield open_
    for page in opened:
        page.close()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_page_in_a_browser(open_page, data, width, scheme):
    page, wrong, requests = open_page(data, width, scheme)
    assert "".join(page.locator("#text .token").all_text_contents()) == data["text"]
    assert page.locator("#rounds svg[role=img]").count() == page.locator("#heat svg[role=img]").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for place in (
        "#text .token",
        "#legend .token",
        ".hint",
        "#lead",
        "dd",
        "dt",
        "#details p",
        "#details td",
        "footer",
    ):
        elements = page.locator(place)
        for index in range(min(elements.count(), 12)):
            assert elements.nth(index).evaluate(CONTRAST) >= 4.5, (place, index)
    assert wrong == [] and page.evaluate("window.violations") == [] and len(requests) == 1


@pytest.mark.browser
def test_page_works_without_a_mouse(open_page, data):
    page, wrong, _ = open_page(data, 400)
    details, focused = page.locator("#details"), "document.activeElement.getAttribute('aria-label')"
    for _ in range(10):  # Tab alone reaches the text, at one stop
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.token')"):
            break
    assert page.locator("#text .token[tabindex='0']").count() == 1
    seen = [(details.inner_text(), page.evaluate(focused))]
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "PageDown", "End"):
        page.keyboard.press(key)
        seen.append((details.inner_text(), page.evaluate(focused)))
        assert seen[-1] != seen[-2], key
        assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    assert f"token {len(data['tokens'])} of" in seen[-1][0]
    page.keyboard.press("Home")
    assert "token 1 of" in details.inner_text() and "round 1:" in details.inner_text().lower()
    first = data["rounds"][0]["drafts"][0]["looks"][-1]
    assert f"{first['p']:.3f}" in details.inner_text() and "Q(exit)" in details.inner_text()
    assert "odds" in details.inner_text()
    number = next(n for n, own in enumerate(data["rounds"]) if own["accepted"] < len(own["drafts"]))
    for _ in range(number):
        page.keyboard.press("PageDown")
    for _ in range(data["rounds"][number]["accepted"] + 1):  # Tab goes through the drafts of the round
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert "rejected" in details.inner_text() and page.evaluate("document.activeElement.matches('#details .here *')")
    page.keyboard.press("Escape")
    assert "rejected" not in details.locator(".how").inner_text()
    assert page.evaluate("document.activeElement.matches('.token')") and wrong == []


@pytest.mark.browser
def test_hover_shows_and_leaving_restores(open_page, data):
    page, _, _ = open_page(data)
    details = page.locator("#details")
    before = details.inner_text()
    page.locator("#text .token").nth(3).hover()
    assert "token 4 of" in details.inner_text()
    page.mouse.move(5, 5)
    assert details.inner_text() == before
    rejected = page.locator("#rounds .rejected")
    assert rejected.count() == sum(len(r["drafts"]) - r["accepted"] for r in data["rounds"]) > 0
    rejected.first.scroll_into_view_if_needed()
    box = rejected.first.bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    assert "rejected" in details.inner_text()


@pytest.mark.browser
@pytest.mark.parametrize("place", ["prompt", "token", "draft", "setting"])
def test_injected_text_is_shown_as_text(open_page, data, place):
    evil = json.loads(json.dumps(data))
    if place == "prompt":
        evil["prompt"] = EVIL
    elif place == "token":
        evil["tokens"][0]["text"] = evil["text"] = EVIL
    elif place == "draft":
        for draft in evil["rounds"][0]["drafts"]:
            draft["text"] = EVIL
        evil["tokens"][0]["text"] = ""
    else:
        evil["settings"] = [["model", EVIL], *evil["settings"][1:]]
    page, wrong, requests = open_page(evil, 400)
    assert "<script>alert(1)</script>" in page.locator("body").inner_text().replace("·", " ")
    assert page.locator("body script").count() == 2 and page.locator("body b").count() == data_bold(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert wrong == [] and page.evaluate("window.violations") == [] and len(requests) == 1


def data_bold(page):
    """The <b> that the page itself has, in its hints."""
    return page.locator(".hint b").count()
