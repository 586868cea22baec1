"""The part of the Hugging Face Hub that huggingface_hub needs to read a model, on loopback.

GET  /api/models/OWNER/NAME/revision/REVISION    the names and sizes of the files
HEAD /OWNER/NAME/resolve/REVISION/FILE           its commit, ETag and size, or a redirection to its content
GET  /OWNER/NAME/resolve/REVISION/FILE           its content, also from a position on (Range)
"""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A server with one repository, `me/digits`, in the revisions `main`, `v1`, `refs/pr/1` and COMMIT.

    A test changes the attributes.
    """

    def __init__(self, files):
        self.files = files  # {name: content}
        self.sizes = {}  # {name: size} that it declares, if they are not the true ones
        self.errors = {}  # {"revision" or "resolve": (status, headers) of all its answers}
        self.location = ""  # where it redirects a download
        self.cut = {}  # {number of a download: bytes after which its connection is closed}
        self.requests = []  # (method, path, headers)
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self):
        """Stop; connections are refused from then on."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def downloads(self):
        return [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    hub: Hub

    def do_GET(self):
        self.hub.requests.append((self.command, self.path, dict(self.headers)))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path.startswith("/cdn/"):
            self.send_file(path.removeprefix("/cdn/"))
            return
        match = re.fullmatch(r"(?:/api/models)?/(\w+/\w+)/(revision|resolve)/(refs/pr/\d+|[^/]+)(?:/(.+))?", path)
        repo, kind, revision, file = match.groups() if match else ("", "", "", "")
        if kind in self.hub.errors:
            status, headers = self.hub.errors[kind]
            self.answer(status, headers=headers)
        elif repo != "me/digits":
            self.answer(401, headers={"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", "refs/pr/1", COMMIT):
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif kind == "revision":
            sizes = {name: len(content) for name, content in self.hub.files.items()} | self.hub.sizes
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        elif self.hub.location:
            headers = {"X-Linked-Size": str(len(self.hub.files[file])), "X-Linked-ETag": self.etag(file)}
            self.answer(302, headers=headers | {"Location": self.hub.location, "X-Repo-Commit": COMMIT})
        else:
            self.send_file(file)

    do_HEAD = do_GET

    def etag(self, file):
        return f'"{hashlib.sha256(self.hub.files[file]).hexdigest()}"'

    def send_file(self, file):
        content, headers = self.hub.files[file], {"ETag": self.etag(file), "X-Repo-Commit": COMMIT}
        if first := int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0]):
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.answer(206 if first else 200, content[first:], headers)

    def answer(self, status, content=b"", headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = self.hub.cut.get(len(self.hub.downloads())) if "/resolve/" in self.path else None
        self.close_connection = end is not None
        self.wfile.write(content[:end])

    def log_message(self, *arguments):
        """Print nothing."""
