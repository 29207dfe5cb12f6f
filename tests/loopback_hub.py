"""A small model hub on 127.0.0.1 that serves folders as repositories to the real huggingface_hub code.

It answers what huggingface_hub 1 and 2 ask for a model: `api/models/ID[/revision/REV]`, `api/models/ID/tree/REV` and
HEAD and GET of `ID/resolve/REV/FILE`, with commit hashes made from the content, ETags, ranges, LFS files behind a
redirect (as on the real hub), gated repositories with tokens, and the real error headers; no xet. Every request is
logged.

    with LoopbackHub() as hub:
        hub.add("Qwen/Qwen2.5-7B", folder)
        hub.use(monkeypatch, cache)                      # in this process, or
        subprocess.run([...], env=hub.environment(cache))
        assert hub.requests == []
"""

import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin", ".gguf", ".pt", ".onnx", "tokenizer.model")
PIECE = 1 << 16


@dataclass(frozen=True)
class File:
    """One file of a commit: its bytes are read from `path` when asked for."""

    path: Path
    size: int
    sha256: str

    @property
    def is_lfs(self) -> bool:
        return self.path.name.endswith(LFS)

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.sha256[:40]


@dataclass
class Repo:
    """Commits by hash, names of branches and tags, and the tokens that may read files (None: anybody)."""

    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    readers: tuple[str, ...] | None = None


