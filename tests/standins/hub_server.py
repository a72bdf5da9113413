"""A small hub on the loopback address, for the unmodified clients of the hub.

    HUB.add("user/tiny", folder, tags=["v1"])                      # a commit; a folder or texts
    HUB.add("user/facts", {"data.csv": "..."}, kind="datasets")
    HUB.fail("model.safetensors", after=1000)                      # drops one connection
    HUB.requests                                                   # what was asked, in order

It serves branches, tags and commits, listings, files with ETags and ranges, and refuses as the hub
does. Weights and parquet files are redirected to another host, `localhost`, renamed repositories on
the same host.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

ACTIONS = ("revision", "tree", "resolve")
LARGE = (".safetensors", ".parquet", ".bin")
"""Files that the hub keeps in large-file storage."""
TOKEN = "hf_of_the_tests"
"""The one token that the hub accepts."""


@dataclass
class Repository:
    """A repository: the files of every commit, and the commit to which each name refers."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """Branches and tags."""
    private: bool = False
    gated: bool = False


class Request(NamedTuple):
    """A request as the server saw it."""

    method: str
    path: str
    status: int | None
    """None if the connection was dropped without an answer."""
    range: str
    token: str


@dataclass(kw_only=True)
class Fault:
    """What goes wrong with the next requests whose path ends so; by default they are dropped."""

    ending: str
    methods: Sequence[str] = ("GET",)
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int = 0
    """Bytes of the body that are sent before the connection drops."""
    call: Callable[[], object] | None = None
    """Called before the request is answered as usual."""


def _nothing(*_: Any) -> None:
    """Print nothing."""


class HubServer(ThreadingHTTPServer):
    """The hub, which serves as long as its process runs."""

    daemon_threads = True
    handle_error = _nothing  # a client may go away

    def __init__(self) -> None:
        """Serve on a free port of the loopback address."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.moved: dict[str, str] = {}
        """Former id of a repository -> its id."""
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.stored: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def add(
        self,
        name: str,
        files: Path | Mapping[str, str | bytes],
        *,
        kind: str = "models",
        branch: str = "main",
        tags: Sequence[str] = (),
        **access: bool,
    ) -> str:
        """Commit files to a branch of a repository, which is made if it is missing."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        content = {p: d.encode() if isinstance(d, str) else d for p, d in files.items()}
        self.stored |= {_etag(path, data): data for path, data in content.items()}
        repository = self.repositories.setdefault((kind, name), Repository(**access))
        entries = [_etag(path, data) for path, data in content.items()]
        commit = hashlib.sha1(f"{name} {[*content]} {entries}".encode()).hexdigest()
        repository.commits[commit] = content
        repository.names |= dict.fromkeys((branch, *tags), commit)
        return commit

    def fail(self, ending: str, **how: Any) -> None:
        """Let requests whose path ends so fail; `Fault` has the ways."""
        self.faults.append(Fault(ending=ending, **how))

    def reset(self) -> None:
        """Forget everything."""
        for record in (self.repositories, self.moved, self.requests, self.faults, self.stored):
            record.clear()


@contextmanager
def online() -> Iterator[None]:
    """Let the libraries of the hub, which are offline in the tests, reach it."""
    import datasets
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        for settings in constants, datasets.config:
            patch.setattr(settings, "HF_HUB_OFFLINE", False)
        yield


def _etag(path: str, data: bytes) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _etag(path, data)}
    stored = {"oid": _etag(path, data), "size": len(data), "pointerSize": 130}
    return entry | ({"lfs": stored} if path.endswith(LARGE) else {})


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    log_message = _nothing

    def do_GET(self) -> None:
        """Answer a request of any method."""
        # A revision may hold an escaped slash, so each part is unescaped alone.
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        cut = None
        for fault in self.server.faults:
            if fault.times and self.command in fault.methods and parts[-1].endswith(fault.ending):
                fault.times -= 1
                if fault.status is not None:
                    return self._send(fault.status, **fault.headers)
                if fault.call is not None:
                    fault.call()
                elif not fault.after:
                    return self._record(None)
                cut = fault.after or None
                break
        if parts[0] == "storage":
            return self._send(200, self.server.stored[parts[1]], cut)
        where = parts[1:] if parts[0] == "api" else parts
        kind = where.pop(0) if where[0] in ("models", "datasets") else "models"
        at = next((i for i, part in enumerate(where) if part in ACTIONS), len(where))
        name, action, rest = "/".join(where[:at]), "".join(where[at : at + 1]), where[at + 1 :]
        if name in self.server.moved:
            place = self.path.replace(name, self.server.moved[name])
            return self._send(307, Location=place)
        token = self._token()
        if token not in ("", TOKEN):
            wrong = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self._send(401, **wrong)
        repository = self.server.repositories.get((kind, name))
        if repository is None or (repository.private and not token):
            return self._refuse(404 if token else 401, "RepoNotFound")
        revision = rest[0] if rest else "main"
        commit = repository.names.get(revision, revision)
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound")
        files, path = repository.commits[commit], "/".join(rest[1:])
        if action == "resolve":
            if repository.gated:
                return self._refuse(403 if token else 401, "GatedRepo")
            return self._file(files, path, commit, cut)
        if action == "tree":
            listed = [_entry(p, files[p]) for p in files if not path or p.startswith(f"{path}/")]
            if not listed:
                return self._refuse(404, "EntryNotFound")
            return self._send(200, json.dumps(listed).encode())
        info = {"id": name, "sha": commit, "private": repository.private, "tags": []}
        info |= {"gated": repository.gated, "siblings": [{"rfilename": p} for p in files]}
        return self._send(200, json.dumps(info).encode())

    do_HEAD = do_GET

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _file(self, files: dict[str, bytes], path: str, commit: str, cut: int | None) -> None:
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            return self._refuse(404, "EntryNotFound", **headers)
        etag = _etag(path, files[path])
        if not path.endswith(LARGE):
            return self._send(200, files[path], cut, **headers, ETag=f'"{etag}"')
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(files[path]))}
        # Another name of this host, so that clients take it for the storage of the hub.
        place = f"http://localhost:{self.server.server_port}/storage/{etag}/{path}"
        return self._send(302, **headers, Location=place)

    def _refuse(self, status: int, code: str, **headers: str) -> None:
        self._send(status, **headers, **{"X-Error-Code": code})

    def _send(self, status: int, body: bytes = b"", cut: int | None = None, **headers: str) -> None:
        """Answer with the requested range of the body, or with its first bytes if it is cut."""
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if ranged and status == 200:
            first, last = int(ranged[1]), int(ranged[2] or len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            status, body = 206, body[first : last + 1]
        self._record(status)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection |= cut is not None

    def _record(self, status: int | None) -> None:
        asked = (self.command, self.path, status, self.headers.get("Range") or "", self._token())
        self.server.requests.append(Request(*asked))
        self.close_connection = status is None


HUB, CACHE = HubServer(), tempfile.TemporaryDirectory(prefix="hub-")
ENVIRONMENT = {"HF_ENDPOINT": HUB.url, "HF_HOME": CACHE.name, "HF_HUB_DISABLE_XET": "1"}
"""What libraries read when they are imported, so that they use this hub."""
