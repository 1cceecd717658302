"""The whole way with kubectl: from a manifest to a model that plain transformers loads."""

from __future__ import annotations

import hashlib
import json
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import manifest, program
from local_up import LocalUp, eventually
from operator_process import free_port

NAME = "whole"
STEPS = 60


@pytest.fixture(scope="module")
def watched(up: LocalUp) -> list[str]:
    """One job applied with kubectl and watched to its end; what `kubectl get -w` printed."""
    watching = up.start_kubectl("get", "ftj", "-w")
    spec = {
        "hyperparameters": {"maxSteps": STEPS, "batchSize": 4, "learningRate": "0.005"},
        "checkpoint": {"everySteps": 20},
    }
    assert up.apply(manifest(NAME, **spec)) == f"finetunejob.finetune.dev/{NAME} created\n"
    up.kubectl("wait", "ftj", NAME, "--for=condition=Complete", "--timeout=240s")
    assert watching.stdout is not None
    lines: list[str] = []
    for line in watching.stdout:
        if line.split()[0] == NAME:
            lines.append(line)
            if "Succeeded" in line:
                break
    watching.kill()
    watching.wait()
    watching.stdout.close()
    return lines


def test_kubectl_saw_phases_and_a_rising_progress(watched: list[str]) -> None:
    phases = list(dict.fromkeys(line.split()[1] for line in watched))
    assert phases[-3:] == ["Running", "Exporting", "Succeeded"]
    percents = [int(word.rstrip("%")) for line in watched for word in line.split() if word.endswith("%")]
    assert percents == sorted(percents)
    assert percents[-1] == 100


def test_the_status_tells_the_whole_story(up: LocalUp, watched: list[str]) -> None:
    status = up.status(NAME)
    assert status["resolved"]["totalSteps"] == STEPS
    assert status["resolved"]["precision"] == "F32"
    assert status["dataset"]["trainRows"] == 48
    assert float(status["evaluation"]["tuned"]["perplexity"]) < float(status["evaluation"]["base"]["perplexity"])
    assert float(status["verification"]["meanKL"]) < 1e-3
    assert status["checkpoint"]["step"] == STEPS
    assert [item["name"] for item in status["artifacts"]] == ["Merged", "Adapter", "Manifest"]
    described = up.kubectl("describe", "ftj", NAME)
    for reason in ("StageStarted", "FirstStep", "TrainingComplete"):
        assert reason in described


def test_the_manifest_matches_the_bucket(up: LocalUp, watched: list[str]) -> None:
    status = up.status(NAME)
    output = f"s3://models/out/{NAME}"
    encoded = up.read(f"{output}/manifest.json")
    (artifact,) = [item for item in status["artifacts"] if item["name"] == "Manifest"]
    assert hashlib.sha256(encoded).hexdigest() == artifact["sha256"]
    published = json.loads(encoded)
    files = {file["path"]: file["sha256"] for file in published["files"]}
    for path, digest in files.items():
        assert hashlib.sha256(up.read(f"{output}/{path}")).hexdigest() == digest, path
    in_bucket = {key for key in up.keys(output) if not key.startswith(".finetune/")}
    assert in_bucket == {*files, "manifest.json"}
    assert published["lineage"]["base"]["uri"] == "s3://models/tiny"
    assert published["lineage"]["versions"]["torch"]


