"""A server of files on loopback, with the faults of a network."""

import contextlib
import http.server
import re
import threading
import time
from collections.abc import Iterator
from typing import Any


class Files(http.server.ThreadingHTTPServer):
    """Serves `files`, {path: content}; `faults` are of the next requests: a status, or bytes after which it is cut."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests = files, list[Any](), list[tuple[str, str | None]]()
        self.ranges, self.lengths, self.pause = True, True, 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Files

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append((self.path, wanted))
        fault = server.faults.pop(0) if server.faults else None
        path = re.sub(r"https?://[^/]*/", "/", self.path)  # of a proxy
        content = server.files.get(path)
        if isinstance(fault, str) or content is None:
            self.send_error(int(fault or 404))
            return
        start = int(wanted[6:-1]) if wanted and server.ranges else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if server.lengths:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        content = content[start : None if fault is None else start + fault]
        with contextlib.suppress(OSError):  # the client is gone
            for i in range(0, len(content), 4096):
                self.wfile.write(content[i : i + 4096])
                if server.pause:
                    time.sleep(server.pause)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Files]:
    """A server of `files` in a thread."""
    with Files(files) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
