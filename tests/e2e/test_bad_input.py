"""Every bad input has one clear sentence with a remedy, at the earliest moment, and takes no GPU."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from conftest import manifest
from local_up import FINETUNE, LocalUp

ADAPTER = "spec.method.adapter"

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    # name: (change of the spec, field, words of the message)
    "an unknown field": ({"learningRate": "1e-4"}, "spec.learningRate", "unknown field"),
    "a wrong type": ({"hyperparameters": {"learningRate": 0.1}}, "spec.hyperparameters.learningRate", "type string"),
    "a value out of bounds": (
        {"hyperparameters": {"batchSize": 0}},
        "spec.hyperparameters.batchSize",
        "greater than or equal to 1",
    ),
    "an unknown choice": (
        {"method": {"adapter": {"type": "Lora"}}},
        f"{ADAPTER}.type",
        'supported values: "Full", "LoRA", "QLoRA"',
    ),
    "quantization without QLoRA": (
        {"method": {"adapter": {"type": "LoRA", "quantization": {}}}},
        ADAPTER,
        "set adapter.type to QLoRA",
    ),
    "quantization with Full": (
        {"method": {"adapter": {"type": "Full", "quantization": {}}}},
        ADAPTER,
        "set adapter.type to QLoRA",
    ),
    "lora with Full": ({"method": {"adapter": {"type": "Full", "lora": {}}}}, ADAPTER, "remove lora"),
    "both of two ways to say how long": (
        {"hyperparameters": {"epochs": 1, "maxSteps": 5}},
        "spec.hyperparameters",
        "not both",
    ),
    "both of two kinds of validation": (
        {
            "dataset": {
                "train": [{"uri": "s3://datasets/a.jsonl"}],
                "validation": [{"uri": "s3://datasets/b.jsonl"}],
                "validationSplit": "0.1",
            }
        },
        "spec.dataset",
        "not both",
    ),
    "columns of another format": (
        {"dataset": {"train": [{"uri": "s3://datasets/a.jsonl"}], "format": "Alpaca", "columns": {"text": "t"}}},
        "spec.dataset",
        "a row of format Alpaca has the columns prompt, completion, input, system",
    ),
    "two ways to give the prompt": (
        {
            "dataset": {
                "train": [{"uri": "s3://datasets/a.jsonl"}],
                "format": "Preference",
                "columns": {"messages": "m", "prompt": "p"},
            },
            "method": {"type": "DPO"},
        },
        "spec.dataset.columns",
        "name one of them",
    ),
    "a format that the method does not learn from": (
        {"dataset": {"train": [{"uri": "s3://datasets/a.jsonl"}], "format": "Preference"}},
        "spec",
        "method.type SFT learns from rows of format Chat",
    ),
    "an s3 URI without a bucket": ({"model": {"uri": "s3:///llama"}}, "spec.model.uri", "write s3://BUCKET/PATH"),
    "an s3 URI without a path": ({"output": {"uri": "s3://models"}}, "spec.output.uri", "write s3://BUCKET/PATH"),
    "another scheme": ({"model": {"uri": "gs://models/llama"}}, "spec.model.uri", "must start with s3://"),
    "an adapter of a full fine-tune": (
        {"method": {"adapter": {"type": "Full"}}, "output": {"uri": "s3://models/x", "artifacts": ["Adapter"]}},
        "spec",
        "Full trains no adapter",
    ),
    "a batch that does not divide": (
        {"hyperparameters": {"batchSize": 5}, "resources": {"gpusPerNode": 2}},
        "spec",
        "must be a multiple of resources.gpusPerNode",
    ),
    "no output": ({"output": None}, "spec.output", "Required value"),
    "a toleration that no pod can have": (
        {"scheduling": {"tolerations": [{"key": "gpu", "operator": "Exists", "value": "yes"}]}},
        "spec.scheduling.tolerations[0]",
        "operator Exists takes no value",
    ),
    "credentials in the endpoint": (
        {"storage": {"endpoint": "https://key:secret@minio:9000"}},
        "spec.storage.endpoint",
        "credentials in storage.secretRef only",
    ),
    "a rate that is infinite": (
        {"hyperparameters": {"learningRate": "1.5e+999"}},
        "spec.hyperparameters.learningRate",
        "write a decimal number",
    ),
}

NAMES = {
    "too long": ("a" * 41, "at most 40 characters"),
    "with a dot": ("my.job", "rename the job"),
    "with a digit first": ("1job", "must start with a letter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_schema_refuses_is_refused_by_kubectl_and_by_validate(up: LocalUp, case: str) -> None:
    change, field, words = REFUSED[case]
    body = manifest("refused", **change)
    body["spec"] = {key: value for key, value in body["spec"].items() if value is not None}
    text = yaml.safe_dump(body)
    offline = up.finetune("validate", "-", stdin=text)
    assert offline.returncode == 1
    assert f" {field}: " in offline.stderr, offline.stderr
    assert words in offline.stderr
    found = next(line for line in offline.stderr.splitlines() if f" {field}: " in line)
    shown = text.splitlines()[int(found.split(":")[1]) - 1]
    last = "key" if field.endswith("[0]") else field.rpartition(".")[2]
    assert (last if field != "spec.output" else "spec") in shown, "the line of the field"
    online = up.kubectl("apply", "-f", "-", stdin=text, check=False)
    assert words in online, online
    assert field in online
    assert "not found" in up.kubectl("get", "ftj", "refused", check=False)


@pytest.mark.parametrize("case", NAMES)
def test_a_name_that_would_not_fit_child_or_host_names(up: LocalUp, case: str) -> None:
    name, words = NAMES[case]
    text = yaml.safe_dump(manifest(name))
    offline = up.finetune("validate", "-", stdin=text)
    assert offline.returncode == 1
    assert words in offline.stderr
    assert words in up.kubectl("apply", "-f", "-", stdin=text, check=False)


def test_what_cannot_be_changed_says_so(up: LocalUp) -> None:
    up.apply(manifest("fixed", model={"uri": "s3://models/nowhere"}))
    changed = manifest("fixed", model={"uri": "s3://models/other"})
    answer = up.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(changed), check=False)
    assert "model cannot be changed after the job was created: delete the job and create it anew" in answer
    up.kubectl("patch", "ftj", "fixed", "--type=merge", "-p", '{"spec":{"failurePolicy":{"maxRestarts":7}}}')
    assert up.job("fixed")["spec"]["failurePolicy"]["maxRestarts"] == 7


class ReadOnlyS3:
    """An S3 server that passes reads on to the real one and refuses to write."""

    def __init__(self, target: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def _refuse(self) -> None:
                body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
                self.send_response(403)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_PUT = do_POST = do_DELETE = _refuse

            def log_message(self, format: str, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def read_only(up: LocalUp) -> Iterator[str]:
    server = ReadOnlyS3(up.description["s3_endpoint"])
    yield server.endpoint
    server.server.shutdown()


def chat(*roles: str, content: str = "words") -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role in roles]})


GOOD = chat("user", "assistant")

ROWS: dict[str, tuple[str, str]] = {
    "not JSON": ("{broken", "not JSON"),
    "no last assistant turn": (chat("user", "assistant", "user"), "does not end with an assistant turn"),
    "an empty turn": (chat("user", "assistant", content=" "), "without content"),
    "too long": (chat("user", "assistant", content="word " * 3000), "is longer than"),
    "no messages": (json.dumps({"messages": []}), "is empty"),
    "not an object": ("[1, 2]", "not an object"),
}


def data(uri: str, **more: Any) -> dict[str, Any]:
    return {"dataset": {"train": [{"uri": uri}], "validationSplit": "0", **more}}


@pytest.fixture(scope="module")
def failures(up: LocalUp, read_only: str, tiny_model: Path) -> dict[str, dict[str, Any]]:
    """All jobs that prepare refuses; their statuses by case."""
    jobs: dict[str, dict[str, Any]] = {
        "missing model": {"model": {"uri": "s3://models/nowhere"}},
        "missing bucket": {"model": {"uri": "s3://nobucket/model"}},
        "missing data": data("s3://datasets/nowhere.jsonl"),
        "missing secret keys": {"storage": {"secretRef": {"name": "wrong-keys"}}},
        "no right to write": {"storage": {"endpoint": read_only}},
        "no server": {"storage": {"endpoint": "http://127.0.0.1:9"}, "failurePolicy": {"maxRestarts": 0}},
        "empty data": data("s3://datasets/empty.jsonl"),
        "blank data": data("s3://datasets/blank.jsonl"),
        "damaged data": data("s3://datasets/rows.parquet"),
        "unknown columns": data("s3://datasets/columns.jsonl"),
        "more bad rows than allowed": data(
            "s3://datasets/rows-not-json.jsonl", invalidRows={"policy": "Skip", "limit": 1}
        ),
        "no config": {"model": {"uri": "s3://models/no-config"}},
        "no tokenizer": {"model": {"uri": "s3://models/no-tokenizer"}},
        "no chat template": {"model": {"uri": "s3://models/no-template"}},
        "no weights": {"model": {"uri": "s3://models/no-weights"}},
        "output taken": {"output": {"uri": "s3://models/taken"}},
    }
    up.put("datasets", "empty.jsonl", b"")
    up.put("datasets", "blank.jsonl", b"\n\n")
    up.put("datasets", "rows.parquet", b"PAR1")
    up.put("datasets", "columns.jsonl", b'{"foo": 1}\n')
    up.put("models", "taken/config.json", b"{}")
    for missing, names in {
        "no-config": ["config.json"],
        "no-tokenizer": ["tokenizer.json"],
        "no-template": ["chat_template.jinja"],
        "no-weights": ["model.safetensors"],
    }.items():
        for path in tiny_model.iterdir():
            if path.name not in names:
                up.s3.upload_file(str(path), "models", f"{missing}/{path.name}")
    for case, (row, _) in ROWS.items():
        key = f"rows-{case.replace(' ', '-').lower()}.jsonl"
        up.put("datasets", key, f"{GOOD}\n{row}\n{row}\n".encode())
        jobs[case] = data(f"s3://datasets/{key}", maxLength=256)
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "wrong-keys"},
        "stringData": {"AWS_ACCESS_KEY_ID": "WRONG", "AWS_SECRET_ACCESS_KEY": "wrong-secret"},
    }
    up.apply(secret)
    names = {case: f"bad-{number}" for number, case in enumerate(jobs)}
    manifests = [manifest(names[case], **change) for case, change in jobs.items()]
    for start in range(0, len(manifests), 4):  # a machine that runs tests has not the memory for all at once
        some = manifests[start : start + 4]
        up.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(some))
        for body in some:
            up.failed(body["metadata"]["name"])
    return {case: up.status(name) | {"jobs": up.jobs(name)} for case, name in names.items()}


EXPECTED: dict[str, tuple[str, int, list[str]]] = {
    "missing model": ("ModelError", 66, ["s3://models/nowhere", "Correct model.uri"]),
    "missing bucket": ("NotFound", 67, ["s3://nobucket", "bucket does not exist"]),
    "missing data": ("NotFound", 67, ["s3://datasets/nowhere.jsonl", "Correct the URI"]),
    "missing secret keys": ("AccessDenied", 77, ["storage.secretRef"]),
    "no right to write": ("AccessDenied", 77, ["s3:PutObject"]),
    "no server": ("StorageUnavailable", 69, ["storage.endpoint"]),
    "empty data": ("DataError", 65, ["s3://datasets/empty.jsonl is empty"]),
    "blank data": ("DataError", 65, ["s3://datasets/blank.jsonl holds no row"]),
    "damaged data": ("DataError", 65, ["rows.parquet is a Parquet file that is damaged or cut off. Upload"]),
    "unknown columns": ("DataError", 65, ["Set dataset.format and dataset.columns"]),
    "more bad rows than allowed": ("DataError", 65, ["2 of 3 rows", "dataset.invalidRows.limit is 1"]),
    "no config": ("ModelError", 66, ["config.json"]),
    "no tokenizer": ("ModelError", 66, ["tokenizer.json"]),
    "no chat template": ("ModelError", 66, ["chat template", "Use an instruct model"]),
    "no weights": ("ModelError", 66, ["no safetensors weights"]),
    "output taken": ("OutputExists", 73, ["s3://models/taken", "set output.onExisting to Overwrite"]),
    **{
        case: ("DataError", 65, ["2 of 3 rows cannot be used", "row 2", words, "dataset.invalidRows.policy to Skip"])
        for case, (_, words) in ROWS.items()
    },
}


@pytest.mark.parametrize("case", EXPECTED)
def test_what_prepare_refuses_has_its_class_exit_code_reason_and_words(
    failures: dict[str, dict[str, Any]], case: str
) -> None:
    failure_class, code, words = EXPECTED[case]
    status = failures[case]
    failure = status["failure"]
    assert (failure["class"], failure["exitCode"], failure["stage"]) == (failure_class, code, "prepare")
    assert failure["disposition"] == "Terminal"
    for word in words:
        assert word in failure["message"], failure["message"]
    conditions = {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}
    assert conditions["Validated"] == ("False", failure_class)
    assert conditions["Failed"] == ("True", failure_class)
    assert all("prepare" in name for name in status["jobs"]), "no GPU was taken"


def test_bad_rows_can_be_skipped_and_are_counted(up: LocalUp) -> None:
    up.put("datasets", "mixed.jsonl", "".join(f"{GOOD}\n" for _ in range(8)).encode() + b"{broken\n")
    change = data("s3://datasets/mixed.jsonl", invalidRows={"policy": "Skip", "limit": 1})
    up.apply(manifest("skipping", **change))
    status = up.succeeded("skipping")
    assert status["dataset"]["skippedRows"] == 1
    assert status["dataset"]["trainRows"] == 8


def test_a_missing_secret_is_named_while_it_is_missing(up: LocalUp) -> None:
    up.apply(manifest("secretless", storage={"secretRef": {"name": "not-there"}}))
    up.until(
        "secretless",
        lambda s: any(
            c["reason"] == "ContainerConfigError" and 'secret "not-there" not found' in c["message"]
            for c in s.get("conditions", [])
        ),
        "the missing secret is named",
    )
    up.kubectl("delete", "ftj", "secretless")


def test_overwrite_replaces_another_model(up: LocalUp) -> None:
    up.put("models", "replaced/config.json", b"{}")
    up.apply(manifest("replacing", output={"uri": "s3://models/replaced", "onExisting": "Overwrite"}))
    up.succeeded("replacing")
    assert json.loads(up.read("s3://models/replaced/config.json"))["model_type"] == "llama"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            b"kind: FinetuneJob\napiVersion: finetune.dev/v1alpha1\n",
            ":1: kind: kind is 'FinetuneJob': write FineTuneJob",
        ),
        (b"kind: FineTuneJob\napiVersion: finetune.dev/v1\n", ":2: apiVersion: apiVersion is 'finetune.dev/v1'"),
        (b"kind: Secret\napiVersion: v1\n", "there is no FineTuneJob to check"),
        (b"", "the file is empty"),
        (b"kind: [\n", "not YAML"),
        (b"a: \x07\n", ":1: not YAML: the character '\\x07' is not allowed"),
        (b"&a [*a]\n", "not YAML: it holds itself"),
        (b"a: \xff\n", "is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_job_says_so(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(text)
    done = subprocess.run([*FINETUNE, "validate", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_help_reads_well() -> None:
    for command in ([], ["submit"], ["watch"], ["wait"], ["local"], ["local", "run"], ["local", "cp"]):
        done = subprocess.run([*FINETUNE, *command, "--help"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("Usage: ")
