"""Locations: `s3://bucket/key`, `hf://org/name@revision`, `hf://datasets/org/name@revision/file`, `file:///path`."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote, urlparse


@dataclass(frozen=True)
class S3Location:
    bucket: str
    key: str
    """Without leading or trailing slash."""

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True)
class HubLocation:
    kind: str
    """"model" or "dataset"."""
    repo: str
    revision: str | None
    path: str
    """File inside the repository; empty for the whole of it."""

    def __str__(self) -> str:
        prefix = "datasets/" if self.kind == "dataset" else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{prefix}{self.repo}{revision}" + (f"/{self.path}" if self.path else "")


@dataclass(frozen=True)
class FileLocation:
    path: str

    def __str__(self) -> str:
        return f"file://{self.path}"


Location = S3Location | HubLocation | FileLocation


def parse(uri: str) -> Location:
    """Parse a URI.

    Raises:
        ValueError: one sentence that says what is wrong and what to write instead.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        raise ValueError(f"{uri!r} is not a URI: write s3://BUCKET/PATH, hf://ORG/NAME or file:///PATH")
    if scheme == "s3":
        bucket, _, key = rest.partition("/")
        key = key.strip("/")
        if not bucket or not key:
            raise ValueError(f"{uri!r} needs a bucket and a path: write s3://BUCKET/PATH")
        return S3Location(bucket, key)
    if scheme == "hf":
        return _parse_hub(uri, rest)
    if scheme == "file":
        parsed = urlparse(uri)
        if parsed.netloc or not parsed.path.startswith("/"):
            raise ValueError(f"{uri!r} needs an absolute path: write file:///PATH")
        return FileLocation(unquote(parsed.path).rstrip("/") or "/")
    raise ValueError(f"{uri!r} has the unknown scheme {scheme!r}: use s3, hf or file")


def _parse_hub(uri: str, rest: str) -> HubLocation:
    kind = "model"
    if rest.startswith("datasets/"):
        kind, rest = "dataset", rest.removeprefix("datasets/")
    parts = rest.strip("/").split("/")
    if len(parts) < 2 or not all(parts[:2]):
        raise ValueError(f"{uri!r} needs an organisation and a name: write hf://ORG/NAME")
    name, _, revision = parts[1].partition("@")
    if kind == "model":
        # A branch name may hold slashes; a model URI has no file part, so all that follows "@" is the revision.
        revision = "/".join([revision, *parts[2:]]) if revision else ""
        path = "" if revision else "/".join(parts[2:])
    else:
        path = "/".join(parts[2:])
    return HubLocation(kind, f"{parts[0]}/{name}", revision or None, path)


def join(uri: str, *parts: str) -> str:
    """Append path segments to a URI: `join("s3://b/p", "x", "y") == "s3://b/p/x/y"`."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])
