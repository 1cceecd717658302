"""The base model as files: which of them matter, what their headers say, and that they stay the same.

Everything here reads metadata only: prepare learns sizes and shapes from the safetensors headers without fetching the
weights.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from finetune_api.base import ApiModel
from finetune_api.document import StorageSettings, canonical_json
from finetune_api.failures import FailureClass, JobError
from finetune_api.uri import HubLocation, parse
from finetune_trainer.model_cache import ModelCache
from finetune_trainer.storage import Folder, ObjectInfo, open_folder

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
SMALL_FILES = (CONFIG, "generation_config.json", *TOKENIZER_FILES)
MAX_HEADER = 100_000_000
"""Bytes; safetensors itself refuses longer headers."""

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorInfo:
    name: str
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]
    file: str
    start: int
    """First byte in the file."""
    end: int
    """One past the last byte in the file."""

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def parameters(self) -> int:
        return prod(self.shape)


class PinnedFile(ApiModel):
    """A file of the base model as it was found first."""

    key: str
    size: int
    version: str


class ModelPin(ApiModel):
    """What the base model was when the job started; later stages refuse anything else."""

    uri: str
    revision: str
    """The hub's commit, or a hash over keys, sizes and versions of the files."""
    files: list[PinnedFile]

    def require_unchanged(self, current: ModelPin) -> None:
        """
        Raises:
            JobError: ModelChanged.
        """
        if current.revision != self.revision:
            raise JobError(
                FailureClass.MODEL_CHANGED,
                f"The base model at {self.uri} changed while the job ran (revision {self.revision[:12]} became "
                f"{current.revision[:12]}). Create the job anew, and do not write to the folder meanwhile.",
            )


def open_pinned(pin: ModelPin, storage: StorageSettings) -> BaseModel:
    """The model as it was pinned: on the hub at the pinned commit, whatever the branch names by now.

    Raises:
        JobError: ModelChanged.
    """
    location = parse(pin.uri)
    uri = str(replace(location, revision=pin.revision)) if isinstance(location, HubLocation) else pin.uri
    model = BaseModel(open_folder(uri, storage), ModelCache.from_environment(storage.endpoint))
    pin.require_unchanged(model.pin)
    return model


