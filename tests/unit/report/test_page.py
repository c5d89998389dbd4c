"""The page: complete, honest about what is missing, closed to the outside, and deaf to what models say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from distft.errors import CorruptArtifactError, MissingArtifactError
from distft.objectives.catalog import Eksft, Objective
from distft.objectives.treatment import Signals
from distft.report import svg
from distft.report.data import read_runs
from distft.report.page import comparison_rows, comparison_table, write_report
from distft.report.table import LONGEST_NAME
from distft.report.view import PARTS
from distft.store.location import Location, open_location
from distft.train.record import read_metrics
from tests.helpers.s3 import BUCKET, s3_environment, set_s3_environment
from tests.unit.report.invented import ARMS, evaluation, generate_rows, invented_store, write_run

VOID = {"meta", "br", "link", "img", "hr", "input"}
OUTSIDE = re.compile(r"""(?:src|href)\s*=|@import|url\s*\(""", re.IGNORECASE)


class Outline(HTMLParser):
    """Checks that every element is closed, and keeps what a reader sees, and which elements there are."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture
def two(tmp_path: Path) -> Location:
    return invented_store(tmp_path / "store")


def pages(store: Location, runs: list[str], **options: Any) -> tuple[str, str]:
    """What was written: HTML and Markdown."""
    where = write_report(store, runs, page=store.child("pages"), **options)
    assert where == f"{store.child('pages').url}/report.html"
    return store.child("pages").read("report.html").decode(), store.child("pages").read("report.md").decode()


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-").replace("\\", "")


def test_two_runs_are_compared_in_one_sentence(two: Location) -> None:
    html, _ = pages(two, ["sft", "sft_kl"])
    text = plain(Outline(html).text)
    # 62.0 points of 66.0; 0.0866 of 0.4127 nats.
    assert "sft_kl learned 94 % of what sft learned on spell" in text
    assert "and drifted 0.21 times as far." in text
    assert "objective.kind, objective.kl; everything else in them is the same" in text


def test_one_run_says_what_it_learned_and_how_far_it_drifted(two: Location) -> None:
    html, _ = pages(two, ["sft_kl"])
    text = plain(Outline(html).text)
    assert "sft_kl raised spell from 8.0 % to 70.0 % right answers (16 to 140 of 200) and drifted 0.087 nats per token" in text


def of_sequences(store: Location) -> Location:
    """One run more, whose loss is a mean over sequences: 200 tokens each, once in a step of 10 and once in a step of 30."""
    rule = {"kind": "eksft", "variant": "published_code"}
    write_run(store, "replica", {**ARMS["sft_kl"], "objective": rule}, seed=2, questions=200, evaluated=True)
    folder = store.child("runs", "replica")
    line, part = (
        read_metrics(folder)[0],
        {"share_kl": 0.0, "share_rkl": 40.0, "rkl": 0.2, "share_collision": 40.0, "collision": 0.5},
    )
    lines = [
        {**line, **part, "step": 1, "share_ce": 240.0, "normaliser": 10.0},
        {**line, **part, "step": 2, "share_ce": 120.0, "normaliser": 30.0},
    ]
    folder.replace("metrics.jsonl", "".join(json.dumps(one) + "\n" for one in lines).encode())
    return store


def test_a_loss_over_sequences_has_tokens_per_sequence_and_no_share(two: Location) -> None:
    html, markdown = pages(of_sequences(two), ["sft", "replica"])
    table = plain(markdown).split("## What the objective did")[1].split("## Answers")[0]
    assert "| replica | cross-entropy | 150.0 per sequence | 120.0 per sequence | 240.0 per sequence |" in table
    assert "| replica | Σp² of the student | 40.0 per sequence |" in table
    assert "| sft | cross-entropy | 100.0 % | 100.0 % | 100.0 % |" in table
    assert not [row for row in table.splitlines() if row.startswith("| replica") and "%" in row]
    assert "Where the loss is a mean over sequences" in table
    section = html.split("What the objective did")[1].split("<h2>")[0]
    assert section.count('class="meter') == 1, "of the other run alone"
    assert "150.0 per sequence" in plain(section)
    assert "Where the loss is a mean over sequences" in section
    assert "mean over sequences" not in pages(two, ["sft", "sft_kl"])[0]


def test_a_replica_is_the_only_rule_that_counts_sequences(two: Location) -> None:
    """What the page goes by is what the rules do."""
    told = Signals(label_logprob=np.full(8, -1, np.float32), entropy=np.ones(8, np.float32), rank=np.ones(8, np.uint32), vocabulary=9,
                   anchors=np.ones(8, np.bool_))  # fmt: skip
    rules = [kind.model_validate({"kind": get_args(kind.model_fields["kind"].annotation)[0]}) for kind in get_args(Objective)]
    [run] = read_runs(two, ["sft"])
    for rule in [*rules, Eksft(kind="eksft", variant="published_code")]:
        counts_one = float(rule.counts(told)[0].sum()) == 1.0
        assert replace(run, config={"objective": rule.model_dump()}).counts_sequences == counts_one, rule


def test_every_part_of_the_loss_has_a_name() -> None:
    from distft.objectives.loss import PARTS as parts  # noqa: N811  (torch, which the page does without)

    assert tuple(PARTS) == parts


def test_sections_come_in_order(two: Location) -> None:
    html, _ = pages(two, ["sft", "sft_kl"])
    assert re.findall(r"<h2>(.*?)</h2>", html) == [
        "Gained against moved", "Results", "Learning curves", "What the objective did with the tokens", "Answers", "Cost",
        "Exact configuration", "Making it again",
    ]  # fmt: skip
    assert html.count('class="plot"') == 2 + 5 + 3  # trade-offs; loss, ce, kl, drift, NLL; optimizer


def test_markdown_has_the_numbers_of_the_json(two: Location) -> None:
    _, markdown = pages(two, ["sft", "sft_kl"])
    text = plain(markdown)
    for name in ARMS:
        summary = json.loads(two.child("runs", name, "eval").read("summary.json"))
        spell, nll, drift = summary["scores"]["spell"]["after"], summary["scores"]["spell-nll"]["after"], summary["drift"]
        right = round(spell["accuracy"] * spell["count"])
        assert re.search(rf"\| {name} \| {100 * spell['accuracy']:.1f} % \| .* \| {right} of {spell['count']} \|", text)
        assert re.search(rf"\| {name} \| {nll['nll']:.3f} \| .* \| {nll['count']} \|", text)
        assert re.search(rf"\| {name} \| {drift['kl']:.3f} \| .* \| {drift['nll']:.3f} \| {drift['tokens']:,} \|", text)
        steps = read_metrics(two.child("runs", name))
        assert f"| {name} | {len(steps)} | 3.00 | {sum(line['tokens'] for line in steps):,} |" in text


def test_the_same_store_gives_the_same_bytes(two: Location) -> None:
    assert pages(two, ["sft", "sft_kl"]) == pages(two, ["sft", "sft_kl"])


def test_nothing_comes_from_outside(two: Location) -> None:
    html, _ = pages(two, ["sft", "sft_kl"])
    assert OUTSIDE.findall(html) == []
    assert "default-src 'none'" in html
    assert not {"script", "link", "img", "iframe", "object"} & set(Outline(html).tags)


CANARY = """"'><script>alert("canary")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}</style></svg>\N{NULL}\ud800"""


def test_what_models_and_run_files_say_stays_text(tmp_path: Path) -> None:
    canary = CANARY.replace("\ud800", "")
    store = invented_store(tmp_path / "store", answer=canary)
    folder = store.child("runs", "sft")
    folder.replace("config.yaml", folder.read("config.yaml").replace(b"data/train.jsonl", b"'<script>x</script>&'"))
    # A run folder that somebody made by hand, with a name that no config may have.
    write_run(store, "<b onload=x>`|", ARMS["sft"], seed=3, questions=200, evaluated=True, answer=canary)
    html, markdown = pages(store, ["sft", "sft_kl", "<b onload=x>`|"], title=canary)
    seen = Outline(html)
    assert not {"script", "img", "b onload", "iframe"} & set(seen.tags)
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert '<script>alert("canary")</script>' in seen.text
    assert "{{ 7 * 7 }}" in seen.text
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", html)[0]
    outside_fences = re.sub(r"^(`{3,})\n.*?\n\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"(?<!\\)<", outside_fences)
    assert "\\<script\\>" in outside_fences


def test_lone_surrogates_do_not_stop_the_page(tmp_path: Path) -> None:
    store = invented_store(tmp_path / "store", names=("sft",))
    html, _ = pages(store, ["sft"], title="a\ud800b")
    assert "<h1>a?b</h1>" in html


def test_a_run_without_evaluation_still_has_a_page(tmp_path: Path) -> None:
    store = invented_store(tmp_path / "store", names=("sft",), evaluated=False)
    html, markdown = pages(store, ["sft"])
    text = plain(Outline(html).text)
    assert "sft was trained for 120 steps and was not evaluated, so what it learned is not known; it drifted 0.413" in text
    assert "Run distft export, then distft evaluate with its config." in text
    assert "<h2>Learning curves</h2>" in html
    assert "<h2>Answers</h2>" not in html
    assert "was not evaluated" in markdown


def test_evaluated_and_unevaluated_runs_go_together(tmp_path: Path) -> None:
    store = invented_store(tmp_path / "store", names=("sft",))
    write_run(store, "later", ARMS["sft_kl"], seed=1, questions=200, evaluated=False)
    html, _ = pages(store, ["sft", "later"])
    text = plain(Outline(html).text)
    assert "sft raised spell from 8.0 % to 74.0 %" in text
    assert "later was trained for 120 steps and was not evaluated" in text


def test_a_run_that_only_began_has_a_page(tmp_path: Path) -> None:
    store = open_location(str(tmp_path))
    store.child("runs", "fresh").replace("config.yaml", b"name: fresh\n")
    html, _ = pages(store, ["fresh"])
    assert "fresh has not been trained yet." in Outline(html).text
    assert comparison_rows(store, ["fresh"])[0]["drift"] is None


@pytest.mark.parametrize("name", ["nobody", "../sft", "..", "", "sft/model", "a\0b"])
def test_a_run_that_is_not_there_is_named(two: Location, name: str) -> None:
    with pytest.raises(MissingArtifactError, match=r"There is no run .* Runs here: sft, sft_kl\."):
        write_report(two, ["sft", name], page=two)
    assert not two.exists("report.html")


def test_no_run_at_all_is_an_error(two: Location) -> None:
    with pytest.raises(MissingArtifactError, match="No run was named"):
        write_report(two, [], page=two)


@pytest.mark.parametrize("name", ["a", "A.b-c_d", "0." + "x" * 98])
def test_odd_but_lawful_names(tmp_path: Path, name: str) -> None:
    store = invented_store(tmp_path / "store", names=(name, "other"))
    html, markdown = pages(store, [name, "other"])
    assert name in Outline(html).text
    assert name in plain(markdown)
    assert all(len(line) < 80 + LONGEST_NAME for line in comparison_table(comparison_rows(store, [name, "other"])).splitlines())


def test_a_name_given_twice_counts_once(two: Location) -> None:
    assert [row["run"] for row in comparison_rows(two, ["sft", "sft_kl", "sft"])] == ["sft", "sft_kl"]


def test_the_store_may_have_moved(tmp_path: Path) -> None:
    """The summary holds where the items once lay; only the artifact's id in it is believed."""
    invented_store(tmp_path / "store")
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    (run,) = read_runs(open_location(str(tmp_path / "elsewhere")), ["sft"])
    assert [task.after.rows is not None for task in run.tasks] == [True, True]


def summary_of(store: Location, run: str) -> dict[str, Any]:
    return json.loads(store.child("runs", run, "eval").read("summary.json"))


def put_summary(store: Location, run: str, summary: dict[str, Any]) -> None:
    store.child("runs", run, "eval").replace("summary.json", json.dumps(summary).encode())


def test_a_summary_that_contradicts_its_artifact_is_refused(two: Location) -> None:
    summary = summary_of(two, "sft")
    summary["scores"]["spell"]["after"]["accuracy"] = 0.99
    put_summary(two, "sft", summary)
    with pytest.raises(CorruptArtifactError, match=r"the summary says .*0\.99"):
        write_report(two, ["sft"], page=two)


def test_items_that_were_changed_are_refused(two: Location) -> None:
    path = Path(summary_of(two, "sft")["scores"]["spell"]["after"]["items"])
    path.write_bytes(path.read_bytes().replace(b'"right": false', b'"right": true '))
    with pytest.raises(CorruptArtifactError, match="sha256"):
        write_report(two, ["sft"], page=two)


def test_items_that_are_gone_are_said_to_be(two: Location) -> None:
    summary = summary_of(two, "sft")
    folder = Path(summary["scores"]["spell"]["after"]["items"]).parent.parent
    (folder / "MANIFEST.json").unlink()
    html, _ = pages(two, ["sft"])
    text = Outline(html).text
    assert "sft, task spell: the items are no longer in the store" in text
    assert "<h2>Answers</h2>" not in html


def test_scores_of_other_weights_are_pointed_out(two: Location) -> None:
    write_run(two, "twin", ARMS["sft_kl"], seed=1, questions=200, evaluated=True)
    put_summary(two, "sft", summary_of(two, "twin"))
    assert "the scores are of other weights than the exported ones" in Outline(pages(two, ["sft"])[0]).text


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "eval/summary.json"])
def test_a_file_that_is_not_what_it_should_be_is_named(two: Location, name: str) -> None:
    two.child("runs", "sft").replace(name, b"[1, {\n")
    with pytest.raises(CorruptArtifactError, match=Path(name).name):
        write_report(two, ["sft"], page=two)


