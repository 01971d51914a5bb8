"""Where text comes from: files of every sort, downloads over a real socket, errors that help."""

import gzip
import hashlib
import lzma
import os
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygpt import corpus as module
from tinygpt import files
from tinygpt.config import DataConfig, UserError
from tinygpt.corpus import cache_dir, data_dir, gpt2_merges, open_corpus
from tinygpt.files import Download, expanded, fetch, obtain


def text_of(path, folder="unused"):
    return "".join(open_corpus(DataConfig(corpus="text", path=str(path)), Path(folder)).chunks())


def fingerprint(path):
    return open_corpus(DataConfig(corpus="text", path=str(path)), Path("unused")).fingerprint


# The user's own files


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**20])
def test_a_file_is_read_as_it_is_written(tmp_path, rhyme, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK_SIZE", chunk)
    file = tmp_path / "my, [odd] name.txt"
    file.write_bytes(rhyme.encode())
    corpus = open_corpus(DataConfig(corpus="text", path=str(file)), Path("unused"))
    assert "".join(corpus.chunks()) == rhyme
    assert "".join(corpus.chunks()) == rhyme
    assert max(map(len, corpus.chunks())) <= chunk


@pytest.mark.parametrize("chunk", [1, 4, 2**20])
def test_a_byte_order_mark_is_dropped_at_the_start_alone(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK_SIZE", chunk)
    file = tmp_path / "bom.txt"
    file.write_bytes("\ufeffone \ufeff two".encode())
    assert text_of(file) == "one \ufeff two"


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_packed_files_are_unpacked(tmp_path, rhyme, suffix, pack):
    file = tmp_path / f"text.txt{suffix}"
    file.write_bytes(pack(rhyme.encode()))
    assert text_of(file) == rhyme
    file.write_bytes(pack(rhyme.encode())[:-20])
    with pytest.raises(UserError, match=r"text\.txt.* is damaged"):
        text_of(file)
    file.write_bytes(rhyme.encode())
    with pytest.raises(UserError, match=r"text\.txt.* is damaged"):
        text_of(file)


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    for name, text in {
        "b.txt": "b ends\n",
        "a.txt": "a does not",
        "sub/c.md": "",
        "sub/d.txt": "d",
        "sub/deep/e.txt": "e",
        ".hidden/f.txt": "hidden",
        ".g.txt": "hidden",
    }.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_a_folder_is_read_in_order_without_what_is_hidden(tree):
    assert text_of(tree) == "a does not\nb ends\nd\ne"


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("*.txt", "a does not\nb ends\n"),
        ("**/*.txt", "a does not\nb ends\nd\ne"),
        ("sub/**", "d\ne"),
        ("[ab].t?t", "a does not\nb ends\n"),
        ("*/d.txt", "d"),
    ],
)
def test_a_glob(tree, pattern, text, monkeypatch):
    assert text_of(tree / pattern) == text
    monkeypatch.chdir(tree)
    assert text_of(pattern) == text


def test_the_fingerprint_follows_the_files(tree):
    first = fingerprint(tree)
    assert fingerprint(tree) == first
    os.utime(tree / "a.txt", ns=(1, 1))
    second = fingerprint(tree)
    (tree / "new.txt").write_text("new")
    assert len({first, second, fingerprint(tree), fingerprint(tree / "a.txt")}) == 4


def failure(path) -> str:
    with pytest.raises(UserError) as caught:
        text_of(path)
    assert caught.value.hint
    return f"{caught.value} | {caught.value.hint}"


def test_a_name_that_only_begins_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~draft.txt").write_text("a draft")
    assert expanded("~draft.txt").read_text() == "a draft"
    monkeypatch.setenv("HOME", "/a/home")
    assert expanded("~/x") == Path("/a/home/x")


def test_what_is_not_there_is_named(tmp_path):
    assert f"{tmp_path}/no.txt does not exist" in failure(tmp_path / "no.txt")
    assert "*.txt matches no file" in failure(tmp_path / "*.txt")
    assert "holds no files" in failure(tmp_path)


def test_an_empty_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    assert "is empty" in failure(tmp_path / "empty.txt")
    assert "is empty" in failure(tmp_path)


@pytest.mark.parametrize("closed", ["secret.txt", "folder", ""])
def test_what_may_not_be_read_is_named(tmp_path, closed):
    file = tmp_path / "folder/secret.txt"
    file.parent.mkdir()
    file.write_text("secret")
    path = file if closed == "secret.txt" else tmp_path / closed
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything
        os.seteuid(65534)
    try:
        message = failure(file if closed == "secret.txt" else path)
    finally:
        os.seteuid(user)
        path.chmod(0o700)
    assert f"cannot read {path}" in message
    assert "Permission denied" in message


