"""Downloads from a server that behaves well, and from one that does not."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from anyres.errors import UserError
from anyres.io import download
from anyres.io.download import fetch

CONTENT = b"PK\x03\x04" + bytes(range(256)) * 4096
"""1 MiB that starts like a torch file."""
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT at /x.pth; the attributes say how it misbehaves."""

    content = CONTENT
    etag = '"one"'
    ranges = True
    cuts: list[int]
    """Bytes after which the next answers end."""
    status = 200
    kind = "application/octet-stream"
    length = True
    redirect = ""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cuts = []
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}/x.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range", "")
        server.asked.append(wanted)
        if server.redirect and self.path != "/moved.pth":
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.end_headers()
            return
        if server.status != 200:
            self.send_error(server.status)
            return
        first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if first >= len(server.content):
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        body = server.content[first:]
        self.send_header("Content-Type", server.kind)
        self.send_header("ETag", server.etag)
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        if first:
            size = len(server.content)
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "_PAUSES", (0.0, 0.0))
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_file_is_downloaded_once_and_used_offline(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch(server.address, "small", sha256=DIGEST[:8], cache=tmp_path)
    assert caplog.messages == [f"downloading small from {server.address}, 1 MB"]  # without a terminal for the bar
    assert path.read_bytes() == CONTENT
    assert re.fullmatch(r"small-[0-9a-f]{8}\.pth", path.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(server.address, "small", sha256=DIGEST[:8], cache=tmp_path) == path
    assert len(server.asked) == 1
    with pytest.raises(UserError, match=r"small: http\S+/y\.pth .*HF_HUB_OFFLINE is set\): get it elsewhere"):
        fetch(server.address.replace("x.pth", "y.pth"), "small", cache=tmp_path, otherwise="get it elsewhere")
    assert len(server.asked) == 1


def test_a_terminal_shows_the_progress(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    fetch(server.address, "small", cache=tmp_path)
    shown = capsys.readouterr().err
    assert "small" in shown
    assert "1.0/1.0" in re.sub(r"\x1b\[[0-9;?]*\w", "", shown)


def test_the_cache_is_that_of_the_hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))
    assert fetch(server.address, "small").is_relative_to(tmp_path / "anyres")


def test_redirections_are_followed_within_the_web(server: Server, tmp_path: Path) -> None:
    server.redirect = server.address.replace("x.pth", "moved.pth")
    assert fetch(server.address, "small", cache=tmp_path).read_bytes() == CONTENT
    server.redirect = "ftp://127.0.0.1/x.pth"
    with pytest.raises(UserError, match=r"redirected to ftp"):
        fetch(server.address, "other", cache=tmp_path)
    server.redirect = server.address
    with pytest.raises(UserError, match=r"cannot be downloaded.*infinite loop"):
        fetch(server.address, "loop", cache=tmp_path)


def test_a_lost_connection_is_resumed(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000, 0, 400_000]
    assert fetch(server.address, "small", sha256=DIGEST[:8], cache=tmp_path).read_bytes() == CONTENT
    assert server.asked == ["", "bytes=300000-", "bytes=300000-", "bytes=700000-"]
    assert not list(tmp_path.glob(".*.part"))


def test_a_later_call_resumes_and_a_new_version_starts_again(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000, 0, 0, 0]
    with pytest.raises(UserError, match=r"lost after 300000 of 1048580 bytes"):
        fetch(server.address, "small", cache=tmp_path)
    assert not list(tmp_path.glob("*.pth"))
    server.cuts, server.asked = [], []
    server.etag, server.content = '"two"', CONTENT[:4] + CONTENT[:3:-1]
    assert fetch(server.address, "small", cache=tmp_path).read_bytes() == server.content
    assert server.asked == ["bytes=300000-", ""]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cuts = False, [300_000]
    assert fetch(server.address, "small", cache=tmp_path).read_bytes() == CONTENT


def test_a_whole_part_of_a_killed_process_is_no_obstacle(server: Server, tmp_path: Path) -> None:
    path = fetch(server.address, "small", cache=tmp_path)
    path.replace(path.with_name(f".{path.name}.00000000.part"))
    assert fetch(server.address, "small", cache=tmp_path).read_bytes() == CONTENT


def test_a_wrong_hash_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"SHA-256 is {DIGEST[:16]}…, and that of the published file is 01234567…"):
        fetch(server.address, "small", sha256="01234567", cache=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".pth", ".part")]


def test_a_recorded_hash_is_compared_with(server: Server, tmp_path: Path) -> None:
    path = fetch(server.address, "small", cache=tmp_path)
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(UserError, match=r"is damaged or was changed .*delete it"):
        fetch(server.address, "small", cache=tmp_path)
    path.unlink()
    server.content, server.etag = CONTENT + b"new", '"two"'
    with pytest.raises(UserError, match=rf"that of the published file is {DIGEST[:16]}"):
        fetch(server.address, "small", cache=tmp_path)
    server.content = CONTENT
    assert fetch(server.address, "small", cache=tmp_path) == path


def test_a_file_put_into_the_cache_by_hand_is_taken(server: Server, tmp_path: Path) -> None:
    path = fetch(server.address, "small", cache=tmp_path / "a")
    copy = tmp_path / "b" / path.name
    copy.parent.mkdir()
    copy.write_bytes(CONTENT)
    assert fetch(server.address, "small", cache=tmp_path / "b") == copy
    copy.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"damaged or was changed"):
        fetch(server.address, "small", cache=tmp_path / "b")


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("text/html; charset=utf-8", CONTENT, "a web page in place of the file"),
        ("application/octet-stream", b"<!DOCTYPE html><html>please log in</html>", "something else than a weights"),
        ("application/json", b'{"error": "gone"}', "something else than a weights"),
    ],
)
def test_what_is_no_weights_file(server: Server, tmp_path: Path, kind: str, content: bytes, message: str) -> None:
    server.kind, server.content = kind, content
    with pytest.raises(UserError, match=message):
        fetch(server.address, "small", cache=tmp_path)
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("length", [True, False])
def test_a_file_that_is_too_large_is_refused(server: Server, tmp_path: Path, length: bool) -> None:
    server.length = length
    with pytest.raises(UserError, match=r"larger than 0 MB"):
        fetch(server.address, "small", largest=400_000, cache=tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1000


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (503, 3)])
def test_errors_of_the_server(server: Server, tmp_path: Path, status: int, tries: int) -> None:
    server.status = status
    with pytest.raises(UserError, match=rf"the server answers {status}"):
        fetch(server.address, "small", cache=tmp_path)
    assert len(server.asked) == tries


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PAUSES", ())
    with pytest.raises(UserError, match=r"small: http:\S+ cannot be downloaded \(.*refused.*\): ask a friend"):
        fetch("http://127.0.0.1:1/x.pth", "small", cache=tmp_path, otherwise="ask a friend")


def test_processes_that_start_together_download_once(server: Server, tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=fetch, args=(server.address, "small"), kwargs={"cache": tmp_path}) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == [""]
