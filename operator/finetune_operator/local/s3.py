"""The embedded S3 server: moto, with its buckets kept as plain files.

    AWS_ACCESS_KEY_ID=... python -m finetune_operator.local.s3 --port PORT --folder DIR

moto answers from memory (large objects from temporary files). After each request that changed something, the bucket is
brought up to date below DIR: `DIR/<bucket>/<key>` holds an object's bytes, so that a tuned model can be loaded from
there, and `DIR/.meta/` what else belongs to it. A server that starts again has what was written before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import FakeBucket, FakeKey, S3Backend, s3_backends
from werkzeug.serving import WSGIRequestHandler, run_simple

logger = logging.getLogger(__name__)

PARTITION = "aws"
REGION = "us-east-1"
_READING = ("GET", "HEAD", "OPTIONS")
_CHUNK = 1 << 20


class BucketFiles:
    """The files below one folder, and the backend that they mirror."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._backend: S3Backend = s3_backends[DEFAULT_ACCOUNT_ID][PARTITION]
        self._written: dict[tuple[str, str], FakeKey] = {}
        self._lock = threading.Lock()

    def load(self) -> None:
        """Fill the backend with what is in the folder."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for bucket in sorted(path.name for path in self._folder.iterdir() if path.is_dir() and path.name != ".meta"):
            self._backend.create_bucket(bucket, REGION)
            for record in sorted((self._folder / ".meta" / bucket).glob("*.json")):
                meta = json.loads(record.read_text())
                path = self._path(bucket, meta["key"])
                if not path.is_file():
                    record.unlink()
                    continue
                stored = self._backend.put_object(bucket, meta["key"], path.read_bytes(), etag=meta["etag"])
                stored.set_metadata(meta["metadata"])
                self._written[bucket, meta["key"]] = stored

    def save(self, bucket_name: str) -> None:
        """Bring the files of one bucket up to date. moto makes a new key object for each change of its content."""
        with self._lock:
            bucket = self._backend.buckets.get(bucket_name)
            present: dict[str, FakeKey] = dict(bucket.keys.items()) if isinstance(bucket, FakeBucket) else {}
            if bucket is not None:
                (self._folder / bucket_name).mkdir(parents=True, exist_ok=True)
            for key, value in present.items():
                if self._written.get((bucket_name, key)) is not value:
                    self._write(bucket_name, key, value)
                    self._written[bucket_name, key] = value
            for name, key in [entry for entry in self._written if entry[0] == bucket_name and entry[1] not in present]:
                self._remove(name, key)
                del self._written[name, key]

    def _path(self, bucket: str, key: str) -> Path:
        path = (self._folder / bucket / key).resolve()
        if not path.is_relative_to((self._folder / bucket).resolve()):
            raise ValueError(f"the key {key!r} leads out of its bucket")
        return path

    def _record(self, bucket: str, key: str) -> Path:
        return self._folder / ".meta" / bucket / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def _write(self, bucket: str, key: str, value: FakeKey) -> None:
        path, record = self._path(bucket, key), self._record(bucket, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        record.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.part")
        with value.lock, partial.open("wb") as file:
            value._value_buffer.seek(0)
            while piece := value._value_buffer.read(_CHUNK):
                file.write(piece)
        partial.replace(path)
        meta = {"key": key, "etag": value.etag.strip('"'), "metadata": dict(value.metadata)}
        record.write_text(json.dumps(meta))

    def _remove(self, bucket: str, key: str) -> None:
        path = self._path(bucket, key)
        path.unlink(missing_ok=True)
        self._record(bucket, key).unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self._folder / bucket or any(parent.iterdir()):
                break
            parent.rmdir()


Environment = dict[str, Any]
StartResponse = Callable[..., Any]


class Gate:
    """WSGI middleware: asks for the access key, and has what a request changed on disk before its answer leaves.

    The random key id is the secret here: it keeps out other users of the machine and web pages in a browser.
    Signatures are not checked.
    """

    def __init__(
        self,
        application: Callable[[Environment, StartResponse], Iterable[bytes]],
        files: BucketFiles,
        access_key: str,
    ) -> None:
        self._application = application
        self._files = files
        self._credential = f"Credential={access_key}/"

    def __call__(self, environment: Environment, start_response: StartResponse) -> Iterable[bytes]:
        if self._credential not in environment.get("HTTP_AUTHORIZATION", ""):
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>InvalidAccessKeyId</Code><Message>Unknown access key.</Message></Error>"]
        answer = self._application(environment, start_response)
        if environment["REQUEST_METHOD"] not in _READING:
            bucket = environment["PATH_INFO"].strip("/").partition("/")[0]
            if bucket:
                self._files.save(bucket)
        return answer


class _QuietHandler(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        return


def serve(host: str, port: int, folder: Path, access_key: str) -> None:
    """Serve until killed."""
    files = BucketFiles(folder)
    files.load()
    application = Gate(DomainDispatcherApplication(create_backend_app), files, access_key)
    run_simple(host, port, application, threaded=True, request_handler=_QuietHandler)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune_operator.local.s3", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the buckets are kept")
    arguments = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    serve(arguments.host, arguments.port, arguments.folder, os.environ["AWS_ACCESS_KEY_ID"])


if __name__ == "__main__":
    main()
