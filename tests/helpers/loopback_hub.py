# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A Hugging Face Hub on 127.0.0.1, so that tests push and load with the real huggingface_hub client and no network.

The client reads `HF_ENDPOINT` when it is imported, so it is used from subprocesses:

    with LoopbackHub() as hub:
        subprocess.run(program, env=hub.environment(hf_home))

Models and datasets, regular commits to branches; no LFS, no pull requests. A commit is the whole tree of files, in
memory, and commits are numbered, those of all branches together. `datasets.load_dataset` works, `Dataset.push_to_hub`
does not (it needs LFS).
"""

import base64
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


Files = dict[str, bytes]  # content by path in the repo
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Repo:
    """Commits of a repo, each the whole tree. `branches` holds the number of the last one of each branch."""

    commits: list[Files] = field(default_factory=lambda: [{}])
    messages: list[str] = field(default_factory=lambda: ["initial commit"])
    private: bool = False
    branches: dict[str, int] = field(default_factory=lambda: {"main": 0})

    @property
    def files(self) -> Files:
        """Those of `main`."""
        return self.commits[self.branches["main"]]

    def sha(self, index: int | None = None) -> str:
        """40 hexadecimal digits, as the client expects: the commit's number. None is the last one of `main`."""
        return f"{self.branches['main'] if index is None else index:040x}"

    def commit(self, files: Files, message: str = "", branch: str = "main") -> str:
        self.commits.append(files)
        self.messages.append(message)
        self.branches[branch] = len(self.commits) - 1
        return self.sha(self.branches[branch])


class Refused(Exception):
    """An answer other than success; `code` is what the client tells errors apart by."""

    def __init__(self, status: int, code: str = "", **content):
        headers = {"X-Error-Code": code} if code else None
        self.response = JSONResponse({"error": code, **content}, status, headers)


