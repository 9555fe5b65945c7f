"""A stand-in of the Hub's HTTP API on loopback: repositories are folders, of which each commit is the last."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import ModelCard, constants, hf_api

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Repositories by `models/USER/NAME` or `datasets/USER/NAME`.

    Attributes:
        folder: they are its folders.
        downloads: the files that were downloaded.
        private: the repositories that were made private.
        revisions: commits by the name of a revision; what `models/USER/NAME` is at one is in `models/USER/NAME@COMMIT`.
        status: what every request to write is answered with, where it is not 200.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.downloads: list[str] = []
        self.private: list[str] = []
        self.revisions: dict[str, str] = {}
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "api":
            self._describe(parts[1:4], *parts[4:6])
        elif parts[0] == "datasets":
            self._give(parts[:3], *parts[4:5], "/".join(parts[5:]))
        else:
            self._give(["models", *parts[:2]], *parts[3:4], "/".join(parts[4:]))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = urlsplit(self.path).path.strip("/").split("/")
        if self.server.status != 200:
            self._send({}, status=self.server.status)
        elif parts[1:] == ["validate-yaml"]:
            self._send({"errors": [], "warnings": []})
        elif parts[1:] == ["repos", "create"]:
            self._create(json.loads(body))
        elif parts[4] == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            self._send({"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        else:
            self._commit(self.server.folder.joinpath(*parts[1:4]), body)

    def _create(self, wanted: dict[str, Any]) -> None:
        kind, name = wanted.get("type") or "model", "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        repository = f"{kind}s/{name}"
        folder, url = self.server.folder / repository, f"{self.server.url}/{repository.removeprefix('models/')}"
        if folder.exists():
            self._send({"error": "You already created this repo", "url": url}, status=409)
            return
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("")
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.server.private.append(repository)
        self._send({"url": url})

    def _commit(self, folder: Path, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                file = folder / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        where = folder.relative_to(self.server.folder).as_posix().removeprefix("models/")
        self._send({"commitUrl": f"{self.server.url}/{where}/commit/{COMMIT}", "commitOid": COMMIT})

    def _at(self, repository: list[str], revision: str) -> tuple[Path, str]:
        """The folder and the commit of a revision."""
        commit = self.server.revisions.get(revision, revision if revision in self.server.revisions.values() else COMMIT)
        folder = self.server.folder.joinpath(*repository)
        return (folder if commit == COMMIT else folder.with_name(f"{folder.name}@{commit}")), commit

    def _describe(self, repository: list[str], kind: str = "", revision: str = "") -> None:
        folder, commit = self._at(repository, revision)
        if not folder.is_dir():
            self._refuse("RepoNotFound")
            return
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in files]
        if kind == "tree":
            self._send(
                [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                    for name, path in zip(names, files, strict=True)
                ]
            )
            return
        card = folder / "README.md"
        self._send(
            {
                "id": "/".join(repository[1:]),
                "sha": commit,
                "siblings": [{"rfilename": name} for name in names],
                "private": "/".join(repository) in self.server.private,
                "tags": list(ModelCard.load(card).data.tags or []) if card.is_file() else [],
            }
        )

    def _give(self, repository: list[str], revision: str, name: str) -> None:
        folder, commit = self._at(repository, revision)
        file = folder / name
        if not file.is_file():
            self._refuse("EntryNotFound" if folder.is_dir() else "RepoNotFound")
            return
        if self.command == "GET":
            self.server.downloads.append(name)
        self._send(file.read_bytes(), {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit})

    def _refuse(self, code: str) -> None:
        self._send(b"", {"X-Error-Code": code}, status=404)

    def _send(self, body: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' output is for failures."""


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of these repositories, for the length of the context: its client asks it, and has a cache of its own."""
    hub = Hub(folder)
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
