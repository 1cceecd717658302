"""`finetune gc` as a user types it, with a real API server and two S3 servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
from aiohttp import web
from botocore.config import Config
from conftest import TestServer
from fault_proxy import Exchange, fault_proxy
from objects import manifest
from trainer_servers import Fault, MotoServer, Proxy, Request, S3rver, Server, s3rver_problem

JOBS = "/apis/finetune.dev/v1alpha1/namespaces/{}/finetunejobs"
DAY = 24 * 3600
NOW = ("--keep-days", "0", "--keep-failed-days", "0", "--yes")
FILES = {
    "prepare/plan.json": b"{}",
    "prepare/train.arrow": b"rows",
    "prepare/1/report.json": b"{}",
    "evaluation/base.json": b"{}",
    "evaluation/reference-train.safetensors": b"x",
    "train/1/checkpoints/10/manifest.json": b"{}",
    "train/1/checkpoints/10/adapter/adapter_model.safetensors": b"x" * 2000,
    "train/1/final/manifest.json": b"{}",
    "train/1/final/probe.safetensors": b"x" * 100,
    "train/1/log.txt": b"",
    "export/1/report.json": b"{}",
}
"""Work files, without the one that names the owner."""


@pytest.fixture(scope="module")
def moto() -> Iterator[MotoServer]:
    with MotoServer() as server:
        yield server


@pytest.fixture(scope="module")
def s3rver_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s3rver")


@pytest.fixture(scope="module")
def s3rver(s3rver_folder: Path) -> Iterator[S3rver]:
    """Keeps objects as files, so that a test can make them old. It cannot list uploads."""
    if problem := s3rver_problem():
        pytest.skip(problem)
    with S3rver(s3rver_folder) as server:
        yield server


@dataclass
class Lab:
    """A namespace, a bucket, and a user with a shell."""

    cluster: TestServer
    namespace: str
    s3: Server
    bucket: str
    kubeconfig: Path = field(init=False)

    def __post_init__(self) -> None:
        self.kubeconfig = self.cluster.kubeconfig
        self.endpoint = self.s3.endpoint
        self.client = boto3.client(
            "s3",
            endpoint_url=self.s3.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.s3.key_id,
            aws_secret_access_key=self.s3.secret,
            config=Config(
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"addressing_style": "path"},
            ),
        )
        self.client.create_bucket(Bucket=self.bucket)

    # The cluster

    def job(self, name: str, condition: str = "", phase: str = "Running", **spec: Any) -> str:
        """A job in a state; returns its uid."""
        spec = {"output": {"uri": f"s3://{self.bucket}/{name}"}, "storage": {"endpoint": self.endpoint}, **spec}
        path = JOBS.format(self.namespace)
        answer = self.cluster.client.create(path, manifest(name, **spec))
        assert answer.code == 201, answer.body
        status: dict[str, Any] = {"phase": phase}
        if condition:
            moment = "2026-01-01T00:00:00Z"
            status["conditions"] = [
                {"type": condition, "status": "True", "reason": "R", "message": "m", "lastTransitionTime": moment}
            ]
        assert self.cluster.client.patch(f"{path}/{name}/status", {"status": status}).code == 200
        return str(answer.body["metadata"]["uid"])

    def over(self, name: str, condition: str = "Complete", **spec: Any) -> str:
        """A job that is over, its published model, and its work files; returns its uid."""
        uid = self.job(name, condition, "Succeeded" if condition == "Complete" else "Failed", **spec)
        self.fill(f"{name}/.finetune/{uid}", uid, name)
        self.put(f"{name}/model.safetensors", b"model")
        self.put(f"{name}/manifest.json", b"{}")
        return uid

    # The bucket

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def fill(self, folder: str, owner: str | None, name: str = "gone") -> None:
        files = dict(FILES)
        if owner:
            identity = {"namespace": self.namespace, "name": name, "uid": owner}
            files["prepare/job.json"] = json.dumps(identity).encode()
        for key, data in files.items():
            self.put(f"{folder}/{key}", data)

    def listing(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", [])]

    def begin_upload(self, key: str) -> None:
        begun = self.client.create_multipart_upload(Bucket=self.bucket, Key=key)
        self.client.upload_part(Bucket=self.bucket, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"part")

    def uploads(self) -> list[str]:
        answer = self.client.list_multipart_uploads(Bucket=self.bucket)
        return sorted(item["Key"] for item in answer.get("Uploads", []))

    # The user

    def command(self, *arguments: str) -> list[str]:
        own = [] if any("://" in argument for argument in arguments) else ["-n", self.namespace]
        base = [sys.executable, "-m", "finetune_operator.cli", "--kubeconfig", str(self.kubeconfig)]
        return [*base, *own, "gc", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
        return kept | {
            "AWS_ACCESS_KEY_ID": self.s3.key_id,
            "AWS_SECRET_ACCESS_KEY": self.s3.secret,
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def gc(self, *arguments: str, code: int = 0) -> str:
        """What the command printed, errors included."""
        done = subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, timeout=300, check=False
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert "Traceback" not in said
        return said


def new_lab(cluster: TestServer, namespace: str, s3: Server) -> Lab:
    return Lab(cluster, namespace, s3, f"gc-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def lab(embedded: TestServer, namespace: str, moto: MotoServer) -> Lab:
    return new_lab(embedded, namespace, moto)


@pytest.fixture(params=["moto", "s3rver"])
def any_lab(request: pytest.FixtureRequest, embedded: TestServer, namespace: str) -> Lab:
    return new_lab(embedded, namespace, request.getfixturevalue(request.param))


@pytest.fixture
def aging_lab(embedded: TestServer, namespace: str, s3rver: S3rver) -> Lab:
    return new_lab(embedded, namespace, s3rver)


def age(s3rver_folder: Path, lab: Lab, prefix: str, days: float) -> None:
    """Let objects be as old as this."""
    moment = time.time() - days * DAY
    files = list((s3rver_folder / lab.bucket / prefix).rglob("*"))
    assert files
    for path in files:
        os.utime(path, (moment, moment))


def lines(said: str) -> dict[str, str]:
    """The lines about folders by their uid."""
    return {line.split()[1]: line for line in said.splitlines() if line.startswith(("remove ", "keep "))}


def test_only_the_work_files_of_jobs_that_are_over_go(any_lab: Lab) -> None:
    lab = any_lab
    complete, failed = lab.over("complete"), lab.over("failed", "Failed")
    running = lab.job("running")
    suspended = lab.job("suspended", "Suspended", "Suspended")
    for name, uid in (("running", running), ("suspended", suspended)):
        lab.fill(f"{name}/.finetune/{uid}", uid, name)
    before = lab.listing()

    said = lab.gc("--keep-days", "0")
    assert lines(said).keys() == {complete, failed}
    assert f"{lab.namespace}/complete  12 files, 2.2 KiB  (Complete, untouched for 0 days)" in lines(said)[complete]
    assert "(Failed, untouched for 0 days: kept for 30 days)" in lines(said)[failed]
    assert "would remove 12 files (2.2 KiB) of 1 job, abort 0 uploads" in said
    assert "add --yes" in said
    assert lab.listing() == before

    assert "removed 12 files" in lab.gc("--keep-days", "0", "--yes")
    assert sorted(set(before) - set(lab.listing())) == [key for key in before if complete in key]
    assert "removed 12 files" in lab.gc("--keep-failed-days", "0", "--yes")
    assert [key for key in lab.listing() if failed in key] == []
    assert lab.listing("failed/") == ["manifest.json", "model.safetensors"]
    assert lab.listing("complete/") == ["manifest.json", "model.safetensors"]
    assert len([key for key in lab.listing() if running in key or suspended in key]) == 2 * (len(FILES) + 1)
    assert "removed 0 files" in lab.gc(*NOW)


def test_the_newest_file_counts(aging_lab: Lab, s3rver_folder: Path) -> None:
    lab = aging_lab
    days = {"c6": 6.9, "c7": 7.1, "young": 8.0, "f8": 8.0, "f29": 29.9, "f30": 30.1}
    uids = {}
    for name, old in days.items():
        uids[name] = lab.over(name, "Failed" if name.startswith("f") else "Complete")
        age(s3rver_folder, lab, name, old)
    lab.put(f"young/.finetune/{uids['young']}/train/1/log.txt", b"a late line")
    said = lines(lab.gc("--yes"))
    gone = {name for name, uid in uids.items() if said[uid].startswith("remove ")}
    assert gone == {"c7", "f30"} == {name for name, uid in uids.items() if not any(uid in key for key in lab.listing())}
    assert "untouched for 29 days: kept for 30 days" in said[uids["f29"]]


def test_unfinished_uploads_of_jobs_that_are_over_are_aborted(lab: Lab) -> None:
    complete, failed, running = lab.over("complete"), lab.over("failed", "Failed"), lab.job("running")
    kept = ["complete/model-2.safetensors", f"running/.finetune/{running}/train/1/checkpoints/20/model.safetensors"]
    for key in (
        *kept,
        f"complete/.finetune/{complete}/train/1/checkpoints/20/model.safetensors",
        f"failed/.finetune/{failed}/train/1/final/model.safetensors",
        f"failed/.finetune/{failed}/train/2/final/model.safetensors",
    ):
        lab.begin_upload(key)
    before = lab.uploads()
    said = lab.gc()
    assert "would remove 0 files (0 B) of 0 jobs, abort 3 uploads" in said
    assert "2 of 2 uploads to abort" in lines(said)[failed]
    assert lab.uploads() == before
    files = lab.listing()
    # The files are too young to go.
    assert "aborted 3 uploads" in lab.gc("--yes")
    assert lab.uploads() == sorted(kept)
    assert lab.listing() == files


def test_a_folder_of_uploads_alone(lab: Lab) -> None:
    uid = lab.job("bot", "Failed", "Failed")
    lab.begin_upload(f"bot/.finetune/{uid}/prepare/train.arrow")
    assert "of 1 job, abort 1 upload" in lab.gc("--keep-failed-days", "0")
    lab.gc(*NOW)
    assert lab.uploads() == []


def test_thousands_of_files(aging_lab: Lab, s3rver_folder: Path) -> None:
    lab = aging_lab
    uid = lab.over("bot")
    folder = s3rver_folder / lab.bucket / "bot" / ".finetune" / uid / "train" / "1" / "final"
    for number in range(2500):
        (folder / f"shard-{number:04}._S3rver_object").write_bytes(b"1234")
    # More than two listings hold, and they are deleted while they are listed.
    assert "removed 2512 files (11.9 KiB) of 1 job" in lab.gc(*NOW)
    assert lab.listing() == ["bot/manifest.json", "bot/model.safetensors"]


def test_jobs_of_all_namespaces(lab: Lab) -> None:
    uid = lab.over("bot")
    elsewhere = lab.command("-A", "--keep-days", "0")
    elsewhere[elsewhere.index("-n") + 1] = "default"
    done = subprocess.run(elsewhere, env=lab.environment, capture_output=True, text=True, timeout=300, check=True)
    assert lines(done.stdout)[uid].startswith("remove ")
    elsewhere.remove("-A")
    done = subprocess.run(elsewhere, env=lab.environment, capture_output=True, text=True, timeout=300, check=True)
    assert uid not in done.stdout


def test_an_own_folder_of_work_files(lab: Lab) -> None:
    uid = lab.job("bot", "Complete", storage={"endpoint": lab.endpoint, "workURI": f"s3://{lab.bucket}/scratch"})
    lab.fill(f"scratch/{uid}", uid, "bot")
    lab.put("scratch/notes.txt", b"mine")
    assert "removed 12 files" in lab.gc(*NOW)
    assert lab.listing() == ["scratch/notes.txt"]


def test_files_on_this_machine(lab: Lab, tmp_path: Path) -> None:
    uid = lab.job("bot", "Complete", output={"uri": f"file://{tmp_path}/out"})
    work = tmp_path / "out" / ".finetune" / uid
    for name, data in FILES.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(data)
    (tmp_path / "out" / "manifest.json").write_text("{}")
    lab.gc(*NOW[:-1])
    assert (work / "prepare" / "plan.json").exists()
    lab.gc(*NOW)
    assert not work.exists()
    assert (tmp_path / "out" / "manifest.json").exists()


class TestJobsThatAreGone:
    """Folders below a URI."""

    def orphan(self, lab: Lab, path: str = "bot/.finetune") -> str:
        uid = str(uuid.uuid4())
        lab.fill(f"{path}/{uid}", uid)
        return f"{path}/{uid}"

    def sweep(self, lab: Lab, path: str = "", *arguments: str, code: int = 0) -> str:
        options = arguments or NOW
        return lab.gc(f"s3://{lab.bucket}/{path}", "--endpoint", lab.endpoint, *options, code=code)

    def test_they_go_once_they_are_old(self, any_lab: Lab) -> None:
        lab = any_lab
        folder = self.orphan(lab)
        other = self.orphan(lab, "bot-2/.finetune")
        lab.put("bot/manifest.json", b"{}")
        before = lab.listing()
        # The longer time holds: whether they have failed is not known any more.
        said = self.sweep(lab, "bot", "--keep-days", "0", "--yes")
        assert "(Gone, untouched for 0 days: kept for 30 days)" in said
        assert f"jobs are those of the cluster https://{lab.cluster.client.host}:{lab.cluster.client.port}" in said
        assert lab.listing() == before
        said = self.sweep(lab, "bot")
        assert f"{lab.namespace}/gone  12 files" in said
        assert lab.listing() == [key for key in before if not key.startswith(folder)]
        self.sweep(lab)
        assert lab.listing() == ["bot/manifest.json"], other

    def test_what_is_in_doubt_is_kept(self, lab: Lab) -> None:
        living, complete = lab.job("living"), lab.over("complete")
        lab.fill(f"living/.finetune/{living}", living)
        unproven, mistaken, foreign, used = (str(uuid.uuid4()) for _ in range(4))
        lab.fill(f"a/.finetune/{unproven}", None)
        lab.fill(f"a/.finetune/{mistaken}", unproven)
        lab.fill(f"a/.finetune/{foreign}", foreign)
        lab.put(f"a/.finetune/{foreign}/train/1/thesis/chapter.tex", b"mine")
        lab.fill(f"a/.finetune/{used}", used)
        lab.job("second", model={"uri": f"s3://{lab.bucket}/a/.finetune/{used}/train/1/final"})
        lab.fill(f"copies/{complete}", complete)
        nested = str(uuid.uuid4())
        lab.fill(f"a/.finetune/{nested}", nested)
        inside = f"s3://{lab.bucket}/a/.finetune/{nested}/train/1/final/merged"
        lab.job("third", "Complete", output={"uri": inside})
        broken = str(uuid.uuid4())
        lab.fill(f"a/.finetune/{broken}", None)
        lab.put(f"a/.finetune/{broken}/prepare/job.json", b"{")
        lab.put(f"photos/{uuid.uuid4()}/train/\x1b[2J1.jpg", b"mine")
        before = lab.listing()
        said = self.sweep(lab)
        why = {uid: line.split("(")[1].split(")")[0] for uid, line in lines(said).items()}
        no_owner = "no prepare/job.json says whose files these are"
        assert why[living] == "the job is not over: Running"
        assert why[complete] in ("Complete, untouched for 0 days", "the job's work files are elsewhere; this is a copy")
        assert why[unproven] == why[broken] == no_owner
        assert why[mistaken] == "prepare/job.json names another job"
        assert why[foreign] == "train/1/thesis/chapter.tex is no work file"
        assert why[nested] == f"job {lab.namespace}/third uses it"
        assert why[used] == f"job {lab.namespace}/second uses it"
        assert "(train/?[2J1.jpg is no work file)" in said
        # The one job that is over, in its own place.
        assert set(before) - set(lab.listing()) == {key for key in before if key.startswith("complete/.finetune/")}

    def test_nothing_around_the_place_that_was_named(self, lab: Lab) -> None:
        folder = self.orphan(lab)
        before = lab.listing()
        assert "removed 0 files" in self.sweep(lab, f"{folder}/train")
        assert lab.listing() == before
        assert "removed 12 files" in self.sweep(lab, folder)

    def test_a_job_that_is_not_readable_lives(self, lab: Lab) -> None:
        uid = lab.job("bot", "Complete")
        lab.fill(f"bot/.finetune/{uid}", uid)

        async def newer(exchange: Exchange) -> web.StreamResponse | None:
            if exchange.seen.path.endswith("finetunejobs"):
                _, data = await exchange.carry_out()
                body = json.loads(data)
                for item in body["items"]:
                    item["spec"]["method"]["adapter"] = {"type": "Unheard"}
                return web.json_response(body)
            return None

        with fault_proxy(lab.cluster.client, lab.kubeconfig.parent / f"{lab.bucket}.yaml") as proxy:
            lab.kubeconfig = proxy.kubeconfig
            proxy.fault = newer
            assert "keep " in self.sweep(lab)
            assert "removed 0 files" in lab.gc(*NOW)
        assert len(lab.listing()) == len(FILES) + 1


class TestTrouble:
    @pytest.fixture
    def proxy(self, lab: Lab) -> Iterator[Proxy]:
        """Between the command and the S3 server."""
        with Proxy(lab.s3.endpoint) as proxy:
            lab.endpoint = proxy.endpoint
            yield proxy

    DENIED = (403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")

    def is_delete(self, part: str) -> Callable[[Request], bool]:
        return lambda request: request.method == "DELETE" and part in request.path

    def test_what_may_not_be_deleted_is_named_and_the_rest_goes_on(self, lab: Lab, proxy: Proxy) -> None:
        denied, other = lab.over("denied"), lab.over("other")
        proxy.faults = [Fault(self.is_delete(f"{denied}/train/1/checkpoints/10/manifest.json"), answer=self.DENIED)]
        said = lab.gc(*NOW, code=1)
        key = f"denied/.finetune/{denied}/train/1/checkpoints/10/manifest.json"
        assert f"error: s3://{lab.bucket}/{key}: " in said
        assert "AccessDenied" in said
        assert "removed 12 files (2.2 KiB) of 1 job" in said
        # Nothing that the manifest names is gone.
        assert f"{denied}/train/1/checkpoints/10/adapter/adapter_model.safetensors" in " ".join(lab.listing())
        assert not any(other in key for key in lab.listing())
        proxy.faults.clear()
        lab.gc(*NOW)
        assert not any(denied in key for key in lab.listing())

    def test_a_bucket_that_cannot_be_listed(self, lab: Lab, proxy: Proxy) -> None:
        lab.over("bot")
        missing = lab.job("lost", "Complete", output={"uri": "s3://no-such-bucket-at-all/x"})
        before = lab.listing()
        assert f"error: s3://no-such-bucket-at-all/x/.finetune/{missing}: " in lab.gc("--keep-days", "0", code=1)
        proxy.faults = [Fault(lambda request: "list-type" in request.query, answer=self.DENIED)]
        said = lab.gc(*NOW, code=1)
        assert said.count("AccessDenied") == 1
        assert "removed 0 files" in said
        said = lab.gc(f"s3://{lab.bucket}", "--endpoint", lab.endpoint, *NOW, code=1)
        assert "AccessDenied" in said
        assert lab.listing() == before

    def test_young_uploads_stay_and_long_lists_are_read_to_their_end(self, lab: Lab, proxy: Proxy) -> None:
        uid = lab.over("bot")
        old, young = (f"bot/.finetune/{uid}/train/{attempt}/final/model.safetensors" for attempt in (1, 2))
        lab.begin_upload(old)
        # moto says that every upload began in 2010, and has one page of them.
        page = (
            "<ListMultipartUploadsResult><IsTruncated>true</IsTruncated><NextKeyMarker>k</NextKeyMarker>"
            f"<NextUploadIdMarker>u</NextUploadIdMarker><Upload><Key>{young}</Key><UploadId>u</UploadId>"
            f"<Initiated>{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.000Z}</Initiated></Upload></ListMultipartUploadsResult>"
        )
        first = Fault(lambda request: request.query.startswith("uploads"), times=1, answer=(200, page.encode()))
        proxy.faults = [first]
        said = lab.gc("--keep-days", "1", "--yes")
        assert "1 of 2 uploads to abort" in lines(said)[uid]
        assert lab.uploads() == []
        assert [request.path for request in proxy.requests if request.method == "DELETE"] == [f"/{lab.bucket}/{old}"]

    def test_a_server_that_stumbles_is_asked_again(self, lab: Lab, proxy: Proxy) -> None:
        lab.over("bot")
        slow = (503, b"<Error><Code>SlowDown</Code></Error>")
        proxy.faults = [Fault(self.is_delete("train"), times=2, answer=slow)]
        assert "removed 12 files" in lab.gc(*NOW)
        assert lab.listing() == ["bot/manifest.json", "bot/model.safetensors"]

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
    def test_interrupted_it_leaves_nothing_that_looks_complete(
        self, lab: Lab, proxy: Proxy, number: signal.Signals, code: int
    ) -> None:
        uid = lab.over("bot")
        processes: list[subprocess.Popen[str]] = []
        stop = Fault(self.is_delete("prepare/train.arrow"), times=1, first=lambda: processes[0].send_signal(number))
        proxy.faults = [stop]
        orphans = lab.cluster.client.delete(f"{JOBS.format(lab.namespace)}/bot")
        assert orphans.code == 200
        command = lab.command(f"s3://{lab.bucket}", "--endpoint", lab.endpoint, *NOW)
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command,
            env=lab.environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
            # A shell that starts the tests in the background lets all below it ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
        ) as process:
            processes.append(process)
            _, said = process.communicate(timeout=300)
        assert process.returncode == code, said
        assert "Traceback" not in said
        left = lab.listing(f"bot/.finetune/{uid}/")
        assert "prepare/job.json" in left
        assert not [key for key in left if key.endswith("manifest.json")]
        lab.gc(f"s3://{lab.bucket}", "--endpoint", lab.endpoint, *NOW)
        assert lab.listing() == ["bot/manifest.json", "bot/model.safetensors"]

    @pytest.mark.parametrize("everywhere", [True, False])
    def test_without_a_cluster_that_answers_nothing_goes(self, lab: Lab, tmp_path: Path, everywhere: bool) -> None:
        lab.over("bot")
        before = lab.listing()

        async def forbid(exchange: Exchange) -> web.StreamResponse | None:
            return web.json_response({"kind": "Status", "message": "finetunejobs is forbidden"}, status=403)

        where = (f"s3://{lab.bucket}", "--endpoint", lab.endpoint) if everywhere else ()
        with fault_proxy(lab.cluster.client, tmp_path / "kubeconfig") as proxy:
            lab.kubeconfig = proxy.kubeconfig
            proxy.fault = forbid
            assert "error: the cluster answered 403" in lab.gc(*where, *NOW, code=4)
        assert "cannot be reached" in lab.gc(*where, *NOW, code=4)
        assert lab.listing() == before

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("hf://org/model",), "write s3://BUCKET/PATH"),
            (("-A", "s3://models"), "leave -n and -A out"),
            (("-n", "default", "s3://models"), "leave -n and -A out"),
            (("--keep-days", "-1"), "not in the range"),
        ],
    )
    def test_wrong_usage(self, lab: Lab, arguments: tuple[str, ...], words: str) -> None:
        assert words in lab.gc(*arguments, code=2)
