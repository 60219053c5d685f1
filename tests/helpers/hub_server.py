"""A Hugging Face Hub on localhost that the real `huggingface_hub` pushes to and downloads from, with faults on demand.

    with HubServer() as server:
        server.fail("commit", Status(500), times=2)
        subprocess.run(command, env={**os.environ, **server.environment(tmp_path)})
        assert "config.json" in server.repositories["user/model"].commits[-1].files

It speaks as much of the Hub's protocol as models need: repositories and who sees them, branches, tags, commits, classic
LFS uploads, downloads by branch and by commit, the redirects of renamed repositories, and the token with which hf-xet
uploads to a local folder. It knows no datasets, pull requests, multipart uploads or xet downloads.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.parse import unquote

import yaml


@dataclass(frozen=True)
class Status:
    """An answer; as a fault it comes instead of the work.

    Like the Hub's, it repeats the body's "error" in a header, where the client looks for it.
    """

    code: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = field(default_factory=lambda: {"error": "injected fault"})  # bytes, or what becomes JSON


@dataclass(frozen=True)
class Cut:
    """The connection closes in the middle of the request's body, or of the answer if the request has none.

    With `after_work` a request with a body is carried out as well, and only its answer is lost.
    """

    after_work: bool = False


@dataclass(frozen=True)
class Silence:
    """The request is read and nothing ever comes back; the server's end closes the connection."""


Fault = Status | Cut | Silence


@dataclass(frozen=True)
class Pointer:
    """Stands for a large file whose bytes went to xet, not through this server."""

    oid: str  # SHA-256
    size: int


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, bytes | Pointer]  # the whole tree, not the difference


@dataclass
class Repository:
    private: bool = False
    commits: list[Commit] = field(default_factory=list)  # of all branches, oldest first
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, bytes | Pointer]) -> Commit:
        contents = sorted((path, _etag(path, content)) for path, content in files.items())
        oid = hashlib.sha1(f"{branch} {title} {len(self.commits)} {contents}".encode()).hexdigest()
        self.commits.append(Commit(oid, title, files))
        self.branches[branch] = self.commits[-1]
        return self.commits[-1]

    def find(self, revision: str) -> Commit:
        by_oid = {commit.oid: commit for commit in self.commits}
        if commit := self.branches.get(revision) or self.tags.get(revision) or by_oid.get(revision):
            return commit
        raise Refusal(404, f"Invalid rev id: {revision}", {"X-Error-Code": "RevisionNotFound"})


class Request(NamedTuple):
    body: bytes
    headers: dict[str, str]
    authenticated: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Refusal(Exception):
    """An answer as the Hub gives it to a request that it declines."""

    def __init__(self, code: int, message: str, headers: dict[str, str] | None = None, **more: str) -> None:
        super().__init__(message)
        self.answer = Status(code, headers or {}, {"error": message, **more})


Work = Callable[..., Status]


class Route(NamedTuple):
    pattern: re.Pattern[str]
    writes: bool  # and so needs a token
    work: Work


ROUTES: dict[str, Route] = {}
MODEL = r"/api/(?:models|spaces)/(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
FILE = rf"/(?P<repo_id>(?!api/)[^/]+/[^/]+)/resolve/{REVISION}/(?P<path>.+)"


def route(stage: str, pattern: str, *, writes: bool = False) -> Callable[[Work], Work]:
    """Registers what answers requests for `pattern`, method and path; the groups become arguments."""

    def register(work: Work) -> Work:
        ROUTES[stage] = Route(re.compile(pattern), writes, work)
        return work

    return register


