"""Readers of .jsonl, .json and .csv: every row comes out, or is counted with a reason without its content."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import RowPolicy
from finetune_trainer.data.rows import BadRow, Problems, Row, read_rows

SECRET = "Mrs. Example's account number 4711"
quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path: Path, data: bytes) -> list[Row | BadRow]:
    path.write_bytes(data)
    return list(read_rows(path, f"s3://bucket/{path.name}"))


def refused(path: Path, data: bytes) -> str:
    with pytest.raises(JobError) as caught:
        read(path, data)
    assert caught.value.failure_class is FailureClass.DATA_ERROR
    assert SECRET not in caught.value.message
    return caught.value.message


class TestJsonLines:
    @pytest.mark.parametrize(
        "data",
        [
            b'{"a": 1}\n{"a": 2}\n',
            b'{"a": 1}\n{"a": 2}',
            b'{"a": 1}\r\n{"a": 2}\r\n',
            b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n',
            b'  {"a": 1}  \n\t{"a": 2}\n',
        ],
        ids=["newline", "no newline at the end", "CRLF", "BOM", "spaces"],
    )
    def test_reads_each_line(self, tmp_path: Path, data: bytes) -> None:
        name = "s3://bucket/rows.jsonl"
        assert read(tmp_path / "rows.jsonl", data) == [Row(name, 1, {"a": 1}), Row(name, 2, {"a": 2})]

    def test_skips_blank_lines_and_keeps_line_numbers(self, tmp_path: Path) -> None:
        rows = read(tmp_path / "rows.jsonl", b'\n{"a": 1}\n\n  \r\n{"a": 2}\n\n')
        assert [(row.number, row.value) for row in rows if isinstance(row, Row)] == [(2, {"a": 1}), (5, {"a": 2})]
        assert len(rows) == 2

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"\xff\xfe{}", "not UTF-8 text"),
            (f'{{"text": "{SECRET}"'.encode(), "not JSON"),
            (SECRET.encode(), "not JSON"),
            (b"null", "not an object"),
            (b"[1, 2]", "not an object"),
            (b'"text"', "not an object"),
            (b"7", "not an object"),
            (b"[" * 100_000, "is nested too deeply"),
            (b"1" * 5000, "not JSON"),
        ],
        ids=["not UTF-8", "cut", "prose", "null", "list", "string", "number", "too deep", "too many digits"],
    )
    def test_names_the_bad_line(self, tmp_path: Path, line: bytes, reason: str) -> None:
        rows = read(tmp_path / "rows.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
        assert rows[1] == BadRow("s3://bucket/rows.jsonl", 2, reason)
        assert isinstance(rows[0], Row)
        assert isinstance(rows[2], Row)

    def test_a_cut_file_loses_its_last_line_only(self, tmp_path: Path) -> None:
        whole = b"".join(json.dumps({"n": n}).encode() + b"\n" for n in range(5))
        rows = read(tmp_path / "rows.jsonl", whole[:-4])
        assert [type(row) for row in rows] == [Row] * 4 + [BadRow]

    @quick
    @given(
        values=st.lists(
            st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.none() | st.lists(st.booleans())),
            min_size=1,
            max_size=8,
        ),
        newline=st.sampled_from(["\n", "\r\n", "\n\n"]),
        bom=st.booleans(),
        escape=st.booleans(),
    )
    def test_what_was_written_is_read(
        self, tmp_path: Path, values: list[dict[str, Any]], newline: str, bom: bool, escape: bool
    ) -> None:
        text = "".join(json.dumps(value, ensure_ascii=escape) + newline for value in values)
        rows = read(tmp_path / "rows.jsonl", text.encode("utf-8-sig" if bom and text else "utf-8", "surrogatepass"))
        if "surrogates" not in repr(rows):
            assert [row.value for row in rows if isinstance(row, Row)] == values

    @quick
    @given(data=st.binary(max_size=300).map(b'{"a": 1}\n'.__add__))
    def test_any_bytes_are_rows_or_problems(self, tmp_path: Path, data: bytes) -> None:
        rows = read(tmp_path / "rows.jsonl", data)
        numbers = [row.number for row in rows]
        assert numbers == sorted(set(numbers))
        # Each line that is not blank is accounted for; a BOM alone is a blank line.
        lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert len(rows) == sum(bool(line.decode("utf-8", "replace").strip()) for line in lines)


class TestJson:
    def test_reads_a_list_of_objects(self, tmp_path: Path) -> None:
        rows = read(tmp_path / "rows.json", b'\xef\xbb\xbf [{"a": 1},\r\n {"a": 2}, null]')
        name = "s3://bucket/rows.json"
        assert rows == [Row(name, 1, {"a": 1}), Row(name, 2, {"a": 2}), BadRow(name, 3, "not an object")]

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b'{"a": 1}\n{"a": 2}', ["list of objects", "end in .jsonl"]),
            (f'[{{"a": "{SECRET}"}}, {{"a":'.encode(), ["cut off", "after row 1", "Upload it again"]),
            (b"", ["holds no row"]),
            (b'{"a": 1}', ["list of objects", "[{...}, {...}]"]),
            (b"[" * 100_000, ["lacks a quotation mark or bracket"]),
            (b'[{"a": 1}] {"a": 2}', ["something behind the end of its list"]),
            (b'[{"a": 1}]' + b" " * 70_000 + b"x", ["something behind the end of its list"]),
        ],
        ids=["JSON Lines", "cut", "empty", "object", "too deep", "text behind", "text far behind"],
    )
    def test_says_what_is_wrong_with_the_file(self, tmp_path: Path, data: bytes, words: list[str]) -> None:
        message = refused(tmp_path / "rows.json", data)
        assert message.startswith("s3://bucket/rows.json ")
        assert all(word in message for word in words), message

    @pytest.mark.parametrize(
        ("element", "reason"),
        [
            (b'"\xff"', "not UTF-8 text"),
            (b"1" * 5000, "not JSON"),
            (b"", "not JSON"),
            (b'{"a": [1, 2}, "b": 3]', "not JSON"),
            (b"[" * 9000 + b"]" * 9000, "is nested too deeply"),
            (b'{"a": "\\"}, {", "b": nul}', "not JSON"),
        ],
        ids=["not UTF-8", "too many digits", "nothing", "brackets crossed", "too deep", "brackets in a string"],
    )
    def test_names_the_damaged_element_and_goes_on(self, tmp_path: Path, element: bytes, reason: str) -> None:
        name = "s3://bucket/rows.json"
        rows = read(tmp_path / "rows.json", b'[{"a": 1}, ' + element + b', {"a": 2}]')
        assert rows == [Row(name, 1, {"a": 1}), BadRow(name, 2, reason), Row(name, 3, {"a": 2})]


class TestCsv:
    @pytest.mark.parametrize("newline", ["\n", "\r\n"])
    @pytest.mark.parametrize("bom", ["", "\ufeff"])
    def test_reads_records(self, tmp_path: Path, newline: str, bom: str) -> None:
        data = (bom + f'question,answer{newline}"a, ""b""{newline}c",d{newline}é,{newline}').encode()
        rows = read(tmp_path / "rows.csv", data)
        name = "s3://bucket/rows.csv"
        assert rows == [
            Row(name, 1, {"question": f'a, "b"{newline}c', "answer": "d"}),
            Row(name, 2, {"question": "é", "answer": ""}),
        ]

    def test_names_records_that_are_no_text(self, tmp_path: Path) -> None:
        rows = read(tmp_path / "rows.csv", b"a,b\n1,2\n\xfc,2\n1,\0\n\xc3\xbc,2\n")
        name = "s3://bucket/rows.csv"
        bad = [BadRow(name, 2, "not UTF-8 text"), BadRow(name, 3, "holds a NUL byte")]
        assert rows == [Row(name, 1, {"a": "1", "b": "2"}), *bad, Row(name, 4, {"a": "ü", "b": "2"})]

    def test_names_records_of_another_width(self, tmp_path: Path) -> None:
        rows = read(tmp_path / "rows.csv", b"a,b\n1,2\n1\n1,2,3\n3,4\n")
        assert [row.number for row in rows if isinstance(row, BadRow)] == [2, 3]
        assert {row.reason for row in rows if isinstance(row, BadRow)} == {
            "has another number of fields than the header"
        }

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (f'a,b\n1,2\n3,"{SECRET}'.encode(), ["not CSV", "after row 1"]),
            (f'a,b\n1,2\n1,"{SECRET}"x\n'.encode(), ["not CSV", "after row 1"]),
            (b"a,\xff\n1,2\n", ["first line that is not UTF-8 text", "Save it as UTF-8"]),
            (b"a,b,a\n1,2,3\n", ["has the column 'a' twice"]),
            (b"a;b\n1;2\n", ["separated by ';'", "separate them by commas"]),
            (b"a\tb\n1\t2\n", ["separated by '\\t'", "let its name end in .tsv"]),
            (b'{"a": 1, "b": 2}\n{"a": 1, "b": 2}\n', ["is JSON and not CSV", "end in .jsonl"]),
        ],
        ids=["cut in a quoted field", "text behind a quoted field", "header", "twice", "semicolons", "tabs", "JSON"],
    )
    def test_says_what_is_wrong_with_the_file(self, tmp_path: Path, data: bytes, words: list[str]) -> None:
        message = refused(tmp_path / "rows.csv", data)
        assert all(word in message for word in words), message

    @quick
    @given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=6))
    def test_what_was_written_is_read(self, tmp_path: Path, records: list[tuple[str, str]]) -> None:
        records = [(a.replace("\0", "").replace("\r", ""), b.replace("\0", "").replace("\r", "")) for a, b in records]
        buffer = io.StringIO()
        csv.writer(buffer).writerows([("a", "b"), *records])
        rows = read(tmp_path / "rows.csv", buffer.getvalue().encode("utf-8", "replace"))
        expected = [{"a": a, "b": b} for a, b in records]
        assert [row.value for row in rows if isinstance(row, Row)] == [
            {key: text.encode("utf-8", "replace").decode() for key, text in value.items()} for value in expected
        ]


@pytest.mark.parametrize("name", ["rows.txt", "rows.parquet.gz", "rows", "rows.gz", "jsonl"])
def test_refuses_other_endings(tmp_path: Path, name: str) -> None:
    message = refused(tmp_path / name, b"{}")
    assert "ending" in message
    assert "Use .jsonl, .ndjson, .json, .csv, .tsv or .parquet" in message


def bad_rows(count: int) -> list[BadRow]:
    return [BadRow("s3://b/x.jsonl", n, "not JSON" if n % 2 else "has no 'text'") for n in range(1, count + 1)]


class TestProblems:
    def test_counts_no_more_different_reasons_than_fit_into_memory(self) -> None:
        problems = Problems(RowPolicy.SKIP, 10_000)
        for number in range(3000):
            problems.add(BadRow("x", number, f"has the key '{number}' twice"))
        assert len(problems.reasons) == 1001
        assert sum(problems.reasons.values()) == 3000

    def check(self, policy: RowPolicy, limit: int, bad: int, total: int = 100) -> None:
        problems = Problems(policy, limit)
        for row in bad_rows(bad):
            problems.add(row)
        problems.check(total)

    @pytest.mark.parametrize(
        ("policy", "limit", "bad"), [(RowPolicy.FAIL, 100, 0), (RowPolicy.SKIP, 0, 0), (RowPolicy.SKIP, 3, 3)]
    )
    def test_allows(self, policy: RowPolicy, limit: int, bad: int) -> None:
        self.check(policy, limit, bad)

    def test_fail_names_the_rows_and_the_way_out(self) -> None:
        with pytest.raises(JobError) as caught:
            self.check(RowPolicy.FAIL, 100, 3)
        assert caught.value.failure_class is FailureClass.DATA_ERROR
        message = caught.value.message
        assert message.startswith("3 of 100 rows cannot be used: s3://b/x.jsonl row 1: not JSON; ")
        assert "In all: 2 x not JSON, 1 x has no 'text'." in message
        assert message.endswith("Mend them, or set dataset.invalidRows.policy to Skip.")

    def test_one_more_than_the_limit_fails(self) -> None:
        with pytest.raises(JobError) as caught:
            self.check(RowPolicy.SKIP, 3, 4)
        assert caught.value.message.startswith("4 of 100 rows cannot be used, and dataset.invalidRows.limit is 3: ")
        assert caught.value.message.endswith("Mend them, or raise the limit.")

    def test_lists_the_first_rows_and_counts_all(self) -> None:
        with pytest.raises(JobError) as caught:
            self.check(RowPolicy.FAIL, 0, 5000, total=9000)
        message = caught.value.message
        assert message.startswith("5000 of 9000 rows")
        assert message.count(" row ") == 10
        assert "and 4990 more" in message
        assert "2500 x not JSON, 2500 x has no 'text'" in message or "2500 x has no 'text', 2500 x not JSON" in message
