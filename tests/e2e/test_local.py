"""`finetune local` keeps its state: buckets, jobs, and work that was interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import manifest, program
from local_up import FINETUNE, LocalUp
from trainer_lab import as_json_lines, short_rows


def local(state: Path, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [*FINETUNE, "local", *arguments, "--state", str(state)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A state folder whose buckets were filled with `finetune local cp`."""
    folder = tmp_path_factory.mktemp("local") / "state"
    rows = folder.parent / "rows.jsonl"
    rows.write_bytes(as_json_lines(short_rows(48)))
    for source, target in ((tiny_model, "s3://models/tiny"), (rows, "s3://datasets/train.jsonl")):
        done = local(folder, "cp", str(source), target)
        assert done.returncode == 0, done.stderr
        assert f"copied to {target}" in done.stdout
    return folder


def test_what_was_copied_in_can_be_copied_out(state: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert local(state, "cp", "s3://models/tiny", str(tmp_path / "copy")).returncode == 0
    for path in tiny_model.iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
    rows = state.parent / "rows.jsonl"
    for target, path in ((tmp_path, tmp_path / "train.jsonl"), (tmp_path / "mine.jsonl", tmp_path / "mine.jsonl")):
        assert local(state, "cp", "s3://datasets/train.jsonl", str(target)).returncode == 0
        assert path.read_bytes() == rows.read_bytes()
    assert local(state, "cp", str(rows), "s3://datasets/more/").returncode == 0
    assert (state / "s3/datasets/more/rows.jsonl").read_bytes() == rows.read_bytes()


@pytest.mark.parametrize(
    ("source", "target", "code", "words"),
    [
        ("a", "b", 2, "one of SOURCE and DESTINATION must be an s3:// URI"),
        ("s3://models/a", "s3://models/b", 2, "one of SOURCE and DESTINATION must be an s3:// URI"),
        ("not-there", "s3://models/a", 1, "not-there does not exist"),
        ("s3://models/nothing", "here", 1, "there is nothing at s3://models/nothing"),
        ("s3://nobucket/nothing", "here", 1, "there is nothing at s3://nobucket/nothing"),
        ("s3://models/tiny", "/dev/null/here", 1, "s3://models/tiny cannot be copied to /dev/null/here"),
        ("not-there", "s3:///a", 1, "s3://BUCKET/PATH"),
    ],
)
def test_what_cannot_be_copied_is_said(state: Path, source: str, target: str, code: int, words: str) -> None:
    done = local(state, "cp", source, target)
    assert done.returncode == code
    assert words in done.stderr


def spec(name: str, steps: int) -> str:
    body = manifest(name, hyperparameters={"maxSteps": steps, "batchSize": 4}, checkpoint={"everySteps": 10})
    del body["spec"]["dataset"]["validation"]
    return yaml.safe_dump(body)


def test_work_that_is_interrupted_goes_on_after_the_next_start(state: Path) -> None:
    up = LocalUp(state, program("kubectl"))
    try:
        second = local(state, "up")
        assert second.returncode == 4
        assert "is in use by another finetune local" in second.stderr
        up.kubectl("apply", "-f", "-", stdin=spec("interrupted", 400))
        up.until("interrupted", lambda s: s.get("checkpoint", {}).get("step", 0) >= 10, "a checkpoint")
    finally:
        up.close()

    up = LocalUp(state, program("kubectl"))
    try:
        status = up.succeeded("interrupted")
        assert status["restarts"] == {"charged": 0, "preemptions": 1, "outOfMemory": 0}
        report = json.loads(up.read(f"{status['resolved']['workURI']}/train/2/report.json"))
        assert report["resumedFromStep"] >= 10
    finally:
        up.close()


def test_a_job_is_run_to_its_end_and_is_still_there(state: Path) -> None:
    done = local(state, "run", "-", stdin=spec("once", 4))
    assert done.returncode == 0, done.stderr
    assert "Succeeded" in done.stdout
    assert "s3://models/out/once/manifest.json" in done.stdout
    again = local(state, "run", "-", stdin=spec("once", 4))
    assert again.returncode == 1
    assert "there is a FineTuneJob once already: use --replace" in again.stderr
    replaced = local(state, "run", "--replace", "-", stdin=spec("once", 4))
    assert replaced.returncode == 0, replaced.stderr
    assert "AlreadyPublished" in replaced.stdout or "holds the verified result" in replaced.stdout


def test_work_files_go_and_the_model_stays(state: Path) -> None:
    job = yaml.safe_load(spec("tidy", 4))
    job["spec"]["checkpoint"] = {"everySteps": 2}
    assert local(state, "run", "-", stdin=yaml.safe_dump(job)).returncode == 0
    model = state / "s3/models/out/tidy"
    (work,) = (model / ".finetune").iterdir()
    published = {path for path in model.rglob("*") if not path.is_relative_to(work)}
    assert json.loads((work / "prepare/job.json").read_text())["uid"] == work.name
    assert (work / "train/1/checkpoints").is_dir()
    said = local(state, "gc", "--keep-days", "0").stdout
    # Each file that a stage has written is known as one.
    assert f"remove  {work.name}  default/tidy" in said
    assert work.exists()
    done = local(state, "gc", "--keep-days", "0", "--yes", "s3://models/out/tidy")
    assert done.returncode == 0, done.stderr
    assert not work.exists()
    assert set(model.rglob("*")) | {work.parent} == published


def test_a_job_that_fails_ends_with_1(state: Path) -> None:
    body = yaml.safe_load(spec("failing", 4))
    body["spec"]["model"]["uri"] = "s3://models/nowhere"
    done = local(state, "run", "-", stdin=yaml.safe_dump(body))
    assert done.returncode == 1
    assert "ModelError in prepare attempt 1" in done.stdout


def heed_ctrl_c() -> None:
    """A shell that starts the tests in the background lets all below it ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_leaves_nothing_behind(state: Path, number: signal.Signals, code: int) -> None:
    command = [*FINETUNE, "local", "run", "--replace", "-", "--state", str(state)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed_ctrl_c) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(spec("stopped", 400))
        process.stdin.close()
        for line in process.stdout:
            if line.startswith("Running"):
                break
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("finetune_operator.main" in " ".join(child.cmdline()) for child in children)
        process.send_signal(number)
        assert process.wait(timeout=60) == code
        assert "Traceback" not in process.stderr.read()
    _, left = psutil.wait_procs(children, timeout=30)
    assert left == []
    assert not (state / "stack.json").exists()
