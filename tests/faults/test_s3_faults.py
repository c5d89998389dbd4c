"""S3 that fails in every way it is known to: what passes is tried again, what does not is told in a sentence."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from distft.errors import CorruptArtifactError, StoreError
from distft.store import patience, s3
from distft.store.location import Location, open_location
from distft.store.manifest import FileEntry, Manifest, commit, fetch, read_manifest, verify_files
from tests.helpers.proxy import Fault, Proxy, Trouble
from tests.helpers.s3 import BUCKET, s3_environment, set_s3_environment

REAL_PAUSES = patience.PAUSES
PASSING: list[Fault] = ["503", "409", "drop_request", "lose_reply"]


@pytest.fixture
def store(proxy: Proxy) -> Location:
    """A store behind the proxy that has answered once, so that it is waited for with patience."""
    store = open_location(f"s3://{BUCKET}/{os.urandom(8).hex()}")
    assert not store.exists("x")
    proxy.asked.clear()
    return store


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("times", [1, 3])
def test_create_survives_passing_trouble_and_wins_once(proxy: Proxy, store: Location, fault: Fault, times: int) -> None:
    proxy.trouble = Trouble("PUT", fault, times)
    assert store.create("name", b"mine"), "the name was free: a lost reply must not look like another's file"
    assert proxy.trouble.seen == times
    assert store.read("name") == b"mine"
    assert not store.create("name", b"other")


@pytest.mark.parametrize("fault", PASSING)
def test_create_does_not_claim_what_another_wrote(proxy: Proxy, store: Location, fault: Fault) -> None:
    store.create("name", b"theirs")
    proxy.trouble = Trouble("PUT", fault)
    assert not store.create("name", b"mine")
    assert store.read("name") == b"theirs"
    proxy.trouble = Trouble("PUT", fault)
    assert not store.create("name", b"theirs"), "equal bytes are still another's"


def test_a_412_without_a_code_means_taken(proxy: Proxy, store: Location) -> None:
    proxy.trouble = Trouble("PUT", "412")
    assert not store.create("name", b"mine")
    assert len([asked for asked in proxy.asked if asked.startswith("PUT")]) == 1


@pytest.mark.parametrize("fault", ["503", "drop_request", "lose_reply", "truncate"])
def test_reads_survive_passing_trouble(proxy: Proxy, store: Location, fault: Fault) -> None:
    store.create("name", b"0123456789")
    for read in (lambda: store.read("name"), lambda: store.read_range("name", 0, 10)):
        proxy.trouble = Trouble("GET", fault, 2)
        assert read() == b"0123456789"
        assert proxy.trouble.seen == 2


@pytest.mark.parametrize(("start", "length"), [(6, 5), (10, 1), (20, 5)])
def test_what_lies_beyond_a_files_end_is_damage_and_no_trouble(proxy: Proxy, store: Location, start: int, length: int) -> None:
    """A server answers a range that begins after the end with 416, and one that only ends there with what there is."""
    store.create("name", b"0123456789")
    says = "ends at byte 10, not 11" if start < 10 else r"name: it ends before what is looked for \(HTTP 416, InvalidRange\)"
    proxy.asked.clear()
    with pytest.raises(CorruptArtifactError, match=says) as told:
        store.read_range("name", start, length)
    assert told.value.exit_status == 3
    assert told.value.where == store.url
    assert len(proxy.requests("GET")) == 1, "asking again would not help"


def test_what_lies_beyond_a_local_files_end(tmp_path: Path) -> None:
    store = open_location(str(tmp_path / "store"))
    store.create("name", b"0123456789")
    for start, length in ((6, 5), (10, 1), (20, 5)):
        with pytest.raises(CorruptArtifactError, match=rf"name ends at byte 10, not {start + length}") as told:
            store.read_range("name", start, length)
        assert told.value.exit_status == 3


@pytest.mark.parametrize("fault", ["503", "drop_request", "lose_reply"])
def test_uploads_in_parts_survive_passing_trouble(
    proxy: Proxy, store: Location, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    data = os.urandom((5 << 20) + 1)
    (tmp_path / "large").write_bytes(data)
    for method, part in (("PUT", "partNumber=2"), ("POST", "uploadId=")):
        proxy.trouble = Trouble(method, fault, 1, part)
        name = f"large-{method}"
        store.upload(name, tmp_path / "large")
        assert proxy.trouble.seen == 1
        assert store.read(name) == data


def test_an_upload_whose_end_was_carried_out_unheard_is_done(
    proxy: Proxy, store: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that has completed an upload may answer the repeated request with 404: the upload is no longer open."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    data = os.urandom((5 << 20) + 1)
    (tmp_path / "large").write_bytes(data)
    proxy.trouble = Trouble("POST", "done_404", 1, "uploadId=")
    store.upload("large", tmp_path / "large")
    assert store.read("large") == data
    proxy.trouble = Trouble("POST", "404", 1, "uploadId=")
    with pytest.raises(StoreError, match="not there"):
        store.upload("other", tmp_path / "large")
    assert store.names() == ["large"]


def test_a_failed_upload_in_parts_is_aborted(
    proxy: Proxy, store: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    (tmp_path / "large").write_bytes(bytes((5 << 20) + 1))
    proxy.trouble = Trouble("PUT", "403", 99, "partNumber=2")
    with pytest.raises(StoreError, match="access denied"):
        store.upload("large", tmp_path / "large")
    assert store.names() == []
    assert store.sweep(older_than_seconds=0) == [], "its parts would be paid for, unseen"


def test_tries_are_bounded(proxy: Proxy, store: Location) -> None:
    proxy.trouble = Trouble("PUT", "503", 1000)
    with pytest.raises(StoreError, match="keeps failing"):
        store.create("name", b"mine")
    assert proxy.trouble.seen == len(patience.PAUSES) + 1


class Clock:
    """Time that passes where somebody sleeps, and nowhere else."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_a_slow_bucket_is_waited_for_three_minutes_with_one_line(
    proxy: Proxy, store: Location, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    monkeypatch.setattr(patience, "PAUSES", REAL_PAUSES)
    monkeypatch.setattr(patience, "_waiting_told", float("-inf"))
    proxy.trouble = Trouble("PUT", "503", len(REAL_PAUSES))
    assert store.create("name", b"mine")
    assert 100 < sum(clock.slept) < 260
    assert max(clock.slept) <= 30
    assert capsys.readouterr().err.count("Waiting for the store: 127.0.0.1") == 1
    proxy.trouble = Trouble("PUT", "503", 4)
    store.replace("name", b"mine")
    assert not capsys.readouterr().err, "a short wait is nobody's concern"