def test_a_summary_of_another_shape_is_named(two: Location) -> None:
    put_summary(two, "sft", {"scores": {"spell": {"before": 3}}})
    with pytest.raises(CorruptArtifactError, match=r"summary\.json"):
        write_report(two, ["sft"], page=two)


def test_the_log_is_read_as_training_reads_it(two: Location) -> None:
    folder = two.child("runs", "sft")
    folder.replace("metrics.jsonl", folder.read("metrics.jsonl") + b'{"step": 121, "lo')
    (run,) = read_runs(two, ["sft"])
    assert list(run.metrics) == read_metrics(folder)


def test_runs_that_were_asked_differently_are_not_set_against_each_other(two: Location) -> None:
    summary = summary_of(two, "sft_kl")
    for label, arm in (("before", None), ("after", ARMS["sft_kl"])):
        weights = {"files": {"model.safetensors": {"before": "0", "after": "1"}[label] * 64}, "config": "2" * 64}
        rows = generate_rows(arm, 5, 40, "")
        summary["scores"]["spell"][label] = evaluation(two, rows, {"weights": weights}, "other questions")
    put_summary(two, "sft_kl", summary)
    html, _ = pages(two, ["sft", "sft_kl"])
    text = plain(Outline(html).text)
    assert "their gains cannot be set against each other" in text
    assert "% of what sft learned" not in text
    assert "did not start from the same scores on the same items" in text


