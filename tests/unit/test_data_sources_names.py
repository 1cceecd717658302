"""What the URI of a source names, and how often its examples are learnt; pure functions."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.document import StorageSettings
from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import DataFile, Dataset, TrainFile
from finetune_trainer.data import sources
from finetune_trainer.data.sources import copies, entry_of, find

BELOW = ["p/a.jsonl", "p/b.csv.gz", "p/q/c.jsonl", "p/q/r/d.parquet", "p/q/r/a-1.jsonl"]
OTHERS = [
    "p/README.md",
    "p/LICENSE",
    "p/.gitattributes",
    "p/_SUCCESS",
    "p/_log/0.json",
    "p/q/.x.jsonl",
    "p/q/_part.jsonl",
    "p/dataset_infos.json",
    "p/q/x.parquet.gz",
    "pp/a.jsonl",
    "a.jsonl",
]


@pytest.fixture
def disk(tmp_path: Path) -> str:
    """URI of a folder with all these files."""
    for name in [*BELOW, *OTHERS]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path.as_uri()


LOCAL = StorageSettings(allow_files=True)


def found(*uris: str, validation: list[str] | None = None) -> list[list[str]]:
    dataset = Dataset(
        train=[TrainFile(uri=uri) for uri in uris],
        validation=[DataFile(uri=uri) for uri in validation] if validation else None,
    )
    return [[file.uri for file in files] for files in find(dataset, LOCAL)]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("p/", BELOW),
        ("p/**", BELOW),
        ("p/**/*", BELOW),
        ("p/*", ["p/a.jsonl", "p/b.csv.gz"]),
        ("p/*.jsonl", ["p/a.jsonl"]),
        ("p/**/*.jsonl", ["p/a.jsonl", "p/q/c.jsonl", "p/q/r/a-1.jsonl"]),
        ("p/**.jsonl", ["p/a.jsonl", "p/q/c.jsonl", "p/q/r/a-1.jsonl"]),
        ("p/*/*.jsonl", ["p/q/c.jsonl"]),
        ("p/**/r/*", ["p/q/r/a-1.jsonl", "p/q/r/d.parquet"]),
        ("p/q/**/a*.jsonl", ["p/q/r/a-1.jsonl"]),
        ("p/*a.jsonl", ["p/a.jsonl"]),
        ("p*/a.jsonl", ["p/a.jsonl", "pp/a.jsonl"]),
        ("p/q/_p*.jsonl", ["p/q/_part.jsonl"]),
        ("p/q/_part.jsonl", ["p/q/_part.jsonl"]),
        ("**/a.jsonl", ["a.jsonl", "p/a.jsonl", "pp/a.jsonl"]),
    ],
)
def test_patterns(disk: str, pattern: str, names: list[str]) -> None:
    expected = [f"{disk}/{name}" for name in sorted(names)]
    assert found(f"{disk}/{pattern}") == [expected, []]
    entries = [DataFile(uri=f"{disk}/other/"), DataFile(uri=f"{disk}/{pattern}")]
    assert {entry_of(uri, entries) for uri in expected} == {1}


def test_names_with_signs_of_uris_and_patterns(tmp_path: Path) -> None:
    for name in ("a+b (1).jsonl", "100%41 ü#?[x].jsonl"):
        (tmp_path / name).write_text("x")
    uris, _ = found(f"{tmp_path.as_uri()}/")
    assert len(uris) == 2
    files, _ = find(Dataset(train=[TrainFile(uri=uri) for uri in uris]), LOCAL)
    fetched = sources.download(files, tmp_path / "fetched", LOCAL)
    assert [path.read_text() for _, path in fetched] == ["x", "x"]
    (tmp_path / "fetched" / "c[x].jsonl").write_text("x")
    assert found(f"{tmp_path.as_uri()}/fetched/*[x]*")[0] == [f"{tmp_path.as_uri()}/fetched/c%5Bx%5D.jsonl"]


def test_sources_keep_their_order_and_files_are_sorted(disk: str) -> None:
    train, validation = found(f"{disk}/p/q/", f"{disk}/a.jsonl", validation=[f"{disk}/pp/"])
    assert train == [f"{disk}/{name}" for name in ("p/q/c.jsonl", "p/q/r/a-1.jsonl", "p/q/r/d.parquet", "a.jsonl")]
    assert validation == [f"{disk}/pp/a.jsonl"]


def refused(*uris: str, validation: list[str] | None = None) -> tuple[FailureClass, str]:
    with pytest.raises(JobError) as caught:
        found(*uris, validation=validation)
    return caught.value.failure_class, caught.value.message


@pytest.mark.parametrize(
    ("train", "validation"), [(["p/", "p/a.jsonl"], None), (["p/a.jsonl"], ["p/*"]), (["p/a.jsonl"] * 2, None)]
)
def test_a_file_that_is_named_twice(disk: str, train: list[str], validation: list[str] | None) -> None:
    second = [f"{disk}/{name}" for name in validation] if validation else None
    failure_class, message = refused(*(f"{disk}/{name}" for name in train), validation=second)
    assert failure_class is FailureClass.USER_ERROR
    assert message.startswith(f"The data file {disk}/p/a.jsonl is named twice, by {disk}/{train[0]} and by {disk}/")
    assert "weight" in message


def test_nothing_found_says_what_is_there(disk: str) -> None:
    failure_class, message = refused(f"{disk}/p/*.tsv")
    assert failure_class is FailureClass.NOT_FOUND
    assert message.startswith(
        f"{disk}/p/*.tsv names no data file: below {disk}/p there is only .gitattributes, LICENSE, "
    )
    assert "and 9 more" in message
    _, message = refused(f"{disk}/nothing/")
    assert f"below {disk}/nothing there is nothing. Correct the URI." in message


def test_an_empty_file_and_an_unknown_ending(disk: str, tmp_path: Path) -> None:
    (tmp_path / "p" / "z.jsonl").write_text("")
    assert refused(f"{disk}/p/") == (FailureClass.DATA_ERROR, f"The data file {disk}/p/z.jsonl is empty. Upload rows.")
    failure_class, message = refused(f"{disk}/p/README.md")
    assert failure_class is FailureClass.USER_ERROR
    assert "has an ending that is unknown" in message


def test_too_many_files(disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_FILES", len(BELOW))
    assert len(found(f"{disk}/p/")[0]) == len(BELOW)
    failure_class, message = refused(f"{disk}/a.jsonl", validation=[f"{disk}/p/"])
    assert failure_class is FailureClass.USER_ERROR
    assert f"{disk}/p/ names 5, and those before it 1. Put their rows into fewer files." in message


def entries(*weights: str) -> list[TrainFile]:
    return [TrainFile(uri=f"s3://b/{number}.jsonl", weight=weight) for number, weight in enumerate(weights)]


class TestCopies:
    @given(
        weights=st.lists(st.sampled_from(["1", "2", "0.5", "2.5", "0.1", "100", "0.001"]), min_size=1, max_size=4),
        data=st.data(),
    )
    def test_how_many(self, weights: list[str], data: st.DataObject) -> None:
        numbers = data.draw(st.lists(st.integers(0, len(weights) - 1), max_size=60))
        held_out = data.draw(st.sets(st.integers(0, max(0, len(numbers) - 1))))
        left_out = [example in held_out for example in range(len(numbers))]
        found = copies(array("H", numbers), entries(*weights), left_out, 42)
        assert len(found) == len(numbers)
        assert not any(found[example] for example in held_out & set(range(len(numbers))))
        for number, weight in enumerate(weights):
            own = [found[i] for i, source in enumerate(numbers) if source == number and i not in held_out]
            assert abs(sum(own) - float(weight) * len(own)) <= 0.5001
            assert set(own) <= {int(float(weight)), int(float(weight)) + 1}

    def test_the_seed_chooses_and_other_sources_do_not(self) -> None:
        one, other = entries("0.5", "1.5")
        first = copies([0] * 40 + [1] * 40, [one, other], [False] * 80, 42)
        second = copies([0] * 40 + [1] * 40, [other, one], [False] * 80, 42)
        assert (first[:40], first[40:]) == (second[40:], second[:40])
        assert Counter(first) == {0: 20, 1: 40, 2: 20}
        assert first[:40] == copies([0] * 40, [one], [False] * 40, 42)
        assert first[:40] != copies([0] * 40, [one], [False] * 40, 43)
        assert [copy - 1 for copy in first[40:]] != list(first[:40])
