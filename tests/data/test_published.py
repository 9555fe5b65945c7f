"""Published files: pinned addresses and hashes, whole files or none, and nothing overwritten."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from misdirection.data import published
from misdirection.data.published import FILES, GITHUB, Published, Source, fetch, is_published
from misdirection.errors import InputError

TEXT = b"- id: mine\n  paraphrases: ['Why is it so?']\n"
SOURCE = Source("someone/some-repository", "a" * 40, "data/some questions.yaml")
PLACE = f"/someone/some-repository/{'a' * 40}/data/some%20questions.yaml"
FILE = Published("questions.yaml", "a question", hashlib.sha256(TEXT).hexdigest(), SOURCE, "Ask first.")
MADE = Published("made.jsonl", "made of it", hashlib.sha256(b"made").hexdigest(), None, "Ask first.", "`unpack` it")


@pytest.fixture
def host(monkeypatch):
    """A server on loopback with one file, and what it was asked for; `answers` gives other replies by path."""
    monkeypatch.setitem(FILES, "questions", (FILE, MADE))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            status, body = self.server.answers.get(self.path, (404, b""))
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: self.server.cut])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.answers, server.cut = [], {PLACE: (200, TEXT), "/elsewhere": (200, TEXT)}, None
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def states(fetched):
    return [each.state for each in fetched]


def test_a_file_comes_whole_from_its_pinned_address_with_its_terms_beside_it(host, tmp_path):
    got = fetch("questions", tmp_path / "published", base=host.url)
    assert states(got) == ["fetched", "missing"] and host.asked == [PLACE]
    assert got[0].path.read_bytes() == TEXT
    terms = (tmp_path / "published" / "questions.yaml.terms.txt").read_text()
    assert "Ask first." in terms and SOURCE.url() in terms
    assert is_published(got[0].path, "questions")
    # What no address gives is told, and taken when it is there.
    assert got[1].told.startswith("`unpack` it; its place is ") and MADE.sha256 in got[1].told
    got[1].path.write_bytes(b"made")
    assert states(fetch("questions", tmp_path / "published", base=host.url)) == ["there", "there"]
    assert host.asked == [PLACE]


@pytest.mark.parametrize(
    ("answer", "cut", "told"),
    [
        ((200, b"another"), None, "another file than the pinned one"),
        ((200, TEXT), 10, "another file than the pinned one"),
        ((404, b""), None, "the host answers with HTTP 404"),
        ((302, b""), None, "the host answers with HTTP 302"),
    ],
)
def test_what_is_not_the_pinned_file_leaves_nothing_and_is_told(host, tmp_path, answer, cut, told):
    host.answers[PLACE], host.cut = answer, cut
    (first, _) = fetch("questions", tmp_path, base=host.url)
    assert first.state == "missing" and told in first.told
    assert f"download {SOURCE.url()}; its place is {tmp_path}" in first.told
    assert list(tmp_path.iterdir()) == [] and "/elsewhere" not in host.asked


def test_another_file_in_its_place_is_left_as_it_is(host, tmp_path):
    (tmp_path / "questions.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"is not the published file .* and is not replaced"):
        fetch("questions", tmp_path, base=host.url)
    assert (tmp_path / "questions.yaml").read_text() == "mine" and host.asked == []


def test_without_a_network_it_is_told_which_file_to_put_where(call, tmp_path, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    status, out, err = call("fetch", "questions", "--out", tmp_path)
    shown = " ".join(out.split())
    assert status == 15 and "the host does not answer" in shown
    assert FILES["questions"][0].sha256 in shown and FILES["questions"][0].source.url() in shown
    assert "names no licence" in err and list(tmp_path.iterdir()) == []


def test_every_published_file_is_pinned_to_a_revision_and_a_hash():
    names = [file.name for files in FILES.values() for file in files]
    assert len(set(names)) == len(names)
    for file in (file for files in FILES.values() for file in files):
        assert file.terms and (file.source or file.how)
        if file.source:
            assert re.fullmatch("[0-9a-f]{64}", file.sha256) and re.fullmatch("[0-9a-f]{40}", file.source.revision)
            assert file.source.url().startswith(f"{GITHUB}/") and GITHUB.startswith("https://")
    assert published.Source("a/b", "c", "d e").url() == f"{GITHUB}/a/b/c/d%20e"