def test_a_drift_that_is_rounding_gives_no_ratio(two: Location) -> None:
    summary = summary_of(two, "sft")
    put_summary(two, "sft", {**summary, "drift": {**summary["drift"], "kl": 2e-5}})
    text = plain(Outline(pages(two, ["sft", "sft_kl"])[0]).text)
    assert "drifted 0.087 nats per token (sft: 0.000020)." in text


def test_another_drift_meter_gives_no_ratio(two: Location) -> None:
    summary = summary_of(two, "sft_kl")
    put_summary(two, "sft_kl", {**summary, "drift": {**summary["drift"], "tokens": 99}})
    text = plain(Outline(pages(two, ["sft", "sft_kl"])[0]).text)
    assert "times as far" not in text
    assert "drifted 0.087 nats per token (sft: 0.413, not measured alike)" in text
    assert "Drift was not measured alike" in text


def test_a_gain_that_may_be_chance_is_called_so(tmp_path: Path) -> None:
    weak = {"objective": {"kind": "sft"}, "right": 0.09, "nll": 2.4, "drift": 0.02}
    store = invented_store(tmp_path / "store", arms={"weak": weak}, names=("weak", "weak2"))
    alone = plain(Outline(pages(store, ["weak"])[0]).text)
    assert "which 200 questions cannot tell from no change, and drifted 0.020" in alone
    both = plain(Outline(pages(store, ["weak", "weak2"])[0]).text)
    assert "gained nothing on spell that 200 questions can tell from chance, so no share of it is given" in both
    assert re.search(r"weak2? drifted 1\.0 times as far as weak2?\.", both)


