"""A line that is about a job says so, whoever writes it; and each thing that is said is one line."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from builders import SETTINGS, UID, job_body

from finetune_operator import logs
from finetune_operator.kube import FINETUNE_JOBS, ApiError, Kind
from finetune_operator.metrics import Metrics
from finetune_operator.progress import ProgressReader
from finetune_operator.reconcile import Key, Reconciler


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the process writes as JSON."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    text = io.StringIO()
    logs.configure("json", "INFO")
    handler = root.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(text)
    yield text
    root.handlers[:], root.level = before
    logging.captureWarnings(False)


def lines(text: io.StringIO) -> list[dict[str, Any]]:
    """A line that is no object of its own is an error here."""
    return [json.loads(line) for line in text.getvalue().splitlines()]


def test_a_line_is_one_object(written: io.StringIO) -> None:
    logging.getLogger("a.library").warning("%s of\n%s", 1, "ü")
    (line,) = lines(written)
    assert line.pop("ts").endswith("+00:00")
    assert line == {"level": "warning", "logger": "a.library", "msg": "1 of\nü"}


def test_an_exception_is_in_its_line(written: io.StringIO) -> None:
    try:
        raise ValueError("what\nwas it")
    except ValueError:
        logging.getLogger("x").exception("it failed")
    (line,) = lines(written)
    assert line["msg"] == "it failed"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: what\nwas it")


def test_fields_end_with_their_block(written: io.StringIO) -> None:
    log = logging.getLogger("x")
    with logs.about(job="a"):
        logs.add(uid="u")
        with logs.about(stage="train"):
            log.info("inner")
        log.info("outer")
    log.info("after")
    inner, outer, after = lines(written)
    assert (inner["job"], inner["uid"], inner["stage"]) == ("a", "u", "train")
    assert (outer["job"], outer["uid"], "stage" in outer) == ("a", "u", False)
    assert not {"job", "uid"} & after.keys()


async def test_fields_of_jobs_at_the_same_time_are_not_mixed_up(written: io.StringIO) -> None:
    async def look(job: str) -> None:
        with logs.about(job=job):
            for _ in range(3):
                await asyncio.sleep(0)
                logging.getLogger("x").info(job)

    await asyncio.gather(*(look(job) for job in "abc"))
    assert len(lines(written)) == 9
    assert all(line["job"] == line["msg"] for line in lines(written))


def test_what_kopf_says_of_an_object_names_it(written: io.StringIO) -> None:
    for kind in ("FineTuneJob", "Pod"):
        reference = {"apiVersion": "v", "kind": kind, "namespace": "team", "name": "bot", "uid": "u"}
        logging.getLogger("kopf.objects").error("handler failed", extra={"k8s_ref": reference})
    job, pod = lines(written)
    assert (job["namespace"], job["job"], job["uid"]) == ("team", "bot", "u")
    assert (pod["namespace"], pod["pod"], pod["uid"]) == ("team", "bot", "u")
    assert "job" not in pod


def test_warnings_of_python_are_lines_too(written: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    (line,) = lines(written)
    assert line["logger"] == "py.warnings"
    logging.captureWarnings(False)


class Cluster:
    """One new job, for which nothing can be created."""

    async def get(self, kind: Kind, *_: Any) -> dict[str, Any] | None:
        return job_body() if kind is FINETUNE_JOBS else None

    async def list(self, *_: Any, **__: Any) -> list[dict[str, Any]]:
        return []

    async def create(self, *_: Any) -> None:
        raise ApiError(500, "etcd is full")


async def test_every_line_of_a_look_is_about_its_job(written: io.StringIO) -> None:
    reconcile = Reconciler(Cluster(), ProgressReader(), SETTINGS, Metrics(), lambda key, delay: None)  # type: ignore[arg-type]
    await reconcile(Key("team", "bot"))
    (line,) = lines(written)
    assert "etcd is full" in line["msg"]
    expected = {"namespace": "team", "job": "bot", "uid": UID, "stage": "prepare", "attempt": 1}
    assert line.items() >= expected.items()