class LoopbackHub:
    """The server, running inside a `with` block.

    url: its address. requests: (method, path) of everything asked since `forget`; sent: file name -> bytes of its
    content that were. cut_after: if set, a file's
    connection is closed after so many bytes of its body, `cuts` times. status: if set, every answer has this HTTP
    status.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.sent: dict[str, int] = {}
        self.cut_after: int | None = None
        self.cuts = 0
        self.status: int | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop answering: the address then refuses connections."""
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, folder: str | Path, revision: str = "main", readers: tuple[str, ...] | None = None) -> str:
        """Serve a folder's files as `repo` at a branch or tag; its commit hash. `readers`: tokens that may read a
        gated one.
        """
        folder = Path(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): _file(path) for path in paths}
        listing = json.dumps({name: file.sha256 for name, file in files.items()})
        commit = hashlib.sha1(listing.encode()).hexdigest()
        held = self.repos.setdefault(repo, Repo())
        held.commits[commit], held.names[revision], held.readers = files, commit, readers
        return commit

    def forget(self) -> None:
        """Empty the log."""
        self.requests.clear()
        self.sent.clear()

    def downloads(self) -> list[str]:
        """The names of the files whose content was asked for, sorted; one asked for twice (resumed) stands twice."""
        pattern = re.compile(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)|/lfs/\w+/(.+)")
        found = [pattern.fullmatch(path) for method, path in self.requests if method == "GET"]
        return sorted(match[1] or match[2] for match in found if match)

    def environment(self, cache: str | Path, **more: str) -> dict[str, str]:
        """This process' environment for a child that uses this hub and no other, with its own cache."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return kept | ours | dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost") | more

    def use(self, monkeypatch, cache: str | Path, token: str | None = None) -> None:
        """Point huggingface_hub in this process here: it reads the environment only once, when it is imported."""
        from huggingface_hub import constants

        for name, value in self.environment(cache).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path(cache) / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(Path(cache) / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        else:
            monkeypatch.delenv("HF_TOKEN", raising=False)


def _file(path: Path) -> File:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return File(path, path.stat().st_size, digest)


_ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = (
    (re.compile(rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)"), "tree"),
    (re.compile(rf"/api/models/{_ID}(?:/revision/(?P<revision>[^/]+))?"), "info"),
    (re.compile(rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)"), "resolve"),
    (re.compile(r"/lfs/(?P<sha256>\w+)/(?P<file>.+)"), "lfs"),
)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def log_message(self, *args) -> None:
        """Silent: the log is `hub.requests`."""

    def _route(self) -> None:
        path = urlsplit(self.path).path
        self.server.hub.requests.append((self.command, unquote(path)))
        if self.server.hub.status:
            return self._error(self.server.hub.status, "", "planted")
        for pattern, kind in _ROUTES:
            if match := pattern.fullmatch(path):
                return getattr(self, f"_{kind}")(
                    **{key: unquote(value or "main") for key, value in match.groupdict().items()}
                )
        return self._error(404, "", "no such page")

    # -- answers

    def _error(self, status: int, code: str, message: str, **headers: str) -> None:
        named = {"X-Error-Code": code} if code else {}
        self._answer(status, json.dumps({"error": message}).encode(), {"X-Error-Message": message, **named, **headers})

    def _json(self, content) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    # -- what is asked for

    def _commit(self, repo: str, revision: str) -> tuple[Repo, str] | None:
        """The repository and the commit, or None after the error that the real hub gives."""
        held = self.server.hub.repos.get(repo)
        if held is None:  # to strangers the hub does not say whether it is private or missing
            known = "Authorization" in self.headers
            self._error(404 if known else 401, "RepoNotFound" if known else "", "Invalid username or password.")
            return None
        commit = held.names.get(revision, revision)
        if commit not in held.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return held, commit

    def _info(self, repo: str, revision: str) -> None:
        if found := self._commit(repo, revision):
            held, commit = found
            siblings = [{"rfilename": name, "size": one.size} for name, one in held.commits[commit].items()]
            gated = "manual" if held.readers is not None else False
            self._json({"id": repo, "sha": commit, "private": False, "gated": gated, "tags": [], "siblings": siblings})

    def _tree(self, repo: str, revision: str) -> None:
        if found := self._commit(repo, revision):
            held, commit = found
            self._json([_entry(name, one) for name, one in held.commits[commit].items()])

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        if not (found := self._commit(repo, revision)):
            return
        held, commit = found
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if held.readers is not None and token not in held.readers:
            said = f"Access to model {repo} is restricted" + (
                " and you are not in the authorized list" if token else ""
            )
            return self._error(403 if token else 401, "GatedRepo", said)
        one = held.commits[commit].get(file)
        if one is None:
            return self._error(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{one.etag}"', "Accept-Ranges": "bytes"}
        if one.is_lfs:
            linked = {"X-Linked-Size": str(one.size), "X-Linked-Etag": f'"{one.etag}"'}
            # absolute and to another host name, as the real hub's to its CDN: a relative one would be followed by HEAD
            linked["Location"] = self.server.hub.url.replace("127.0.0.1", "localhost") + f"/lfs/{one.sha256}/{file}"
            return self._answer(302, b"", headers | linked)
        return self._send(one, headers)

    def _lfs(self, sha256: str, file: str) -> None:
        commits = (files for repo in self.server.hub.repos.values() for files in repo.commits.values())
        one = next(file for files in commits for file in files.values() if file.sha256 == sha256)
        self._send(one, {"ETag": f'"{one.etag}"', "Accept-Ranges": "bytes"})

    def _send(self, one: File, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        stop = min(int(asked[2]) + 1, one.size) if asked and asked[2] else one.size
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{one.size}")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "GET":
            self._send_body(one, start, stop)

    def _send_body(self, one: File, start: int, stop: int) -> None:
        hub = self.server.hub
        if hub.cut_after is not None and hub.cuts > 0 and stop - start > hub.cut_after:
            hub.cuts -= 1
            stop = start + hub.cut_after
            self.close_connection = True
        hub.sent[one.path.name] = hub.sent.get(one.path.name, 0) + stop - start
        with open(one.path, "rb") as file:
            file.seek(start)
            while start < stop and (piece := file.read(min(PIECE, stop - start))):
                self.wfile.write(piece)
                start += len(piece)


def _entry(name: str, one: File) -> dict:
    entry = {"type": "file", "path": name, "size": one.size, "oid": one.etag[:40]}
    if one.is_lfs:
        entry["lfs"] = {"oid": one.sha256, "size": one.size, "pointerSize": 134}
    return entry