def test_no_change_at_all_is_called_so(tmp_path: Path) -> None:
    none = {"objective": {"kind": "sft"}, "right": 0.0, "nll": 2.4, "drift": 0.02}
    store = open_location(str(tmp_path))
    write_run(store, "idle", none, seed=0, questions=6, evaluated=True)
    text = plain(Outline(pages(store, ["idle"])[0]).text)
    assert "idle left spell at 0.0 % right answers (0 of 6 before and after) and drifted 0.020 nats per token" in text


def test_thirty_runs_all_look_different() -> None:
    looks = {(svg.series(place), svg.mark(place, 0.0, 0.0), svg.line([(0.0, 0.0)], place, "mean")) for place in range(32)}
    assert len(looks) == 32


def test_another_teacher_is_not_called_the_untouched_model(two: Location) -> None:
    folder = two.child("runs", "sft_kl")
    folder.replace(
        "config.yaml", folder.read("config.yaml").replace(b"teacher:\n  path: null", b"teacher:\n  path: models/large")
    )
    html, _ = pages(two, ["sft_kl"])
    assert "drift from the teacher" in html
    assert "<title>untouched" not in html  # it has a score, but its own drift from that teacher was not measured


def test_lost_answers_come_first_and_are_counted(two: Location) -> None:
    html, _ = pages(two, ["sft_kl"])
    (run,) = read_runs(two, ["sft_kl"])
    before, after = run.tasks[0].before.rows, run.tasks[0].after.rows
    assert before is not None
    assert after is not None
    lost = [i + 1 for i, (b, a) in enumerate(zip(before, after, strict=True)) if b["right"] and not a["right"]]
    headings = re.findall(r"<h4>(.*?) <span>(\d+) of 200", html)
    assert headings[0] == ("Right before, wrong after", str(len(lost)))
    assert [int(n) for n in re.findall(r"<span>Question (\d+)</span>", html)][:4] == lost[:4]


