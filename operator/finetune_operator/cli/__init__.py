"""The command `finetune`, also `kubectl finetune`."""

from finetune_operator.cli.commands import main

__all__ = ["main"]
