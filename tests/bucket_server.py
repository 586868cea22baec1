"""gcp-storage-emulator with what TensorStore relies on and the emulator leaves out: conditions on generations.

    python tests/bucket_server.py PORT BUCKET CONTROL

The words in the file CONTROL make it a bad bucket: `refuse` writes (403), or take 50 ms for each (`slow`); `down`
answers everything with 503. `read STATUS COUNT PART` answers reads of objects with PART in their names with STATUS, or
with half of the body where STATUS is `drop`; `list STATUS COUNT PART` does that to listings of what begins with PART.
With a COUNT above 0 only the first so many fail. Each failure of a read appends a line to the file CONTROL.fired.
"""

import functools
import json
import pathlib
import sys
import time
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def generation(storage, bucket, name) -> str:
    try:
        return str(storage.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return "0"


def fault(control, method, name, prefix) -> str:
    """The status with which a request is to fail, "drop", or "" where it is not."""
    words = control.read_text().split()
    if words[:1] == ["down"]:
        return "503"
    if words[:1] not in (["read"], ["list"]) or method != server.GET:
        return ""
    kind, status, count, part = words
    fired = control.with_name(f"{control.name}.fired")
    lines = fired.read_text().splitlines() if fired.exists() else []
    if part not in ((name if kind == "read" else prefix) or "") or 0 < int(count) <= len(lines):
        return ""
    with fired.open("a") as file:
        file.write(f"{kind} {name or prefix}\n")
    return status


def half(handler, response) -> None:
    """Answer, and close the connection in the middle of the body."""
    content = response._content if isinstance(response._content, bytes) else response._content.encode()
    handler.send_response(response.status.value)
    for name, value in response._headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])


def with_conditions(handler, method, control):
    def handle(request, response, storage):
        words = control.read_text().split()
        writes = method in (server.POST, server.PUT, server.PATCH, server.DELETE)
        if writes and "slow" in words:
            time.sleep(0.05)
        if writes and "refuse" in words:
            response.status = HTTPStatus.FORBIDDEN
            return
        bucket = request.params.get("bucket_name")
        name = request.params.get("object_id") or request.query.get("name", [None])[0]
        status = fault(control, method, name, None if name else request.query.get("prefix", [""])[0])
        if status == "drop":
            response.close = functools.partial(half, response._handler, response)
        elif status:
            response.status = HTTPStatus(int(status))
            response["Content-type"] = "application/json"
            response.write(json.dumps({"error": {"code": int(status), "message": response.status.phrase}}))
            return
        if bucket and name:
            now = generation(storage, bucket, name)
            if handler is objects.download and now != "0":
                response["x-goog-generation"] = now
            if request.query.get("ifGenerationMatch", [now])[0] != now:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
            if request.query.get("ifGenerationNotMatch", [""])[0] == now != "0":
                response.status = HTTPStatus.NOT_MODIFIED
                return
        handler(request, response, storage)

    return handle


def main(port: str, bucket: str, control: str) -> None:
    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            handlers[method] = with_conditions(handler, method, pathlib.Path(control))
    server.create_server("127.0.0.1", int(port), in_memory=True, default_bucket=bucket).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
