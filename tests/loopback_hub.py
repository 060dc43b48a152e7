"""The part of the Hub's HTTP API that pushing and loading a model asks for, kept in memory and served on loopback."""

import base64
import hashlib
import itertools
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"
USER = "someone"
LFS_SUFFIXES = (".safetensors", ".png")


class Hub(ThreadingHTTPServer):
    """`repositories[id]` is {"private": bool, "commits": [(id, {path: bytes})]}; `requests` are "METHOD step"."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.objects, self.requests = {}, {}, []
        self.drop_uploads = False  # cut the connection in the middle of an LFS upload
        self.commit_numbers = itertools.count(1)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def files(self, repository, revision="main"):
        """{path: bytes} at a revision, or None."""
        commits = self.repositories.get(repository, {}).get("commits", [])
        found = [files for number, files in commits if revision in ("main", number)]
        return found[-1] if found else None

    def environment(self, home, token=TOKEN):
        """Variables with which a process takes this for the Hub; `home` keeps what it downloads."""
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            # Xet, which uploads prefer, is a storage service behind a binary client; over LFS the API is plain HTTP.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",  # `hf` would ask a package registry
        }
        return settings | ({"HF_TOKEN": token} if token else {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status=200, body=b"", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        body = b""
        if not (self.command == "PUT" and self.server.drop_uploads):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for method, pattern, handler in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                self.server.requests.append(f"{self.command} {handler.__name__}")
                return handler(self, body, *match.groups())
        self.server.requests.append(f"{self.command} {path}")
        self.refuse(404, "EntryNotFound", "Entry not found")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    @property
    def has_token(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def url_of(self, repository):
        return f"{self.server.url}/{repository}"

    # ---- Upload

    def whoami(self, body):
        if not self.has_token:
            return self.refuse(401, "", "Invalid username or password.")
        self.answer(200, {"name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def repository(self, body, name):
        if name not in self.server.repositories:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        self.answer(200, {"id": name, "siblings": []})

    def create(self, body):
        if not self.has_token:
            return self.refuse(401, "", "Invalid username or password.")
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if name in self.server.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": self.url_of(name)})
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        self.server.repositories[name] = {"private": private, "commits": [("0" * 40, {})]}
        self.answer(200, {"url": self.url_of(name), "name": name})

    def validate_card(self, body):
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body, repository, revision):
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": modes})

    def lfs_batch(self, body, repository):
        objects = [
            item | {"actions": {"upload": {"href": f"{self.server.url}/objects/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, body, oid):
        if self.server.drop_uploads:
            self.rfile.read(100)
            self.close_connection = True
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.answer()

    def commit(self, body, repository, revision):
        if not self.has_token:
            return self.refuse(401, "", "Invalid username or password.")
        files = dict(self.server.files(repository))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        number = f"{next(self.server.commit_numbers):040x}"
        self.server.repositories[repository]["commits"].append((number, files))
        url = f"{self.url_of(repository)}/commit/{number}"
        self.answer(200, {"success": True, "commitUrl": url, "commitOid": number})

    # ---- Download

    def resolve(self, body, repository, revision, path):
        known = self.server.repositories.get(repository)
        if known is None or (known["private"] and not self.has_token):
            return self.refuse(401, "RepoNotFound", "Repository not found")
        files = self.server.files(repository, revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        number = next(number for number, at in reversed(known["commits"]) if at is files)
        if path not in files:
            return self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=number)
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        self.answer(200, files[path], ETag=etag, X_Repo_Commit=number)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("GET", rf"/api/models/{NAME}", Handler.repository),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_card),
    ("POST", rf"/api/models/{NAME}/preupload/(\w+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/objects/(\w+)", Handler.lfs_upload),
    ("POST", rf"/api/models/{NAME}/commit/(\w+)", Handler.commit),
    ("GET HEAD", rf"/{NAME}/resolve/(\w+)/(.+)", Handler.resolve),
]


@contextmanager
def loopback_hub():
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
