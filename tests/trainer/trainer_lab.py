"""What the trainer's tests work with: a tiny model, jobs, stages run in this process, agents run as in pods."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from finetune_api.document import JobDocument, JobIdentity, StorageSettings
from finetune_api.names import (
    AGENT_PORT,
    ENV_COMPLETION_INDEX,
    ENV_MAIN_ADDRESS,
    ENV_MAIN_PORT,
    ENV_POD_IP,
    ENV_POD_NAME,
    ENV_TERMINATION_PATH,
    ENV_WORK_DIR,
    Stage,
)
from finetune_api.report import Report, decode
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.layout import PodDisk
from finetune_trainer.reporting import Reporter, failure_file

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "examples" / "quickstart"
INJECT = Path(__file__).parent / "inject"
"""Holds a sitecustomize.py that lets a test change code in processes it does not start itself."""
KEY_ID, SECRET = "AKIDTESTTESTTEST", "test-secret-value-0123456789"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_addresses = itertools.count(1)


# Models


def train_tokenizer(rows: Path = QUICKSTART / "train.jsonl", size: int = 1000) -> Any:
    """A byte-level BPE tokenizer with ChatML; its padding token is its stop token, as in many real models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(rows.read_text().splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_tiny_model(folder: Path, *, dtype: str = "float32", seed: int = 0, **config: Any) -> Path:
    """A random Llama of two layers with a real tokenizer, as save_pretrained writes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **config})).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def short_rows(count: int, start: int = 0, *, system: bool = False) -> list[dict[str, Any]]:
    """Rows of the quickstart without the long system prompt: small tickets that a tiny model can begin to learn."""
    lines = (QUICKSTART / "train.jsonl").read_text().splitlines()[start : start + count]
    rows = [json.loads(line) for line in lines]
    return rows if system else [{"messages": row["messages"][1:]} for row in rows]


def as_json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# Storage


@dataclass(frozen=True)
class Bucket:
    """A bucket of the test's own, seen past the code under test."""

    endpoint: str
    name: str
    key_id: str = KEY_ID
    secret: str = SECRET

    @property
    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.key_id,
            aws_secret_access_key=self.secret,
            config=Config(
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"addressing_style": "path"},
            ),
        )

    @property
    def settings(self) -> StorageSettings:
        return StorageSettings(endpoint=self.endpoint, path_style=True)

    def uri(self, path: str) -> str:
        return f"s3://{self.name}/{path}"

    def put(self, path: str, data: bytes | str | Path) -> None:
        body = data.read_bytes() if isinstance(data, Path) else data
        self.client.put_object(Bucket=self.name, Key=path, Body=body)

    def put_folder(self, path: str, folder: Path) -> None:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(f"{path}/{file.relative_to(folder).as_posix()}", file)

    def get(self, path: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.name, Key=path)["Body"].read()
        return data

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def fetch_folder(self, path: str, folder: Path) -> Path:
        for key in self.keys(f"{path}/"):
            target = folder / key.removeprefix(f"{path}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.get(key))
        return folder

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def delete(self, *paths: str) -> None:
        for path in paths:
            self.client.delete_object(Bucket=self.name, Key=path)

    def uploads(self) -> list[str]:
        """Multipart uploads that were neither completed nor aborted."""
        return [item["Key"] for item in self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])]


# Jobs


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `change` replaced; a leaf of None is removed."""
    result = dict(base)
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        elif value is None:
            result.pop(key, None)
        else:
            result[key] = value
    return result


BASE_SPEC: dict[str, Any] = {
    "dataset": {"maxLength": 512},
    "method": {"adapter": {"type": "LoRA"}},
    "hyperparameters": {"maxSteps": 12, "learningRate": "1e-2", "batchSize": 8, "warmupRatio": "0"},
    "checkpoint": {"everySeconds": 0},
    "resources": {"gpusPerNode": 0},
}


@dataclass
class TestJob:
    """One FineTuneJob, and the disks of its pods."""

    __test__ = False

    bucket: Bucket
    root: Path
    spec: FineTuneJobSpec
    uid: str = "uid-1"
    name: str = "ticket-bot"
    storage: StorageSettings | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the document that a test sets."""

    @property
    def work(self) -> str:
        """Prefix of the work files in the bucket."""
        return f"{self.output}/.finetune/{self.uid}"

    @property
    def output(self) -> str:
        return self.spec.output.uri.removeprefix(f"s3://{self.bucket.name}/")

    def document(self, stage: str, attempt: int = 1, earlier: tuple[int, ...] = (), **fields: Any) -> JobDocument:
        return JobDocument(
            **{
                "stage": Stage(stage),
                "attempt": attempt,
                "job": JobIdentity(namespace="team-a", name=self.name, uid=self.uid),
                "spec": self.spec,
                "work_uri": self.bucket.uri(self.work),
                "storage": self.storage or self.bucket.settings,
                "earlier_attempts": list(earlier),
                **self.overrides,
                **fields,
            }
        )

    def disk(self, stage: str, attempt: int = 1, node: int = 0) -> PodDisk:
        suffix = f"-{node}" if node else ""
        return PodDisk(self.root / f"{self.uid}-{stage}-{attempt}{suffix}")

    def run(self, stage: str, attempt: int = 1, earlier: tuple[int, ...] = (), **fields: Any) -> Report:
        """Run a stage in this process; its report. Failures come out as the exceptions that they are."""
        steps = {"prepare": ("prepare",), "train": ("fetch", "train"), "export": ("export",)}[stage]
        document = self.document(stage, attempt, earlier, **fields)
        return [run_step(step, document, self.disk(stage, attempt)) for step in steps][-1]

    def agent(self, stage: str, attempt: int = 1, earlier: tuple[int, ...] = (), **options: Any) -> AgentRun:
        """Start a pod of this stage."""
        environment = options.pop("environment", {})
        command = options.pop("command", [])
        document = self.document(stage, attempt, earlier, **options)
        return AgentRun(document, self.disk(stage, attempt), environment, command)

    def nodes(self, attempt: int = 1, earlier: tuple[int, ...] = (), *, count: int = 2, **options: Any) -> Nodes:
        """The train pods of several nodes; none is started yet."""
        environment = options.pop("environment", {})
        document = self.document("train", attempt, earlier, nodes=count, **options)
        return Nodes(document, [self.disk("train", attempt, node) for node in range(count)], environment)


