"""The contract of a location, the same on a disk and on S3."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distft.errors import ConfigError, CorruptArtifactError, MissingArtifactError, StoreError
from distft.store.location import PARTIAL, Location, open_location
from tests.helpers.race import race

BAD_NAMES = ["", "/etc/passwd", "../up", "a/../../up", "a//b", "./a", "a/", "a\\b", "nul\0", ".."]


def test_a_created_file_reads_back_and_is_listed(store: Location) -> None:
    assert store.create("a/b.bin", b"0123456789")
    assert store.exists("a/b.bin")
    assert store.size("a/b.bin") == 10
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 3, 4) == b"3456"
    assert store.read_range("a/b.bin", 3, 0) == b""
    assert store.names(recursive=True) == ["a/b.bin"]
    assert store.names() == []
    assert store.folders() == ["a"]
    assert store.child("a").names() == ["b.bin"]
    assert store.child("a", "x").url == store.url + "/a/x"


def test_create_never_overwrites(store: Location) -> None:
    assert store.create("name", b"first")
    assert not store.create("name", b"second")
    assert not store.create("name", b"first"), "equal bytes of another writer are not ours"
    assert store.read("name") == b"first"


def test_replace_overwrites(store: Location) -> None:
    store.replace("log", b"one")
    store.replace("log", b"two")
    assert store.read("log") == b"two"


def test_what_is_absent_says_so(store: Location) -> None:
    assert not store.exists("a/b")
    assert store.names(recursive=True) == []
    assert store.folders() == []
    for ask in (lambda: store.read("a/b"), lambda: store.size("a/b"), lambda: store.read_range("a/b", 0, 1)):
        with pytest.raises(MissingArtifactError, match=r"no file .*b"):
            ask()
    store.delete("a/b")


def test_an_empty_file_is_a_file(store: Location) -> None:
    assert store.create("empty", b"")
    assert store.exists("empty")
    assert store.read("empty") == b""
    assert store.size("empty") == 0


def test_a_range_past_the_end_is_an_error_and_not_fewer_bytes(store: Location) -> None:
    store.create("file", b"12345")
    with pytest.raises(CorruptArtifactError, match="ends at byte 5"):
        store.read_range("file", 3, 10)


def test_delete_removes_one_file(store: Location) -> None:
    store.create("a", b"1")
    store.create("b", b"2")
    store.delete("a")
    assert store.names() == ["b"]


def test_listings_are_sorted_and_complete_beyond_a_page(store: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.store.s3 import S3Location

    call = S3Location._call
    small = {"list_objects_v2": {"MaxKeys": 7}}
    monkeypatch.setattr(S3Location, "_call", lambda self, method, **asked: call(self, method, **asked, **small.get(method, {})))
    names = [f"f{index % 2}/{index:04d}" for index in range(40)]
    for name in names:
        store.replace(name, b"")
    assert store.names(recursive=True) == sorted(names)
    assert store.child("f1").names() == [f"{index:04d}" for index in range(1, 40, 2)]
    assert store.folders() == ["f0", "f1"]


def test_upload_puts_a_scratch_file(store: Location) -> None:
    path = store.scratch("data/file")
    path.write_bytes(b"payload")
    assert store.names(recursive=True) == []
    store.upload("data/file", path)
    assert store.read("data/file") == b"payload"
    assert store.names(recursive=True) == ["data/file"]


def test_a_file_has_an_age(store: Location) -> None:
    store.create("file", b"1")
    assert -60 < store.age("file") < 60
    with pytest.raises(MissingArtifactError):
        store.age("absent")


def test_download_copies_a_file(store: Location, tmp_path: Path) -> None:
    store.create("file", b"payload")
    store.download("file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"payload"
    with pytest.raises(MissingArtifactError):
        store.download("other", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_name_leads_out_of_the_folder(store: Location, name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    attempts = [
        lambda: store.read(name), lambda: store.create(name, b"x"), lambda: store.replace(name, b"x"), lambda: store.exists(name),
        lambda: store.upload(name, source), lambda: store.delete(name), lambda: store.child(name), lambda: store.local(name),
        lambda: store.scratch(name), lambda: store.size(name), lambda: store.read_range(name, 0, 1),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(CorruptArtifactError, match="not a name inside a folder"):
            attempt()


def test_check_writable_leaves_nothing(store: Location) -> None:
    store.check_writable()
    assert store.names(recursive=True) == []


def test_a_location_crosses_processes_as_its_url(store: Location) -> None:
    store.create("file", b"payload")
    data = pickle.dumps(store.child("deeper"))
    assert b"canary-secret" not in data
    again = pickle.loads(data)  # noqa: S301  our own bytes
    assert again == store.child("deeper")
    assert again.url == store.url + "/deeper"


def _read_in_worker(location: Location) -> bytes:
    return location.read("file")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_process_reads_what_its_parent_wrote(store: Location, method: str) -> None:
    store.create("file", b"payload")  # also opens the parent's connections, which the child must not share
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(_read_in_worker, (store,)).get(timeout=60) == b"payload"


def test_eight_writers_and_one_winner(store: Location) -> None:
    store.names()
    for round in range(5):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda writer, r=round: store.create(f"race-{r}", f"writer {writer}".encode()), range(8)))
        assert sum(won) == 1
        assert store.read(f"race-{round}") == f"writer {won.index(True)}".encode()


RACER = """
import sys
from distft.store.location import open_location
store = open_location(sys.argv[1])
store.exists("warm")
"""


def test_two_processes_and_one_winner(store: Location) -> None:
    answers = race(store.url, ["0", "1"], prepare=RACER, act='print(store.create("race", sys.argv[2].encode()))')
    assert sorted(answers) == ["False", "True"]
    assert store.read("race").decode() == str(answers.index("True"))


def test_unfinished_files_are_no_files_and_can_be_swept(tmp_path: Path) -> None:
    store = open_location(str(tmp_path))
    store.create("data/whole", b"1")
    store.scratch("data/torn").write_bytes(b"half")
    assert store.names(recursive=True) == ["data/whole"]
    assert store.sweep(older_than_seconds=3600) == []
    assert [Path(name).name[: len(PARTIAL)] for name in store.sweep(older_than_seconds=0)] == [PARTIAL]
    assert os.listdir(tmp_path / "data") == ["whole"]


def test_unfinished_multipart_uploads_can_be_swept(s3_url: str) -> None:
    from distft.store.s3 import S3Location

    store = open_location(s3_url)
    assert isinstance(store, S3Location)
    store._call("create_multipart_upload", Key=store._key("data/torn"))
    assert store.names(recursive=True) == []
    assert store.child("other").sweep(older_than_seconds=0) == []
    assert store.sweep(older_than_seconds=3600, dry_run=True) in ([], ["data/torn"]), "moto says that every upload began in 2010"
    assert store.sweep(older_than_seconds=0) == ["data/torn"]
    assert store.sweep(older_than_seconds=0) == []


def test_a_large_upload_goes_in_parts(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.store import s3

    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)  # the least that S3 allows
    data = os.urandom((11 << 20) + 17)
    (tmp_path / "large").write_bytes(data)
    store = open_location(s3_url)
    store.upload("large", tmp_path / "large")
    assert store.read("large") == data
    store.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


def test_a_link_inside_the_store_cannot_lead_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to("loop")
    (folder / "inner").symlink_to("real")
    (folder / "real").write_bytes(b"fine")
    store = open_location(str(folder))
    for name in ("link", "loop"):
        with pytest.raises(StoreError, match="leads out"):
            store.read(name)
    assert store.read("inner") == b"fine"


def test_a_folder_that_leads_out_of_the_store_is_never_listed_cleaned_or_read(tmp_path: Path) -> None:
    """An export removes what lies in its folder; through a link that would be someone else's."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious").write_bytes(b"1")
    (foreign / ".partial-old").write_bytes(b"1")
    root = tmp_path / "store"
    (root / "runs").mkdir(parents=True)
    (root / "runs" / "model").symlink_to(foreign)
    model = open_location(str(root)).child("runs", "model")
    for act in (
        model.names, lambda: model.names(recursive=True), model.folders, lambda: model.sweep(0), lambda: model.delete("precious"),
        lambda: model.read("precious"), lambda: model.create("new", b""), lambda: model.child("deeper").names(),
    ):  # fmt: skip
        with pytest.raises(StoreError, match="leads out of the store"):
            act()
    assert sorted(path.name for path in foreign.iterdir()) == [".partial-old", "precious"]


