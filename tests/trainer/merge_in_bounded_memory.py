"""Merges an adapter into a model, runs the result layer by layer, and prints how much memory that took at most.

Arguments: the folder of the base model, of the adapter, and of the result. A process of its own: what it needs at most
is counted from its start.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path

from finetune_trainer import models, probe
from finetune_trainer.base_model import BaseModel
from finetune_trainer.merge import LoraDeltas, Merge
from finetune_trainer.shards import write_model
from finetune_trainer.storage.files import FileFolder


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


base_folder, adapter, output = map(Path, sys.argv[1:])
base = BaseModel(FileFolder(str(base_folder)))
rows = [{"input_ids": list(range(20)), "labels": [-100, *range(1, 20)]} for _ in range(4)]
start = peak_bytes()
merge = Merge(base, LoraDeltas(adapter), None, "F32", output / "disk")
write_model(merge.tensors(), merge.specs, output, max_shard_bytes=100_000_000)
merged = peak_bytes()
shutil.copy(base_folder / "config.json", output)
probe.log_probs(models.load_streamed(output, output / "offload"), rows)
sys.stdout.write(json.dumps({"start": start, "merged": merged, "verified": peak_bytes()}))