def run_step(step: str, document: JobDocument, disk: PodDisk) -> Report:
    from finetune_trainer import main

    reporter = Reporter(document, disk.run)
    before = signal.getsignal(signal.SIGTERM)
    try:
        main._call(step, document, disk, reporter)
    finally:
        reporter.close()
        signal.signal(signal.SIGTERM, before)
    return reporter.report


class AgentRun:
    """An agent with its children, started as a pod starts it: a job document, a work directory, an environment."""

    def __init__(
        self,
        document: JobDocument,
        disk: PodDisk,
        environment: dict[str, str],
        command: list[str],
        address: str | None = None,
    ) -> None:
        disk.root.mkdir(parents=True, exist_ok=True)
        self.disk = disk
        self.termination = disk.root / "termination-log"
        self.output = disk.root / "output.txt"
        self.address = address or new_address()
        path = disk.root / "job.json"
        path.write_text(document.model_dump_json(by_alias=True))
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, sys.executable, "-m", "finetune_trainer.main", "agent", "--document", str(path)],
                env={
                    **os.environ,
                    ENV_WORK_DIR: str(disk.root),
                    ENV_TERMINATION_PATH: str(self.termination),
                    ENV_POD_IP: self.address,
                    "PYTHONPATH": os.pathsep.join([str(INJECT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
                    **environment,
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"the agent did not end; it printed: {self.text()}") from None

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        """The condition's first true value while the agent runs. The limit only ends what would never end."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert self.process.poll() is None, f"the agent ended before: {self.text()}"
            assert time.monotonic() < deadline, f"it did not happen; the agent printed: {self.text()}"
            time.sleep(0.01)
        return value

    @property
    def message(self) -> bytes:
        """The termination message as it is now."""
        return self.termination.read_bytes() if self.termination.exists() else b""

    @property
    def report(self) -> Report:
        report = decode(self.message)
        assert report is not None, f"no report: {self.message!r}; the agent printed: {self.text()}"
        return report

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def get(self, path: str) -> tuple[int, str, bytes]:
        """GET from the agent's own server: status, content type, body."""
        try:
            with urllib.request.urlopen(f"http://{self.address}:{AGENT_PORT}{path}", timeout=10) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Content-Type"], error.read()

    def children(self) -> list[int]:
        """Processes that the agent started."""
        return [pid for pid in map(int, _pids(self.process.pid)) if pid]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill_all(self) -> None:
        """SIGKILL to the agent and all its children at once, as when a node dies."""
        pids = [self.process.pid, *self.children()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)

    def failure_file(self, rank: int = 0) -> Path:
        return failure_file(self.disk.run, rank)


def step_source(name: str, body: str) -> str:
    """A step of a pod under test as a function: the test's own code in place of the product's."""
    return f"\ndef {name}(document, disk, reporter):\n" + textwrap.indent(textwrap.dedent(body), "    ")


class Nodes:
    """Pods that train together: each a pod of its own, with what the operator and Kubernetes tell it."""

    def __init__(self, document: JobDocument, disks: list[PodDisk], environment: dict[str, str]) -> None:
        self.document = document
        self.disks = disks
        self.environment = environment
        self.addresses = [new_address() for _ in disks]
        with socket.socket() as probe:
            probe.bind(("", 0))
            self.port = probe.getsockname()[1]

    def start(self, node: int, **environment: str) -> AgentRun:
        own = {
            ENV_COMPLETION_INDEX: str(node),
            ENV_POD_NAME: f"{self.document.job.name}-train-{node}-{secrets.token_hex(3)}",
            ENV_MAIN_ADDRESS: self.addresses[0],
            ENV_MAIN_PORT: str(self.port),
        }
        given = self.environment | own | environment
        return AgentRun(self.document, self.disks[node], given, [], self.addresses[node])

    def replace(self, node: int, **environment: str) -> AgentRun:
        """Start a pod in the place of one that is gone. It shares nothing with it but the index."""
        root = self.disks[node].root
        self.disks[node] = PodDisk(root.with_name(f"{root.name}-again"))
        self.addresses[node] = new_address()
        return self.start(node, **environment)

    def start_all(self) -> list[AgentRun]:
        return [self.start(node) for node in range(len(self.disks))]


def new_address() -> str:
    """A loopback address that no other pod of the tests has."""
    number = next(_addresses)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return f"127.{77 + worker}.{number // 250}.{number % 250 + 1}"


def _pids(parent: int) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError):
        yield from Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