class HubServer:
    """Listens on a free port of localhost while the context lasts.

    A repository that a client creates begins with a commit of its own, as on the Hub.
    """

    valid_token = "hf_testtesttesttesttesttesttesttest"
    user = "user"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}  # former or differently written ids, and the present ones
        self.private_by_default = False  # as an organisation may choose
        self.requests: list[tuple[str, str]] = []  # method, path with query
        self.stages: list[str] = []  # of the same requests; "unknown" where this server has no answer
        self.closing = threading.Event()
        self._objects: dict[str, bytes] = {}  # what came through LFS, by SHA-256
        self._faults: dict[str, Iterator[Fault | None]] = {}
        self._xet_in_use = False
        self._lock = threading.Lock()

    def __enter__(self) -> HubServer:
        self._folder = TemporaryDirectory(prefix="hub-server-", ignore_cleanup_errors=True)
        self.xet_store = Path(self._folder.name)
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self._listener.hub = self
        self.url = f"http://127.0.0.1:{self._listener.server_port}"
        # The poll interval is how long the end of the context takes.
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._folder.cleanup()

    def environment(self, home: Path, *, xet: bool = False) -> dict[str, str]:
        """What a client process needs in its environment to use this server and nothing of the machine's own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.valid_token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def add_repository(self, repo_id: str, folder: Path) -> None:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        self.repositories[repo_id] = Repository()
        self.repositories[repo_id].commit("main", "initial commit", files)

    def fail(self, stage: str, fault: Fault | None, times: int | None = 1) -> None:
        """The next `times` requests for `stage` meet the fault, or all if None, after those that earlier calls chose.

        The fault None lets requests through.
        """
        if stage not in ROUTES:
            raise ValueError(f"no stage '{stage}'; there are {', '.join(ROUTES)}")
        faults = repeat(fault) if times is None else repeat(fault, times)
        with self._lock:
            self._faults[stage] = chain(self._faults.get(stage, ()), faults)

    def heal(self) -> None:
        """Forgets all faults."""
        with self._lock:
            self._faults.clear()

    def reset(self) -> None:
        """As new: forgets faults, repositories, files and requests."""
        self.heal()
        self.private_by_default = False
        for memory in (self.repositories, self.renamed, self.requests, self.stages, self._objects):
            memory.clear()
        self._xet_in_use = False

    def log(self, stage: str, method: str, path: str) -> Fault | None:
        """Notes a request and says which fault it meets."""
        with self._lock:
            self.requests.append((method, path))
            self.stages.append(stage)
            return next(self._faults.get(stage, iter(())), None)

    def _open(self, repo_id: str, request: Request) -> Repository:
        repository = self.repositories.get(repo_id)
        if repository and (request.authenticated or not repository.private):
            return repository
        # To the anonymous the Hub says 401 and no code; its client concludes the code, but from https addresses alone.
        raise Refusal(404 if request.authenticated else 401, "Repository not found", {"X-Error-Code": "RepoNotFound"})

    @route("whoami", r"GET /api/whoami-v2", writes=True)
    def _whoami(self, request: Request) -> Status:
        token = {"displayName": "test", "role": "write"}
        return _done({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": token}})

    @route("create", r"POST /api/repos/create", writes=True)
    def _create(self, request: Request) -> Status:
        wanted = request.json
        repo_id = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repositories or repo_id in self.renamed:
            raise Refusal(409, f"You already created this model repo: {repo_id}", url=url)
        self.repositories[repo_id] = Repository(self._wanted_private(wanted, self.private_by_default))
        self.repositories[repo_id].commit("main", "initial commit", {".gitattributes": b"*.png filter=lfs -text\n"})
        return _done({"url": url, "name": repo_id})

    @route("settings", rf"PUT {MODEL}/settings", writes=True)
    def _settings(self, request: Request, repo_id: str) -> Status:
        repository = self._open(repo_id, request)
        repository.private = self._wanted_private(request.json, repository.private)
        return _done({"private": repository.private})

    @staticmethod
    def _wanted_private(wanted: dict[str, Any], otherwise: bool) -> bool:
        """Clients before 2.0 say "private", later ones "visibility"."""
        if "visibility" in wanted:
            return wanted["visibility"] == "private"
        return bool(wanted.get("private", otherwise))

    @route("refs", rf"GET {MODEL}/refs")
    def _refs(self, request: Request, repo_id: str) -> Status:
        repository = self._open(repo_id, request)

        def listing(kind: str, known: dict[str, Commit]) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit.oid}
                for name, commit in known.items()
            ]

        heads, tags = listing("heads", repository.branches), listing("tags", repository.tags)
        return _done({"branches": heads, "converts": [], "tags": tags})

    @route("validate-yaml", r"POST /api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Status:
        block = re.match(r"---\n(.*?)\n---\n", request.json["content"], re.DOTALL)
        warnings = [] if block else [{"message": "empty or missing yaml metadata in repo card"}]
        errors = [{"message": message} for message in _metadata_errors(yaml.safe_load(block[1]))] if block else []
        return Status(400 if errors else 200, {}, {"errors": errors, "warnings": warnings})

    @route("preupload", rf"POST {MODEL}/preupload/{REVISION}", writes=True)
    def _preupload(self, request: Request, repo_id: str, revision: str) -> Status:
        present = self._open(repo_id, request).find(revision).files
        answers = []
        for file in request.json["files"]:
            path = file["path"]
            mode = "lfs" if _is_large(path, file["size"]) else "regular"
            oid = {"oid": _etag(path, present[path])} if path in present else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return _done({"files": answers})

    @route("lfs-batch", r"POST /(?:spaces/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", writes=True)
    def _lfs_batch(self, request: Request, repo_id: str) -> Status:
        self._open(repo_id, request)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in request.json["objects"]]
        for wanted in objects:
            if wanted["oid"] not in self._objects:
                wanted["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}/{wanted['size']}"}}
        transfer = "xet" if "xet" in request.json["transfers"] else "basic"  # which early 1.x clients ask here
        return _done({"transfer": transfer, "objects": objects})

    @route("lfs-upload", r"PUT /lfs/(?P<oid>[0-9a-f]{64})/(?P<size>[0-9]+)")
    def _lfs_upload(self, request: Request, oid: str, size: str) -> Status:
        if len(request.body) != int(size) or hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, f"{len(request.body)} bytes are not the announced {size} or not those of {oid}")
        self._objects[oid] = request.body
        return _done()

    @route("xet-token", rf"GET {MODEL}/xet-write-token/{REVISION}", writes=True)
    def _xet_token(self, request: Request, repo_id: str, revision: str) -> Status:
        self._open(repo_id, request).find(revision)
        self._xet_in_use = True
        address, expiry = f"local://{self.xet_store}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expiry)}
        return Status(200, headers, {"casUrl": address, "accessToken": "xet", "exp": expiry})

    @route("branch", rf"POST {MODEL}/branch/{REVISION}", writes=True)
    def _branch(self, request: Request, repo_id: str, revision: str) -> Status:
        repository = self._open(repo_id, request)
        if re.search(r"[\s~^:?*\[\\]|\.\.|^[-/]|[/.]$|\.lock$", revision):  # as git-check-ref-format
            raise Refusal(400, f"Invalid reference name: {revision}")
        if revision in repository.branches:
            raise Refusal(409, f"Reference already exists: {revision}")
        repository.branches[revision] = repository.find(request.json.get("startingPoint", "main"))
        return _done({})

    @route("commit", rf"POST {MODEL}/commit/{REVISION}", writes=True)
    def _commit(self, request: Request, repo_id: str, revision: str) -> Status:
        repository = self._open(repo_id, request)
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        with self._lock:
            if revision not in repository.branches:
                raise Refusal(404, f"Invalid rev id: {revision}", {"X-Error-Code": "RevisionNotFound"})
            parent = repository.branches[revision]
            if header["value"].get("parentCommit", parent.oid) != parent.oid:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for operation in operations:
                self._apply(operation["key"], operation["value"], files)
            commit = repository.commit(revision, header["value"]["summary"], files)
        return _done({"commitUrl": f"{self.url}/{repo_id}/commit/{commit.oid}", "commitOid": commit.oid})

    def _apply(self, kind: str, value: dict[str, Any], files: dict[str, bytes | Pointer]) -> None:
        path = value["path"]
        if kind == "file":
            files[path] = b64decode(value["content"])
        elif kind == "lfsFile":
            if value["oid"] not in self._objects and not self._xet_in_use:
                raise Refusal(400, f"an LFS pointer pointed to a file that does not exist. Offending file: {path}")
            files[path] = self._objects.get(value["oid"]) or Pointer(value["oid"], value["size"])
        elif kind == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(404, "A file with this name doesn't exist", {"X-Error-Code": "EntryNotFound"})
        elif kind == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        else:
            raise Refusal(400, f"unknown operation {kind}")

    @route("info", rf"GET {MODEL}(?:/revision/{REVISION})?")
    def _info(self, request: Request, repo_id: str, revision: str | None) -> Status:
        repository = self._open(repo_id, request)
        commit = repository.find(revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        return _done({"id": repo_id, "sha": commit.oid, "private": repository.private, "siblings": siblings})

    @route("commits", rf"GET {MODEL}/commits/{REVISION}")
    def _commits(self, request: Request, repo_id: str, revision: str) -> Status:
        repository = self._open(repo_id, request)
        repository.find(revision)
        date = "2026-01-01T00:00:00.000Z"
        shown = [
            {"id": commit.oid, "authors": [], "date": date, "title": commit.title, "message": ""}
            for commit in reversed(repository.commits)
        ]
        return _done(shown)

    @route("tree", rf"GET {MODEL}/tree/{REVISION}")
    def _tree(self, request: Request, repo_id: str, revision: str) -> Status:
        files = self._open(repo_id, request).find(revision).files
        return _done([_describe(path, content) for path, content in files.items()])

    @route("metadata", rf"HEAD {FILE}")
    @route("download", rf"GET {FILE}")
    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Status:
        commit = self._open(repo_id, request).find(revision)
        headers = {"X-Repo-Commit": commit.oid}
        content = commit.files.get(path)
        if content is None:
            raise Refusal(404, "Entry not found", {"X-Error-Code": "EntryNotFound", **headers})
        if isinstance(content, Pointer):
            raise Refusal(501, f"{path} is in xet, which this server cannot read", headers)
        headers |= {"ETag": f'"{_etag(path, content)}"', "Accept-Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", request.headers.get("range", "")):
            start, end = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return Status(206, headers, content[start : end + 1])
        return Status(200, headers, content)


def _done(body: Any = b"") -> Status:
    return Status(200, {}, body)


REPO_ID = r"[\w.-]+/[\w.-]+"
IDENTIFIER = r"[a-z0-9][a-z0-9.+_-]*"
METADATA = {
    "library_name": IDENTIFIER,
    "license": IDENTIFIER,
    "base_model": REPO_ID,
    "base_model_relation": "adapter|finetune|merge|quantized",
    "datasets": rf"{REPO_ID}|[\w.-]+",
    "tags": r"\S.*",
}
"""What the Hub's documentation says of the fields that a fine-tuned model's card may have."""


def _metadata_errors(metadata: dict[str, Any]) -> Iterator[str]:
    """What the Hub would object to."""
    for name, pattern in METADATA.items():
        values = metadata.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not re.fullmatch(pattern, value):
                yield f'"{name}" must not be {value!r}'
    for model in metadata.get("model-index", []):
        for result in model["results"]:
            measured = [result["task"].get("type"), *(result["dataset"].get(name) for name in ("type", "name"))]
            measured += [metric.get(name) for metric in result["metrics"] for name in ("type", "value")]
            if None in measured or not result["metrics"]:
                yield f'"model-index" of {model["name"]} lacks a required field'


def _is_large(path: str, size: int) -> bool:
    return size > 0 and (size > 1_000_000 or path.endswith((".safetensors", ".png")))


def _describe(path: str, content: bytes | Pointer) -> dict[str, Any]:
    """The file's entry in a listing."""
    entry = {"type": "file", "path": path}
    if isinstance(content, bytes) and not _is_large(path, len(content)):
        return {**entry, "size": len(content), "oid": _git_oid(content)}
    if isinstance(content, bytes):
        content = Pointer(hashlib.sha256(content).hexdigest(), len(content))
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{content.oid}\nsize {content.size}\n".encode()
    large = {"oid": content.oid, "size": content.size, "pointerSize": len(text)}
    return {**entry, "size": content.size, "oid": _git_oid(text), "lfs": large}


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _etag(path: str, content: bytes | Pointer) -> str:
    """What tells the client whether it has this file already."""
    entry = _describe(path, content)
    return entry.get("lfs", entry)["oid"]


