"""Every container, compressed or not: what was written is read, and what is damaged is named."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.failures import FailureClass, JobError
from finetune_trainer.data import containers, rows
from finetune_trainer.data.rows import BadRow, Row, read_rows

quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

VALUES = [{"question": f"Was kostet {n}\u00a0€?", "answer": f'"{n}",\n\t{n * n}'} for n in range(300)]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def json_lines(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def separated(values: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(values[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(values)
    return buffer.getvalue().encode()


def parquet(values: list[dict[str, Any]] | pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(values if isinstance(values, pa.Table) else pa.Table.from_pylist(values), sink, **options)
    return sink.getvalue().to_pybytes()


CONTAINERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": lambda values: json.dumps(values, ensure_ascii=False).encode(),
    ".csv": separated,
    ".tsv": lambda values: separated(values, "\t"),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def read(path: Path, data: bytes) -> list[Row | BadRow]:
    path.write_bytes(data)
    return list(read_rows(path, f"s3://bucket/{path.name}"))


def refused(path: Path, data: bytes) -> str:
    with pytest.raises(JobError) as caught:
        read(path, data)
    assert caught.value.failure_class is FailureClass.DATA_ERROR
    assert caught.value.message.startswith(f"s3://bucket/{path.name} ")
    return caught.value.message


def values_of(found: list[Row | BadRow]) -> list[Any]:
    return [row.value if isinstance(row, Row) else row for row in found]


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
@pytest.mark.parametrize("container", CONTAINERS)
def test_what_was_written_is_read(tmp_path: Path, container: str, compression: str) -> None:
    data = CONTAINERS[container](VALUES)
    found = read(tmp_path / f"rows{container}{compression}", COMPRESSIONS.get(compression, bytes)(data))
    assert values_of(found) == VALUES
    assert [row.number for row in found] == list(range(1, len(VALUES) + 1))


def test_the_ending_may_be_in_capitals(tmp_path: Path) -> None:
    assert values_of(read(tmp_path / "rows.JSONL.GZ", gzip.compress(json_lines(VALUES)))) == VALUES


@pytest.mark.parametrize("compression", COMPRESSIONS)
class TestCompressed:
    def test_of_several_parts(self, tmp_path: Path, compression: str) -> None:
        compress = COMPRESSIONS[compression]
        data = compress(json_lines(VALUES[:100])) + compress(json_lines(VALUES[100:]))
        assert values_of(read(tmp_path / f"rows.jsonl{compression}", data)) == VALUES

    def test_cut_anywhere(self, tmp_path: Path, compression: str) -> None:
        whole = COMPRESSIONS[compression](json_lines(VALUES))
        path = tmp_path / f"rows.jsonl{compression}"
        for end in (12, len(whole) // 2, len(whole) - 1):
            message = refused(path, whole[:end])
            assert "is cut off" in message
            assert message.endswith("Upload it again.")

    def test_damaged(self, tmp_path: Path, compression: str) -> None:
        whole = COMPRESSIONS[compression](json_lines(VALUES))
        middle = len(whole) // 2
        data = whole[:middle] + bytes(byte ^ 0xFF for byte in whole[middle : middle + 40]) + whole[middle + 40 :]
        message = refused(tmp_path / f"rows.jsonl{compression}", data)
        assert "is damaged: " in message or "is cut off" in message

    def test_followed_by_something_else(self, tmp_path: Path, compression: str) -> None:
        """Such as a second part whose beginning is damaged: its rows must not be lost without a word."""
        message = refused(
            tmp_path / f"rows.jsonl{compression}", COMPRESSIONS[compression](json_lines(VALUES)) + b"x" * 99
        )
        assert "is damaged" in message

    def test_text_with_its_ending(self, tmp_path: Path, compression: str) -> None:
        message = refused(tmp_path / f"rows.jsonl{compression}", json_lines(VALUES))
        assert f"ends in {compression} and is not" in message

    def test_without_its_ending(self, tmp_path: Path, compression: str) -> None:
        for container in CONTAINERS:
            message = refused(tmp_path / f"rows{container}", COMPRESSIONS[compression](CONTAINERS[container](VALUES)))
            assert f"let its name end in {container}{compression}" in message

    def test_twice(self, tmp_path: Path, compression: str) -> None:
        compress = COMPRESSIONS[compression]
        assert "once more compressed" in refused(
            tmp_path / f"a.csv{compression}", compress(compress(separated(VALUES)))
        )

    def test_nothing(self, tmp_path: Path, compression: str) -> None:
        assert "holds no row" in refused(tmp_path / f"rows.jsonl{compression}", COMPRESSIONS[compression](b""))


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("rows.jsonl", json_lines(VALUES))
    return buffer.getvalue()


@pytest.mark.parametrize("container", [*CONTAINERS, ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (archive(), "is a zip archive"),
        (b"%PDF-1.7\n...", "is a PDF document"),
        (b"<!DOCTYPE html>\n<html>", "is a web page or XML. Upload the data themselves."),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git lfs pull"),
        ('{"a": 1}\n'.encode("utf-16"), "is UTF-16 or UTF-32 text. Save it as UTF-8."),
        ('{"a": 1}\n'.encode("utf-16-le"), "is UTF-16 or UTF-32 text. Save it as UTF-8."),
    ],
    ids=["zip", "PDF", "HTML", "git LFS", "UTF-16", "UTF-16 without BOM"],
)
def test_says_what_a_file_is_that_is_no_data(tmp_path: Path, container: str, data: bytes, words: str) -> None:
    inner = gzip.compress(data) if container.endswith(".gz") else data
    message = refused(tmp_path / f"rows{container}", inner)
    assert f"ends in {container} and is " in message
    assert words in message


@pytest.mark.parametrize("container", [container for container in CONTAINERS if container != ".json"])
def test_parquet_with_another_ending(tmp_path: Path, container: str) -> None:
    assert "is a Parquet file. Let its name end in .parquet." in refused(tmp_path / f"a{container}", parquet(VALUES))


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(VALUES[:3]).encode(),
        json.dumps(VALUES[:3], indent=2).encode(),
        json.dumps(VALUES[0], indent=2).encode(),
        ("[" + ",\n".join(map(json.dumps, VALUES[:3])) + "]").encode(),
    ],
    ids=["list on one line", "list", "object", "list of lines"],
)
def test_json_that_is_not_on_lines(tmp_path: Path, data: bytes) -> None:
    message = refused(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + data)
    assert "is JSON over several lines, or one list" in message
    assert "let the name of a list of objects end in .json" in message


@pytest.mark.parametrize("column", ["ORCID", "PARENT", "PAR1", "BZh9", "version"])
def test_columns_that_begin_like_other_files(tmp_path: Path, column: str) -> None:
    assert values_of(read(tmp_path / "rows.csv", f"{column},b\n1,2\n".encode())) == [{column: "1", "b": "2"}]


def test_lines_of_lists_are_bad_rows(tmp_path: Path) -> None:
    found = read(tmp_path / "rows.jsonl", b'[{"role": "user"}]\n[{"role": "user"}]\n{"a": 1}\n')
    bad = [BadRow("s3://bucket/rows.jsonl", number, "not an object") for number in (1, 2)]
    assert found == [*bad, Row("s3://bucket/rows.jsonl", 3, {"a": 1})]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", b"\n \n\xe2\x80\x83\n"),
        ("rows.json", b" [ \n]\n"),
        ("rows.csv", b"question,answer\n"),
        ("rows.tsv", b"\n\n"),
        ("rows.parquet", parquet(pa.table({"question": pa.array([], pa.string())}))),
    ],
)
def test_nothing_in_it(tmp_path: Path, name: str, data: bytes) -> None:
    assert "holds no row. Upload rows, or take the file out" in refused(tmp_path / name, data)


BAD_JSON = {
    b'{"a": NaN}': "holds NaN, which is not JSON",
    b'{"a": [-Infinity]}': "holds -Infinity, which is not JSON",
    b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}': "has the key 'c' twice",
    b"\0\0\0\0": "holds a NUL byte",
    b'{"a": "\0"}': "holds a NUL byte",
    b'{"a": "\xfc"}': "not UTF-8 text",
    b'{"a": 1,}': "not JSON",
    b"null": "not an object",
    b'{"a": ' + b"[" * 9000 + b"]" * 9000 + b"}": "is nested too deeply",
}


@pytest.mark.parametrize("container", [".jsonl", ".json"])
@pytest.mark.parametrize(("bad", "reason"), BAD_JSON.items(), ids=BAD_JSON.values())
def test_bad_rows_of_json(tmp_path: Path, container: str, bad: bytes, reason: str) -> None:
    lines = [b'{"a": 1}', bad, b'{"a": 2}']
    data = b"\n".join(lines) if container == ".jsonl" else b"[" + b",".join(lines) + b"]"
    name = f"s3://bucket/rows{container}"
    found = read(tmp_path / f"rows{container}", data)
    assert found == [Row(name, 1, {"a": 1}), BadRow(name, 2, reason), Row(name, 3, {"a": 2})]


@pytest.mark.parametrize("container", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_row_may_be_so_large_and_no_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 200_000)
    monkeypatch.setattr(csv, "field_size_limit", lambda limit: None)
    values = [{"a": "x"}, {"a": "y" * 190_000}, {"a": "z" * 210_000}, {"a": "é"}]
    data = {**CONTAINERS, ".parquet": parquet}[container](values)
    path = tmp_path / f"rows{container}"
    if container == ".csv":
        csv.field_size_limit(1 << 20)
        assert "(after row 2). Look for a quotation mark that is missing" in refused(path, data)
        return
    found = read(path, data)
    assert values_of(found)[:2] + values_of(found)[3:] == values[:2] + values[3:]
    assert found[2] == BadRow(f"s3://bucket/rows{container}", 3, "is larger than 64 MiB")


class TestParquet:
    def test_values_are_plain(self, tmp_path: Path) -> None:
        messages = [
            {"role": "user", "content": "?", "weight": None},
            {"role": "assistant", "content": "!", "weight": 1},
        ]
        moment = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        table = pa.table(
            {
                "messages": pa.array(
                    [messages] * 3,
                    pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string()), ("weight", pa.int8())])),
                ),
                "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
                "seen": pa.array([1_767_225_600_000_000_001] * 3, pa.timestamp("ns")),
                "day": pa.array([moment] * 3, pa.timestamp("us", tz="UTC")),
                "tags": pa.array([[("x", 1)], [], None], pa.map_(pa.string(), pa.int64())),
                "nothing": pa.nulls(3),
            }
        )
        found = values_of(read(tmp_path / "rows.parquet", parquet(table)))
        # A struct has the members of all rows; what a row does not have is not in it.
        assert [value["messages"] for value in found] == [[{"role": "user", "content": "?"}, messages[1]]] * 3
        assert [value["kind"] for value in found] == ["a", "b", "a"]
        assert [value["tags"] for value in found] == [{"x": 1}, {}, None]
        assert {value["nothing"] for value in found} == {None}
        assert {value["seen"] for value in found} == {1_767_225_600_000_000_001}

    def test_row_groups_and_batches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rows, "PARQUET_BATCH_ROWS", 7)
        for compression in ("none", "snappy", "zstd"):
            found = read(tmp_path / "rows.parquet", parquet(VALUES, row_group_size=100, compression=compression))
            assert values_of(found) == VALUES
            assert [row.number for row in found] == list(range(1, 301))

    def test_one_bad_value_is_one_bad_row(self, tmp_path: Path) -> None:
        texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
        found = read(tmp_path / "rows.parquet", parquet(pa.table({"text": texts})))
        name = "s3://bucket/rows.parquet"
        assert found == [Row(name, 1, {"text": "a"}), BadRow(name, 2, "not UTF-8 text"), Row(name, 3, {"text": "c"})]
        tags = pa.array([[("x", 1)], [("x", 1), ("x", 2)]], pa.map_(pa.string(), pa.int64()))
        found = read(tmp_path / "rows.parquet", parquet(pa.table({"tags": tags})))
        assert found[1] == BadRow(name, 2, "has a value that cannot be read, or a key twice")

    def test_cut_or_damaged(self, tmp_path: Path) -> None:
        whole = parquet(VALUES, row_group_size=50, write_page_checksum=True)
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 0xFF
        for data in (whole[:-1], whole[: len(whole) // 2], whole[:6], bytes(damaged)):
            assert "is a Parquet file that is damaged or cut off" in refused(tmp_path / "rows.parquet", data)

    def test_one_letter_that_is_another(self, tmp_path: Path) -> None:
        whole = parquet(
            [{"text": "a" * 500}],
            compression="none",
            write_page_checksum=True,
            use_dictionary=False,
            write_statistics=False,
        )
        assert len(read(tmp_path / "rows.parquet", whole)) == 1
        assert "that is damaged or cut off" in refused(
            tmp_path / "rows.parquet", whole.replace(b"a" * 400, b"a" * 399 + b"b", 1)
        )

    def test_fewer_rows_than_it_says(self, tmp_path: Path) -> None:
        whole = parquet(VALUES)
        # The number of rows, 300, before the list of row groups.
        assert whole.count(b"\x16\xd8\x04\x19") == 1
        damaged = whole.replace(b"\x16\xd8\x04\x19", b"\x16\xda\x04\x19")
        assert "says that it has 301 rows (after row 300)" in refused(tmp_path / "rows.parquet", damaged)

    def test_a_column_twice(self, tmp_path: Path) -> None:
        table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
        assert "has the column 'text' twice" in refused(tmp_path / "rows.parquet", parquet(table))


# What may be in a file of generated rows: good ones, and bad ones that leave the others alone.
GOOD = st.dictionaries(st.text(max_size=4), st.text(max_size=20) | st.integers() | st.none(), max_size=3)
LINES = st.lists(
    GOOD.map(lambda value: json.dumps(value).encode())
    | st.sampled_from([bad for bad in BAD_JSON if len(bad) < 100 and b"\n" not in bad]),
    min_size=1,
    max_size=12,
)


@quick
@given(
    lines=LINES,
    compression=st.sampled_from(["", *COMPRESSIONS]),
    container=st.sampled_from([".jsonl", ".json"]),
    block=st.sampled_from([1, 2, 3, 7, 1 << 16]),
)
def test_no_row_is_lost_or_doubled(
    tmp_path: Path, lines: list[bytes], compression: str, container: str, block: int
) -> None:
    data = b"\n".join([b"{}", *lines]) if container == ".jsonl" else b"[{},\n" + b" ,".join(lines) + b"]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", block)
        patch.setattr(containers, "BLOCK", block)
        found = read(tmp_path / f"rows{container}{compression}", COMPRESSIONS.get(compression, bytes)(data))
    assert [row.number for row in found] == list(range(1, len(lines) + 2))
    for row, line in zip(found[1:], lines, strict=True):
        expected = BAD_JSON.get(line)
        assert (row.reason == expected) if isinstance(row, BadRow) else (row.value == json.loads(line))


def outcome(path: Path, data: bytes) -> list[int] | None:
    """Numbers of the rows; None when the file was refused in the way that files are."""
    try:
        return [row.number for row in read(path, data)]
    except JobError as error:
        clear = error.failure_class is FailureClass.DATA_ERROR and error.message.startswith(f"s3://bucket/{path.name} ")
        return None if clear else []


@quick
@given(
    start=st.sampled_from(
        [b"", b"[", b"{", b"a,b\n", b"PAR1", *(compress(b"[{}") for compress in COMPRESSIONS.values())]
    ),
    data=st.binary(max_size=200),
    ending=st.sampled_from([*CONTAINERS, *(f".jsonl{ending}" for ending in COMPRESSIONS), ".parquet"]),
)
def test_any_bytes_are_rows_or_one_clear_failure(tmp_path: Path, start: bytes, data: bytes, ending: str) -> None:
    numbers = outcome(tmp_path / f"rows{ending}", start + data)
    assert numbers is None or (numbers and numbers == sorted(set(numbers)))


@quick
@given(places=st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_parquet_is_rows_or_one_clear_failure(tmp_path: Path, places: list[tuple[int, int]]) -> None:
    data = bytearray(PARQUET)
    for place, byte in places:
        data[place % len(data)] = byte
    numbers = outcome(tmp_path / "rows.parquet", bytes(data))
    assert numbers is None or numbers == list(range(1, len(numbers) + 1)) != []


PARQUET = parquet(VALUES, row_group_size=100)

PEAK = """
import sys
from pathlib import Path
from finetune_trainer.data.rows import read_rows
count = sum(1 for _ in read_rows(Path(sys.argv[1]), sys.argv[1]))
# The peak in resource.getrusage begins with that of the parent.
print(count, Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def peak(path: Path) -> tuple[int, int]:
    """Rows of a file, and the most memory of a process that reads them."""
    run = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    count, size = map(int, run.stdout.split())
    return count, size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is in /proc")
@pytest.mark.parametrize("ending", [".jsonl.zst", ".json", ".csv", ".parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, ending: str) -> None:
    """Twenty times as many rows, 40 MB of them."""
    few, many = tmp_path / f"few{ending}", tmp_path / f"many{ending}"
    values = [{"text": f"{n} " + "text " * 200} for n in range(2000)]
    for path, times in ((few, 1), (many, 20)):
        if ending == ".parquet":
            path.write_bytes(parquet(pa.concat_tables([pa.Table.from_pylist(values)] * times), compression="none"))
            continue
        container, _, compression = ending.rpartition(".") if ending.count(".") > 1 else (ending, "", "")
        data = {**CONTAINERS, ".parquet": parquet}[container](values)
        if container == ".json":
            data = b"[" + b",".join([data[1:-1]] * times) + b"]"
        else:
            head, _, rest = data.partition(b"\n") if container == ".csv" else (b"", b"", data)
            data = head + b"\n" + rest * times
        path.write_bytes(COMPRESSIONS.get(f".{compression}", bytes)(data))
    (count, low), (counts, high) = peak(few), peak(many)
    assert (count, counts) == (2000, 40_000)
    assert high <= 1.1 * low