def test_plain_transformers_loads_the_result(up: LocalUp, watched: list[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(up.description["s3_folder"]) / "models" / "out" / NAME
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_logs_of_a_finished_stage(up: LocalUp, watched: list[str]) -> None:
    pod = up.kubectl(
        "get", "pods", "-l", f"finetune.dev/job-name={NAME},finetune.dev/stage=train", "-o", "name"
    ).strip()
    assert f"step {STEPS}/{STEPS}" in up.kubectl("logs", pod)
    work = up.status(NAME)["resolved"]["workURI"]
    assert f"step {STEPS}/{STEPS}".encode() in up.read(f"{work}/train/1/log.txt")


def test_no_secret_is_anywhere(up: LocalUp, watched: list[str]) -> None:
    secret = up.description["secret_key"]
    assert secret not in up.kubectl("get", "ftj,jobs,pods,configmaps,events", "-o", "yaml")
    work = up.status(NAME)["resolved"]["workURI"]
    for key in up.keys(work):
        if key.endswith((".txt", ".json")):
            assert secret.encode() not in up.read(f"{work}/{key}"), key


class TestCommands:
    def test_list_and_get(self, up: LocalUp, watched: list[str]) -> None:
        listed = up.finetune("list").stdout
        assert any(line.split()[:2] == [NAME, "Succeeded"] for line in listed.splitlines())
        assert NAME in up.finetune("list", "--phase", "Succeeded").stdout
        assert NAME not in up.finetune("list", "--phase", "Running").stdout
        for arguments in (["-n", "default", "list"], ["list", "-n", "default"]):
            assert NAME in up.finetune(*arguments).stdout
        assert NAME not in up.finetune("list", "-n", "elsewhere").stdout
        shown = up.finetune("get", NAME).stdout
        assert f"s3://models/out/{NAME}/manifest.json" in shown
        assert json.loads(up.finetune("get", NAME, "-o", "json").stdout)["metadata"]["name"] == NAME

    def test_wait_and_watch_end_with_the_jobs_fate(self, up: LocalUp, watched: list[str]) -> None:
        assert up.finetune("wait", NAME).returncode == 0
        assert up.finetune("watch", NAME).returncode == 0

    def test_logs(self, up: LocalUp, watched: list[str]) -> None:
        assert f"step {STEPS}/{STEPS}" in up.finetune("logs", NAME, "--stage", "train").stdout
        assert "published" in up.finetune("logs", NAME).stdout

    def test_wait_runs_out_of_time_with_3(self, up: LocalUp) -> None:
        up.apply(manifest("waiting", storage={"secretRef": {"name": "not-there"}}))
        assert up.finetune("wait", "waiting", "--timeout", "0.1").returncode == 3
        up.kubectl("delete", "ftj", "waiting")

    def test_wait_tells_failure_with_1(self, up: LocalUp) -> None:
        body = json.dumps(manifest("failing", model={"uri": "s3://models/nowhere"}))
        made = up.finetune("submit", "-", stdin=body)
        assert made.returncode == 0, made.stderr
        assert up.finetune("wait", "failing").returncode == 1
        again = up.finetune("submit", "-", stdin=body)
        assert again.returncode == 4
        assert "already exists" in again.stderr

    def test_a_job_that_is_not_there(self, up: LocalUp) -> None:
        gone = up.finetune("get", "nobody")
        assert gone.returncode == 4
        assert "there is no FineTuneJob" in gone.stderr

    def test_submit_checks_first(self, up: LocalUp) -> None:
        body = manifest("checked", hyperparameters={"epochs": 1, "maxSteps": 1})
        wrong = up.finetune("submit", "-", stdin=yaml.safe_dump(body))
        assert wrong.returncode == 1
        assert "set epochs or maxSteps, not both" in wrong.stderr


def test_the_same_specification_again_uses_no_gpu(up: LocalUp, watched: list[str]) -> None:
    """After a restore from a backup, say: the result is found, and nothing is trained."""
    spec = up.job(NAME)["spec"]
    again = manifest("again") | {"spec": spec}
    up.apply(again)
    status = up.succeeded("again")
    assert up.jobs("again") == ["again-prepare-1"]
    (complete,) = [c for c in status["conditions"] if c["type"] == "Complete"]
    assert complete["reason"] == "AlreadyPublished"
    assert status["evaluation"] == up.status(NAME)["evaluation"]


def test_prometheus_has_the_loss_curve(up: LocalUp, tmp_path: Path) -> None:
    """A real Prometheus scrapes operator and trainer; both pass promtool. Debian builds Prometheus without discovery in
    Kubernetes, so that the test says where the pod is, as a PodMonitor would."""
    targets = tmp_path / "trainer.json"
    promtool, prometheus = program("promtool"), program("prometheus")
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {
                "job_name": "operator",
                "static_configs": [{"targets": [urllib.parse.urlparse(up.description["metrics_url"]).netloc]}],
            },
            {"job_name": "trainer", "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}]},
        ],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    server = subprocess.Popen(
        [
            prometheus,
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "log").open("wb"),
    )

    def query(expression: str) -> list[dict[str, Any]]:
        encoded = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{encoded}", timeout=5) as answer:
                result: list[dict[str, Any]] = json.loads(answer.read())["data"]["result"]
                return result
        except OSError:
            return []

    try:
        eventually(lambda: query("up"), "Prometheus starts")
        steps = {"maxSteps": 400, "batchSize": 4, "learningRate": "0.005"}
        up.apply(manifest("scraped", hyperparameters=steps))
        # Before the first step: Prometheus takes some seconds to take up a new target.
        pod = ["get", "pods", "-l", "finetune.dev/job-name=scraped,finetune.dev/stage=train"]
        address = eventually(
            lambda: up.kubectl(*pod, "-o", "jsonpath={.items[*].status.podIP}"), "the train pod starts"
        )
        targets.write_text(json.dumps([{"targets": [f"{address}:9464"], "labels": {"job_name": "scraped"}}]))
        eventually(lambda: query('up{job_name="scraped"} == 1'), "Prometheus scrapes the train pod")
        up.until("scraped", lambda status: status.get("progress", {}).get("currentStep", 0) > 0, "the first step")
        for url in (up.description["metrics_url"], f"http://{address}:9464/metrics"):
            with urllib.request.urlopen(url, timeout=5) as answer:
                text = answer.read()
            checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
            assert checked.returncode == 0, checked.stdout + checked.stderr
        up.succeeded("scraped")
        curve = 'finetune_trainer_loss{job_name="scraped"}[10m]'
        (series,) = eventually(lambda: query(curve), "the trainer's loss is scraped")
        values = [float(value) for _, value in series["values"]]
        assert len(set(values)) > 2, "a curve, not a point"
        assert values[-1] < values[0]
        eventually(
            lambda: query('finetune_job_progress_ratio{name="scraped"} == 1'), "the operator's progress is scraped"
        )
        assert query('finetune_job_loss{name="scraped"}')
    finally:
        server.terminate()
        server.wait()
