"""How much memory and disk a pod gets: what the job names, or what follows from the size of the base model. Pure."""

from __future__ import annotations

import re

from finetune_api.names import Stage
from finetune_api.spec import AdapterType, FineTuneJobSpec, OutputDtype, Resources, StageResources
from finetune_api.status import FineTuneJobStatus, Resolved

GIB = 1024**3
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}


def asked(spec: FineTuneJobSpec, stage: Stage) -> Resources | StageResources:
    """What the job says of the resources of a stage."""
    if stage is Stage.TRAIN:
        return spec.resources
    return spec.stages.prepare if stage is Stage.PREPARE else spec.stages.export


def memory(spec: FineTuneJobSpec, status: FineTuneJobStatus, stage: Stage) -> str:
    """Memory of a pod: what the job names, or what follows from the model."""
    if chosen := asked(spec, stage).memory:
        return chosen
    known = status.resolved or Resolved()
    if stage is Stage.TRAIN:
        return train_memory(spec, known)
    return export_memory(known) if stage is Stage.EXPORT else "2Gi"


def train_memory(spec: FineTuneJobSpec, resolved: Resolved) -> str:
    """Host memory of a train pod: /dev/shm, the libraries in each process, and the model once on its way to the GPUs;
    on CPU the model, its gradients and optimiser state live there too."""
    processes = max(1, spec.resources.gpus_per_node)
    if resolved.weight_bytes is None:
        return _gibibytes((13 + 3 * processes) * GIB)
    times = 1.5 if spec.resources.gpus_per_node else 5
    size = (1 + 3 * processes) * GIB + quantity_bytes(spec.resources.shared_memory) + int(times * resolved.weight_bytes)
    if spec.method.adapter.type is AdapterType.FULL:
        # A resumed attempt reads the optimiser's state, two floats for each weight, through host memory. On CPU the
        # weights, the gradients and that state stay there, in float32.
        size += (8 if spec.resources.gpus_per_node else 16) * (resolved.parameters or 0)
    return _gibibytes(size)


def export_memory(resolved: Resolved) -> str:
    """Host memory of an export pod: libraries, and a few copies of the largest tensor in 32 bits."""
    if resolved.largest_tensor_bytes is None:
        return "8Gi"
    return _gibibytes(3 * GIB + 8 * resolved.largest_tensor_bytes)


def disk(spec: FineTuneJobSpec, status: FineTuneJobStatus, stage: Stage) -> str:
    """Disk of a pod: what the job names, or what follows from the model for /work, /tmp and the log."""
    if chosen := asked(spec, stage).ephemeral_storage:
        return chosen
    resolved = status.resolved or Resolved()
    if stage is Stage.PREPARE:
        return "2Gi"
    if resolved.weight_bytes is None or resolved.parameters is None:
        return "20Gi"
    parameters, adapter = resolved.parameters, spec.method.adapter
    # A 4-bit base with its constants, on its way to storage, or from there.
    quantized = 0.6 * parameters if adapter.type is AdapterType.QLORA else 0
    if adapter.type is AdapterType.FULL:
        trained = 4.0 * parameters
    else:
        # An adapter of rank 16 on all linear layers is less than a hundredth of a base of billions of parameters; it is
        # more of a smaller one, but then the constant below is enough for all.
        trained = 4.0 * parameters * 0.01 * (adapter.lora.rank if adapter.lora else 16) / 16
    if stage is Stage.TRAIN:
        # The base and the rows, one checkpoint that is resumed from and two that are on their way to storage, each
        # with two floats of the optimiser for each trained weight, and what is handed over at the end.
        tokens = status.dataset.train_tokens if status.dataset else 0
        return _gibibytes(int(2 * GIB + resolved.weight_bytes + quantized + 16 * tokens + (3 * 3 + 1) * trained))
    # What was trained, the model that is published, and one file of the base at a time.
    published = 4 * parameters if spec.output.dtype is OutputDtype.F32 else resolved.weight_bytes
    return _gibibytes(int(2 * GIB + quantized + trained + published + min(resolved.weight_bytes, 10 * GIB)))


def _gibibytes(size: int) -> str:
    return f"{-(-size // GIB)}Gi"


def quantity_bytes(text: str) -> int:
    """A Kubernetes quantity of bytes."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text)
    assert match is not None, f"{text!r} is no quantity"
    return int(float(match[1]) * _UNITS.get(match[2], 1))
