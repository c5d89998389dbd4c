"""The page of tokens: whatever a document says stays text, every token is there and in its colour, and it works without a mouse."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.corpus.chat import load_tokenizer
from distft.errors import ConfigError, StoreError
from distft.objectives.treatment import Signals
from distft.plan.token_documents import PAGE_TOKENS, STEPS, chosen_documents
from distft.plan.token_page import _palette, token_page, write_token_page
from distft.plan.token_text import BROKEN, PART, TokenTexts, visible
from distft.plan.tokens import TREATMENTS, Seen, TokenPlan, plan_tokens
from distft.store.location import open_location
from tests.helpers.browser import needs_chromium, visit
from tests.helpers.runs import Bench
from tests.helpers.s3 import BUCKET, s3_environment, set_s3_environment
from tests.helpers.stores import document, run_config, shared_model

EVIL = "</script><script>document.title='canary'</script><img src=x onerror=alert(1)>'\"&{{ 7*7 }}\x00\u202e"
TEXT = f"One\n\ttwo  three 🤖 naïve {EVIL} — 日本\n"


@pytest.fixture(scope="module")
def texts() -> TokenTexts:
    return TokenTexts(load_tokenizer(shared_model()))


def seen_of(rows: list[list[int]], *, prompt: int = 3, seed: int = 0, scale: float = 1.0) -> list[Seen]:
    """Documents of these tokens, of which all but the first few are supervised."""
    random = np.random.default_rng(seed)
    found = []
    for ids in rows:
        made = document(ids, range(prompt, len(ids)))
        count = len(ids) - prompt
        known = Signals(
            label_logprob=-random.exponential(scale, count).astype(np.float32),
            entropy=random.exponential(1, count).astype(np.float32),
            rank=random.integers(0, 50, count).astype(np.uint32),
        )  # fmt: skip
        found.append(Seen(document=made, signals=known, entries=random.integers(1, 9, count).astype(np.uint16)))
    return found


def plan_of(seen: list[Seen], kind: str = "stm", **sections: Any) -> TokenPlan:
    run = run_config(Path("store"), shared_model(), objective={"kind": kind}, **sections)
    return plan_tokens(run, seen, held=len(seen), rows=len(seen), vocabulary=280)


def page_of(seen: list[Seen], texts: TokenTexts, kind: str = "stm") -> str:
    run = run_config(Path("store"), shared_model(), objective={"kind": kind})
    return token_page(run, plan_of(seen, kind), texts)


def ids_of(text: str, prompt: str = "abc") -> list[int]:
    return load_tokenizer(shared_model()).encode(prompt + text, add_special_tokens=False)


class Tokens(HTMLParser):
    """The supervised tokens of a page, tags, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.inside = False
        self.in_text = 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag == "div":
            self.in_text = 1 if given.get("class") == "text" else 0
        if tag == "i" and self.in_text:
            self.inside = True
            self.tokens.append((given["class"] or "", ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "i":
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside and self.tokens:
            name, text = self.tokens[-1]
            self.tokens[-1] = (name, text + data)


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    assert found
    return json.loads(found[1])


def test_rows_of_one_text_are_shown_once_for_each_way_they_are_marked() -> None:
    one, _ = seen = seen_of([ids_of("twice"), ids_of("other")])
    here, there = one.document.supervised.copy(), one.document.supervised.copy()
    here[-1], there[-2] = False, False
    marked = [
        replace(one, document=replace(one.document, anchors=anchors, row=row))
        for row, anchors in ((3, here), (4, there), (5, here))
    ]
    assert len({each.document.digest for each in (one, *marked)}) == 1
    assert [shown.number for shown in chosen_documents(plan_of([*seen, *marked, one]))] == [0, 1, 2, 3]


def test_every_supervised_token_is_there_in_its_colour(texts: TokenTexts) -> None:
    seen = seen_of([ids_of(TEXT), ids_of("again")])
    html = page_of(seen, texts)
    plan = plan_of(seen)
    tokens = Tokens(html).tokens
    assert [name.split()[0] for name, _ in tokens] == [TREATMENTS[code] for code in plan.applied[0].codes]
    assert {"learned", "masked"} == {name.split()[0] for name, _ in tokens}
    data = data_of(html)
    assert [len(one["ids"]) for one in data["documents"]] == [len(one.signals) for one in seen]
    for number, one in enumerate(data["documents"]):
        for column in ("positions", "ce", "entropy", "rank", "entries"):
            assert len(one[column]) == len(one["ids"]), column
        assert one["positions"] == np.flatnonzero(seen[number].document.supervised).tolist()
        for place, applied in enumerate(plan.applied):
            mine = slice(int(plan.starts[number]), int(plan.starts[number + 1]))
            codes = [(ord(sign) - 65) // STEPS for sign in one["codes"][place]]
            assert codes == applied.codes[mine].tolist()
            signs = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
            packed, palette = one["weights"][place], data["objectives"][place]["palette"]
            weights = [palette[64 * signs.index(a) + signs.index(b)] for a, b in zip(packed[::2], packed[1::2], strict=True)]
            np.testing.assert_allclose(np.array(weights).T, applied.weights[:, mine], atol=2e-5)


def test_what_documents_say_stays_text(texts: TokenTexts) -> None:
    seen = seen_of([ids_of(TEXT), ids_of("x", prompt=TEXT)], prompt=4)
    html = page_of(seen, texts)
    found = Tokens(html)
    assert found.tags.count("script") == 2, "data, and ours"
    assert "img" not in found.tags
    assert "<script>document" not in html
    assert "\0" not in html
    assert "\u202e" not in html
    assert "49" not in {text for _, text in found.tokens}, "nothing is a template"


def test_a_script_that_is_not_ours_is_forbidden(texts: TokenTexts) -> None:
    html = page_of(seen_of([ids_of("text")]), texts)
    policy = re.search(r"script-src '(sha256-[^']+)'", html)
    script = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert policy
    assert len(script) == 1
    assert policy[1] == f"sha256-{base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()}"
    assert "default-src 'none'" in html
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html)


def test_run_names_and_files_stay_text(texts: TokenTexts) -> None:
    seen = seen_of([ids_of("text")])
    object.__setattr__(seen[0].document, "file", "<b onclick=x>.jsonl")
    html = page_of(seen, texts)
    assert "<b onclick" not in html
    assert "&lt;b onclick=x&gt;.jsonl, row 1" in html


def test_files_and_special_tokens_cannot_turn_the_text_around(texts: TokenTexts) -> None:
    special = min(texts.special)
    seen = seen_of([[*ids_of("text"), special]])
    object.__setattr__(seen[0].document, "file", "gpj.\u202elive\u200b.jsonl")
    texts._known[special] = "<\u202e|end|>"
    html = page_of(seen, texts)
    assert "\u202e" not in html
    assert html.count("gpj.U+202EliveU+200B.jsonl, row 1") == 2
    assert "<u>&lt;<b>U+202E</b>|end|&gt;</u>" in html


@pytest.mark.parametrize("largest", [1.0, 4.0, 1e4, 1e9])
def test_a_palette_is_as_fine_as_its_weights_are_small(largest: float) -> None:
    weights = np.random.default_rng(0).random((4, 20_000)).astype(np.float32) * largest
    weights[1:] = 0
    weights[0, 0] = largest
    rows, places = _palette(weights)
    assert len(rows) <= 4096
    found = np.array(rows)[places].T
    assert np.abs(found - weights).max() <= largest / 1000


def test_pieces_make_the_text(texts: TokenTexts) -> None:
    tokenizer = load_tokenizer(shared_model())
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = texts.pieces(ids)
    assert len(pieces) == len(ids)
    assert PART in pieces, "the robot is more than one token"
    assert "".join(piece for piece in pieces if piece != PART) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_any_ids_at_all_have_pieces(texts: TokenTexts) -> None:
    random = np.random.default_rng(0)
    for length in [*range(1, 40), 200]:
        ids = random.integers(0, 280, length).tolist()
        pieces = texts.pieces(ids)
        assert len(pieces) == length
        for piece in pieces:
            visible(piece, alone=True).encode("utf-8", "strict")
    begun = load_tokenizer(shared_model()).encode("🤖", add_special_tokens=False)[:-1]
    assert texts.pieces(begun) == [BROKEN] * len(begun)
    assert texts.pieces([]) == []


def test_what_cannot_be_seen_gets_a_mark() -> None:
    assert visible("\n", alone=True) == "<b>↵</b>\n"
    assert visible("a\n\tb", alone=True) == "a<b>↵</b>\n<b>⇥</b>\tb"
    assert visible("  ", alone=True) == "<b>·</b><b>·</b>"
    assert visible(" a", alone=True) == " a"
    assert visible(" ", alone=False) == " "
    assert visible("\u202e\x00\ud800", alone=True) == "<b>U+202E</b><b>U+0000</b><b>U+D800</b>"
    assert visible("", alone=True) == "<b>∅</b>"
    assert visible("<i>&\"'", alone=True) == "&lt;i&gt;&amp;&quot;&#x27;"


def test_documents_are_an_even_spread_and_those_that_lose_most() -> None:
    seen = seen_of([[5 + n % 200, *range(3, 23)] for n in range(100)], seed=1)
    seen[37].signals.label_logprob[:] = -40.0
    plan = plan_of(seen)
    found = chosen_documents(plan)
    numbers = [one.number for one in found]
    assert len(numbers) == len(set(numbers)) == 20
    assert numbers == sorted(numbers)
    even = [one.number for one in found if one.why == "evenly spread"]
    assert even == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    assert next(one.why for one in found if one.number == 37) == "most CE that stm does not learn"
    assert {one.why for one in chosen_documents(plan_of(seen, "sft"))} == {"evenly spread", "most CE"}
    assert [one.number for one in chosen_documents(plan_of([*seen[:3], seen[1]]))] == [0, 1, 2], (
        "a row that repeats is shown once"
    )


def test_the_page_stays_small(texts: TokenTexts) -> None:
    random = np.random.default_rng(2)
    seen = seen_of([random.integers(3, 270, length).tolist() for length in [3000] * 25 + [1540] * 5], prompt=1500)
    html = page_of(seen, texts, "dft")
    assert len(html.encode()) < 3_000_000
    assert len(Tokens(html).tokens) <= PAGE_TOKENS
    assert "of them are cut" in html
    assert "tokens …" in html, "a long prompt is shortened"


def test_the_page_is_a_file_of_the_users(tmp_path: Path) -> None:
    model, seen = shared_model(), seen_of([ids_of("text")])
    run = run_config(tmp_path / "store", model, objective={"kind": "stm"})
    store, plan = open_location(run.store), plan_of(seen)
    where = write_token_page(run, plan, model, tmp_path / "new" / "page.html", store=store)
    assert where == str(tmp_path / "new" / "page.html")
    first = Path(where).read_bytes()
    write_token_page(run, plan, model, Path(where), store=store)
    assert Path(where).read_bytes() == first, "the same every time"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    with pytest.raises(ConfigError, match="in the store"):
        write_token_page(run, plan, model, tmp_path / "store" / "page.html", store=store)
    with pytest.raises(StoreError, match="cannot be written"):
        write_token_page(run, plan, model, tmp_path / "new", store=store)


def test_plan_writes_it_where_asked_and_nowhere_else(bench: Bench) -> None:
    bench.run("tokenize")
    bench.run("score")
    before = sorted(path for path in bench.store.rglob("*") if path.is_file())
    page = bench.folder / "tokens.html"
    assert bench.run("plan", f"--page={page}").json["page"] == str(page)
    assert "sft_kl kl=0.5" in page.read_text(encoding="utf-8")
    assert sorted(path for path in bench.store.rglob("*") if path.is_file()) == before


def test_a_store_on_s3_is_looked_at_too(bench: Bench, s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_s3_environment(monkeypatch, s3_environment(s3_server))
    store = f"store=s3://{BUCKET}/tokens"
    for verb in ("tokenize", "score"):
        bench.run(verb, store)
    result = bench.run("plan", store, f"--page={tmp_path / 'page.html'}").json
    assert result["tokens"]["documents"] > 0
    assert len(Tokens(Path(result["page"]).read_text(encoding="utf-8")).tokens) > 100


@needs_chromium
def test_in_a_browser(tmp_path: Path, texts: TokenTexts) -> None:
    """Objectives are switched, tokens tell of themselves on hover and by keyboard, and nothing of a document runs."""
    seen = seen_of([ids_of(TEXT), ids_of("And then more of it, on and on."), ids_of("q" * 60)], prompt=3)
    plan = plan_of(seen)
    page = tmp_path / "page.html"
    page.write_text(page_of(seen, texts), encoding="utf-8")

    def key(name: str) -> tuple[str, dict[str, Any]]:
        return "Input.dispatchKeyEvent", {"type": "keyDown", "key": name}

    radios = "[...document.querySelectorAll('input[name=objective]')]"
    classes = "[...document.querySelectorAll('.text i')].map((token) => token.className.split(' ')[0])"
    field = "document.querySelector('[data-field={}]').textContent"
    done = visit(page, tmp_path / "profile", [
        classes, "document.title", "document.getElementById('card').hidden",
        radios + ".find((one) => one.nextSibling.textContent.trim() === 'stm_kl').click()",
        classes, "[...document.querySelectorAll('.verdict')].filter((one) => one.checkVisibility()).map((one) => one.textContent)",
        "document.querySelectorAll('.text')[1].focus()", key("ArrowRight"), key("ArrowRight"),
        "document.activeElement === document.querySelectorAll('.text')[1].querySelectorAll('i')[1]",
        field.format("position"), field.format("id"), field.format("w-kl"), field.format("what"),
        "document.getElementById('card').checkVisibility()", key("Escape"), "document.getElementById('card').hidden",
        "document.querySelectorAll('.text i')[0].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))",
        "document.getElementById('card').hidden", "document.documentElement.scrollWidth <= innerWidth", "document.scripts.length",
    ])  # fmt: skip
    before, title, hidden, _, after, verdicts, _, focused, position, token, kl, what, shown, gone, _, hovered, fits, scripts = (
        done.answers
    )
    names = [one.rule.model_dump()["kind"] for one in plan.applied]
    assert before == [TREATMENTS[code] for code in plan.applied[0].codes]
    assert after == [TREATMENTS[code] for code in plan.applied[names.index("stm_kl")].codes]
    assert "canary" not in title
    assert (hidden, focused, shown, gone, hovered, fits, scripts) == (True, True, True, True, False, True, 2)
    [verdict] = verdicts
    assert verdict.startswith("stm_kl learns")
    assert position == str(np.flatnonzero(seen[1].document.supervised)[1])
    assert token == str(seen[1].document.tokens[int(position)])
    masked = plan.applied[0].codes[plan.starts[1] + 1] == TREATMENTS.index("masked")
    assert (kl, what) == (("1", "held") if masked else ("0", "learned"))
    assert done.trouble == []
    assert [url for url in done.requests if not url.startswith("file:")] == []
    assert len(done.screenshot) > 10_000
