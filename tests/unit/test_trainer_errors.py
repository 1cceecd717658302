"""Every exception has a class and a sentence; a class of ours keeps both."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from finetune_api.failures import FailureClass, JobError
from finetune_trainer.errors import classify


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


class CudaOutOfMemoryError(OutOfMemoryError):
    pass


class DistBackendError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize("failure_class", list(FailureClass))
def test_ours_say_it_themselves(failure_class: FailureClass) -> None:
    assert classify(JobError(failure_class, "Do this.")) == (failure_class, "Do this.")


@pytest.mark.parametrize(
    ("error", "failure_class", "remedy"),
    [
        (
            OutOfMemoryError("CUDA out of memory"),
            FailureClass.OUT_OF_MEMORY_GPU,
            "Lower hyperparameters.microBatchSize",
        ),
        (CudaOutOfMemoryError("x"), FailureClass.OUT_OF_MEMORY_GPU, "Lower hyperparameters.microBatchSize"),
        (MemoryError(), FailureClass.OUT_OF_MEMORY_HOST, "Raise the memory"),
        (OSError(errno.ENOSPC, "No space left on device"), FailureClass.DISK_FULL, "Raise ephemeralStorage"),
        (DistBackendError("NCCL"), FailureClass.COMMUNICATION, "lost each other"),
    ],
)
def test_known_types(error: BaseException, failure_class: FailureClass, remedy: str) -> None:
    found, message = classify(error)
    assert found is failure_class
    assert remedy in message


def test_gloo_is_known_by_where_it_speaks_from() -> None:
    words = "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.7]:15771: Connection reset"
    assert classify(RuntimeError(words))[0] is FailureClass.COMMUNICATION
    assert classify(RuntimeError("gloo is not available"))[0] is FailureClass.UNKNOWN


def test_a_full_disk() -> None:
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space") as caught:
        file.write(b"x")
    assert classify(caught.value)[0] is FailureClass.DISK_FULL


class SafetensorError(Exception):
    """As safetensors names it."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
)
def test_a_full_disk_as_libraries_say_it(error: BaseException) -> None:
    failure_class, message = classify(error)
    assert failure_class is FailureClass.DISK_FULL
    assert "Raise ephemeralStorage" in message


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while deserializing header: header too large"),
        RuntimeError("[enforce fail at inline_container.cc:197] . PytorchStreamReader failed reading zip archive"),
    ],
)
def test_other_trouble_with_files_is_no_full_disk(error: BaseException) -> None:
    assert classify(error)[0] is FailureClass.UNKNOWN


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("first line\nsecond line"), "ValueError: first line"),
        (KeyError("text"), "KeyError: 'text'"),
        (RuntimeError(), "RuntimeError"),
        (OSError(errno.EACCES, "Permission denied"), "PermissionError: [Errno 13] Permission denied"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_anything_else_is_unknown_and_short(error: BaseException, message: str) -> None:
    assert classify(error) == (FailureClass.UNKNOWN, message)


def test_a_long_message_is_cut() -> None:
    assert len(classify(ValueError("x" * 10_000))[1]) < 400
