"""A stand-in for the Hugging Face Hub: repositories in memory, on 127.0.0.1, with the standard library alone.

    with FakeHub() as hub:                # hub.url, hub.log, hub.files("user/name")
        env = hub.env(hf_home=tmp_path)   # for a *fresh* process: HF_ENDPOINT is read when huggingface_hub is imported
        subprocess.run([sys.executable, "script.py"], env={**os.environ, **env}, check=True)

or, for trying things by hand, `python tests/fake_hub.py 8899`, which prints the environment to set.

It knows what the client does to push and pull: creating repositories (public and private), commits in one step with
large files uploaded before it, pull requests, branches, tags and any commit as a revision, tokens that may write, that
may only read, and that are wrong. `fail` makes chosen requests fail: with a status, by dropping the connection in the
middle of the upload, or by not answering for a while.

Not modelled: xet storage (set HF_HUB_DISABLE_XET=1), gated repositories, uploads in several parts, deleting or moving
a repository, discussions, rate limits.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# Some of the values that the Hub takes for `license`; the front matter of a README.md is checked against them.
LICENSES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "unknown", "other")
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".npz", ".png", ".jpg")

Files = dict[str, bytes]


@dataclass
class Commit:
    sha: str
    message: str
    files: Files


@dataclass
class Repo:
    """One repository: its commits, and what branches, tags and pull requests (`refs/pr/1`) point to."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    blobs: Files = field(
        default_factory=dict
    )  # large files by their sha256, uploaded before the commit that names them

    def commit(self, message: str, files: Files, ref: str = "main") -> Commit:
        parent = self.refs.get(ref, "")
        content = "".join(f"{name}:{git_oid(data)}\n" for name, data in sorted(files.items()))
        sha = hashlib.sha1(f"{parent}\n{message}\n{len(self.commits)}\n{content}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, message, files)
        self.refs[ref] = sha
        return self.commits[sha]

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass
class Failure:
    """What happens to requests whose "METHOD /path" matches: a status, or a dropped connection, `times` times."""

    pattern: str
    status: int | None
    times: float
    delay: float


class FakeHub:
    def __init__(
        self, port: int = 0, user: str = "user", token: str = "hf_write", read_token: str = "hf_read"
    ) -> None:
        self.user, self.token, self.read_token = user, token, read_token
        self.repos: dict[tuple[str, str], Repo] = {}  # ("model", "user/name")
        self.refused_names: set[str] = set()
        self.failures: list[Failure] = []
        self.log: list[str] = []  # "METHOD /path" of every request
        self.on_request: Callable[[str], None] = lambda line: None  # e.g. to move a branch between two requests
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Request,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    # ---- what a test calls ----

    def env(self, hf_home: Any) -> dict[str, str]:
        """The environment of a client that knows this Hub only."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(Path(hf_home).absolute()),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> Files:
        commit = self.repo(repo_id, kind).at(revision)
        assert commit is not None, f"{repo_id} has no revision {revision}"
        return commit.files

    def put(self, repo_id: str, files: Files, private: bool = False, kind: str = "model") -> Commit:
        """Commit `files` over what is there (creating the repository), as if somebody had pushed them."""
        with self.lock:
            repo = self.repos.setdefault((kind, repo_id), Repo(private))
            head = repo.at("main")
            return repo.commit("put", {**(head.files if head else {}), **files})

    def fail(self, pattern: str, status: int | None = 500, times: float = float("inf"), delay: float = 0) -> None:
        """Answer requests like "POST .*/commit/.*" with `status` after `delay` seconds; None drops the connection."""
        self.failures.append(Failure(pattern, status, times, delay))

    def note(self, line: str) -> Failure | None:
        """Log a request; what is to happen to it, if it is to fail."""
        with self.lock:
            self.log.append(line)
            failure = next((f for f in self.failures if f.times > 0 and re.fullmatch(f.pattern, line)), None)
            if failure:
                failure.times -= 1
            return failure

    # ---- the routes: each gets the request and the named parts of its path ----

    def whoami(self, request: "Request") -> None:
        request.answer({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self, request: "Request") -> None:
        wanted = json.loads(request.body)
        kind, owner = wanted.get("type") or "model", wanted.get("organization") or self.user
        repo_id = f"{owner}/{wanted['name']}"
        if owner != self.user:
            return request.refuse(403, f"You don't have the rights to create a {kind} under the namespace {owner!r}.")
        if repo_id in self.refused_names:
            return request.refuse(400, f"Invalid name: {repo_id!r} is reserved.")
        answer = {
            "url": f"{self.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}",
            "name": repo_id,
            "id": repo_id,
        }
        if (kind, repo_id) in self.repos:
            return request.answer({**answer, "error": f"You already created this {kind} repo"}, 409)
        self.repos[kind, repo_id] = Repo(private=bool(wanted.get("private")) or wanted.get("visibility") == "private")
        self.repos[kind, repo_id].commit("initial commit", {".gitattributes": b""})
        request.answer(answer)

    def validate_yaml(self, request: "Request") -> None:
        found = re.search(r"^license:\s*['\"]?([^\s'\"]+)", json.loads(request.body)["content"], re.M)
        bad = bool(found) and found[1] not in LICENSES
        errors = [{"message": f'"license" must be one of {", ".join(LICENSES)}'}] if bad else []
        request.answer({"errors": errors, "warnings": []}, 400 if bad else 200)

    def info(self, request: "Request", kind: str, repo_id: str, revision: str = "main") -> None:
        if found := request.find(kind, repo_id, revision):
            repo, commit = found
            siblings = [{"rfilename": name} for name in sorted(commit.files)]
            ids = {"_id": "0" * 24, "id": repo_id, "modelId": repo_id, "sha": commit.sha}
            counts = {"downloads": 0, "likes": 0, "tags": []}
            request.answer({**ids, **counts, "private": repo.private, "siblings": siblings})

    def tree(self, request: "Request", kind: str, repo_id: str, revision: str, folder: str = "") -> None:
        if found := request.find(kind, repo_id, revision):

            def describe(name: str, data: bytes) -> dict[str, Any]:
                lfs = {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}} if is_lfs(name) else {}
                return {"type": "file", "path": name, "size": len(data), "oid": git_oid(data), **lfs}

            files = sorted(found[1].files.items())
            request.answer([describe(*file) for file in files if not folder or file[0].startswith(folder + "/")])

    def preupload(self, request: "Request", kind: str, repo_id: str, revision: str) -> None:
        if found := request.find(kind, repo_id, revision):
            files = found[1].files

            def describe(name: str) -> dict[str, Any]:
                known = name in files and not is_lfs(name)
                mode = "lfs" if is_lfs(name) else "regular"
                oid = git_oid(files[name]) if known else None
                return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

            request.answer({"files": [describe(file["path"]) for file in json.loads(request.body)["files"]]})

    def lfs_batch(self, request: "Request", repo_id: str, kind: str = "models") -> None:
        if found := request.find(kind, repo_id, "main"):

            def describe(oid: str, size: int) -> dict[str, Any]:
                upload = {"href": f"{self.url}/_lfs/{kind}/{repo_id}/{oid}", "header": {}}
                return {"oid": oid, "size": size} | ({} if oid in found[0].blobs else {"actions": {"upload": upload}})

            objects = [describe(wanted["oid"], wanted["size"]) for wanted in json.loads(request.body)["objects"]]
            request.answer({"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    def lfs_put(self, request: "Request", kind: str, repo_id: str, oid: str) -> None:
        if sha256(request.body) != oid:
            return request.refuse(400, "sha256 does not match")
        self.repos[kind.rstrip("s"), repo_id].blobs[oid] = request.body
        request.answer({})

    def commit(self, request: "Request", kind: str, repo_id: str, revision: str) -> None:
        creates_pr = request.query.get("create_pr") == ["1"]
        if repo_id.split("/")[0] != self.user and not creates_pr:
            return request.refuse(403, "You don't have the rights to write here; open a pull request.")
        if not (found := request.find(kind, repo_id, revision)):
            return
        repo, parent = found
        files, message = dict(parent.files), ""
        for line in request.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", parent.sha) != parent.sha:
                    return request.refuse(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = repo.blobs[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {name: data for name, data in files.items() if not name.startswith(value["path"])}
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        commit = repo.commit(message, files, ref=f"refs/pr/{number}" if creates_pr else revision)
        url = f"{self.url}/{repo_id}"
        pull_request = {"pullRequestUrl": f"{url}/discussions/{number}"} if creates_pr else {}
        request.answer({"commitOid": commit.sha, "commitUrl": f"{url}/commit/{commit.sha}", **pull_request})

    def resolve(self, request: "Request", repo_id: str, revision: str, name: str, kind: str = "models") -> None:
        if not (found := request.find(kind, repo_id, revision)):
            return
        commit = found[1]
        if name not in commit.files:
            return request.refuse(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.sha})
        data = commit.files[name]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{git_oid(data)}"'}
        if is_lfs(name):
            headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        request.answer(data, content_type="application/octet-stream", headers=headers)


KIND, REPO, REVISION = r"(?P<kind>models|datasets|spaces)", r"(?P<repo_id>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
# Method, path, what does it, and the token that it needs.
ROUTES: list[tuple[str, str, Callable[..., None], str]] = [
    ("GET", r"/api/whoami-v2", FakeHub.whoami, "any"),
    ("POST", r"/api/repos/create", FakeHub.create, "write"),
    ("POST", r"/api/validate-yaml", FakeHub.validate_yaml, ""),
    ("POST", rf"/api/{KIND}/{REPO}/preupload/{REVISION}", FakeHub.preupload, "write"),
    ("POST", rf"/api/{KIND}/{REPO}/commit/{REVISION}", FakeHub.commit, "write"),
    ("GET", rf"/api/{KIND}/{REPO}/tree/{REVISION}(?:/(?P<folder>.+))?", FakeHub.tree, ""),
    ("GET", rf"/api/{KIND}/{REPO}(?:/revision/{REVISION})?", FakeHub.info, ""),
    ("POST", rf"/(?:(?P<kind>datasets|spaces)/)?{REPO}\.git/info/lfs/objects/batch", FakeHub.lfs_batch, "write"),
    ("PUT", rf"/_lfs/{KIND}/{REPO}/(?P<oid>[0-9a-f]{{64}})", FakeHub.lfs_put, ""),
    ("GET HEAD", rf"/(?:(?P<kind>datasets|spaces)/)?{REPO}/resolve/{REVISION}/(?P<name>.+)", FakeHub.resolve, ""),
]


class Request(BaseHTTPRequestHandler):
    """One request: who sent it, what it carries, and how it is answered."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"  # keep-alive: every answer must carry its Content-Length
    body: bytes

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        line, hub = f"{self.command} {self.path}", self.hub
        failure = hub.note(line)
        if failure:
            time.sleep(failure.delay)
            if failure.status is None:
                return self.drop()
        self.body = self.read_body()
        if failure:
            return self.refuse(failure.status, "told to fail")
        hub.on_request(line)
        if self.token not in ("", hub.token, hub.read_token):
            return self.refuse(401, "Invalid credentials in Authorization header")
        # The parts of a path are split before they are unquoted: `refs%2Fpr%2F1` is one part.
        path = urlsplit(self.path).path
        for methods, pattern, route, needs in ROUTES:
            if self.command in methods and (match := re.fullmatch(pattern, path)):
                if needs and not self.token:
                    return self.refuse(401, "Invalid username or password.")
                if needs == "write" and self.token != hub.token:
                    return self.refuse(403, "This token may only read.")
                parts = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                with hub.lock:
                    return route(hub, self, **parts)
        self.refuse(404, f"fake_hub has no route for {line}")

    do_HEAD = do_POST = do_PUT = do_GET

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def find(self, kind: str, repo_id: str, revision: str) -> tuple[Repo, Commit] | None:
        """The repository and the commit; None once the refusal is sent."""
        repo = self.hub.repos.get((kind.rstrip("s"), repo_id))
        if repo is None or (repo.private and not self.token):
            self.refuse(404 if self.token else 401, "Repository not found", "RepoNotFound")
        elif (commit := repo.at(revision)) is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        else:
            return repo, commit
        return None

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def drop(self) -> None:
        """Take half of the body, then hang up."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
        self.close_connection = True

    def answer(
        self,
        content: Any,
        status: int = 200,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        fixed = {"Content-Type": content_type, "Content-Length": str(len(data))}
        for name, value in {**fixed, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        reason = {"X-Error-Code": code, "X-Error-Message": message}  # the client turns the code into an exception
        self.answer({"error": message}, status, headers={**reason, **(headers or {})})


def is_lfs(name: str) -> bool:
    return name.endswith(LFS_SUFFIXES)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


if __name__ == "__main__":
    with FakeHub(port=int(sys.argv[1]) if len(sys.argv) > 1 else 0) as hub:
        print("\n".join(f"export {name}={value}" for name, value in hub.env("hf_home").items()), flush=True)
        threading.Event().wait()