class LoopbackHub:
    """The server. Use it as a context manager; `url` is then its address.

    Attributes:
        repos: by "models/owner/name" or "datasets/owner/name". Tests may read and change them.
        requests: (method, path) of every request so far.
        intercept: called with (method, path) before each request is answered, in a thread of its own. Returns None to
            go on or an HTTP status to refuse; it may also sleep, or kill the client. A test may set it.
    """

    def __init__(self, port: int = 0) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.intercept: Callable[[str, str], int | None] = lambda method, path: None
        self._socket = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        api, repo = "/api/{kind}/{owner}/{name}", "/{owner}/{name}"
        routes = [
            Route("/api/validate-yaml", self._endpoint(lambda *_: JSONResponse({"errors": []})), methods=["POST"]),
            Route("/api/repos/create", self._endpoint(self._create), methods=["POST"]),
            Route(api, self._endpoint(self._info)),
            Route(api + "/auth-check/write", self._endpoint(lambda *_: JSONResponse({}))),
            Route(api + "/revision/{rev:path}", self._endpoint(self._info)),
            Route(api + "/tree/{rev}", self._endpoint(self._tree)),
            Route(api + "/tree/{rev}/{path:path}", self._endpoint(self._tree)),
            Route(api + "/preupload/{rev}", self._endpoint(self._preupload), methods=["POST"]),
            Route(api + "/commit/{rev}", self._endpoint(self._commit), methods=["POST"]),
            Route(api + "/branch/{branch}", self._endpoint(self._branch), methods=["POST"]),
            Route("/datasets" + repo + "/resolve/{rev}/{path:path}", self._endpoint(self._resolve)),
            Route(repo + "/resolve/{rev}/{path:path}", self._endpoint(self._resolve)),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> "LoopbackHub":
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)
        return self

    def __exit__(self, *exception) -> None:
        self.kill()
        self._thread.join(timeout=10)

    def kill(self) -> None:
        """Stop at once, without answering what is under way; `intercept` may call it."""
        self._server.should_exit = True
        self._server.force_exit = True  # does not wait for connections that clients keep open

    def environment(self, hf_home: str | os.PathLike, pythonpath: str | os.PathLike | None = None) -> dict[str, str]:
        """Environment variables for a client process with a cache of its own and this server as its Hub."""
        foreign = ("HF_", "HUGGINGFACE_", "DIFFUSERS_", "TRANSFORMERS_", "PYTHONPATH")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(hf_home), "HF_TOKEN": "hf_loopback", "NO_PROXY": "127.0.0.1"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return env if pythonpath is None else env | {"PYTHONPATH": str(pythonpath)}

    # What the routes share --------------------------------------------------------------------------------------------

    def _endpoint(self, answer: Callable) -> Callable:
        """Call `answer(request, body)`, with the repo and the number of the commit where the path names them."""

        async def endpoint(request: Request) -> Response:
            self.requests.append((request.method, request.url.path))
            status = await run_in_threadpool(self.intercept, request.method, request.url.path)
            try:
                if status is not None:
                    raise Refused(status)
                if request.method == "POST" and "Authorization" not in request.headers:
                    raise Refused(401)
                body = await request.body()
                return answer(request, body, *(self._repo(request) if "owner" in request.path_params else ()))
            except Refused as refused:
                return refused.response

        return endpoint

    def _repo(self, request: Request) -> tuple[Repo, int]:
        """The repo that a path names, and the number of the commit that it names."""
        path = request.path_params
        kind = path.get("kind", "datasets" if request.url.path.startswith("/datasets/") else "models")
        repo = self.repos.get(f"{kind}/{path['owner']}/{path['name']}")
        if repo is None:
            raise Refused(404, "RepoNotFound")
        names = {repo.sha(index): index for index in range(len(repo.commits))} | repo.branches
        revision = path.get("rev", "main")
        if revision not in names:
            raise Refused(404, "RevisionNotFound")
        return repo, names[revision]

    # The routes -------------------------------------------------------------------------------------------------------

    def _create(self, request: Request, body: bytes) -> Response:
        wanted = json.loads(body)
        name, kind = f"{wanted.get('organization') or 'loopback'}/{wanted['name']}", f"{wanted.get('type') or 'model'}s"
        url = f"{self.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if f"{kind}/{name}" in self.repos:
            raise Refused(409, url=url)
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.repos[f"{kind}/{name}"] = Repo(private=private)
        return JSONResponse({"url": url, "name": name})

    def _info(self, request: Request, body: bytes, repo: Repo, index: int) -> Response:
        owner, name = request.path_params["owner"], request.path_params["name"]
        files = [{"rfilename": path, "size": len(content)} for path, content in sorted(repo.commits[index].items())]
        info = {"id": f"{owner}/{name}", "modelId": f"{owner}/{name}", "author": owner, "sha": repo.sha(index)}
        about = {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return JSONResponse(info | about | {"siblings": files, "lastModified": DATE, "createdAt": DATE})

    def _tree(self, request: Request, body: bytes, repo: Repo, index: int) -> Response:
        folder = request.path_params.get("path", "").strip("/")
        below = [entry for entry in tree(repo.commits[index]) if not folder or entry["path"].startswith(f"{folder}/")]
        if folder and not below:
            raise Refused(404, "EntryNotFound")
        if request.query_params.get("recursive", "").lower() not in ("true", "1"):
            depth = folder.count("/") + 1 if folder else 0
            below = [entry for entry in below if entry["path"].count("/") == depth]
        return JSONResponse(below)

    def _preupload(self, request: Request, body: bytes, repo: Repo, index: int) -> Response:
        oids = {path: git_oid(content) for path, content in repo.commits[index].items()}
        paths = [file["path"] for file in json.loads(body)["files"]]
        answer = {"uploadMode": "regular", "shouldIgnore": False}  # the client leaves out files that did not change
        return JSONResponse({"files": [answer | {"path": path, "oid": oids.get(path)} for path in paths]})

    def _commit(self, request: Request, body: bytes, repo: Repo, index: int) -> Response:
        branch, name = request.path_params["rev"], "{owner}/{name}".format(**request.path_params)
        if branch not in repo.branches or request.query_params.get("create_pr"):
            raise Refused(404, "RevisionNotFound", error="commits go to branches only")
        files, message = dict(repo.commits[index]), ""
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, repo.sha(index)):
                    raise Refused(412)
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert key == "deletedFile", f"{key} is not served"
                del files[value["path"]]
        sha = repo.commit(files, message, branch)
        return JSONResponse({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}"})

    def _branch(self, request: Request, body: bytes, repo: Repo, index: int) -> Response:
        branch = request.path_params["branch"]
        if branch in repo.branches:
            raise Refused(409)
        repo.branches[branch] = index
        return JSONResponse({})

    def _resolve(self, request: Request, body: bytes, repo: Repo, index: int) -> Response:
        content = repo.commits[index].get(request.path_params["path"])
        if content is None:
            raise Refused(404, "EntryNotFound")
        headers = {"X-Repo-Commit": repo.sha(index), "ETag": f'"{git_oid(content)}"'}
        return Response(content, headers=headers, media_type="application/octet-stream")


def git_oid(content: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree(files: Files) -> list[dict]:
    """Files and folders as the Hub lists them."""
    folders = {parent.as_posix() for path in files for parent in Path(path).parents} - {"."}
    entries = [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
    entries += [{"type": "file", "path": p, "size": len(c), "oid": git_oid(c)} for p, c in files.items()]
    return sorted(entries, key=lambda entry: entry["path"])