def test_the_terminals_table(two: Location) -> None:
    table = comparison_table(comparison_rows(two, ["sft", "sft_kl"]))
    assert table.isascii()
    assert table.splitlines()[2].split("   ")[0] == "sft"
    assert "8.0 % -> 74.0 % of 200" in table
    assert "2.406 -> 0.347" in table
    assert table.splitlines()[3].endswith("0.087")
    assert max(map(len, table.splitlines())) <= 100


def test_rows_are_json_with_before_and_after(two: Location) -> None:
    row = json.loads(json.dumps(comparison_rows(two, ["sft"])[0]))
    assert row["accuracy"] == {"task": "spell", "before": 0.08, "after": 0.74, "count": 200}
    assert row["target_nll"]["task"] == "spell-nll"
    assert row["drift"] == 0.4127
    low, high = row["tasks"]["spell"]["after_interval"]
    assert low < 0.74 < high


def test_a_long_run_and_a_single_step_are_drawn(tmp_path: Path) -> None:
    store = invented_store(tmp_path / "store", names=("sft",))
    folder = store.child("runs", "sft")
    line = json.loads(folder.read("metrics.jsonl").splitlines()[0])
    folder.replace(
        "metrics.jsonl", "".join(json.dumps({**line, "step": n, "loss": 2.0 + n % 3}) + "\n" for n in range(1, 20_001)).encode()
    )
    long, _ = pages(store, ["sft"])
    assert len(long) < 400_000
    folder.replace("metrics.jsonl", (json.dumps({**line, "ce": float("nan"), "loss": 0.0}) + "\n").encode())
    Outline(pages(store, ["sft"])[0])


def test_a_store_on_s3_has_a_page_too(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_s3_environment(monkeypatch, s3_environment(s3_server))
    monkeypatch.setenv("DISTFT_CACHE_DIR", str(tmp_path))
    store = open_location(f"s3://{BUCKET}/report")
    for place, (name, arm) in enumerate(ARMS.items()):
        write_run(store, name, arm, seed=place, questions=40, evaluated=True)
    html, _ = pages(store, ["sft", "sft_kl"])
    assert "of 40 questions" in Outline(html).text


def test_neither_torch_nor_matplotlib_is_loaded(two: Location) -> None:
    program = f"""
import sys
from distft.report.page import write_report
from distft.store.location import open_location
store = open_location({two.url!r})
write_report(store, ["sft", "sft_kl"], page=store)
heavy = {{"torch", "transformers", "ray", "deepspeed", "matplotlib"}} & set(sys.modules)
sys.exit(f"loaded {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
