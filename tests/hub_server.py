"""A hub on this machine: as much of its HTTP interface as push and pull use."""

import base64
from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from typing import Any

TOKEN = "hf_of_the_tests"


@dataclasses.dataclass
class Repository:
  """One repository: `commits` maps digests to files, the last one is main."""

  private: bool = False
  commits: dict[str, dict[str, bytes]] = dataclasses.field(
      default_factory=lambda: {_digest("first"): {}}
  )

  @property
  def main(self) -> str:
    return list(self.commits)[-1]

  @property
  def files(self) -> dict[str, bytes]:
    return self.commits[self.main]


def _digest(text: str) -> str:
  return hashlib.sha1(text.encode()).hexdigest()


class Hub:
  """What the hub holds, and what it was asked.

  Attributes:
    repositories: by OWNER/NAME.
    address: where it is.
    fails: status that every answer has, or None.
    log: 'METHOD path' of every request.
  """

  def __init__(self):
    self.repositories: dict[str, Repository] = {}
    self.address = ""
    self.fails: int | None = None
    self.log: list[str] = []

  def create(self, body: dict[str, Any]) -> tuple[int, Any]:
    name = f"{body.get('organization') or 'me'}/{body['name']}"
    url = {"url": f"{self.address}/{name}"}
    if name in self.repositories:
      return 409, url | {"error": "You already created this model repo"}
    private = body.get("private") or body.get("visibility") == "private"
    self.repositories[name] = Repository(bool(private))
    return 200, url

  def commit(self, name: str, body: bytes) -> tuple[int, Any]:
    repository = self.repositories[name]
    files = dict(repository.files)
    for line in map(json.loads, body.splitlines()):
      value = line["value"]
      if line["key"] == "file":
        files[value["path"]] = base64.b64decode(value["content"])
      elif line["key"] == "deletedFile":
        del files[value["path"]]
      else:
        assert line["key"] == "header", line["key"]
    oid = _digest(str(len(repository.commits)))
    repository.commits[oid] = files
    url = f"https://huggingface.co/{name}/commit/{oid}"
    return 200, {"success": True, "commitOid": oid, "commitUrl": url}


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
  return [
      {"type": "file", "path": path, "size": len(content),
       "oid": hashlib.sha1(content).hexdigest()}
      for path, content in files.items()
  ]


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  hub: Hub

  def log_message(self, *args) -> None:
    pass

  def _answer(self, status: int, body: Any, **headers: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding") != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    content = b""
    while size := int(self.rfile.readline(), 16):
      content += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return content

  def do_POST(self) -> None:
    body, path = self._body(), self.path.partition("?")[0]
    if not self._may(path, self._signed()):
      return
    if path == "/api/validate-yaml":
      wrong = b'license: \\"unheard-of' in body
      said = [{"message": '"license" must be one of [mit]'}] * wrong
      answer = {"errors": said, "warnings": []}
      return self._answer(400 if wrong else 200, answer)
    if path == "/api/repos/create":
      return self._answer(*self.hub.create(json.loads(body)))
    name, what = re.fullmatch(
        r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path
    ).groups()
    if what == "commit":
      return self._answer(*self.hub.commit(name, body))
    return self._answer(200, {"files": [
        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
        for f in json.loads(body)["files"]
    ]})

  def do_GET(self) -> None:
    path = self.path.partition("?")[0]
    about = re.fullmatch(
        r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path
    )
    name, what, revision = about.groups() if about else re.fullmatch(
        r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path
    ).groups()
    found = self.hub.repositories.get(name)
    if not self._may(path, found and (not found.private or self._signed())):
      return
    if not about:
      content = found.commits[what][revision]
      etag = hashlib.sha1(content).hexdigest()
      return self._answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=what)
    commit = found.main if revision in (None, "main") else revision
    if commit not in found.commits:
      return self._answer(404, {}, X_Error_Code="RevisionNotFound")
    if what == "tree":
      return self._answer(200, _tree(found.commits[commit]))
    return self._answer(200, {
        "id": name, "sha": commit, "private": found.private, "tags": [],
        "downloads": 0, "likes": 0,
        "siblings": [{"rfilename": p} for p in found.commits[commit]],
    })

  do_HEAD = do_GET

  def _signed(self) -> bool:
    return self.headers.get("Authorization") == f"Bearer {TOKEN}"

  def _may(self, path: str, allowed: Any) -> bool:
    """Logs a request; refuses it if it must not be answered."""
    self.hub.log.append(f"{self.command} {path}")
    if self.hub.fails:
      self._answer(self.hub.fails, {"error": "the hub is tired"})
    elif not allowed:
      self._answer(401, {"error": "Repository not found"})
    return bool(allowed) and not self.hub.fails


@contextlib.contextmanager
def running() -> Iterator[Hub]:
  """Yields a hub; it ends with the context."""
  hub = Hub()
  handler = type("Handler", (_Handler,), {"hub": hub})
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  server.daemon_threads = True
  thread = threading.Thread(target=server.serve_forever, args=(0.05,))
  thread.start()
  try:
    hub.address = f"http://127.0.0.1:{server.server_port}"
    yield hub
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
