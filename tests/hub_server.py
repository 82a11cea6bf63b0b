"""A hub on this machine: as much of huggingface.co's HTTP interface as models need.

Repositories hold commits, commits hold files; branches name commits. Every upload is taken in
the "regular" mode, whole in the commit's request, so no object store is needed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


@dataclass
class Repo:
    """Branches -> commits -> files; who may see it."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, branch: str = "main", message: str = "") -> str:
        """Add files on top of a branch; the commit's hash."""
        held = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        text = f"{len(self.commits)} {branch} {sorted(held)}"
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit], self.branches[branch] = held, commit
        self.messages.append(message)
        return commit


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    token: str | None


class Hub:
    """The repositories, one user's token, and a record of every request."""

    token = "hf_of_the_tests"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.broken: set[str] = set()  # repositories whose files are cut off
        self.validated: list[str] = []  # model cards that were sent to be checked
        self.endpoint = ""

    def add(self, name: str, directory: Path, branch: str = "main") -> str:
        """A commit of everything in a directory, sub-folders too."""
        files = {
            file.relative_to(directory).as_posix(): file.read_bytes()
            for file in sorted(directory.rglob("*"))
            if file.is_file()
        }
        return self.repos.setdefault(name, Repo()).commit(files, branch)

    def fetched(self, name: str) -> list[str]:
        """Paths of the files of a repository whose content was asked for."""
        resolve = re.compile(rf"/{re.escape(name)}/resolve/[^/]+/(.+)")
        found = (resolve.fullmatch(r.path) for r in self.requests if r.method == "GET")
        return sorted(match[1] for match in found if match)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """The hub on a free port of the loopback interface."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _RefusedError(Exception):
    """A status, and the hub's own word for it."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, path, token))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self._route(path, token, body)
        except _RefusedError as refused:
            self._error(*refused.args)

    def _route(self, path: str, token: str | None, body: bytes) -> None:
        if path == "/api/validate-yaml":
            self.hub.validated.append(json.loads(body)["content"])
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body), token)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path):
            self._model(match[1], match[2] or "revision", match[3] or "main", token, body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo = self._visible(match[1], token)
            commit, files = _at(repo, match[2])
            self._file(commit, files, match[3], broken=match[1] in self.hub.broken)
        else:
            raise _RefusedError(404, "NotFound")

    def _model(self, name: str, action: str, revision: str, token: str | None, body: bytes) -> None:
        repo = self._visible(name, token)
        commit, files = _at(repo, revision)
        if action == "revision":
            siblings = [{"rfilename": file} for file in files]
            told = {"id": name, "sha": commit, "private": repo.private, "siblings": siblings}
            self._json(told)
        elif action == "tree":
            self._json([_describe(file, data) for file, data in files.items()])
        elif token != self.hub.token:
            raise _RefusedError(403, "Forbidden")
        elif action == "preupload":
            asked = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": item["path"], **modes} for item in asked]})
        elif action == "commit":
            self._commit(name, repo, revision, body)
        else:
            raise _RefusedError(404, "NotFound")

    def _visible(self, name: str, token: str | None) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and token != self.hub.token):
            # As the hub does: who may not see a repository is not told whether it exists.
            raise _RefusedError(404 if token == self.hub.token else 401, "RepoNotFound")
        return repo

    def _create(self, wanted: dict[str, Any], token: str | None) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if token != self.hub.token:
            raise _RefusedError(401, "Unauthorized")
        exists = name in self.hub.repos
        if not exists:
            private = wanted.get("visibility") == "private" or wanted.get("private") is True
            self.hub.repos[name] = Repo(private=private)
            self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.hub.endpoint}/{name}"}, status=409 if exists else 200)

    def _commit(self, name: str, repo: Repo, branch: str, body: bytes) -> None:
        files: dict[str, bytes] = {}
        message = ""
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                message = item["value"]["summary"]
            elif item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            else:
                raise _RefusedError(400, f"no {item['key']} here")
        commit = repo.commit(files, branch, message)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._json({"success": True, "commitUrl": url, "commitOid": commit})

    def _file(self, commit: str, files: Files, path: str, broken: bool) -> None:
        if path not in files:
            raise _RefusedError(404, "EntryNotFound")
        data = files[path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{_blob_id(data)}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET" and broken:
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(data)

    def _json(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _at(repo: Repo, revision: str) -> tuple[str, Files]:
    commit = repo.branches.get(revision, revision)
    if commit not in repo.commits:
        raise _RefusedError(404, "RevisionNotFound")
    return commit, repo.commits[commit]


def _blob_id(data: bytes) -> str:
    """Git's own hash of a file."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _describe(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
