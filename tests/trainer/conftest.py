"""Servers, models and jobs of the trainer's tests. Everything is real but the hub; nothing leaves this machine."""

from __future__ import annotations

import functools
import os
import secrets
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from trainer_lab import BASE_SPEC, QUICKSTART, Bucket, TestJob, as_json_lines, merged, save_tiny_model, short_rows
from trainer_servers import MotoServer, S3rver, Server, s3rver_problem

from finetune_api.failures import JobError
from finetune_api.report import Report
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.main import _quiet_libraries
from finetune_trainer.storage import s3

# Read when a client is made, or when a library is imported that no module here imports at its top.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": tempfile.mkdtemp(prefix="finetune-hf-"),
    "AWS_ACCESS_KEY_ID": "AKIDTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "test-secret-value-0123456789",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
}
for name in ("HF_TOKEN", "HF_ENDPOINT", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_ENDPOINT_URL"):
    os.environ.pop(name, None)
_quiet_libraries()


@pytest.fixture(scope="session")
def moto() -> Iterator[MotoServer]:
    """An S3 server in a process of its own."""
    with MotoServer() as server:
        yield server


@pytest.fixture(scope="session")
def s3rver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3rver]:
    """Another implementation of S3, so that ours is not fitted to one server's ways."""
    if problem := s3rver_problem():
        pytest.skip(problem)
    with S3rver(tmp_path_factory.mktemp("s3rver")) as server:
        yield server


def new_bucket(endpoint: str, key_id: str, secret: str) -> Bucket:
    bucket = Bucket(endpoint, f"test-{secrets.token_hex(6)}", key_id, secret)
    bucket.client.create_bucket(Bucket=bucket.name)
    return bucket


@pytest.fixture
def bucket(moto: MotoServer) -> Bucket:
    return new_bucket(moto.endpoint, moto.key_id, moto.secret)


@pytest.fixture(params=["moto", "s3rver"])
def any_bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket of each server. Clients are kept with their keys, and another server has others."""
    server: Server = request.getfixturevalue(request.param)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
    yield new_bucket(server.endpoint, server.key_id, server.secret)
    s3._client.cache_clear()


@pytest.fixture(scope="session")
def shared_bucket(moto: MotoServer) -> Bucket:
    """Holds the tiny model and its data; jobs write below folders of their own."""
    return new_bucket(moto.endpoint, moto.key_id, moto.secret)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random two-layer Llama in float32."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def inputs(shared_bucket: Bucket, tiny_model: Path) -> Bucket:
    """The shared bucket with the model at `model`, 48 train rows and 9 validation rows at `data`."""
    shared_bucket.put_folder("model", tiny_model)
    shared_bucket.put("data/train.jsonl", as_json_lines(short_rows(48)))
    shared_bucket.put("data/validation.jsonl", as_json_lines(short_rows(9, start=100)))
    shared_bucket.put("data/quickstart.jsonl", QUICKSTART / "train.jsonl")
    return shared_bucket


@pytest.fixture(scope="session")
def make_job(inputs: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TestJob]:
    """Makes jobs with an output folder of their own; keyword arguments change the spec."""

    def make(bucket: Bucket = inputs, **changes: Any) -> TestJob:
        uid = f"uid-{secrets.token_hex(4)}"
        spec = {
            "model": {"uri": bucket.uri("model")},
            "dataset": {
                "train": [{"uri": bucket.uri("data/train.jsonl")}],
                "validation": [{"uri": bucket.uri("data/validation.jsonl")}],
            },
            "output": {"uri": bucket.uri(f"out/{uid}")},
        }
        spec = merged(merged(BASE_SPEC, spec), changes)
        return TestJob(bucket, tmp_path_factory.mktemp("job"), FineTuneJobSpec.model_validate(spec), uid)

    return make


@dataclass(frozen=True)
class Trained:
    """A job that went through prepare and train in this process, and what it left in memory."""

    job: TestJob
    report: Report
    trainer: Any
    """TRL's trainer, with the trained model."""

    @property
    def final(self) -> str:
        """Prefix of what training handed over."""
        return f"{self.job.work}/train/1/final"

    @property
    def history(self) -> list[dict[str, Any]]:
        return [entry for entry in self.trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="session")
def train(make_job: Callable[..., TestJob]) -> Callable[..., Trained]:
    """Prepares and trains a job with these changes of the spec."""

    def run(**changes: Any) -> Trained:
        from finetune_trainer import training

        job = make_job(**changes)
        job.run("prepare")
        built = []
        original = training.build_trainer
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "build_trainer", lambda *args: built.append(original(*args)) or built[-1])
            report = job.run("train")
        return Trained(job, report, built[0])

    return run


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[TestJob, int], None]:
    """Train a prepared job in this process, and tell it to stop in this step: it saves a checkpoint and ends."""

    def run(job: TestJob, step: int) -> None:
        from finetune_trainer.training import LoopCallback

        begin = LoopCallback.on_step_begin

        def stopped(self: Any, args: Any, state: Any, control: Any, **named: Any) -> None:
            begin(self, args, state, control, **named)
            if state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(LoopCallback, "on_step_begin", stopped)
            with pytest.raises(JobError, match=f"after step {step} of .*; a checkpoint was saved"):
                job.run("train")

    return run


@pytest.fixture(scope="session")
def trained(train: Callable[..., Trained]) -> Callable[[str], Trained]:
    """One trained job for each adapter type, shared by all tests that only look."""

    @functools.cache
    def get(adapter: str) -> Trained:
        return train(method={"adapter": {"type": adapter}}, checkpoint={"everySteps": 3, "keepLast": 2})

    return get


@pytest.fixture(scope="session")
def exported(trained: Callable[[str], Trained]) -> Callable[[str], Report]:
    """The report of exporting the shared job of an adapter type."""

    @functools.cache
    def get(adapter: str) -> Report:
        return trained(adapter).job.run("export", 1, (1,))

    return get
