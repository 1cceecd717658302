"""The training processes of an attempt, as one of them sees it. With one process nothing is communicated."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from finetune_api.failures import FailureClass, JobError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> World:
        """The agent sets the variables that torch and accelerate read too."""
        return cls(
            int(os.environ.get("RANK", "0")),
            int(os.environ.get("WORLD_SIZE", "1")),
            int(os.environ.get("LOCAL_RANK", "0")),
        )

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def require_gpus(self, asked: int) -> None:
        """
        Raises:
            JobError: when the pod was given GPUs and torch cannot use them. Training on the CPU instead would hold them
                for nothing.
        """
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if usable < asked:
            raise JobError(
                FailureClass.UNKNOWN,
                f"resources.gpusPerNode is {asked}, but {usable} GPUs are usable with torch {torch.__version__}. Check "
                "the driver of the node, and resources.gpuResourceName or resourceClaims, or set gpusPerNode to 0 to "
                "train on CPU.",
            )

    def sum(self, *values: float) -> list[float]:
        """Add up numbers over all processes, in double precision."""
        return self._reduce(values, "SUM")

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in at least one process."""
        return [bool(value) for value in self._reduce([float(flag) for flag in flags], "MAX")]

    def same(self, *values: float) -> bool:
        """Whether each value is the same in all processes."""
        reduced = self._reduce([*values, *(-value for value in values)], "MAX")
        return all(most == -least for most, least in zip(reduced, reduced[len(values) :], strict=False))

    def of_main(self, value: float) -> float:
        """The value that the main process has."""
        return self.sum(value if self.rank == 0 else 0.0)[0]

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def _reduce(self, values: tuple[float, ...] | list[float], operation: str) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, operation))
        return [float(value) for value in tensor.tolist()]
