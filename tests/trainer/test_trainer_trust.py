"""Servers whose certificates only a company's own authority vouches for, reached over real TLS."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from test_trainer_hub import Console
from trainer_certificates import Authority
from trainer_hub import FakeHub, Repository
from trainer_lab import TestJob
from trainer_servers import SecureMotoServer

from finetune_api.document import StorageSettings
from finetune_api.failures import FailureClass, JobError, exit_code_of
from finetune_api.names import ENV_CA_BUNDLE
from finetune_trainer.storage import Folder, open_folder, s3
from finetune_trainer.trust import VARIABLES, trust_bundle

BUCKET = "secure"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def secure(authority: Authority) -> Iterator[SecureMotoServer]:
    with SecureMotoServer(authority.server()) as server:
        make_bucket(server, authority)
        yield server


def make_bucket(server: SecureMotoServer, authority: Authority) -> Any:
    client = boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1", verify=str(authority.bundle))
    client.create_bucket(Bucket=BUCKET)
    return client


@pytest.fixture(autouse=True)
def no_trust(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins with a process that trusts the well-known authorities only."""
    for name in (*VARIABLES, ENV_CA_BUNDLE):
        # Set first, so that what the code under test sets is taken away again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    s3._client.cache_clear()
    yield
    s3._client.cache_clear()


def folder(server: SecureMotoServer) -> Folder:
    return open_folder(f"s3://{BUCKET}/x", StorageSettings(endpoint=server.endpoint, path_style=True))


def failure(call: Callable[[], object]) -> JobError:
    with pytest.raises(JobError) as caught:
        call()
    return caught.value


def test_an_unknown_authority_is_refused_and_the_remedy_named(secure: SecureMotoServer) -> None:
    error = failure(lambda: folder(secure).write("a", b"1"))
    assert error.failure_class is FailureClass.USER_ERROR
    assert "Name the certificate of its authority in storage.caBundle" in error.message
    assert "unable to get local issuer certificate" in error.message


def test_with_the_bundle_s3_is_read_and_written(
    secure: SecureMotoServer, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_CA_BUNDLE, str(authority.bundle))
    monkeypatch.setattr(s3, "MIN_PART", 5 * 1024 * 1024)
    trust_bundle(tmp_path)
    data = os.urandom(11 * 1024 * 1024)
    (tmp_path / "file").write_bytes(data)
    target = folder(secure)
    target.upload(tmp_path / "file", "parts")
    (info,) = target.list()
    target.download(info, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


def test_the_well_known_authorities_are_still_trusted(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    well_known = Authority(tmp_path, "Well-known CA")
    monkeypatch.setenv("SSL_CERT_FILE", str(well_known.bundle))
    monkeypatch.setenv(ENV_CA_BUNDLE, str(authority.bundle))
    trust_bundle(tmp_path / "run")
    with SecureMotoServer(well_known.server()) as theirs:
        make_bucket(theirs, well_known)
        folder(theirs).write("a", b"1")
        assert folder(theirs).read("a") == b"1"
    together = Path(os.environ["AWS_CA_BUNDLE"]).read_bytes()
    # A child of the agent does not do it again.
    trust_bundle(tmp_path / "run")
    assert Path(os.environ["AWS_CA_BUNDLE"]).read_bytes() == together


def test_without_a_file_of_ones_own_the_well_known_ones_are_boto3s(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_CA_BUNDLE, str(authority.bundle))
    trust_bundle(tmp_path)
    assert Path(os.environ["SSL_CERT_FILE"]).read_bytes().count(b"BEGIN CERTIFICATE") > 50


def test_an_expired_certificate_is_the_servers_affair(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_CA_BUNDLE, str(authority.bundle))
    trust_bundle(tmp_path)
    with SecureMotoServer(authority.server(timedelta(days=-1))) as expired:
        error = failure(lambda: folder(expired).write("a", b"1"))
    assert error.failure_class is FailureClass.STORAGE_UNAVAILABLE
    assert "certificate has expired" in error.message


@pytest.mark.parametrize("content", [b"", b"no certificate", b"\xff\xfe"])
def test_a_bundle_without_certificates_is_an_error_of_the_user(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundle").write_bytes(content)
    monkeypatch.setenv(ENV_CA_BUNDLE, str(tmp_path / "bundle"))
    error = failure(lambda: trust_bundle(tmp_path))
    assert error.failure_class is FailureClass.USER_ERROR
    assert "storage.caBundle" in error.message
    assert "SSL_CERT_FILE" not in os.environ


def test_the_hub_is_reached_too(authority: Authority, tmp_path: Path) -> None:
    with FakeHub(authority.context()) as hub:
        hub.repositories["models/org/name"] = Repository()
        hub.repositories["models/org/name"].commit({"config.json": b"{}"})
        with Console(hub.endpoint, tmp_path / "without") as console:
            failure_class, message = console.fails("hf://org/name", "list")
            assert failure_class is FailureClass.USER_ERROR
            assert "storage.caBundle" in message
        environment = {ENV_CA_BUNDLE: str(authority.bundle), "FINETUNE_WORK_DIR": str(tmp_path)}
        with Console(hub.endpoint, tmp_path / "with", **environment) as console:
            assert console("hf://org/name", "read", "config.json") == "{}"


@pytest.mark.parametrize("good", [True, False], ids=["trusted", "broken bundle"])
def test_a_whole_pod(
    good: bool, secure: SecureMotoServer, authority: Authority, make_job: Callable[..., TestJob], tmp_path: Path
) -> None:
    """Model, data and output behind the company's TLS; the agent stores its log and report there, too."""
    job = make_job()
    client = boto3.client("s3", endpoint_url=secure.endpoint, region_name="us-east-1", verify=str(authority.bundle))
    client.create_bucket(Bucket=job.bucket.name)
    for key in [*job.bucket.keys("model/"), *job.bucket.keys("data/")]:
        client.put_object(Bucket=job.bucket.name, Key=key, Body=job.bucket.get(key))
    bundle = authority.bundle if good else tmp_path / "empty"
    bundle.touch()
    settings = StorageSettings(endpoint=secure.endpoint, path_style=True)
    run = job.agent("prepare", environment={ENV_CA_BUNDLE: str(bundle)}, storage=settings)
    code = run.wait()
    if not good:
        assert code == exit_code_of(FailureClass.USER_ERROR)
        assert run.report.failure is not None
        assert "storage.caBundle" in run.report.failure.message
        return
    assert code == 0, run.text()
    stored = client.get_object(Bucket=job.bucket.name, Key=f"{job.work}/prepare/1/report.json")["Body"].read()
    assert json.loads(stored)["outcome"] == "Succeeded"
