"""Reading rows, refusing what cannot be read, and the identity of data by its content."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distft.config.schema import Source
from distft.corpus import sources
from distft.corpus.sources import rows, source_identity
from distft.errors import DataError
from tests.unit.corpus.conftest import write_jsonl

ROWS: list[dict[str, Any]] = [{"text": f"row {n} \u2028 é 😀 {'x' * n}", "other": n} for n in range(300)]


def source(path: Path | str, format: str = "text", **settings: Any) -> Source:
    return Source.model_validate({"path": str(path), "format": format, **settings})


def texts(given: Source) -> list[str]:
    return [row.value["text"] for row in rows(given)]


def write_array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=70)


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def write_lines(path: Path) -> None:
    write_jsonl(path, ROWS)


KINDS: list[tuple[str, Callable[[Path], None]]] = [
    ("a.jsonl", write_lines), ("a.json", write_lines), ("a.json", write_array), ("a.parquet", write_parquet),
    ("a.arrow", write_arrow_file), ("a.arrow", write_arrow_stream),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write"), KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    found = list(rows(source(tmp_path / name)))
    assert [row.value["text"] for row in found] == [row["text"] for row in ROWS]
    assert [row.number for row in found] == list(range(1, 301))
    assert {(row.file, row.name) for row in found} == {(str(tmp_path / name), name)}
    assert texts(source(tmp_path / name, limit=7)) == [row["text"] for row in ROWS[:7]]


@pytest.mark.parametrize("block", [1, 7, 64])
def test_a_json_array_is_read_the_same_through_any_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("distft.corpus.files.BLOCK_BYTES", block)
    write_array(tmp_path / "a.json")
    assert texts(source(tmp_path / "a.json")) == [row["text"] for row in ROWS]


def test_numbers_are_lines_where_lines_are_blank(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n   \n{"text": "b"}')
    assert [(row.number, row.value["text"]) for row in rows(source(tmp_path / "a.jsonl"))] == [(1, "a"), (4, "b")]


def test_a_byte_order_mark_is_no_part_of_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf [{"text": "a"}]')
    assert texts(source(tmp_path / "a.json")) == ["a"]


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", [{"text": "2"}])
    write_jsonl(tmp_path / "a.jsonl", [{"text": "1"}])
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / "state.json").write_text("{}")
    pq.write_table(pa.table({"text": ["3"]}), tmp_path / "c.parquet")
    write_jsonl(tmp_path / "below" / "d.jsonl", [{"text": "4"}])
    assert texts(source(tmp_path)) == ["1", "2", "3"]
    assert texts(source(tmp_path / "*.jsonl")) == ["1", "2"]
    assert texts(source(f"{tmp_path}/**/*.jsonl")) == ["1", "2", "4"]
    write_jsonl(tmp_path / "odd[1].jsonl", [{"text": "5"}])
    assert texts(source(tmp_path / "odd[1].jsonl")) == ["5"]


@pytest.mark.parametrize(
    ("name", "content", "where", "told"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "row 2", "not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', "row 3", "not UTF-8: byte 0xff"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "row 1", "not UTF-8"),
        ("a.jsonl", b'["a"]\n', "row 1", "must be a JSON object, not list"),
        ("a.jsonl", b'{"text": "a"}\n{"txet": "b", "n": 1}\n', "row 2", "no column 'text'; there are: 'txet', 'n'"),
        ("a.jsonl", b"", "", "the file is empty"),
        ("a.jsonl", b"\n\n", "", "the file is empty"),
        ("a.json", b"", "", "the file is empty"),
        ("a.json", b"[]", "", "the file is empty"),
        ("a.json", b'[{"text": "a"}, {"text": "b" "c"}]', "row 2", "not JSON"),
        ("a.json", b'[{"text": "a"}, {"text": "b"', "row 2", "not JSON"),
        ("a.json", b'[{"text": "a"},]', "row 2", "not JSON"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "row 2", "expected ','"),
        ("a.json", b'[{"text": "a"}', "row 2", "the end of the file"),
        ("a.json", b'[{"text": "a"}] x', "row 2", "expected the end of the file, found 'x'"),
        ("a.json", b'[{"text": "a"}, 3]', "row 2", "must be a JSON object, not int"),
        ("a.json", b'[{"text": "\xff"}]', "row 1", "not UTF-8"),
        ("a.parquet", b"not parquet at all", "", "cannot be read"),
        ("a.arrow", b"ARROW1 but no more", "", "cannot be read"),
        ("a.arrow", b"", "", "cannot be read"),
        ("a.csv", b"text\na\n", "", "no reader for .csv"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(tmp_path: Path, name: str, content: bytes, where: str, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        list(rows(source(tmp_path / name)))
    assert told in error.value.problem
    assert error.value.where == (f"{tmp_path / name}, {where}" if where else str(tmp_path / name))
    assert error.value.exit_status == 2


def test_a_missing_column_is_met_with_the_nearest(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"message": []}])
    with pytest.raises(DataError, match="Did you mean 'message'"):
        list(rows(source(tmp_path / "a.jsonl", "chat")))
    pq.write_table(pa.table({"prompt": ["a"], "completions": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'completion'; there are: 'prompt', 'completions'"):
        list(rows(source(tmp_path / "a.parquet", "prompt_completion")))
    assert len(list(rows(source(tmp_path / "a.parquet", "prompt_completion", completion="completions")))) == 1


@pytest.mark.parametrize("path", ["gone.jsonl", "no/such/folder/*.jsonl", "/no/such/folder"])
def test_a_missing_file_is_not_looked_up_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_load_dataset", None)
    with pytest.raises(DataError, match=r"no such file|no file matches"):
        list(rows(source(path)))


def test_a_folder_without_data_and_an_empty_file_among_others(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data files"):
        list(rows(source(tmp_path)))
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(DataError, match="the file is empty") as error:
        list(rows(source(tmp_path)))
    assert error.value.where.endswith("b.jsonl")


def test_options_of_a_data_set_are_refused_with_a_path(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="`split: test` is for a `datasets` name"):
        list(rows(source(tmp_path / "a.jsonl", split="test")))


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Stands for the hub: what `load_dataset` gives, by name, from arrow files as its cache has them."""
    import datasets

    hub: dict[str, Any] = {}

    def load(path: str, name: str | None, split: str, revision: str | None) -> Any:
        given: list[dict[str, Any]] = hub[path]
        datasets.Dataset.from_list(given).save_to_disk(str(tmp_path / path.replace("/", "-")))
        return datasets.Dataset.load_from_disk(str(tmp_path / path.replace("/", "-")))

    monkeypatch.setattr("datasets.load_dataset", load)
    sources._load_dataset.cache_clear()
    yield hub
    sources._load_dataset.cache_clear()


