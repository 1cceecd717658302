"""Prepare finds on a CPU what would go wrong later, stores the rows, and finds its own and others' finished work."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from trainer_lab import Bucket, TestJob, as_json_lines, save_tiny_model, short_rows

from finetune_api.failures import FailureClass, JobError
from finetune_api.names import OWNER_FILE
from finetune_api.report import Report
from finetune_api.spec import Adapter, AdapterType, LoRA
from finetune_trainer import layout
from finetune_trainer.architecture import require_adaptable
from finetune_trainer.data import prepared
from finetune_trainer.data.pipeline import held_out as choose_held_out
from finetune_trainer.plan import TrainingPlan
from finetune_trainer.storage.s3 import S3Folder

MakeJob = Callable[..., TestJob]


def failure(job: TestJob, stage: str = "prepare") -> JobError:
    with pytest.raises(JobError) as caught:
        job.run(stage)
    return caught.value


def plan_of(job: TestJob) -> TrainingPlan:
    return TrainingPlan.model_validate(job.bucket.json(f"{job.work}/{layout.PLAN}"))


def rows_of(job: TestJob, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    path = job.root / name
    path.write_bytes(job.bucket.get(f"{job.work}/prepare/{name}"))
    return [(tuple(row["input_ids"]), tuple(row["labels"])) for row in prepared.read_rows(path)]


@pytest.fixture(scope="module")
def job(make_job: MakeJob) -> TestJob:
    job = make_job()
    job.report = job.run("prepare")  # type: ignore[attr-defined]
    return job


class TestGoodJob:
    def test_the_report(self, job: TestJob) -> None:
        report: Report = job.report  # type: ignore[attr-defined]
        plan = plan_of(job)
        assert report.phase == "Done"
        assert report.dataset is not None
        assert report.dataset.format == "Chat"
        assert (report.dataset.train_rows, report.dataset.validation_rows, report.dataset.skipped_rows) == (48, 9, 0)
        rows = rows_of(job, "train.arrow")
        assert report.dataset.train_tokens == sum(len(ids) for ids, _ in rows)
        assert report.dataset.supervised_tokens == sum(label != -100 for _, labels in rows for label in labels)
        assert report.dataset.sha256 == plan.data.train.sha256
        assert report.resolved is not None
        assert report.resolved.model_type == "llama"
        assert report.resolved.model_revision == plan.model.revision
        assert report.resolved.total_steps == 12
        assert report.resolved.artifacts == ["Merged", "Adapter"]
        assert report.resolved.dtype == "F32"

    def test_sizes_come_from_the_weights_headers(self, job: TestJob, tiny_model: Path) -> None:
        from safetensors.torch import load_file

        tensors = load_file(tiny_model / "model.safetensors")
        resolved = job.report.resolved  # type: ignore[attr-defined]
        assert resolved.parameters == sum(tensor.numel() for tensor in tensors.values())
        assert resolved.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert resolved.largest_tensor_bytes == max(tensor.nbytes for tensor in tensors.values())
        # And the weights themselves were not fetched.
        assert not (job.disk("prepare").base / "model.safetensors").exists()

    def test_nothing_is_left_but_what_later_stages_read_and_whose_it_is(self, job: TestJob) -> None:
        names = ("job.json", "plan.json", "report.json", "report.md", "train.arrow", "validation.arrow")
        assert job.bucket.keys(f"{job.output}/") == [f"{job.work}/prepare/{name}" for name in names]
        assert job.bucket.json(f"{job.work}/{OWNER_FILE}") == {
            "namespace": "team-a",
            "name": "ticket-bot",
            "uid": job.uid,
        }

    def test_the_data_report(self, job: TestJob) -> None:
        said: Report = job.report  # type: ignore[attr-defined]
        assert said.dataset is not None
        assert said.dataset.report_uri == f"{job.bucket.uri(job.work)}/prepare/report.md"
        text = job.bucket.get(f"{job.work}/prepare/report.md").decode()
        assert "| rows | 48 | 9 |" in text
        found = job.bucket.json(f"{job.work}/prepare/report.json")
        assert found["train"]["tokens"] == said.dataset.train_tokens
        assert [source["rows"] for source in found["trainSources"]] == [48]

    def test_a_restart_finds_the_plan(self, job: TestJob, monkeypatch: pytest.MonkeyPatch) -> None:
        before = job.bucket.get(f"{job.work}/{layout.PLAN}")
        monkeypatch.setattr("finetune_trainer.stages.prepare._prepare", None)  # would be called to prepare again
        report = job.run("prepare", attempt=2)
        assert report.dataset == job.report.dataset  # type: ignore[attr-defined]
        assert job.bucket.get(f"{job.work}/{layout.PLAN}") == before

    def test_a_broken_plan_is_made_again(self, make_job: MakeJob) -> None:
        job = make_job()
        job.bucket.put(f"{job.work}/{layout.PLAN}", b'{"schemaVersion": 1')
        job.run("prepare")
        assert plan_of(job).data.train.rows == 48


def test_the_same_data_give_the_same_rows(make_job: MakeJob) -> None:
    plans = []
    for _ in range(2):
        job = make_job()
        job.run("prepare")
        plans.append(plan_of(job))
    assert plans[0].data == plans[1].data
    assert plans[0].document_digest != plans[1].document_digest  # another output folder


def test_a_changed_source_gives_a_new_plan(make_job: MakeJob, inputs: Bucket) -> None:
    inputs.put("data/changing.jsonl", as_json_lines(short_rows(10)))
    job = make_job(dataset={"train": [{"uri": inputs.uri("data/changing.jsonl")}]})
    job.run("prepare")
    before = plan_of(job)
    inputs.put("data/changing.jsonl", as_json_lines(short_rows(11)))
    job.run("prepare", attempt=2)
    after = plan_of(job)
    assert (before.data.train.rows, after.data.train.rows) == (10, 11)
    assert before.data.train.sha256 != after.data.train.sha256
    assert before.data.train_sources != after.data.train_sources


def test_training_without_preparation(make_job: MakeJob) -> None:
    job = make_job()
    for stage, earlier in (("train", ()), ("export", (1,))):
        with pytest.raises(JobError, match=r"plan\.json does not exist: the prepare stage has not finished") as caught:
            job.run(stage, 1, earlier)
        assert caught.value.failure_class is FailureClass.NOT_FOUND


@pytest.mark.parametrize(
    ("hyperparameters", "steps"),
    [
        ({"maxSteps": 5}, 5),
        ({"maxSteps": None, "epochs": 2}, 2 * 3),  # 24 rows in batches of 10
        ({"maxSteps": None}, 3 * 3),
    ],
)
def test_steps(make_job: MakeJob, inputs: Bucket, hyperparameters: dict[str, Any], steps: int) -> None:
    inputs.put("data/24.jsonl", as_json_lines(short_rows(24)))
    job = make_job(
        dataset={"train": [{"uri": inputs.uri("data/24.jsonl")}]}, hyperparameters={"batchSize": 10, **hyperparameters}
    )
    job.run("prepare")
    assert plan_of(job).total_steps == steps


@pytest.mark.parametrize(
    ("method", "output", "expected"),
    [
        ("Full", {}, ("2e-5", ["Merged"], "F32")),
        ("LoRA", {}, ("2e-4", ["Merged", "Adapter"], "F32")),
        ("QLoRA", {"artifacts": ["Adapter"], "dtype": "BF16"}, ("2e-4", ["Adapter"], "BF16")),
    ],
)
def test_what_absent_values_become(make_job: MakeJob, method: str, output: dict[str, Any], expected: Any) -> None:
    job = make_job(method={"adapter": {"type": method}}, output=output, hyperparameters={"learningRate": None})
    job.run("prepare")
    plan = plan_of(job)
    assert (plan.learning_rate, plan.artifacts, plan.dtype) == expected


class TestData:
    def prepare(self, make_job: MakeJob, bucket: Bucket, name: str, data: bytes, **dataset: Any) -> TestJob:
        bucket.put(f"data/{name}", data)
        return make_job(dataset={"train": [{"uri": bucket.uri(f"data/{name}")}], "validation": None, **dataset})

    FORMATS = {
        "alpaca.json": json.dumps([{"instruction": "Add", "input": "1 2", "output": "3"}] * 3).encode(),
        "questions.csv": b"\xef\xbb\xbfquestion,answer\r\n" + b'"1, 2?",3\r\n' * 3,
        "completions.jsonl": b'{"prompt": "1+2", "completion": "3"}\n' * 3,
        "texts.jsonl": b'{"text": "Once upon a time"}\n' * 3,
        "chat.jsonl": as_json_lines(short_rows(3)),
    }

    @pytest.mark.parametrize("name", FORMATS)
    def test_formats(self, make_job: MakeJob, inputs: Bucket, name: str) -> None:
        job = self.prepare(make_job, inputs, name, self.FORMATS[name])
        job.run("prepare")
        assert plan_of(job).data.train.rows == 3

    def test_files_of_several_formats(self, make_job: MakeJob, inputs: Bucket) -> None:
        for name, data in self.FORMATS.items():
            inputs.put(f"data/{name}", data)
        job = make_job(dataset={"train": [{"uri": inputs.uri(f"data/{name}")} for name in self.FORMATS]})
        job.run("prepare")
        assert plan_of(job).data.format == "Alpaca, Chat, PromptCompletion, QuestionAnswer, Text"
        assert plan_of(job).data.train.rows == 15

    def test_bad_rows_are_named_without_their_content(self, make_job: MakeJob, inputs: Bucket) -> None:
        rows = [json.dumps(row) for row in short_rows(6)]
        secret = "Ms Example owes 4711 dollars"
        rows[1] = json.dumps({"messages": [{"role": "user", "content": secret}]})
        rows[3] = secret
        rows[4] = json.dumps(
            {"messages": [{"role": "user", "content": secret * 300}, {"role": "assistant", "content": "x"}]}
        )
        job = self.prepare(make_job, inputs, "bad.jsonl", "\n".join(rows).encode())
        error = failure(job)
        uri = inputs.uri("data/bad.jsonl")
        assert error.failure_class is FailureClass.DATA_ERROR
        assert error.message == (
            f"3 of 6 rows cannot be used: {uri} row 2: does not end with an assistant turn; {uri} row 4: not JSON; "
            f"{uri} row 5: is longer than 512 tokens (dataset.maxLength). In all: 1 x does not end with an assistant "
            "turn, 1 x not JSON, 1 x is longer than 512 tokens (dataset.maxLength). Mend them, or set "
            "dataset.invalidRows.policy to Skip."
        )
        assert job.bucket.keys(f"{job.work}/") == [f"{job.work}/{OWNER_FILE}"]

    @pytest.mark.parametrize(("limit", "fits"), [(2, True), (1, False)])
    def test_skipped_rows_are_counted(self, make_job: MakeJob, inputs: Bucket, limit: int, fits: bool) -> None:
        data = as_json_lines(short_rows(5)) + b"null\n{}\n"
        job = self.prepare(make_job, inputs, "some.jsonl", data, invalidRows={"policy": "Skip", "limit": limit})
        if not fits:
            assert failure(job).message.startswith("2 of 7 rows cannot be used, and dataset.invalidRows.limit is 1")
            return
        report = job.run("prepare")
        assert report.dataset is not None
        assert (report.dataset.train_rows, report.dataset.skipped_rows) == (5, 2)

    @pytest.mark.parametrize(
        ("data", "dataset", "words"),
        [
            (b"", {}, "is empty. Upload rows"),
            (b"\n\n", {}, "data/none.jsonl holds no row. Upload rows"),
            (b"null\n", {"invalidRows": {"policy": "Skip"}}, "dataset.train has no usable row"),
            (b'{"a": "b"}\n', {}, "the format cannot be found out from the columns (a). Set dataset.format"),
        ],
        ids=["empty file", "blank lines", "only bad rows", "unknown columns"],
    )
    def test_no_usable_rows(
        self, make_job: MakeJob, inputs: Bucket, data: bytes, dataset: dict[str, Any], words: str
    ) -> None:
        error = failure(self.prepare(make_job, inputs, "none.jsonl", data, **dataset))
        assert error.failure_class is FailureClass.DATA_ERROR
        assert words in error.message

    def test_validation_without_usable_rows(self, make_job: MakeJob, inputs: Bucket) -> None:
        inputs.put("data/null.jsonl", b"null\n")
        dataset = {"validation": [{"uri": inputs.uri("data/null.jsonl")}], "invalidRows": {"policy": "Skip"}}
        error = failure(make_job(dataset=dataset))
        assert "dataset.validation has no usable row" in error.message

    def test_a_missing_file(self, make_job: MakeJob, inputs: Bucket) -> None:
        error = failure(make_job(dataset={"train": [{"uri": inputs.uri("data/nothing.jsonl")}]}))
        assert error.failure_class is FailureClass.NOT_FOUND
        assert error.message == f"The data file {inputs.uri('data/nothing.jsonl')} does not exist. Correct the URI."

    def test_a_row_may_not_be_longer_than_the_models_context(self, make_job: MakeJob, inputs: Bucket) -> None:
        text = json.dumps({"text": "word " * 1500}).encode()
        error = failure(self.prepare(make_job, inputs, "long.jsonl", text, maxLength=100_000))
        assert "is longer than 1024 tokens" in error.message


class TestHeldOutRows:
    def job(self, make_job: MakeJob, inputs: Bucket, split: str | None, rows: int, **changes: Any) -> TestJob:
        inputs.put(f"data/{rows}.jsonl", as_json_lines(short_rows(rows)))
        dataset = {"train": [{"uri": inputs.uri(f"data/{rows}.jsonl")}], "validation": None, "validationSplit": split}
        return make_job(dataset=dataset, **changes)

    @pytest.mark.parametrize(
        ("split", "rows", "expected"),
        [(None, 39, 0), (None, 40, 2), ("0", 60, 0), ("0.25", 20, 5), ("0.001", 20, 1), ("0.99", 20, 19)],
    )
    def test_how_many(self, make_job: MakeJob, inputs: Bucket, split: str | None, rows: int, expected: int) -> None:
        job = self.job(make_job, inputs, split, rows)
        job.run("prepare")
        data = plan_of(job).data
        assert (data.train.rows, data.validation.rows) == (rows - expected, expected)
        train, validation = rows_of(job, "train.arrow"), rows_of(job, "validation.arrow")
        assert len(train) == rows - expected
        assert set(train) & set(validation) == set()

    def test_the_seed_decides(self, make_job: MakeJob, inputs: Bucket) -> None:
        found = []
        for seed in (1, 1, 2):
            job = self.job(make_job, inputs, "0.25", 20, hyperparameters={"seed": seed})
            job.run("prepare")
            found.append(rows_of(job, "validation.arrow"))
        assert found[0] == found[1] != found[2]

    def test_rows_of_one_conversation_stay_together(self, inputs: Bucket, make_job: MakeJob, tmp_path: Path) -> None:
        """A template that rewrites earlier turns makes several rows of a conversation."""
        from test_trainer_render import REWRITING

        folder = save_tiny_model(tmp_path / "model")
        (folder / "chat_template.jinja").write_text(REWRITING)
        inputs.put_folder("rewriting", folder)
        turns = [
            {
                "messages": [
                    {"role": role, "content": f"{role} {number} {turn}"}
                    for turn in range(3)
                    for role in ("user", "assistant")
                ]
            }
            for number in range(12)
        ]
        inputs.put("data/turns.jsonl", as_json_lines(turns))
        job = make_job(
            model={"uri": inputs.uri("rewriting")},
            dataset={"train": [{"uri": inputs.uri("data/turns.jsonl")}], "validation": None, "validationSplit": "0.5"},
        )
        job.run("prepare")
        data = plan_of(job).data
        assert data.split_conversations == 12
        assert (data.train.rows, data.validation.rows) == (18, 18)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        sides = [
            {tokenizer.decode(ids).split("user ")[1].split()[0] for ids, _ in rows_of(job, name)}
            for name in ("train.arrow", "validation.arrow")
        ]
        assert sides[0] | sides[1] == {str(number) for number in range(12)}
        assert sides[0] & sides[1] == set()

    @settings(deadline=None)
    @given(
        examples=st.integers(0, 2000), split=st.sampled_from([None, "0", "0.05", "0.5", "0.999"]), seed=st.integers(0)
    )
    def test_something_is_always_left_to_learn(self, examples: int, split: str | None, seed: int) -> None:
        labels = [0] * examples
        chosen = choose_held_out(range(examples), split, seed, labels)
        assert chosen == choose_held_out(range(examples), split, seed, labels)
        held_out = set(chosen)
        assert len(held_out) == len(chosen)
        assert held_out <= set(range(examples))
        assert len(held_out) < max(1, examples)
        if split is None:
            assert len(held_out) <= 200


def write_shards(folder: Path) -> None:
    """The tiny model in several files."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(config))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    write_shards(folder)
    next(folder.glob("model-00002-*")).unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def no_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["has no config.json", "save_pretrained"]),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ["config.json is not JSON", "Upload it again"],
    ),
    "config is no object": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ["config.json is not a JSON object"],
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        ["has no tokenizer.json", "Add the model's fast tokenizer"],
    ),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        ["config or tokenizer cannot be loaded", "Upload them again"],
    ),
    "no chat template": (no_chat_template, ["no chat template", "add chat_template.jinja"]),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ["has no safetensors weights", "Convert it with save_pretrained"],
    ),
    "pickled weights": (pickled, ["has no safetensors weights", "pickled weights are not loaded"]),
    "a missing shard": (missing_shard, ["names weight files that are not there", "model-00002-", "Upload the whole"]),
    "cut weights": (cut_weights, ["is not a safetensors file, or it is cut off", "Upload it again"]),
    "no safetensors": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"PK\x03\x04 something else entirely"),
        ["is not a safetensors file"],
    ),
    "an absurd header": (
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
        ["is not a safetensors file"],
    ),
    "code of its own": (
        change_config(auto_map={"AutoModelForCausalLM": "modeling.X"}),
        ["brings its own Python code", "is not run"],
    ),
    "quantised before": (
        change_config(quantization_config={"quant_method": "gptq"}),
        ["are quantised already", "Use the original weights"],
    ),
    "no language model": (
        change_config(model_type="vit", architectures=["ViTModel"]),
        ["'vit' in config.json is no causal language model", "Use a text generation model"],
    ),
    "no model type": (change_config(model_type=None), ["is no causal language model"]),
    "an unknown model type": (change_config(model_type="llama9"), ["'llama9'", "is no causal language model"]),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(make_job: MakeJob, inputs: Bucket, tiny_model: Path, tmp_path: Path, name: str) -> None:
    spoil, words = BAD_MODELS[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    spoil(folder)
    prefix = f"bad/{name.replace(' ', '-')}"
    inputs.put_folder(prefix, folder)
    job = make_job(model={"uri": inputs.uri(prefix)})
    error = failure(job)
    assert error.failure_class is FailureClass.MODEL_ERROR
    assert all(word in error.message for word in words), error.message
    assert job.bucket.keys(f"{job.work}/") == [f"{job.work}/{OWNER_FILE}"]


def test_a_missing_model(make_job: MakeJob, inputs: Bucket) -> None:
    error = failure(make_job(model={"uri": inputs.uri("no-model-here")}))
    assert error.failure_class is FailureClass.MODEL_ERROR
    assert "is empty or does not exist. Correct model.uri, or upload the model" in error.message


def test_a_sharded_model(make_job: MakeJob, inputs: Bucket, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    write_shards(folder)
    inputs.put_folder("sharded", folder)
    (tmp_path / "x").write_text("")
    inputs.put("sharded/original/consolidated.pth", b"not ours")
    job = make_job(model={"uri": inputs.uri("sharded")})
    report = job.run("prepare")
    assert report.resolved is not None
    assert report.resolved.parameters == 138048
    assert not any("consolidated" in file.key for file in plan_of(job).model.files)


def test_plain_text_needs_no_chat_template(make_job: MakeJob, inputs: Bucket, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    no_chat_template(folder)
    inputs.put_folder("no-template", folder)
    inputs.put("data/plain.jsonl", b'{"text": "Once upon a time"}\n')
    make_job(
        model={"uri": inputs.uri("no-template")},
        dataset={"train": [{"uri": inputs.uri("data/plain.jsonl")}], "validation": None},
    ).run("prepare")


class TestOccupiedOutput:
    @pytest.mark.parametrize("key", ["config.json", "adapter/adapter_config.json", "manifest.json"])
    def test_a_model_of_somebody(self, make_job: MakeJob, key: str) -> None:
        job = make_job()
        job.bucket.put(f"{job.output}/{key}", b"{}")
        error = failure(job)
        assert error.failure_class is FailureClass.OUTPUT_EXISTS
        assert f"{job.spec.output.uri} already holds a model without a manifest" in error.message
        assert "Choose another output.uri, or set output.onExisting to Overwrite" in error.message

    def test_overwrite_allows_it(self, make_job: MakeJob) -> None:
        job = make_job(output={"onExisting": "Overwrite"})
        job.bucket.put(f"{job.output}/config.json", b"{}")
        job.run("prepare")

    def test_other_files_do_not_matter(self, make_job: MakeJob) -> None:
        job = make_job()
        job.bucket.put(f"{job.output}/notes.txt", b"")
        job.run("prepare")


def test_no_right_to_write_is_found_before_anything_is_read(make_job: MakeJob, moto: Any) -> None:
    from trainer_servers import Fault, Proxy

    from finetune_api.document import StorageSettings

    with Proxy(moto.endpoint) as proxy:
        body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
        proxy.faults.append(Fault(lambda request: request.method == "PUT", answer=(403, body)))
        job = make_job(model={"uri": "s3://no-such-bucket-at-all/model"})
        job.storage = StorageSettings(endpoint=proxy.endpoint, path_style=True)
        error = failure(job)
    assert error.failure_class is FailureClass.ACCESS_DENIED
    assert "s3:PutObject" in error.message
    assert [request.method for request in proxy.requests] == ["PUT"]


class TestAdaptable:
    """What an adapter cannot be put on, or could not be merged into, is known before a GPU is taken."""

    def test_a_target_that_the_model_does_not_have(self, make_job: MakeJob) -> None:
        job = make_job(method={"adapter": {"type": "LoRA", "lora": {"targetModules": ["q_proj", "query"]}}})
        error = failure(job)
        assert error.failure_class is FailureClass.USER_ERROR
        assert "lora.targetModules names query, which the model does not have" in error.message
        assert "q_proj" in error.message

    @pytest.mark.parametrize("adapter", ["LoRA", "QLoRA"])
    def test_weights_that_are_stored_under_other_names(self, tiny_model: Path, adapter: str) -> None:
        stored = {f"language_model.{name}" for name in load_file(tiny_model / "model.safetensors")}
        asked = Adapter(type=AdapterType(adapter))
        with pytest.raises(JobError, match=r"Set output\.artifacts to \[Adapter\]") as caught:
            require_adaptable(tiny_model, asked, stored, merge=True)
        assert caught.value.failure_class is FailureClass.MODEL_ERROR
        require_adaptable(tiny_model, asked, stored, merge=False)

    @pytest.mark.parametrize("tied", [True, False])
    def test_the_output_head_is_not_adapted(self, tmp_path: Path, tied: bool) -> None:
        """TRL would refuse it, on the GPU: it computes the loss from the head's own weight."""
        model = save_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
        stored = set(load_file(model / "model.safetensors"))
        require_adaptable(model, Adapter(type=AdapterType.LORA), stored, merge=True)
        head = Adapter(type=AdapterType.LORA, lora=LoRA(target_modules=["q_proj", "lm_head"]))
        with pytest.raises(JobError, match=r"names lm_head, the model's output head") as caught:
            require_adaptable(model, head, stored, merge=False)
        assert caught.value.failure_class is FailureClass.USER_ERROR


def test_the_output_may_not_be_the_base_models_own_folder(make_job: MakeJob, inputs: Bucket) -> None:
    job = make_job(output={"uri": f"{inputs.uri('model')}/"})
    error = failure(job)
    assert error.failure_class is FailureClass.USER_ERROR
    assert "is the base model's own folder" in error.message


def test_the_output_is_tried_when_the_work_files_are_elsewhere(
    make_job: MakeJob, inputs: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(storage={"workURI": inputs.uri("scratch")})
    original = S3Folder.write

    def write(folder: S3Folder, key: str, data: bytes) -> None:
        if folder.uri == job.spec.output.uri:
            raise JobError(FailureClass.ACCESS_DENIED, "no")
        original(folder, key, data)

    monkeypatch.setattr(S3Folder, "write", write)
    assert failure(job).failure_class is FailureClass.ACCESS_DENIED