class BaseModel:
    """The base model in its folder."""

    def __init__(self, folder: Folder, cache: ModelCache | None = None) -> None:
        self.folder = folder
        self._cache = cache
        self._files = {info.key: info for info in folder.list()}
        if not self._files:
            raise JobError(
                FailureClass.MODEL_ERROR,
                f"The model folder {folder.uri} is empty or does not exist. Correct model.uri, or upload the model.",
            )
        if CONFIG not in self._files:
            raise JobError(
                FailureClass.MODEL_ERROR,
                f"The model folder {folder.uri} has no {CONFIG}. model.uri must name the folder that save_pretrained "
                "wrote.",
            )

    def files(self) -> list[ObjectInfo]:
        """The files that belong to the model; anything else in the folder is left alone."""
        wanted = {*SMALL_FILES, INDEX, *self.shards}
        return [self._files[key] for key in sorted(wanted & self._files.keys())]

    @cached_property
    def pin(self) -> ModelPin:
        files = [PinnedFile(key=info.key, size=info.size, version=info.version) for info in self.files()]
        revision = self.folder.revision or hashlib.sha256(canonical_json([f.to_json_dict() for f in files])).hexdigest()
        return ModelPin(uri=self.folder.uri, revision=revision, files=files)

    @cached_property
    def config(self) -> dict[str, Any]:
        return self._json(CONFIG)

    @cached_property
    def shards(self) -> list[str]:
        """Names of the weight files, in order.

        Raises:
            JobError: ModelError, when there are none, or some are missing.
        """
        if INDEX in self._files:
            names = sorted(set(self._json(INDEX).get("weight_map", {}).values()))
            missing = [name for name in names if name not in self._files]
            if missing or not names:
                raise JobError(
                    FailureClass.MODEL_ERROR,
                    f"{INDEX} in {self.folder.uri} names weight files that are not there: "
                    f"{', '.join(missing[:3]) or 'none at all'}. Upload the whole model.",
                )
            return names
        if SINGLE in self._files:
            return [SINGLE]
        raise JobError(
            FailureClass.MODEL_ERROR,
            f"The model folder {self.folder.uri} has no safetensors weights ({SINGLE} or {INDEX}). Convert it with "
            "save_pretrained; pickled weights are not loaded.",
        )

    @cached_property
    def tensors(self) -> list[TensorInfo]:
        """All tensors, from the headers of the weight files."""
        return [tensor for shard in self.shards for tensor in read_header(self.folder, self._files[shard])]

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def dtype(self) -> str:
        """The number format that most of the weights have, as safetensors writes it."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.parameters
        return max(sizes, key=lambda name: sizes[name])

    def require_trainable(self) -> None:
        """Tells by configuration and tokenizer.

        Raises:
            JobError: ModelError, when the model is of a kind that cannot be trained.
        """
        if "auto_map" in self.config:
            raise JobError(
                FailureClass.MODEL_ERROR,
                "The model brings its own Python code (auto_map in config.json), which is not run. Use a model of an "
                "architecture that transformers knows.",
            )
        if "quantization_config" in self.config:
            raise JobError(
                FailureClass.MODEL_ERROR,
                "The model's weights are quantised already (quantization_config in config.json). Use the original "
                "weights; QLoRA quantises them itself.",
            )
        if "tokenizer.json" not in self._files:
            raise JobError(
                FailureClass.MODEL_ERROR,
                f"The model folder {self.folder.uri} has no tokenizer.json. Add the model's fast tokenizer.",
            )

    def download(self, target: Path, keys: Iterable[str] | None = None) -> None:
        """Fetch the pinned versions of the model's files, or of those in `keys`; weights from the cache, if there is
        one."""
        asked = None if keys is None else sorted({*keys} & self._files.keys())
        wanted = self.files() if asked is None else [self._files[key] for key in asked]
        cached = [info for info in wanted if info.key in self.shards] if self._cache else []
        for info in wanted:
            if info not in cached:
                self.folder.download(info, target / info.key)
        if self._cache:
            self._cache.fetch(self.folder, cached, target)

    def _json(self, key: str) -> dict[str, Any]:
        try:
            value = json.loads(self.folder.read(key))
        except ValueError as error:
            raise JobError(
                FailureClass.MODEL_ERROR, f"{self.folder.uri}/{key} is not JSON. Upload it again."
            ) from error
        if not isinstance(value, dict):
            raise JobError(FailureClass.MODEL_ERROR, f"{self.folder.uri}/{key} is not a JSON object.")
        return value


def read_header(folder: Folder, info: ObjectInfo) -> list[TensorInfo]:
    """The tensors of a safetensors file in the order of their bytes, from its header alone.

    The format: 8 bytes header length, a JSON header with name -> {dtype, shape, data_offsets}, then the bytes.
    """
    broken = JobError(
        FailureClass.MODEL_ERROR,
        f"{folder.uri}/{info.key} is not a safetensors file, or it is cut off. Upload it again.",
    )
    start = folder.read(info.key, 0, min(8, info.size))
    if len(start) != 8:
        raise broken
    (length,) = struct.unpack("<Q", start)
    if not 2 <= length <= min(MAX_HEADER, info.size - 8):
        raise broken
    try:
        header = json.loads(folder.read(info.key, 8, length))
        tensors = [
            TensorInfo(
                name,
                item["dtype"],
                tuple(item["shape"]),
                info.key,
                8 + length + item["data_offsets"][0],
                8 + length + item["data_offsets"][1],
            )
            for name, item in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise broken from error
    if any(tensor.end > info.size for tensor in tensors):
        raise broken
    return sorted(tensors, key=lambda tensor: tensor.start)
