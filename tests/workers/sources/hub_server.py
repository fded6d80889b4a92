"""A small real hub on loopback: the endpoints that huggingface_hub and datasets ask, over folders of real files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test"


@dataclass
class Repository:
    """One repository with one commit, on the branch ``main``."""

    folder: Path
    commit: str = "c0ffee" + "0" * 34
    gated: bool = False
    private: bool = False
    # What the server does wrong, to see that nobody is fooled.
    lies: dict[str, Any] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        found = {
            str(path.relative_to(self.folder)): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()
        }
        return dict(sorted(found.items()))


@dataclass
class Hub:
    """Repositories by ``models/NAME`` or ``datasets/NAME``; ``requests`` is what was asked."""

    url: str
    repositories: dict[str, Repository]
    requests: list[tuple[str, str, str | None]]

    def downloaded(self) -> set[str]:
        """Names of files of which any byte was asked for."""
        return {path.rsplit("/", 1)[1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path}


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub("", {}, [])

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        self.hub.requests.append((self.command, self.path, self.headers.get("Range")))
        path = unquote(urlsplit(self.path).path).strip("/")
        kind = "datasets" if path.startswith(("datasets/", "api/datasets/")) else "models"
        plain = path.removeprefix("api/").removeprefix(f"{kind}/")
        name = next((name for name in self.hub.repositories if f"{kind}/{plain}/".startswith(name + "/")), None)
        if name is None:
            return self._error(401, "RepoNotFound")
        repository = self.hub.repositories[name]
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository.private and not authorized:
            return self._error(401, "RepoNotFound")
        if "status" in repository.lies:
            return self._error(repository.lies["status"], "")
        action, _, rest = plain.removeprefix(name.partition("/")[2]).strip("/").partition("/")
        revision, _, file = rest.partition("/")
        if revision not in {"", "main", repository.commit}:
            return self._error(404, "RevisionNotFound")
        if action == "resolve":
            if repository.gated and not authorized:
                return self._error(403, "GatedRepo")
            return self._file(repository, file)
        if action in {"", "revision"}:
            return self._json(self._info(name, repository))
        if action == "tree":
            return self._json(self._tree(repository, file))
        if action == "paths-info":
            wanted = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            return self._json([entry for entry in self._tree(repository, "") if entry["path"] in wanted])
        return self._error(404, "EntryNotFound")

    def _info(self, name: str, repository: Repository) -> dict[str, Any]:
        siblings = [
            {
                "rfilename": path,
                "size": len(content),
                "blobId": hashlib.sha1(content).hexdigest(),
                "lfs": {"sha256": _sha256(content), "size": len(content), "pointerSize": 130},
            }
            for path, content in repository.files().items()
        ]
        info = {"_id": "1", "id": name.partition("/")[2], "sha": repository.commit, "siblings": siblings}
        return {
            **info,
            "private": repository.private,
            "gated": repository.gated,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }

    def _tree(self, repository: Repository, folder: str) -> list[dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        for path, content in repository.files().items():
            oid = hashlib.sha1(content).hexdigest()
            entries[path] = {"type": "file", "path": path, "size": len(content), "oid": oid}
            for parent in Path(path).parents:
                if str(parent) != ".":
                    entries[str(parent)] = {"type": "directory", "path": str(parent), "size": 0, "oid": "0" * 40}
        recursive = "recursive=True" in self.path or "recursive=true" in self.path
        return [
            entry
            for path, entry in entries.items()
            if path.startswith(folder) and path != folder and (recursive or str(Path(path).parent) in {folder, "."})
        ]

    def _file(self, repository: Repository, path: str) -> None:
        content = repository.files().get(path)
        if content is None:
            self._error(404, "EntryNotFound")
            return
        content = repository.lies.get(path, content)
        first, status = 0, 200
        data = content
        if (wanted := self.headers.get("Range")) and not repository.lies.get("no ranges"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, status = int(start), 206
            data = content[first : int(end) + 1 if end else None]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{len(content)}")
        self.send_header("ETag", f'"{_sha256(content)}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
