"""What a data file is, by its name and by its first bytes, and its content as a stream without compression."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

CONTAINERS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
ENDINGS = (
    "Use .jsonl, .ndjson, .json, .csv, .tsv or .parquet; all but .parquet also with .gz, .bz2, .xz or .zst behind it"
)

BLOCK = 1 << 16
"""Bytes that are read at once."""
XZ_MEMORY = 1 << 30
"""Bytes that a decompressor may take: xz at its strongest needs 65 MiB, a hostile file asks for more."""

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (rb"\x1f\x8b", "gzip"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2"),
    (rb"\xfd7zXZ\0", "xz"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "zstd"),
    (rb"PAR1(?![ -~\t\r\n])", "Parquet"),
    (rb"ARROW1|\xff\xff\xff\xff.\x00\x00\x00.\x00\x00\x00", "an Arrow file"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive (or a document of an office program)"),
    (rb".{257}ustar[\0 ]", "a tar archive"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (rb"%PDF-", "a PDF document"),
    (rb"\x89HDF\r\n", "an HDF5 file"),
    (rb"SQLite format 3\0", "an SQLite database"),
    (rb"Obj\x01", "an Avro file"),
    (rb"\xff\xfe|\xfe\xff|[\[{]\0|\0[\[{]|\0\0\xfe\xff", "UTF-16 or UTF-32 text"),
    (rb"version https://git-lfs", "the pointer that git keeps in place of a large file"),
    (rb"\s*<(!DOCTYPE|!doctype|html|HTML|\?xml)", "a web page or XML"),
)
_COMPILED = [(re.compile(pattern, re.DOTALL), what) for pattern, what in _SIGNATURES]
_REMEDIES = {
    "UTF-16 or UTF-32 text": "Save it as UTF-8",
    "the pointer that git keeps in place of a large file": "Fetch the file itself with git lfs pull, and upload that",
    "a web page or XML": "Upload the data themselves",
}


class Unreadable(Exception):
    """A file cannot be read from here on: what is wrong with it, and what to do, as two halves of a message."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True)
class Kind:
    """What the name of a file says it is."""

    container: str
    compression: str
    """Ending of the compression, or nothing."""


def kind_of(name: str) -> Kind | None:
    """What a file is by its name, or None when it is no data file."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    container = suffixes[-1] if suffixes else ""
    if container not in CONTAINERS or (container == ".parquet" and compression):
        return None
    return Kind(container, compression)


def signature(head: bytes) -> str:
    """What a file is by its first bytes; empty for what may be text."""
    return next((what for pattern, what in _COMPILED if pattern.match(head)), "")


@contextmanager
def open_text(path: Path, kind: Kind) -> Iterator[io.BufferedReader]:
    """The bytes of a file of text, without compression.

    Raises:
        Unreadable: it is something else than its name says. Reading may raise it, too.
    """
    with path.open("rb") as file:
        stream = file
        if kind.compression:
            expected, found = COMPRESSIONS[kind.compression], signature(file.peek(512))
            if found != expected:
                what = _shown(found) if found else f"not {expected}"
                raise Unreadable(f"ends in {kind.compression} and is {what}", "Give it the ending of what it is")
            stream = io.BufferedReader(_Decompressed(file, kind.compression), BLOCK)
        if found := signature(stream.peek(512)):
            raise _wrong(found, kind)
        yield stream


def require_parquet(path: Path) -> None:
    """
    Raises:
        Unreadable: the file is no Parquet by its first bytes.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if not head.startswith(b"PAR1"):
        raise _wrong(signature(head) or "no Parquet file", Kind(".parquet", ""))


def _shown(found: str) -> str:
    return f"{found} data" if found in COMPRESSIONS.values() else "a Parquet file" if found == "Parquet" else found


def _wrong(found: str, kind: Kind) -> Unreadable:
    ending = next((ending for ending, name in COMPRESSIONS.items() if name == found), "")
    remedy = _REMEDIES.get(found, ENDINGS)
    if ending and kind.container == ".parquet":
        remedy = "Decompress it: Parquet is compressed inside"
    elif ending:
        again = "once more compressed" if kind.compression else "compressed"
        remedy = f"It is {again}: let its name end in {kind.container}{ending}, and compress it once"
    elif found == "Parquet":
        remedy = "Let its name end in .parquet"
    return Unreadable(f"ends in {kind.container}{kind.compression} and is {_shown(found)}", remedy)


class _Decompressed(io.RawIOBase):
    """Turns what goes wrong in a decompressor into `Unreadable`, and leaves what goes wrong on the disk as it is."""

    def __init__(self, file: BinaryIO, compression: str) -> None:
        self._read = _reader(file, compression)
        self._name = COMPRESSIONS[compression]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._read(len(buffer))
        except EOFError as error:
            raise self._cut() from error
        except (zlib.error, lzma.LZMAError, pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            if "Truncated" in str(error):
                raise self._cut() from error
            raise Unreadable(
                f"is damaged: its {self._name} data cannot be decompressed", "Compress it anew, and upload it again"
            ) from error
        buffer[: len(data)] = data
        return len(data)

    def _cut(self) -> Unreadable:
        return Unreadable(f"is cut off: its {self._name} data have no end", "Upload it again")


def _reader(file: BinaryIO, compression: str) -> Callable[[int], bytes]:
    match compression:
        case ".gz":
            return gzip.GzipFile(fileobj=file, mode="rb").read
        case ".bz2":
            return _Members(file, bz2.BZ2Decompressor).read
        case ".xz":
            return _Members(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)).read
    stream: Callable[[int], bytes] = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd").read
    return stream


class _Members:
    """Decompresses one stream behind the other, to the end of the file.

    The standard library's readers of bzip2 and xz end without a word where a later stream is damaged."""

    def __init__(self, file: BinaryIO, new: Callable[[], Any]) -> None:
        self._file = file
        self._new = new
        self._stream = new()

    def read(self, size: int) -> bytes:
        while True:
            if self._stream.eof:
                # Streams may be padded with zeros.
                rest: bytes = self._stream.unused_data.lstrip(b"\0")
                while not rest:
                    block = self._file.read(BLOCK)
                    if not block:
                        return b""
                    rest = block.lstrip(b"\0")
                self._stream = self._new()
            elif self._stream.needs_input:
                rest = self._file.read(BLOCK)
                if not rest:
                    raise EOFError
            else:
                rest = b""
            data: bytes = self._stream.decompress(rest, size)
            if data:
                return data