def test_a_file_that_goes_away_is_named(tmp_path):
    file = tmp_path / "gone.txt"
    file.write_text("text")
    corpus = open_corpus(DataConfig(corpus="text", path=str(file)), Path("unused"))
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read .*gone\.txt"):
        list(corpus.chunks())


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_not_utf8_are_located(tmp_path, monkeypatch, chunk, start):
    monkeypatch.setattr(module, "CHUNK_SIZE", chunk)
    file = tmp_path / "latin 1.txt"
    good = start + "déjà vu: ".encode() * 100
    file.write_bytes(good + "café au lait".encode("latin-1"))
    message = failure(file)
    assert f"latin 1.txt is not UTF-8: bad byte at offset {len(good) + 3} " in message
    assert f"iconv -f LATIN1 -t UTF-8 '{file}'" in message
    file.write_bytes(good + "é".encode()[:1])
    assert f"offset {len(good)} " in failure(file)


@given(good=st.text(st.characters(codec="utf-8"), max_size=30), cut=st.integers(1, 6))
def test_any_bad_byte_is_located(tmp_path_factory, good, cut):
    file = tmp_path_factory.getbasetemp() / "bad.txt"
    file.write_bytes(b"x" * module._BINARY_PROBE + good.encode() + b"\xff")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_SIZE", cut)
        message = failure(file)
    assert f"offset {module._BINARY_PROBE + len(good.encode())} " in message


def test_binary_files_are_named_as_such(tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(b"PNG\r\n\0\0")
    assert "picture.png is a binary file: it has a zero byte at offset 5" in failure(file)
    file.write_bytes("text".encode("utf-16"))
    assert "is UTF-16" in failure(file)
    assert "iconv -f UTF-16" in failure(file)


# Known corpora


def test_pydocs_is_inside_python(tmp_path, monkeypatch):
    corpus = open_corpus(DataConfig(corpus="pydocs"), tmp_path / "absent")
    text = "".join(corpus.chunks())
    monkeypatch.setattr(module, "CHUNK_SIZE", 1000)
    assert "".join(corpus.chunks()) == text
    assert len(text) > 300_000
    assert 'The "assert" statement' in text
    assert open_corpus(DataConfig(corpus="pydocs"), tmp_path).fingerprint == corpus.fingerprint


def test_shakespeare_is_read_from_the_data_folder(shared_data):
    corpus = open_corpus(DataConfig(corpus="shakespeare"), shared_data)
    text = "".join(corpus.chunks())
    assert len(text) == 1_115_394
    assert hashlib.sha256(text.encode()).hexdigest() == corpus.fingerprint == module.SHAKESPEARE.sha256


def test_another_file_in_its_place_is_refused(tmp_path):
    file = tmp_path / "tinyshakespeare/input.txt"
    file.parent.mkdir()
    file.write_text("To be or not")
    with pytest.raises(UserError) as caught:
        open_corpus(DataConfig(corpus="shakespeare"), tmp_path)
    found = hashlib.sha256(b"To be or not").hexdigest()
    assert all(part in str(caught.value) for part in (str(file), found, module.SHAKESPEARE.sha256))
    assert file.read_text() == "To be or not"


def test_folders_come_from_the_argument_then_the_environment(monkeypatch):
    for function, name, default in [
        (data_dir, "TINYGPT_DATA_DIR", "data"),
        (cache_dir, "TINYGPT_CACHE_DIR", "data/cache"),
    ]:
        monkeypatch.delenv(name, raising=False)
        assert function(None) == Path(default)
        monkeypatch.setenv(name, "/elsewhere")
        assert function(None) == Path("/elsewhere")
        assert function("here") == Path("here")


# Downloads


class Quiet(SimpleHTTPRequestHandler):
    failures = 0
    breaks_after = None
    starts: ClassVar[list[int]] = []

    def log_message(self, *args):
        pass

    def do_GET(self):
        if Quiet.failures:
            Quiet.failures -= 1
            self.send_error(503)
        elif Quiet.breaks_after is not None:
            self.send_part()
        else:
            super().do_GET()

    def send_part(self):
        """From where the Range header says, and no more than `breaks_after` bytes of what was promised."""
        content, wanted = Path(self.translate_path(self.path)).read_bytes(), self.headers["Range"]
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        Quiet.starts.append(start)
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + Quiet.breaks_after])