def test_the_store_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    store = open_location(str(tmp_path / "store"))
    assert store.create("file", b"1")
    assert store.read("file") == b"1"


def test_upload_moves_within_a_file_system_and_refuses_a_taken_name(tmp_path: Path) -> None:
    store = open_location(str(tmp_path / "store"))
    for _ in range(2):
        (tmp_path / "file").write_bytes(b"payload")
        inode = (tmp_path / "file").stat().st_ino
        if not store.exists("file"):
            store.upload("file", tmp_path / "file")
            assert not (tmp_path / "file").exists()
            assert (tmp_path / "store" / "file").stat().st_ino == inode
        else:
            with pytest.raises(StoreError, match="never overwritten"):
                store.upload("file", tmp_path / "file")
            assert (tmp_path / "file").exists()


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_location("store").url == str(tmp_path / "store")


@pytest.mark.parametrize(
    "text",
    ["s3://AKIA:hunter2@bucket/x", "s3://AKIA:hunter2/x", "s3://hunter2@bucket", "s3://", "s3://b", "s3://bucket/x?k=hunter2",
     "s3://bucket/../x", "gs://bucket", "file:///x", "https://hunter2@host/bucket", ""],
)  # fmt: skip
def test_addresses_that_are_refused_without_repeating_secrets(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_location(text)
    assert "hunter2" not in str(refused.value)
