"""A model hub in this process that speaks as much of the protocol as huggingface_hub needs to read and to commit."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


class FakeHub:
    """Repositories with their commits; what was asked for is listed in `asked`."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        """Of each repository its commits, the oldest first, and of each the files by name."""
        self.private: set[str] = set()
        self.asked: list[str] = []

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Add files to the main branch; returns the commit."""
        commits = self.repositories.setdefault(repo, {})
        whole = {**(list(commits.values())[-1] if commits else {}), **files}
        oid = hashlib.sha1(repr((len(commits), sorted(whole))).encode()).hexdigest()
        commits[oid] = whole
        return oid

    def files(self, repo: str) -> dict[str, bytes]:
        """Those of the main branch."""
        return list(self.repositories[repo].values())[-1]

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision and its files."""
        commits = self.repositories[repo]
        oid = list(commits)[-1] if revision == "main" and commits else revision
        return (oid, commits[oid]) if oid in commits else None


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub that the environment names within the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        found: FakeHub = self.server.hub  # type: ignore[attr-defined]
        return found

    def do_HEAD(self) -> None:
        self._resolve(body=False)

    def do_GET(self) -> None:
        self._resolve(body=True)

    def do_POST(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.hub.asked.append(f"POST {'/'.join(parts)}")
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(content)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(repo)
            there = repo in self.hub.repositories
            if not there:
                self.hub.commit(repo, {".gitattributes": b""})
            return self._answer(409 if there else 200, {"url": f"{self.hub.endpoint}/{repo}"})
        if parts == ["api", "validate-yaml"]:
            return self._answer(200, {"errors": [], "warnings": []})
        repo = "/".join(parts[2:4])
        if repo not in self.hub.repositories:
            return self._answer(404, {}, code="RepoNotFound")
        if parts[4:5] == ["preupload"]:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            return self._answer(200, {"files": files})
        lines = [json.loads(line) for line in content.splitlines()]
        oid = self.hub.commit(
            repo,
            {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            },
        )
        return self._answer(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid})

    def _resolve(self, *, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.hub.asked.append(f"{self.command} {'/'.join(parts)}")
        repo = "/".join(parts[:2])
        authorised = self.headers.get("Authorization") == "Bearer hf_of_this_test"
        if (
            parts[2:3] != ["resolve"]
            or repo not in self.hub.repositories
            or (repo in self.hub.private and not authorised)
        ):
            return self._answer(401, {}, code="RepoNotFound")
        found = self.hub.find(repo, parts[3])
        if found is None:
            return self._answer(404, {}, code="RevisionNotFound")
        oid, files = found
        content = files.get("/".join(parts[4:]))
        if content is None:
            return self._answer(404, {}, code="EntryNotFound", commit=oid)
        self.send_response(200)
        self.send_header("X-Repo-Commit", oid)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
        return None

    def _answer(self, status: int, content: dict[str, Any], *, code: str | None = None, commit: str = "") -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""
