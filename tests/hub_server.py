"""A stand-in of the Hub's HTTP API on loopback: repositories are folders, each with one commit."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


class Hub(ThreadingHTTPServer):
    """Serves repositories by their id, at any revision; counts the files that were downloaded."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        if path.startswith("api/models/"):
            self._api(path.removeprefix("api/models/").split("/"))
        else:
            self._resolve(path.split("/", 4))

    def _api(self, parts: list[str]) -> None:
        folder, kind, commit = self._folder(parts), parts[2], parts[3]
        if folder is None:
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        entries = [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _etag(path)}
            for path in files
        ]
        siblings = [{"rfilename": entry["path"]} for entry in entries]
        whole = {"id": "/".join(parts[:2]), "sha": commit, "siblings": siblings, "private": False, "tags": []}
        self._send(json.dumps(entries if kind == "tree" else whole).encode(), {"Content-Type": "application/json"})

    def _resolve(self, parts: list[str]) -> None:
        folder = self._folder(parts)
        if folder is None:
            return
        commit, file = parts[3], folder / parts[4]
        if not file.is_file():
            self._refuse("EntryNotFound")
            return
        if self.command == "GET":
            self.server.downloads.append(parts[4])
        self._send(file.read_bytes(), {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit})

    def _folder(self, parts: list[str]) -> Path | None:
        folder = self.server.repositories.get("/".join(parts[:2]))
        if folder is None:
            self._refuse("RepoNotFound")
        return folder

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' output is for failures."""


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[Hub]:
    """A Hub with these repositories, by id, for the length of the context."""
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
