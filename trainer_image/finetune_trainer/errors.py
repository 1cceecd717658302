"""Which failure class an exception belongs to: by type where a type exists, by errno where one is set."""

from __future__ import annotations

import errno

from finetune_api.failures import RULES, FailureClass, JobError


def classify(error: BaseException) -> tuple[FailureClass, str]:
    """The class of an exception, and a message for the user.

    Exceptions of torch are told apart by their name, so that stages that need no torch do not import it.
    """
    if isinstance(error, JobError):
        return error.failure_class, error.message
    names = {cls.__name__ for cls in type(error).__mro__}
    if "OutOfMemoryError" in names:
        return (
            FailureClass.OUT_OF_MEMORY_GPU,
            "The GPU ran out of memory. Lower hyperparameters.microBatchSize or dataset.maxLength, or use more GPU "
            "memory.",
        )
    if isinstance(error, MemoryError):
        return FailureClass.OUT_OF_MEMORY_HOST, "The pod ran out of memory. Raise the memory of this stage."
    if _is_full_disk(error, names):
        return FailureClass.DISK_FULL, RULES[FailureClass.DISK_FULL].sentence
    if names & {"DistBackendError", "DistNetworkError", "DistStoreError"}:
        return FailureClass.COMMUNICATION, "The training processes lost each other."
    if isinstance(error, RuntimeError) and "/gloo/" in str(error):
        # It has no type of its own for this; its messages begin with the path of its source.
        return FailureClass.COMMUNICATION, "The training processes lost each other."
    first_line = str(error).strip().partition("\n")[0][:300]
    return FailureClass.UNKNOWN, f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def _is_full_disk(error: BaseException, names: set[str]) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if "SafetensorError" in names:
        # Rust's errors are only text here.
        return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
    # torch.save does not say why it could not write. On the disk of a pod this is why.
    return isinstance(error, RuntimeError) and "inline_container.cc" in str(error) and "unexpected pos" in str(error)