def test_a_data_set_by_name(named: dict[str, Any]) -> None:
    named["some/set"] = ROWS
    found = list(rows(source("some/set", split="test", subset="main")))
    assert [row.value for row in found] == [{"text": row["text"]} for row in ROWS]
    assert (found[-1].number, found[-1].place) == (300, "some/set, row 300")
    with pytest.raises(DataError, match="no column 'messages'; there are: 'text', 'other'"):
        list(rows(source("some/set", "chat")))
    with pytest.raises(DataError, match="no data set of that name could be loaded"):
        list(rows(source("other/set")))


def test_a_named_data_sets_identity_is_its_rows(named: dict[str, Any]) -> None:
    named |= {"a/set": ROWS, "b/set": ROWS, "c/set": [*ROWS[:-1], {**ROWS[-1], "text": "edited"}], "d/set": ROWS[::-1]}
    identities = [source_identity(source(name)) for name in ("a/set", "b/set", "c/set", "d/set")]
    assert identities[0] == identities[1]
    assert len({str(identity["content"]) for identity in identities}) == 3


def test_identity_is_content_in_order_and_no_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "one" / "a.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "one" / "b.jsonl", ROWS[3:])
    before = source_identity(source(tmp_path / "one"))
    (tmp_path / "one").rename(tmp_path / "two")
    (tmp_path / "two" / "a.jsonl").rename(tmp_path / "two" / "aa.jsonl")
    assert source_identity(source(tmp_path / "two")) == before
    assert str(tmp_path) not in str(before)
    assert "jsonl" not in str(before)
    (tmp_path / "two" / "aa.jsonl").rename(tmp_path / "two" / "c.jsonl")  # now read last
    assert source_identity(source(tmp_path / "two")) != before


def test_identity_knows_columns_format_and_limit(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    given = [source(path), source(path, text="other"), source(path, "chat"), source(path, limit=3)]
    assert len({str(source_identity(one)) for one in given}) == 4
    unused = source(path, messages="elsewhere")  # a column that text does not read
    assert source_identity(unused) == source_identity(source(path))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: str) -> None:
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.{kind}"
        given = [{"text": "x" * 1000} for _ in range(count)]
        if kind == "jsonl":
            write_jsonl(path, given)
        elif kind == "json":
            path.write_text(json.dumps(given))
        elif kind == "parquet":
            pq.write_table(pa.Table.from_pylist(given), path, row_group_size=500)
        else:
            table = pa.Table.from_pylist(given)
            with pa.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=500)
        del given
        tracemalloc.start()
        try:
            assert sum(1 for _ in rows(source(path))) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # imports
    small, large = peak(4000), peak(20_000)
    assert large < 1.5 * small + (1 << 20), (small, large)