class _Listener(ThreadingHTTPServer):
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may leave when it likes
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Moves bytes and brings the faults about; what the answers are is the HubServer's business."""

    server: _Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_request(self) -> None:
        hub = self.server.hub
        line = f"{self.command} {self.path.partition('?')[0]}"
        matches = ((stage, match) for stage, route in ROUTES.items() if (match := route.pattern.fullmatch(line)))
        stage, match = next(matches, ("unknown", None))
        fault = hub.log(stage, self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        if length and isinstance(fault, Cut) and not fault.after_work:
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if isinstance(fault, Silence):
            hub.closing.wait()
            self.close_connection = True
        elif isinstance(fault, Status):
            self.send(fault)
        else:
            self.send(self.work(stage, match, body), cut=isinstance(fault, Cut))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def work(self, stage: str, match: re.Match[str] | None, body: bytes) -> Status:
        hub = self.server.hub
        token = self.headers.get("Authorization")
        try:
            if match is None:
                raise Refusal(404, "Sorry, we can't find the page you are looking for.")
            if token not in (None, f"Bearer {hub.valid_token}"):
                raise Refusal(401, "Invalid credentials in Authorization header")
            if ROUTES[stage].writes and token is None:
                raise Refusal(401, "Invalid username or password.")
            headers = {name.lower(): value for name, value in self.headers.items()}
            arguments = {name: value and unquote(value) for name, value in match.groupdict().items()}
            if present := hub.renamed.get(arguments.get("repo_id")):
                return Status(307, {"Location": hub.url + self.path.replace(arguments["repo_id"], present, 1)})
            return ROUTES[stage].work(hub, Request(body, headers, token is not None), **arguments)
        except Refusal as refusal:
            return refusal.answer

    def send(self, answer: Status, *, cut: bool = False) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        sent = b"" if self.command == "HEAD" else body
        if cut:
            self.close_connection = True
            if not sent:
                return
            sent = sent[: len(sent) // 2]
        self.send_response(answer.code)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        if isinstance(answer.body, bytes):
            headers["Content-Type"] = "application/octet-stream"
        elif "error" in answer.body:
            headers["X-Error-Message"] = answer.body["error"]
        for name, value in {**headers, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, format: str, *args: object) -> None:
        pass