@pytest.fixture
def address(tmp_path, monkeypatch):
    """A web server on this machine; what it serves lies in tmp_path/public."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    public = tmp_path / "public"
    public.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(public)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


CONTENT = b"To be, or not to be\n" * 10_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_a_missing_file_is_downloaded_once(address, tmp_path, capfd):
    (tmp_path / "public/input.txt").write_bytes(CONTENT)
    download = Download(f"{address}/input.txt", SHA256, "play/input.txt")
    path = obtain(download, tmp_path / "data")
    assert path == tmp_path / "data/play/input.txt"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "public/input.txt").unlink()
    assert obtain(download, tmp_path / "data") == path
    assert capfd.readouterr().out == ""


def test_a_busy_server_is_asked_again(address, tmp_path):
    (tmp_path / "public/input.txt").write_bytes(CONTENT)
    Quiet.failures = 2
    fetch(f"{address}/input.txt", SHA256, tmp_path / "input.txt")
    assert Quiet.failures == 0
    assert (tmp_path / "input.txt").read_bytes() == CONTENT


def refused(url, target, sha256=SHA256) -> str:
    with pytest.raises(UserError) as caught:
        fetch(url, sha256, target)
    assert not target.exists()
    assert not target.parent.is_dir() or not list(target.parent.glob(".*"))
    return f"{caught.value} | {caught.value.hint}"


def test_a_download_with_the_wrong_content_is_not_kept(address, tmp_path):
    (tmp_path / "public/input.txt").write_bytes(CONTENT + b"!")
    message = refused(f"{address}/input.txt", tmp_path / "data/input.txt")
    assert f"expected {SHA256}" in message
    assert hashlib.sha256(CONTENT + b"!").hexdigest() in message


@pytest.fixture
def breaking(address, tmp_path, monkeypatch):
    """A server whose connections break after 65,536 bytes; the file it has, and where it is to go."""
    (tmp_path / "public/input.txt").write_bytes(CONTENT)
    monkeypatch.setattr(Quiet, "breaks_after", 2**16)
    monkeypatch.setattr(Quiet, "starts", [])
    return f"{address}/input.txt", tmp_path / "data/input.txt"


def test_a_download_that_broke_off_is_gone_on_with(breaking):
    url, target = breaking
    for _ in range(3):
        with pytest.raises(UserError, match="cannot download"):
            fetch(url, SHA256, target)
        assert not target.exists()
    fetch(url, SHA256, target)
    assert target.read_bytes() == CONTENT
    assert Quiet.starts == [0, 2**16, 2**17, 3 * 2**16]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("left", [b"another file's beginning", CONTENT, CONTENT + b"more"])
def test_what_is_left_of_another_download_does_no_harm(breaking, monkeypatch, left):
    url, target = breaking
    monkeypatch.setattr(Quiet, "breaks_after", 10**6)
    target.parent.mkdir()
    target.with_name(".input.txt.part").write_bytes(left)
    fetch(url, SHA256, target)
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]


def test_two_downloads_at_once_do_not_mix(breaking, monkeypatch):
    url, target = breaking
    monkeypatch.setattr(Quiet, "breaks_after", 10**6)
    target.parent.mkdir()
    with files._part(target) as other:
        other.file.write(b"of another process")
        other.file.flush()
        fetch(url, SHA256, target)
        assert other.path.read_bytes() == b"of another process"
    assert target.read_bytes() == CONTENT


def test_a_page_that_is_not_there_is_an_error(address, tmp_path):
    assert "404" in refused(f"{address}/input.txt", tmp_path / "data/input.txt")


def test_without_a_network_the_error_is_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/input.txt"
    message = refused(url, tmp_path / "data/play/input.txt")
    assert "cannot download" in message
    assert "refused" in message
    for part in (url, SHA256, f"{tmp_path}/data/play as input.txt"):
        assert part in message


def test_a_data_folder_that_cannot_be_written_is_an_error(address, tmp_path):
    (tmp_path / "public/input.txt").write_bytes(CONTENT)
    (tmp_path / "data").touch()
    with pytest.raises(UserError, match=r"cannot write .*data/play/input\.txt") as caught:
        fetch(f"{address}/input.txt", SHA256, tmp_path / "data/play/input.txt")
    assert "TINYGPT_DATA_DIR" in caught.value.hint


def test_gpt2_merges_are_looked_for_where_tiktoken_keeps_them(tmp_path, monkeypatch):
    name = hashlib.sha1(module.GPT2_MERGES.url.encode()).hexdigest()
    monkeypatch.setattr(module, "GPT2_MERGES", module.GPT2_MERGES._replace(sha256=SHA256))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    ours, theirs = tmp_path / "data/tiktoken_cache" / name, tmp_path / "theirs" / name
    for file in (ours, theirs):
        file.parent.mkdir(parents=True)
        file.write_bytes(CONTENT)
    assert gpt2_merges(tmp_path / "data") == ours
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(theirs.parent))
    assert gpt2_merges(tmp_path / "data") == theirs
    theirs.unlink()
    assert gpt2_merges(tmp_path / "data") == ours