def test_a_server_that_is_busy_from_the_first_request_on_is_waited_for(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the last of many processes that start at once; three tries are for those that nobody answers."""
    monkeypatch.setattr(patience, "_answered", set())
    proxy.trouble = Trouble("HEAD", "503", 5)
    assert not open_location(f"s3://{BUCKET}/{os.urandom(8).hex()}").exists("x")
    assert proxy.trouble.seen == 5


def test_wrong_bytes_are_counted_apart_from_other_trouble(proxy: Proxy, store: Location) -> None:
    faults: list[Fault] = ["503", "409", "flip_request", "503", "flip_request"]
    waiting = iter(faults)
    proxy.weather = lambda method, _: next(waiting, None) if method == "PUT" else None
    store.replace("name", b"mine")
    assert next(waiting, None) is None
    assert store.read("name") == b"mine"


@pytest.mark.parametrize("fault", ["503", "lose_reply", "404"])
def test_a_sweep_goes_on_through_trouble_and_past_an_upload_that_is_gone(proxy: Proxy, store: Location, fault: Fault) -> None:
    assert isinstance(store, s3.S3Location)
    for name in ("one", "two"):
        store._call("create_multipart_upload", Key=store._key(name))
    proxy.trouble = Trouble("DELETE", fault, 1, "one")
    swept = store.sweep(older_than_seconds=0)
    assert proxy.trouble.seen == 1
    assert swept == (["one", "two"] if fault == "503" else ["two"]), "what is gone was another's, as far as anyone can tell"
    assert store.sweep(older_than_seconds=0) == (["one"] if fault == "404" else [])


@pytest.mark.parametrize(("fault", "says"), [("403", "access denied"), ("507", "no space left")])
def test_lasting_trouble_is_told_at_once(proxy: Proxy, store: Location, fault: Fault, says: str) -> None:
    proxy.trouble = Trouble("PUT", fault, 1000)
    writes: list[Callable[[], object]] = [
        lambda: store.create("name", b"mine"), lambda: store.replace("name", b"mine"), store.check_writable,
    ]  # fmt: skip
    for tries, write in enumerate(writes, start=1):
        with pytest.raises(StoreError, match=says) as told:
            write()
        assert told.value.help
        assert told.value.where.startswith(f"s3://{BUCKET}/")
        assert proxy.trouble.seen == tries


def test_wrong_bytes_that_pass_are_fetched_again_and_wrong_bytes_that_stay_are_refused(
    proxy: Proxy, store: Location, tmp_path: Path
) -> None:
    store.create("data/x", b"payload")
    entry = FileEntry(name="data/x", size=7, sha256=hashlib.sha256(b"payload").hexdigest())
    proxy.trouble = Trouble("GET", "flip", 99)
    with pytest.raises(CorruptArtifactError, match="data/x: sha256"):
        fetch(store, entry, tmp_path)
    with pytest.raises(CorruptArtifactError, match="data/x: sha256"):
        verify_files(store, Manifest(kind="corpus", identity={}, files=(entry,)))
    assert [path.name for path in tmp_path.iterdir()] == [f"{entry.sha256}.lock"]
    proxy.trouble = Trouble("GET", "flip", 1)
    assert fetch(store, entry, tmp_path).read_bytes() == b"payload"
    assert proxy.trouble.seen == 1


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)  # which keeps checksums and tells them
def test_bytes_that_the_servers_checksum_denies_are_asked_for_again(proxy: Proxy, store: Location) -> None:
    store.create("name", b"payload")
    proxy.hides_checksums = False
    proxy.trouble = Trouble("GET", "flip", 1)
    assert store.read("name") == b"payload"
    proxy.trouble = Trouble("GET", "flip", 99)
    with pytest.raises(CorruptArtifactError, match="wrong bytes arrive"):
        store.read("name")
    assert proxy.trouble.seen == patience.REREADS + 1


def test_bytes_that_arrive_wrong_are_sent_again(proxy: Proxy, store: Location, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    writes: dict[str, Callable[[], object]] = {
        "created": lambda: store.create("created", b"mine"), "replaced": lambda: store.replace("replaced", b"mine"),
        "uploaded": lambda: store.upload("uploaded", tmp_path / "file"),
    }  # fmt: skip
    for name, write in writes.items():
        proxy.trouble = Trouble("PUT", "flip_request", patience.REREADS)
        assert write() is not False, "the name was free: wrong bytes there are one's own"
        assert store.read(name) == b"mine"
        proxy.trouble = Trouble("PUT", "flip_request", 99)
        with pytest.raises(CorruptArtifactError, match="wrong bytes arrive"):
            store.replace("other", b"mine")
        assert proxy.trouble.seen == patience.REREADS + 1
    proxy.trouble = None
    assert not store.create("created", b"other")


def test_a_manifest_that_came_wrong_once_is_read_again(proxy: Proxy, store: Location) -> None:
    manifest = commit(store, Manifest(kind="corpus", identity={"a": 1}, files=()))
    proxy.trouble = Trouble("GET", "flip", 1)
    assert read_manifest(store) == manifest
    proxy.trouble = Trouble("GET", "flip", 99)
    with pytest.raises(CorruptArtifactError, match="not a sound manifest"):
        read_manifest(store)
    assert proxy.trouble.seen == 2


@pytest.mark.parametrize("fault", PASSING)
def test_a_commit_is_one_commit_through_trouble(proxy: Proxy, store: Location, fault: Fault) -> None:
    store.create("data/x", b"payload")
    entry = FileEntry(name="data/x", size=7, sha256=hashlib.sha256(b"payload").hexdigest())
    manifest = Manifest(kind="corpus", identity={"a": 1}, files=(entry,))
    proxy.trouble = Trouble("PUT", fault, 2, "MANIFEST")
    assert commit(store, manifest) is manifest
    assert read_manifest(store) == manifest


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)  # which checks no signature: a header can be taken away
def test_a_server_without_conditional_writes_is_refused_before_it_can_do_harm(proxy: Proxy, store: Location) -> None:
    proxy.strip = {"if-none-match"}
    with pytest.raises(StoreError, match="ignores If-None-Match"):
        store.check_writable()
    assert store.names() == []


def _every_verb(store: Location) -> list[Callable[[], object]]:
    return [
        store.check_writable, store.names, store.folders, lambda: store.exists("x"), lambda: store.size("x"),
        lambda: store.read("x"),
        lambda: store.create("x", b""), lambda: store.replace("x", b""), lambda: read_manifest(store),
    ]  # fmt: skip


def _told(store: Location, says: str) -> None:
    for verb in _every_verb(store):
        with pytest.raises(StoreError, match=says) as told:
            verb()
        assert told.value.help
        assert "canary-secret" not in str(told.value)


def test_no_such_bucket(s3_url: str) -> None:
    _told(open_location("s3://no-such-bucket-here/x"), "no bucket 'no-such-bucket-here'")


def test_no_credentials(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = {key: value for key, value in s3_environment(s3_server).items() if "KEY" not in key}
    set_s3_environment(monkeypatch, bare)
    monkeypatch.setenv("HOME", str(tmp_path))
    _told(open_location(f"s3://{BUCKET}/x"), "no credentials were found")


def test_an_endpoint_that_is_not_there(no_pauses: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        set_s3_environment(monkeypatch, s3_environment(f"http://127.0.0.1:{unused.getsockname()[1]}"))
        _told(open_location(f"s3://{BUCKET}/x"), r"127\.0\.0\.1:\d+ cannot be reached")


def test_an_endpoint_that_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    set_s3_environment(monkeypatch, s3_environment("not an address"))
    _told(open_location(f"s3://{BUCKET}/x"), "settings are not usable")


def test_an_endpoint_with_a_password_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    set_s3_environment(monkeypatch, s3_environment("http://user:canary-secret@127.0.0.1:1"))
    _told(open_location(f"s3://{BUCKET}/x"), "AWS_ENDPOINT_URL holds a user or a password")
