"""Folders and patterns of real stores, and what weights and formats of sources make of the prepared rows."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_trainer_hub import Console
from test_trainer_prepare import failure, plan_of, rows_of
from trainer_hub import FakeHub, Repository, blob_id
from trainer_lab import Bucket, TestJob, as_json_lines, short_rows

from finetune_api.failures import FailureClass
from finetune_api.spec import DataFile, Dataset, TrainFile
from finetune_trainer.card import _source_lines
from finetune_trainer.data import sources
from finetune_trainer.plan import SourceFile

MakeJob = Callable[..., TestJob]


def test_folders_and_patterns_of_a_bucket(any_bucket: Bucket, tmp_path: Path) -> None:
    names = ["a/1.jsonl", "a/2.csv", "a/b/ü 3.jsonl", "a/_SUCCESS", "a/README.md", "ab/4.jsonl", "5.jsonl"]
    for name in names:
        any_bucket.put(name, f"content of {name}".encode())

    def found(*uris: str) -> list[str]:
        dataset = Dataset(train=[TrainFile(uri=any_bucket.uri(uri)) for uri in uris])
        files, _ = sources.find(dataset, any_bucket.settings)
        keys = [file.uri.removeprefix(any_bucket.uri("")) for file in files]
        fetched = sources.download(files, tmp_path, any_bucket.settings)
        assert [path.read_text() for _, path in fetched] == [f"content of {key}" for key in keys]
        return keys

    assert found("a/") == ["a/1.jsonl", "a/2.csv", "a/b/ü 3.jsonl"]
    assert found("a/*.jsonl", "a/b/*") == ["a/1.jsonl", "a/b/ü 3.jsonl"]
    assert found("a*/*.jsonl") == ["a/1.jsonl", "ab/4.jsonl"]
    assert found("**") == ["5.jsonl", "a/1.jsonl", "a/2.csv", "a/b/ü 3.jsonl", "ab/4.jsonl"]


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def console(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    with Console(hub.endpoint, tmp_path_factory.mktemp("hub")) as console:
        yield console


class TestHub:
    @pytest.fixture
    def repository(self, hub: FakeHub) -> Repository:
        hub.repositories = {"datasets/org/rows": Repository()}
        return hub.repositories["datasets/org/rows"]

    FILES = {
        ".gitattributes": b"*.parquet filter=lfs",
        "README.md": b"# Rows",
        "data/train-0.jsonl": b"0",
        "data/train-1.jsonl": b"1",
        "data/test.jsonl": b"2",
        "rows.py": b"raise SystemExit('never run')",
    }

    @pytest.mark.parametrize(
        ("rest", "names"),
        [
            ("", ["data/test.jsonl", "data/train-0.jsonl", "data/train-1.jsonl"]),
            ("/", ["data/test.jsonl", "data/train-0.jsonl", "data/train-1.jsonl"]),
            ("/data/train-*.jsonl", ["data/train-0.jsonl", "data/train-1.jsonl"]),
            ("@v1/data/", ["data/test.jsonl", "data/train-0.jsonl", "data/train-1.jsonl"]),
            ("/data/test.jsonl", ["data/test.jsonl"]),
        ],
    )
    def test_files_of_a_data_set(
        self, console: Console, repository: Repository, hub: FakeHub, tmp_path: Path, rest: str, names: list[str]
    ) -> None:
        repository.commit(self.FILES, branch="v1")
        repository.commit(self.FILES)
        root = "hf://datasets/org/rows" + ("@v1" if rest.startswith("@") else "")
        hub.requests.clear()
        found = console(f"hf://datasets/org/rows{rest}", "fetch", str(tmp_path))
        assert found == [
            [f"{root}/{name}", len(self.FILES[name]), blob_id(self.FILES[name]), self.FILES[name].decode()]
            for name in names
        ]
        # The repository is listed once to find the files and once to fetch them, however many there are.
        listings = [path for _, path, _ in hub.requests if re.fullmatch(r"api/datasets/org/rows(/revision/.*)?", path)]
        assert len(listings) == 2

    def test_a_file_with_two_names(self, console: Console, repository: Repository, tmp_path: Path) -> None:
        repository.commit(self.FILES)
        two = "hf://datasets/org/rows@main/data/ hf://datasets/org/rows/data/test.jsonl"
        failure_class, message = console.fails(two, "fetch", str(tmp_path))
        assert failure_class is FailureClass.USER_ERROR
        assert "test.jsonl is named twice, by hf://datasets/org/rows@main/data/ and by" in message

    def test_nothing_found(self, console: Console, repository: Repository, tmp_path: Path) -> None:
        repository.commit({"README.md": b"# Rows", "rows.py": b""})
        failure_class, message = console.fails("hf://datasets/org/rows", "fetch", str(tmp_path))
        assert failure_class is FailureClass.NOT_FOUND
        assert "below hf://datasets/org/rows there is only README.md, rows.py. Correct the URI." in message

    def test_a_file_that_changed_since_it_was_found(
        self, console: Console, repository: Repository, tmp_path: Path
    ) -> None:
        repository.commit({"rows.jsonl": b"old"})
        uri = "hf://datasets/org/rows#changed"
        info = console(uri, "stat", "rows.jsonl")
        repository.commit({"rows.jsonl": b"new"})
        failure_class, message = console.fails(
            "hf://datasets/org/rows#newer", "download_as", "rows.jsonl", str(tmp_path / "x"), *info[1:]
        )
        assert failure_class is FailureClass.MODEL_CHANGED
        assert message.startswith("hf://datasets/org/rows/rows.jsonl changed on the hub while the job ran.")
        assert not (tmp_path / "x").exists()


def chats(count: int, mark: str) -> bytes:
    return as_json_lines(
        [
            {"messages": [{"role": "user", "content": f"{mark} {n}"}, {"role": "assistant", "content": str(n)}]}
            for n in range(count)
        ]
    )


class TestPrepared:
    def learnt(
        self, make_job: MakeJob, sources: list[dict[str, Any]], **dataset: Any
    ) -> tuple[Counter[Any], Counter[Any]]:
        """Rows to learn from and to measure with, with how often they are there."""
        job = make_job(dataset={"train": sources, "validation": None, **dataset})
        job.run("prepare")
        return Counter(rows_of(job, "train.arrow")), Counter(rows_of(job, "validation.arrow"))

    def test_weights(self, make_job: MakeJob, inputs: Bucket) -> None:
        inputs.put("weights/a.jsonl", chats(10, "a"))
        inputs.put("weights/b.jsonl", chats(8, "b"))
        a, b = ({"uri": inputs.uri(f"weights/{name}.jsonl")} for name in "ab")
        plain, _ = self.learnt(make_job, [a, b])
        only_a, _ = self.learnt(make_job, [a])
        assert set(plain.values()) == {1}
        weighted, _ = self.learnt(make_job, [{**a, "weight": "2.5"}, {**b, "weight": "0.5"}])
        assert Counter(weighted[row] for row in only_a) == {2: 5, 3: 5}
        assert Counter(weighted[row] for row in plain - only_a) == {1: 4, 0: 4}
        swapped, _ = self.learnt(make_job, [{**b, "weight": "0.5"}, {**a, "weight": "2.5"}])
        assert swapped == weighted
        # So many that two seeds will not choose the same half: the name of the bucket is another one each time.
        inputs.put("weights/many.jsonl", chats(30, "many"))
        source = {"uri": inputs.uri("weights/many.jsonl"), "weight": "0.5"}
        other_seed = make_job(dataset={"train": [source], "validation": None}, hyperparameters={"seed": 7})
        other_seed.run("prepare")
        half, _ = self.learnt(make_job, [source])
        assert set(rows_of(other_seed, "train.arrow")) != set(half)
        assert plan_of(other_seed).data.train.rows == sum(half.values()) == 15

    def test_weights_with_validation(self, make_job: MakeJob, inputs: Bucket) -> None:
        inputs.put("weights/c.jsonl", chats(12, "c"))
        source = {"uri": inputs.uri("weights/c.jsonl"), "weight": "3"}
        train, validation = self.learnt(make_job, [source], validationSplit="0.25")
        assert (len(train), len(validation)) == (9, 3)
        assert (set(train.values()), set(validation.values())) == ({3}, {1})
        assert not train.keys() & validation.keys()
        inputs.put("weights/v.jsonl", chats(4, "v"))
        files = [{"uri": inputs.uri("weights/v.jsonl")}]
        train, validation = self.learnt(make_job, [source], validation=files)
        assert (len(train), set(train.values()), len(validation), set(validation.values())) == (12, {3}, 4, {1})

    def test_a_folder_of_several_containers(self, make_job: MakeJob, inputs: Bucket) -> None:
        inputs.put("folder/x/1.jsonl.gz", gzip.compress(as_json_lines(short_rows(5))))
        inputs.put("folder/x/2.json", json.dumps(short_rows(4, 5)).encode())
        inputs.put("folder/x/_SUCCESS", b"")
        inputs.put("folder/y.jsonl", as_json_lines(short_rows(2, 20)))
        one = make_job(
            dataset={"train": [{"uri": inputs.uri("folder/x/")}], "validation": [{"uri": inputs.uri("folder/*")}]}
        )
        one.run("prepare")
        data = plan_of(one).data
        assert [file.uri for file in data.train_sources] == [
            inputs.uri(f"folder/x/{n}") for n in ("1.jsonl.gz", "2.json")
        ]
        assert [file.uri for file in data.validation_sources] == [inputs.uri("folder/y.jsonl")]
        assert (data.train.rows, data.validation.rows) == (9, 2)
        assert all(file.size and file.version for file in data.train_sources)

    def test_a_format_and_columns_of_one_source(self, make_job: MakeJob, inputs: Bucket) -> None:
        inputs.put("formats/a.csv", b"frage,antwort\n1+1?,2\n")
        inputs.put("formats/b.jsonl", b'{"inhalt": "Es war einmal", "text": "x"}\n')
        inputs.put("formats/c.jsonl", b'{"inhalt": "Und wenn sie nicht gestorben sind"}\n')
        sources = [
            {
                "uri": inputs.uri("formats/a.csv"),
                "format": "QuestionAnswer",
                "columns": {"prompt": "frage", "completion": "antwort"},
            },
            {"uri": inputs.uri("formats/b.jsonl"), "format": "Text"},
            {"uri": inputs.uri("formats/c.jsonl")},
        ]
        job = make_job(dataset={"train": sources, "validation": None, "format": "Text", "columns": {"text": "inhalt"}})
        job.run("prepare")
        assert plan_of(job).data.format == "QuestionAnswer, Text"
        lengths = [len(ids) for ids, _ in rows_of(job, "train.arrow")]
        assert len(lengths) == 3
        assert lengths[1] < lengths[2]  # "x", since the source's own format has its usual column

    def test_damage_in_one_file_of_many_is_named(self, make_job: MakeJob, inputs: Bucket) -> None:
        inputs.put("damaged/1.jsonl", as_json_lines(short_rows(3)))
        inputs.put("damaged/2.jsonl.gz", gzip.compress(as_json_lines(short_rows(3)))[:-9])
        error = failure(make_job(dataset={"train": [{"uri": inputs.uri("damaged/")}], "validation": None}))
        assert error.failure_class is FailureClass.DATA_ERROR
        assert error.message.startswith(f"{inputs.uri('damaged/2.jsonl.gz')} is cut off: its gzip data have no end")

    def test_a_card_names_some_of_many_files(self) -> None:
        files = [SourceFile(uri=f"s3://b/{n}.jsonl", size=1000, version="1") for n in range(20)]
        assert len(_source_lines(files)) == 20
        assert _source_lines(files * 2)[20:] == ["- 20 more files (20,000 bytes), which `manifest.json` names"]

    def test_validation_has_no_weight(self) -> None:
        assert "weight" not in DataFile.model_fields
