"""Anchors: from characters of an answer to tokens, and everything that an annotation can get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.config.schema import Data
from distft.corpus.anchors import Anchor, AnnotatedRow, Annotation
from distft.corpus.build import build_corpus, corpus_identity
from distft.corpus.chat import Renderer
from distft.corpus.files import Row
from distft.corpus.reader import Corpus
from distft.errors import DataError
from distft.store.location import open_location
from distft.store.model_folder import resolve_model
from tests.helpers.models import CHATML, MARKED_CHATML, tiny_model_folder
from tests.unit.corpus.conftest import chat, encode, row, write_jsonl

Make = Callable[..., Renderer]

TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
THINKING = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
SHOUTING = CHATML.replace("message['content']", "message['content'] | upper")


def marked(row: Row, *anchors: dict[str, Any]) -> AnnotatedRow:
    made = tuple(
        Anchor(start=one.get("start", 0), end=one.get("end"), message=one.get("message"), text=one.get("text"),
               place=f"a.jsonl, row 1, anchor {number}")
        for number, one in enumerate(anchors, start=1)
    )  # fmt: skip
    return AnnotatedRow(row.file, row.number, row.value, made)


def learned(renderer: Renderer, row: Row, *anchors: dict[str, Any]) -> list[str]:
    """The text of each run of anchored tokens; all of them are supervised."""
    document = encode(renderer, marked(row, *anchors))
    assert not (document.anchored & ~document.supervised).any()
    plain = encode(renderer, row)
    assert plain.tokens.tolist() == document.tokens.tolist()
    assert plain.supervised.tolist() == document.supervised.tolist()
    assert not plain.anchored.any()
    runs: list[list[int]] = [[]]
    for token, chosen in zip(document.tokens.tolist(), document.anchored.tolist(), strict=True):
        if chosen:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [str(renderer.tokenizer.decode(run)) for run in runs if run]


TALK = chat("Who?", "It was Ada.", "When?", "In 1843, I think.")


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML, TRIMMING])
def test_characters_of_a_message_become_tokens(renderer: Make, template: str) -> None:
    made = renderer(template=template)
    assert learned(made, TALK, {"message": 2, "start": 7, "end": 10, "text": "Ada"}) == ["Ada"]
    assert learned(made, TALK, {"message": 4, "start": 3, "end": 7}, {"message": 2, "start": 0, "end": 2}) == ["It", "1843"]
    assert learned(made, TALK, {"message": 4, "start": 3, "end": 5}, {"message": 4, "start": 4, "end": 7}) == ["1843"]


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML, TRIMMING])
def test_without_an_end_it_takes_the_end_of_the_turn_along(renderer: Make, template: str) -> None:
    made = renderer(template=template)
    assert learned(made, TALK, {"message": 4, "start": 9}) == ["I think.<|im_end|>"]
    assert learned(made, TALK, {"message": 2}) == ["It was Ada.<|im_end|>"]
    assert learned(made, chat("Who?", "Ada."), {}) == ["Ada.<|im_end|>"]


def test_white_space_that_the_template_trims_moves_nothing(renderer: Make) -> None:
    made = renderer(template=TRIMMING)
    assert learned(made, chat("Who?", "\n  It was Ada. \n"), {"message": 2, "start": 10, "end": 13, "text": "Ada"}) == ["Ada"]
    assert learned(made, chat("Who?", "\n  It was Ada. \n"), {"message": 2, "start": 0, "end": 5}) == ["It"]
    with pytest.raises(DataError, match="marks no supervised token"):
        learned(made, chat("Who?", "\n  It was Ada. \n"), {"message": 2, "start": 0, "end": 2})


def test_what_a_template_leaves_of_a_message_can_be_marked_and_the_rest_cannot(renderer: Make) -> None:
    made = renderer(template=THINKING)
    said = chat("Who?", "<think>Ada?</think>It was Ada.")
    assert learned(made, said, {"message": 2, "start": 26, "end": 29, "text": "Ada"}) == ["Ada"]
    with pytest.raises(DataError, match="marks 'Ada', which the chat template leaves out"):
        learned(made, said, {"message": 2, "start": 7, "end": 10, "text": "Ada"})
    with pytest.raises(DataError, match="the chat template rewrites what it is in"):
        learned(renderer(template=SHOUTING), chat("Who?", "It was Ada."), {"message": 2, "start": 7, "end": 10})


def test_a_token_is_marked_by_one_character_of_it(renderer: Make) -> None:
    made = renderer(vocabulary=384)
    whole = learned(made, chat("Hello?", "The capital of France is Paris."), {"start": 15, "end": 16})
    assert len(whole) == 1
    assert "F" in whole[0]
    assert len(whole[0]) > 1


@pytest.mark.parametrize("adds_bos", [False, True])
def test_completions_and_texts(renderer: Make, adds_bos: bool) -> None:
    made = renderer("prompt_completion", adds_bos=adds_bos)
    pair = row(prompt="2 + 3 = ", completion="five, I say")
    assert learned(made, pair, {"start": 0, "end": 4, "text": "five"}) == ["five"]
    assert learned(made, pair, {"start": 8}) == ["say<|im_end|>"]
    made = renderer("text", adds_bos=adds_bos)
    assert learned(made, row(text="Two and three."), {"start": 4, "end": 7}) == ["and"]
    assert learned(made, row(text="Two and three."), {"start": 8}) == ["three.<|im_end|>"]
    messages = row(prompt=[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}],
                   completion=[{"role": "user", "content": "You?"}, {"role": "assistant", "content": "Ada."}])  # fmt: skip
    made = renderer("prompt_completion")
    assert learned(made, messages, {"start": 0, "end": 3}) == ["Ada"]
    assert learned(made, messages, {"message": 2, "start": 0, "end": 3}) == ["Ada"]


@pytest.mark.parametrize(
    ("anchor", "says"),
    [
        ({"message": 2, "start": 7, "end": 10, "text": "Eva"}, "said to be 'Eva', and at characters 7 to 10 stands 'Ada'"),
        ({"message": 2, "start": 7, "end": 12}, "is at characters 7 to 12, and what it is in has 11"),
        ({"message": 2, "start": 11}, "is at characters 11 to 11, and what it is in has 11"),
        ({"message": 5, "start": 0, "end": 1}, "is in message 5, and there are 4"),
        ({"message": 3, "start": 0, "end": 1}, "is in message 3, which is the user's"),
        ({"start": 0, "end": 1}, "does not say in which of the row's 2 assistant turns it is"),
    ],
)
def test_an_anchor_that_is_not_there(renderer: Make, anchor: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says) as told:
        learned(renderer(), TALK, anchor)
    assert told.value.where == "a.jsonl, row 1, anchor 1"
    assert told.value.help


def test_a_part_that_no_template_marks_is_not_dropped_in_silence(renderer: Make) -> None:
    parts = "{{ message['content'].split('|')[0] }}|{% generation %}{{ message['content'].split('|')[1] }}"
    halves = MARKED_CHATML.replace("{% generation %}{{ message['content'] }}", parts)
    said = chat("Who?", "thinking Ada|It was Ada.")
    made = renderer(template=halves)
    assert learned(made, said, {"message": 2, "start": 20, "end": 23}) == ["Ada"]
    for anchor in ({"message": 2, "start": 9, "end": 18}, {"message": 2}):
        with pytest.raises(DataError, match="marks text that is not supervised"):
            learned(made, said, anchor)
    with pytest.raises(DataError, match="marks no supervised token"):
        learned(made, said, {"message": 2, "start": 9, "end": 12})


def test_what_cannot_be_traced_is_told_of_the_anchor(renderer: Make) -> None:
    dropping = MARKED_CHATML.replace(
        "{{ message['content'] }}<|im_end|>{% endgen", "{{ message['content'] | length }}<|im_end|>{% endgen"
    )
    with pytest.raises(DataError, match="the anchor cannot be traced") as told:
        learned(renderer(template=dropping), chat("Who?", "Ada."), {"message": 2, "start": 0, "end": 3})
    assert told.value.where == "a.jsonl, row 1, anchor 1"


def test_token_0_is_never_one(renderer: Make) -> None:
    assert learned(renderer("text"), row(text="Two and three."), {"start": 0, "end": 3, "text": "Two"}) == ["wo"]


def test_a_message_where_there_are_none(renderer: Make) -> None:
    with pytest.raises(DataError, match="is in message 2, and the row has no messages"):
        learned(renderer("text"), row(text="Two and three."), {"message": 2, "start": 0, "end": 3})


@pytest.mark.parametrize("max_tokens", [30, 5])
def test_an_anchor_that_is_cut_off(renderer: Make, max_tokens: int) -> None:
    long = chat("Who?", "It was Ada, and nobody else.")
    with pytest.raises(DataError, match=f"which data.max_tokens={max_tokens} cuts off") as told:
        renderer().encode([marked(long, {"message": 2, "start": 20, "end": 24})], max_tokens)
    assert told.value.help == "Raise data.max_tokens, or remove the anchor."


# --- the file --------------------------------------------------------------------------------------------------------

ROWS = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": f"It was {name}."}]}
        for name in ("Ada", "Bob", "Eve")]  # fmt: skip


def line(row: int, start: int = 7, end: int | None = 10, **more: Any) -> dict[str, Any]:
    return {"row": row, "anchors": [{"message": 2, "start": start, "end": end, **more}]}


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Data]:
    def make(*lines: Any, rows: list[Any] = ROWS, **settings: Any) -> Data:
        train = {"path": str(write_jsonl(tmp_path / "train.jsonl", rows)), **settings}
        return Data.model_validate({"train": {"anchors": str(write_jsonl(tmp_path / "anchors.jsonl", list(lines))), **train}})

    return make


@pytest.fixture
def built(tmp_path: Path) -> Callable[[Data], Corpus]:
    def make(config: Data) -> Corpus:
        store = open_location(str(tmp_path / "store"))
        folder = (
            tiny_model_folder(tmp_path / "model", vocabulary=261) if not (tmp_path / "model").exists() else tmp_path / "model"
        )
        manifest = build_corpus(config, resolve_model(str(folder), None), store)
        return Corpus.open(store.child("corpus", manifest.id), tmp_path / "staging")

    return make


def test_a_corpus_knows_its_anchors_and_names_documents_as_without(
    data: Callable[..., Data], built: Callable[[Data], Corpus], capsys: pytest.CaptureFixture[str]
) -> None:
    annotated = built(data(line(1, text="Ada"), line(3, end=None), line(3, 0, 2)))
    told = capsys.readouterr().err
    plain = built(Data.model_validate({"train": {"path": data(line(1)).train.path}}))
    assert annotated.digests("train") == plain.digests("train")
    assert annotated.folder.url != plain.folder.url
    for one, bare in zip(annotated.documents("train"), plain.documents("train"), strict=True):
        assert one.supervised.tolist() == bare.supervised.tolist()
        assert not bare.anchors.any()
    texts = [bytes(one.tokens[one.anchors][:10].tolist()) for one in annotated.documents("train")]
    assert [len(text) for text in texts] == [3, 0, 2 + len("Eve.") + 1]
    assert "10 of 36 supervised tokens are anchors, in 2 of 3 documents" in told
    assert annotated.manifest.facts["train"]["anchor_tokens"] == 10


def test_identity_is_the_annotations_bytes(data: Callable[..., Data], tmp_path: Path) -> None:
    model = resolve_model(str(tiny_model_folder(tmp_path / "model")), None)
    one = corpus_identity(data(line(1)), model)
    assert corpus_identity(data(line(1)), model) == one
    assert corpus_identity(data(line(2)), model) != one
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes((tmp_path / "anchors.jsonl").read_bytes())
    config = data(line(2))
    assert corpus_identity(
        config.model_copy(update={"train": config.train.model_copy(update={"anchors": str(moved)})}), model
    ) == (corpus_identity(config, model))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([line(4)], "there is no row 4 in data.train, which has 3 rows"),
        ([line(1, file="b.jsonl") | {"file": "b.jsonl"}], "has 'file'"),
        ([line(1) | {"file": "b.jsonl"}], "no file of data.train is called b.jsonl"),
        ([line(1) | {"file": "a/train.jsonl"}], "without its folders is wanted"),
        ([line(0)], "`row` is 0; a whole number from 1 on is wanted"),
        ([line(1) | {"row": True}], "`row` is True"),
        ([line(1, -1)], "`start` is -1"),
        ([line(1, 7, 7)], "the anchor ends at character 7 and starts at 7"),
        ([line(1, text=5)], "`text` is 5; a string is wanted"),
        ([line(1) | {"anchor": 1}], "a line has 'anchor'; known are anchors, file, row"),
        ([{"row": 1}], "the line has no 'anchors'"),
        ([{"row": 1, "anchors": []}], "no list of at least one anchor"),
        ([{"row": 1, "anchors": [7]}], "an anchor must be an object, not int"),
        ([[1]], "a row must be a JSON object, not list"),
        ([{"anchors": [{}]}], "the line has no 'row'"),
        ([], "there are no anchors"),
    ],
)
def test_a_bad_annotation(data: Callable[..., Data], built: Callable[[Data], Corpus], lines: list[Any], says: str) -> None:
    with pytest.raises(DataError) as told:
        built(data(*lines))
    assert says in told.value.problem
    assert "anchors.jsonl" in told.value.where
    assert told.value.help


def test_an_annotation_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        Annotation(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match=r"read from a \.jsonl file"):
        Annotation(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match="home directory"):
        Annotation("~nobody-of-that-name/a.jsonl")
    (tmp_path / "long.jsonl").write_text('{"row": 1, "anchors": [{"start": ' + "9" * 5_000 + "}]}")
    with pytest.raises(DataError, match="not JSON"):
        Annotation(str(tmp_path / "long.jsonl"))


def test_several_files_are_told_apart(tmp_path: Path, built: Callable[[Data], Corpus]) -> None:
    for name in ("one", "two"):
        write_jsonl(tmp_path / "rows" / f"{name}.jsonl", ROWS)
    anchors = write_jsonl(tmp_path / "anchors.jsonl", [line(2) | {"file": "two.jsonl"}])
    config = Data.model_validate({"train": {"path": str(tmp_path / "rows"), "anchors": str(anchors)}})
    found = [(one.file, one.row) for one in built(config).documents("train") if one.anchors.any()]
    assert found == [("two.jsonl", 2)]
    write_jsonl(anchors, [line(2)])
    with pytest.raises(DataError, match="the data has 2 files, and the line does not say in which its row is"):
        built(config)


def test_files_that_change_their_names_are_other_data(tmp_path: Path, built: Callable[[Data], Corpus]) -> None:
    """Contents and their order stay as they are, but the line means the other file now."""
    rows = tmp_path / "rows"
    write_jsonl(rows / "a.jsonl", ROWS[:1])
    write_jsonl(rows / "b.jsonl", ROWS[1:2])
    anchors = write_jsonl(tmp_path / "anchors.jsonl", [line(1) | {"file": "b.jsonl"}])
    config = Data.model_validate({"train": {"path": str(rows), "anchors": str(anchors)}})
    before = built(config)
    (rows / "b.jsonl").rename(rows / "c.jsonl")
    (rows / "a.jsonl").rename(rows / "b.jsonl")
    after = built(config)
    assert before.folder.url != after.folder.url
    for corpus, told in ((before, b"Bob"), (after, b"Ada")):
        [text] = [bytes(one.tokens[one.anchors].tolist()) for one in corpus.documents("train") if one.anchors.any()]
        assert len(text) == len(told)
    assert [bool(one.anchors.any()) for one in after.documents("train")] == [True, False]


def test_files_of_one_name_cannot_be_told_apart(tmp_path: Path, built: Callable[[Data], Corpus]) -> None:
    for folder in ("a", "b"):
        write_jsonl(tmp_path / "rows" / folder / "train.jsonl", ROWS)
    anchors = write_jsonl(tmp_path / "anchors.jsonl", [line(2) | {"file": "train.jsonl"}])
    config = Data.model_validate({"train": {"path": str(tmp_path / "rows" / "**" / "*.jsonl"), "anchors": str(anchors)}})
    with pytest.raises(DataError, match=r"2 files of data.train are called train.jsonl"):
        built(config)


def test_rows_beyond_the_limit_are_not_missed_unless_they_are_all(
    data: Callable[..., Data], built: Callable[[Data], Corpus]
) -> None:
    found = built(data(line(1), line(3), limit=2))
    assert [bool(one.anchors.any()) for one in found.documents("train")] == [True, False]
    with pytest.raises(DataError, match="none of its anchors is in the 2 rows that are taken"):
        built(data(line(3), limit=2))


def test_a_limit_forgives_nothing_else(data: Callable[..., Data], built: Callable[[Data], Corpus], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file of data.train is called typo.jsonl"):
        built(data(line(1), line(3) | {"file": "typo.jsonl"}, limit=2))
    config = data(line(1), line(2), limit=2)
    path = tmp_path / "train.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, "", *others]))  # row 2 is blank now
    with pytest.raises(DataError, match=r"there is no row 2 in data.train, which has 2 rows"):
        built(config)


def test_it_is_taken_up_where_it_was_cut_off(data: Callable[..., Data], tmp_path: Path) -> None:
    """Rows that were done already still count as there."""
    model = resolve_model(str(tiny_model_folder(tmp_path / "model", vocabulary=261)), None)
    config, store = data(line(1), line(300), rows=ROWS * 100), open_location(str(tmp_path / "store"))
    whole = build_corpus(config, model, store, part_tokens=2_000)
    assert len(whole.files) > 1
    folder = store.child("corpus", whole.id)
    folder.delete("MANIFEST.json")
    last = sorted(folder.child("parts").names())[-1]
    folder.child("parts").delete(last)
    assert build_corpus(config, model, store, part_tokens=2_000).facts == whole.facts


def test_the_files_words_are_as_documented(tmp_path: Path) -> None:
    """The line in the module's docstring, which README shows too."""
    import distft.corpus.anchors as module

    example = next(text.strip() for text in (module.__doc__ or "").splitlines() if text.strip().startswith("{"))
    readme = Path(__file__).parents[3] / "README.md"
    assert example in readme.read_text()
    assert Annotation(str(write_jsonl(tmp_path / "a.jsonl", [json.loads(example)])))
