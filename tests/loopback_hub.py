"""A Hugging Face Hub on the loopback interface, for tests that use the real `huggingface_hub` client.

`LoopbackHub` keeps repositories in memory and speaks the part of the Hub's protocol that sharing a model needs:
create, pre-upload, LFS, commit, pull requests, branches, tags, tree, resolve with ranges, private and gated
repositories, moved ones, and failures on demand. Files of `LFS_SUFFIXES` go through git LFS; Xet is not spoken, so the
client is told not to use it. Every request is logged, without secrets.

`connected` points the libraries of this process at such a Hub, `environment` those of a subprocess.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace, TracebackType
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".npz", ".png", ".jpg", ".zip")
_SECRET_HEADERS = ("authorization", "cookie")


@dataclass(frozen=True)
class Request:
    """One request as it was logged: the path with its query, and whether a token came along, but never the token."""

    method: str
    path: str
    headers: Mapping[str, str]
    with_token: bool
    status: int | None

    def __str__(self) -> str:
        return f"{self.method} {self.path} -> {self.status}"


@dataclass
class Account:
    """Who a token belongs to."""

    name: str
    organizations: tuple[str, ...] = ()
    can_write: bool = True


@dataclass
class Repository:
    """A repository: every commit is the whole map from path to content."""

    repo_id: str
    repo_type: str = "model"
    sdk: str | None = None
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def add_commit(self, ref: str, files: dict[str, bytes], title: str) -> str:
        """Put `files`, the whole content, on a ref and return the commit's 40 hexadecimal digits."""
        digest = hashlib.sha1(f"{self.repo_id} {len(self.commits)} {title}".encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        sha = digest.hexdigest()
        self.commits[sha], self.titles[sha], self.refs[ref] = dict(files), title, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, tag, full ref or commit; `None` when there is none."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.refs[ref]
        return revision if revision in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Content by path at a revision."""
        return self.commits[self.resolve(revision)]


@dataclass
class Failure:
    """What `LoopbackHub.fail` and `LoopbackHub.cut` arrange: the next `times` matching requests go wrong."""

    pattern: str
    method: str | None
    times: int
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None


class Answer(Exception):
    """A response. Raised for errors from anywhere below, returned otherwise."""

    def __init__(self, status: int, body: object = b"", headers: Mapping[str, str] | None = None):
        super().__init__(status)
        self.status = status
        self.headers = dict(headers or {})
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if not isinstance(body, bytes):
            self.headers.setdefault("Content-Type", "application/json")


def refusal(status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    """An error as the Hub words it: the kind in X-Error-Code, the text in X-Error-Message and in the body."""
    named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, {"error": message}, named | dict(headers or {}))


class LoopbackHub:
    """A Hub in memory, served on a free port of 127.0.0.1; a context manager.

    Attributes:
        url: endpoint to give to the clients.
        repositories: by (type, id); read them to see what was pushed.
        requests: log of everything that was asked, oldest first; `clear_log` empties it.
        lfs_objects: content by sha256, uploaded through git LFS.
        validated: contents that clients sent to /api/validate-yaml.

    Example:
        >>> with LoopbackHub() as hub:
        ...     token = hub.add_account("alice")
        ...     sha = hub.commit("alice/demo", {"config.json": b"{}"})
        ...     hub.repositories["model", "alice/demo"].resolve("main") == sha
        True
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.moved: dict[tuple[str, str], str] = {}
        self.accounts: dict[str, Account] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.validated: list[str] = []
        self._failures: list[Failure] = []
        self._lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            @property
            def hub(self) -> LoopbackHub:
                return hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    # ------------------------------------------------------------------------------------------- what tests arrange

    def add_account(self, name: str, *, organizations: tuple[str, ...] = (), can_write: bool = True) -> str:
        """Make an account, which may write in its own namespace and its organizations', and return its token."""
        token = f"hf_{hashlib.sha256(f'{name} {can_write}'.encode()).hexdigest()[:34]}"
        self.accounts[token] = Account(name, organizations, can_write)
        return token

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        """A repository, made when it is not there yet."""
        with self._lock:
            key = (repo_type, repo_id)
            if key not in self.repositories:
                self.repositories[key] = Repository(repo_id, repo_type)
                self.repositories[key].add_commit("refs/heads/main", {}, "initial commit")
            return self.repositories[key]

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | None],
        *,
        revision: str = "main",
        repo_type: str = "model",
    ) -> str:
        """Change files behind the clients' back (`None` deletes; any path is taken) and return the commit."""
        with self._lock:
            repository = self.repository(repo_id, repo_type)
            content = dict(repository.files(revision) if repository.resolve(revision) else {})
            for path, data in files.items():
                if data is None:
                    content.pop(path, None)
                else:
                    content[path] = data.encode() if isinstance(data, str) else data
            ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            return repository.add_commit(ref, content, f"Change {', '.join(files)}")

    def commit_folder(self, repo_id: str, folder: str | os.PathLike[str], **named: str) -> str:
        """Add every file of a folder in one commit."""
        folder = Path(folder)
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        return self.commit(repo_id, files, **named)

    def move(self, old: str, new: str, repo_type: str = "model") -> None:
        """Rename a repository; its old name redirects to the new one."""
        with self._lock:
            repository = self.repositories.pop((repo_type, old))
            repository.repo_id = new
            self.repositories[repo_type, new] = repository
            self.moved[repo_type, old] = new

    def fail(
        self,
        pattern: str,
        status: int = 500,
        *,
        times: int = 1,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer the next `times` requests whose path matches the regular expression with an error status."""
        with self._lock:
            self._failures.append(Failure(pattern, method, times, status=status, headers=headers or {}))

    def cut(self, pattern: str, *, after: int = 0, times: int = 1, method: str = "GET") -> None:
        """Close the connection of the next `times` matching requests after that many bytes of the body."""
        with self._lock:
            self._failures.append(Failure(pattern, method, times, cut_after=after))

    def clear_log(self) -> None:
        """Forget the requests logged so far, and the failures still due."""
        with self._lock:
            self.requests.clear()
            self._failures.clear()

    # ---------------------------------------------------------------------------------------------------- the server

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> tuple[Answer, int | None]:
        """Answer one request and log it; the number of bytes to send, when the connection is to be cut."""
        path = unquote(urlsplit(target).path)
        with self._lock:
            failure = self._next_failure(method, path)
            try:
                if failure is not None and failure.status is not None:
                    raise refusal(failure.status, None, "A failure on demand", failure.headers)
                answer = self._route(method, target, headers, body)
            except Answer as error:
                answer = error
            cut = failure.cut_after if failure is not None else None
            self.requests.append(
                Request(
                    method,
                    target,
                    {name: value for name, value in headers.items() if name.lower() not in _SECRET_HEADERS},
                    with_token="authorization" in {name.lower() for name in headers},
                    status=None if cut is not None else answer.status,
                )
            )
            return answer, cut

    def _next_failure(self, method: str, path: str) -> Failure | None:
        for failure in self._failures:
            if failure.times > 0 and failure.method in (None, method) and re.search(failure.pattern, path):
                failure.times -= 1
                return failure
        return None

    def _route(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        parts = urlsplit(target)
        call = Call(self, method, parts.path, parse_qs(parts.query), headers, body, self._account(headers))
        for methods, pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, parts.path)
            if match and method in methods:
                return handler(call, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        raise refusal(404, None, f"No such route: {method} {parts.path}")

    def _account(self, headers: Mapping[str, str]) -> Account | None:
        given = {name.lower(): value for name, value in headers.items()}.get("authorization")
        if given is None:
            return None
        account = self.accounts.get(given.removeprefix("Bearer ").strip())
        if account is None:
            raise refusal(401, None, "Invalid credentials in Authorization header")
        return account


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def _serve(self) -> None:
        answer, cut = self.hub.answer(self.command, self.path, dict(self.headers.items()), self._read_body())
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body if cut is None else answer.body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format: str, *args: object) -> None:
        """Requests are logged by the Hub, not on the console."""


@dataclass
class Call:
    """One request under way, with what several routes need of it."""

    hub: LoopbackHub
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    account: Account | None

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def repository(self, kind: str, repo_id: str, *, files: bool = False, write: bool = False) -> Repository:
        """The repository asked for, if the caller may: the Hub hides private ones from strangers."""
        repo_type = (kind or "models").removesuffix("s")
        if (repo_type, repo_id) in self.hub.moved:
            new = self.hub.moved[repo_type, repo_id]
            query = f"?{'&'.join(f'{k}={v[0]}' for k, v in self.query.items())}" if self.query else ""
            raise Answer(307, headers={"Location": self.path.replace(f"/{repo_id}", f"/{new}", 1) + query})
        repository = self.hub.repositories.get((repo_type, repo_id))
        if repository is None or (repository.private and not self.belongs(repository)):
            raise refusal(401 if self.account is None else 404, "RepoNotFound", "Repository not found")
        if files and repository.gated and not self.belongs(repository):
            if self.account is None:
                text = f"Access to model {repo_id} is restricted. You must have access to it and be authenticated"
                raise refusal(401, "GatedRepo", f"{text} to access it. Please log in.")
            if self.account.name not in repository.granted:
                text = f"Access to model {repo_id} is restricted and you are not in the authorized list."
                raise refusal(403, "GatedRepo", f"{text} Visit {self.hub.url}/{repo_id} to ask for access.")
        if write:
            self.require_write(repo_id)
        return repository

    def belongs(self, repository: Repository) -> bool:
        return self.account is not None and (
            self.account.name in repository.granted or repository.repo_id.split("/")[0] in self.namespaces()
        )

    def namespaces(self) -> tuple[str, ...]:
        return () if self.account is None else (self.account.name, *self.account.organizations)

    def require_write(self, repo_id: str) -> None:
        if self.account is None:
            raise refusal(401, None, "Invalid username or password.")
        if not self.account.can_write or repo_id.split("/")[0] not in self.namespaces():
            raise refusal(403, None, f"You don't have the rights to write to {repo_id} with this token")

    def revision(self, repository: Repository, revision: str) -> str:
        sha = repository.resolve(revision)
        if sha is None:
            raise refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


# ---------------------------------------------------------------------------------------------------- the routes


def _create(call: Call) -> Answer:
    asked = call.json
    if call.account is None:
        raise refusal(401, None, "Invalid username or password.")
    repo_id = f"{asked.get('organization') or call.account.name}/{asked['name']}"
    call.require_write(repo_id)
    repo_type = asked.get("type") or "model"
    prefix = "" if repo_type == "model" else f"{repo_type}s/"
    answer = {"url": f"{call.hub.url}/{prefix}{repo_id}", "name": repo_id}
    if (repo_type, repo_id) in call.hub.repositories:
        raise Answer(409, answer | {"error": "You already created this repo"})
    if repo_type == "space" and asked.get("sdk") not in ("gradio", "docker", "static"):
        raise refusal(400, None, "A Space needs an sdk: gradio, docker or static")
    repository = call.hub.repository(repo_id, repo_type)
    repository.private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repository.sdk = asked.get("sdk")
    return Answer(200, answer)


def _delete(call: Call) -> Answer:
    asked = call.json
    repo_type = asked.get("type") or "model"
    owner = asked.get("organization") or (call.account.name if call.account else "")
    repository = call.repository(f"{repo_type}s", f"{owner}/{asked['name']}", write=True)
    del call.hub.repositories[repo_type, repository.repo_id]
    return Answer(200, {})


def _whoami(call: Call) -> Answer:
    if call.account is None:
        raise refusal(401, None, "Invalid username or password.")
    role = "write" if call.account.can_write else "read"
    return Answer(
        200,
        {
            "type": "user",
            "name": call.account.name,
            "orgs": [{"name": name} for name in call.account.organizations],
            "auth": {"accessToken": {"role": role}},
        },
    )


def _validate_yaml(call: Call) -> Answer:
    content = call.json["content"]
    call.hub.validated.append(content)
    errors = []
    if content.startswith("---\n") and "\n---" not in content[4:]:
        errors.append({"message": "The metadata block is not closed"})
    return Answer(400 if errors else 200, {"errors": errors, "warnings": []})


def _pre_upload(call: Call, kind: str, repo_id: str, revision: str) -> Answer:
    create_pr = call.flag("create_pr")
    repository = call.repository(kind, repo_id, write=not create_pr)
    present = repository.commits[call.revision(repository, revision)]
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if _is_lfs(file["path"]) else "regular",
            "shouldIgnore": False,
            "oid": _oid(file["path"], present[file["path"]]) if file["path"] in present else None,
        }
        for file in call.json["files"]
    ]
    return Answer(200, {"files": files})


def _lfs_batch(call: Call, kind: str, repo_id: str) -> Answer:
    call.repository(kind, repo_id)
    if call.account is None:
        raise refusal(401, None, "Invalid username or password.")
    objects = []
    for asked in call.json["objects"]:
        entry = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in call.hub.lfs_objects:
            entry["actions"] = {"upload": {"href": f"{call.hub.url}/lfs-storage/{asked['oid']}", "header": {}}}
        objects.append(entry)
    return Answer(200, {"transfer": "basic", "objects": objects})


def _lfs_put(call: Call, oid: str) -> Answer:
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise refusal(400, None, "The content does not have the announced sha256")
    call.hub.lfs_objects[oid] = call.body
    return Answer(200)


def _commit(call: Call, kind: str, repo_id: str, revision: str) -> Answer:
    create_pr = call.flag("create_pr")
    repository = call.repository(kind, repo_id, write=not create_pr)
    if call.account is None:
        raise refusal(401, None, "Invalid username or password.")
    parent = call.revision(repository, revision)
    files, title = dict(repository.commits[parent]), ""
    for line in call.body.splitlines():
        key, value = (entry := json.loads(line))["key"], entry["value"]
        if key == "header":
            title = value["summary"]
            if value.get("parentCommit") not in (None, parent):
                raise refusal(412, None, "The branch has moved on from parentCommit")
            continue
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise refusal(400, None, f"Invalid path in the repository: {path}")
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in call.hub.lfs_objects:
                raise refusal(400, None, f"The LFS object of {path} was not uploaded")
            files[path] = call.hub.lfs_objects[value["oid"]]
        elif key == "deletedFile":
            files.pop(path, None)
        elif key == "deletedFolder":
            files = {name: data for name, data in files.items() if not name.startswith(path.rstrip("/") + "/")}
        else:
            raise refusal(400, None, f"Unknown operation: {key}")
    number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
    ref = f"refs/pr/{number}" if create_pr else _ref(repository, revision)
    sha = repository.add_commit(ref, files, title)
    prefix = "" if repository.repo_type == "model" else f"{repository.repo_type}s/"
    page = f"{call.hub.url}/{prefix}{repo_id}"
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", "hookOutput": ""}
    return Answer(200, answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if create_pr else {}))


def _ref(repository: Repository, revision: str) -> str:
    for ref in (f"refs/heads/{revision}", revision):
        if ref in repository.refs:
            return ref
    raise refusal(400, None, f"Only a branch or a pull request can be committed to, not {revision}")


def _info(call: Call, kind: str, repo_id: str, revision: str = "main") -> Answer:
    repository = call.repository(kind, repo_id)
    sha = call.revision(repository, revision or "main")
    siblings = []
    for path, data in sorted(repository.commits[sha].items()):
        sibling: dict[str, object] = {"rfilename": path}
        if call.flag("blobs"):
            entry = _entry(path, data)
            sibling |= {"size": len(data), "blobId": entry["oid"]}
            if "lfs" in entry:
                sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": len(data), "pointerSize": 134}
        siblings.append(sibling)
    return Answer(
        200,
        {
            "id": repo_id,
            "sha": sha,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        },
    )


def _tree(call: Call, kind: str, repo_id: str, revision: str, folder: str = "") -> Answer:
    repository = call.repository(kind, repo_id)
    files = repository.commits[call.revision(repository, revision)]
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    below = {path: data for path, data in files.items() if path.startswith(prefix)}
    if prefix and not below:
        raise refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
    entries = [_folder_entry(name) for name in sorted(_folders(below, prefix, call.flag("recursive")))]
    entries += [
        _entry(path, data)
        for path, data in sorted(below.items())
        if call.flag("recursive") or "/" not in path[len(prefix) :]
    ]
    return Answer(200, entries)


def _paths_info(call: Call, kind: str, repo_id: str, revision: str) -> Answer:
    repository = call.repository(kind, repo_id)
    files = repository.commits[call.revision(repository, revision)]
    form = "x-www-form-urlencoded" in {name.lower(): value for name, value in call.headers.items()}.get(
        "content-type", ""
    )
    paths = parse_qs(call.body.decode()).get("paths", []) if form else call.json["paths"]
    entries = []
    for path in paths:
        if path in files:
            entries.append(_entry(path, files[path]))
        elif any(name.startswith(f"{path.rstrip('/')}/") for name in files):
            entries.append(_folder_entry(path.rstrip("/")))
    return Answer(200, entries)


def _refs(call: Call, kind: str, repo_id: str) -> Answer:
    repository = call.repository(kind, repo_id)

    def listed(prefix: str) -> list[dict]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in sorted(repository.refs.items())
            if ref.startswith(prefix)
        ]

    answer = {"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []}
    return Answer(200, answer | ({"pullRequests": listed("refs/pr/")} if call.flag("include_prs") else {}))


def _branch(call: Call, kind: str, repo_id: str, branch: str) -> Answer:
    repository = call.repository(kind, repo_id, write=True)
    ref = f"refs/heads/{branch}"
    if call.method == "DELETE":
        repository.refs.pop(ref, None)
        return Answer(200, {})
    if ref in repository.refs:
        raise refusal(409, None, "Reference already exists")
    start = (call.json if call.body else {}).get("startingPoint") or "main"
    repository.refs[ref] = call.revision(repository, start)
    return Answer(200, {})


def _tag(call: Call, kind: str, repo_id: str, revision: str) -> Answer:
    repository = call.repository(kind, repo_id, write=True)
    if call.method == "DELETE":
        repository.refs.pop(f"refs/tags/{revision}", None)
        return Answer(200, {})
    ref = f"refs/tags/{call.json['tag']}"
    if ref in repository.refs:
        raise refusal(409, None, "Tag reference exists already")
    repository.refs[ref] = call.revision(repository, revision)
    return Answer(200, {})


def _resolve(call: Call, kind: str, repo_id: str, revision: str, path: str) -> Answer:
    repository = call.repository(kind, repo_id, files=True)
    sha = call.revision(repository, revision)
    commit = {"X-Repo-Commit": sha}
    if path not in repository.commits[sha]:
        raise refusal(404, "EntryNotFound", "Entry not found", commit)
    data = repository.commits[sha][path]
    headers = commit | {"ETag": f'"{_oid(path, data)}"', "Accept-Ranges": "bytes"}
    headers["Content-Type"] = "application/octet-stream"
    if _is_lfs(path):
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{_oid(path, data)}"'}
    wanted = {name.lower(): value for name, value in call.headers.items()}.get("range")
    if wanted is None:
        return Answer(200, data, headers)
    first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
    start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
    if start >= len(data):
        raise Answer(416, headers={"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def _is_lfs(path: str) -> bool:
    return path.lower().endswith(LFS_SUFFIXES)


def _oid(path: str, data: bytes) -> str:
    """The sha256 of a file of git LFS, the git blob's sha1 of any other."""
    return hashlib.sha256(data).hexdigest() if _is_lfs(path) else _blob(data)


def _blob(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
    return entry | ({"lfs": {"oid": _oid(path, data), "size": len(data), "pointerSize": 134}} if _is_lfs(path) else {})


def _folder_entry(path: str) -> dict:
    return {"type": "directory", "path": path, "size": 0, "oid": _blob(path.encode())}


def _folders(files: Mapping[str, bytes], prefix: str, recursive: bool) -> set[str]:
    names = set()
    for path in files:
        parts = path[len(prefix) :].split("/")[:-1]
        names |= {prefix + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1) if recursive or depth == 1}
    return names


# Revisions arrive quoted, so one never holds a slash here.
_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+(?:/[^/]+)?)"
_PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+(?:/[^/]+)?)"
_ROUTES: tuple[tuple[tuple[str, ...], str, Callable[..., Answer]], ...] = (
    (("POST",), r"/api/repos/create", _create),
    (("DELETE",), r"/api/repos/delete", _delete),
    (("GET",), r"/api/whoami-v2", _whoami),
    (("POST",), r"/api/validate-yaml", _validate_yaml),
    (("PUT",), r"/lfs-storage/(?P<oid>[0-9a-f]{64})", _lfs_put),
    (("POST",), _API + r"/preupload/(?P<revision>[^/]+)", _pre_upload),
    (("POST",), _API + r"/commit/(?P<revision>[^/]+)", _commit),
    (("POST",), _API + r"/paths-info/(?P<revision>[^/]+)", _paths_info),
    (("POST", "DELETE"), _API + r"/branch/(?P<branch>[^/]+)", _branch),
    (("POST", "DELETE"), _API + r"/tag/(?P<revision>[^/]+)", _tag),
    (("GET",), _API + r"/refs", _refs),
    (("GET",), _API + r"/tree/(?P<revision>[^/]+)(?P<folder>/.+)?", _tree),
    (("GET",), _API + r"/revision/(?P<revision>[^/]+)", _info),
    (("GET",), _API, _info),
    (("POST",), _PAGE + r"\.git/info/lfs/objects/batch", _lfs_batch),
    (("GET", "HEAD"), _PAGE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
)


# -------------------------------------------------------------------------------------------- pointing clients at it


@contextmanager
def connected(hub: LoopbackHub, home: str | os.PathLike[str]) -> Iterator[pytest.MonkeyPatch]:
    """Point the huggingface_hub and transformers of this process at the Hub, with an empty cache under `home`.

    Nobody is logged in, whatever the machine's settings are; the libraries' pauses between two tries are left out, so
    that failures cost no time. Everything is put back at the end. `HF_ENDPOINT` is read when the libraries are
    imported, hence the constants.
    """
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    home = Path(home)
    impatient = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(hub, home).items():
            patch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(hf_api.api, "endpoint", hub.url)
        # Made on its first use, with the endpoint of that moment; older versions of transformers have none.
        patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        patch.setattr(_http, "time", impatient)
        patch.setattr(file_download, "time", impatient)
        huggingface_hub.utils.close_session()
        try:
            yield patch
        finally:
            huggingface_hub.utils.close_session()


@contextmanager
def offline() -> Iterator[None]:
    """Inside `connected`: what `HF_HUB_OFFLINE=1` does."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


def environment(hub: LoopbackHub, home: str | os.PathLike[str]) -> dict[str, str]:
    """Variables that point a subprocess at the Hub, with its cache under `home`; add HF_TOKEN to log in."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(Path(home) / "hub"),
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # A proxy of the machine must not be asked for the loopback interface.
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def page(hub: LoopbackHub, repo_id: str, path: str, revision: str = "main") -> str:
    """The address of a file, to ask for it without the client."""
    return f"{hub.url}/{repo_id}/resolve/{quote(revision, safe='')}/{quote(path)}"
