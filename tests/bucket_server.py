"""gcp-storage-emulator with what TensorStore relies on and the emulator leaves out: conditions on generations.

    python tests/bucket_server.py PORT BUCKET CONTROL

The words in the file CONTROL make it a bad bucket: `refuse` writes (403), or take 50 ms for each (`slow`).
"""

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
