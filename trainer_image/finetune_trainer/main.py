"""`finetune-trainer`: the agent (what a pod runs), and each stage as a plain command.

    finetune-trainer agent   --document job.json     run the document's stage as a pod would
    finetune-trainer prepare --document job.json     one step, in this process
    finetune-trainer fetch | train | export

The work directory is $FINETUNE_WORK_DIR. Exit codes are those of `finetune_api.failures`.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

from finetune_api.document import JobDocument
from finetune_api.failures import FailureClass, JobError
from finetune_api.names import ENV_DOCUMENT, ENV_WORK_DIR
from finetune_trainer.errors import classify
from finetune_trainer.layout import PodDisk
from finetune_trainer.reporting import Reporter, write_failure
from finetune_trainer.trust import trust_bundle

STEPS = ("prepare", "fetch", "train", "export")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="finetune-trainer", description="Run a stage of a FineTuneJob.", epilog=f"${ENV_WORK_DIR}: work directory"
    )
    parser.add_argument("command", choices=("agent", *STEPS), help="agent runs the document's whole stage")
    parser.add_argument(
        "--document",
        type=Path,
        default=os.environ.get(ENV_DOCUMENT),
        required=ENV_DOCUMENT not in os.environ,
        help=f"the job document (default: ${ENV_DOCUMENT})",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    _quiet_libraries()
    document = JobDocument.model_validate_json(Path(options.document).read_bytes())
    if options.command == "agent":
        import prometheus_client

        from finetune_trainer.agent import run_agent

        prometheus_client.disable_created_metrics()
        with contextlib.suppress(JobError):
            # The first step finds the same, and says so in its report.
            trust_bundle(PodDisk.from_environment().run)
        return run_agent(document, Path(options.document))
    return run_step(options.command, document)


def run_step(name: str, document: JobDocument) -> int:
    """Run one step in this process; returns its exit code and leaves the reason of a failure for the agent."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    disk = PodDisk.from_environment()
    rank = int(os.environ.get("RANK", "0"))
    # Of the training processes the first one speaks for all; each pod fetches for itself.
    reporter = Reporter(document, disk.run) if rank == 0 or name == "fetch" else None
    try:
        trust_bundle(disk.run)
        _KEPT.append(_call(name, document, disk, reporter))
    except BaseException as error:
        _KEPT.append(error)
        failure_class, message = classify(error)
        if isinstance(error, JobError):
            logging.error("%s: %s", failure_class, message)
        else:
            traceback.print_exc()
        return write_failure(disk.run, rank, failure_class, message)
    finally:
        if reporter:
            # On a full disk the step has failed for that already, or has no need of it any more.
            with contextlib.suppress(OSError):
                reporter.close()
    return 0


_KEPT: list[object] = []
"""What must not be freed before the process ends: torch's process groups can wait for themselves for ever when they go
(the destructor of a gloo group joins threads that need the lock it holds)."""


def leave(code: int) -> None:
    """End the process without tearing anything down."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _call(name: str, document: JobDocument, disk: PodDisk, reporter: Reporter | None) -> object:
    # Imported here: torch takes seconds, and not every step needs it.
    if name == "train":
        from finetune_trainer.stages import train

        return train.run(document, disk, reporter)
    if reporter is None:
        raise JobError(FailureClass.USER_ERROR, f"The step {name} runs in one process only.")
    if name == "prepare":
        from finetune_trainer.stages import prepare

        prepare.run(document, disk, reporter)
    elif name == "fetch":
        from finetune_trainer.stages import fetch

        fetch.run(document, disk, reporter)
    else:
        from finetune_trainer.stages import export

        export.run(document, disk, reporter)
    return None


def _quiet_libraries() -> None:
    """No progress bars in a log, no pings to a hub, no kernels fetched at run time."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "BITSANDBYTES_NOWELCOME": "1",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("httpx", "httpx2", "botocore", "boto3", "s3transfer"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # "parameters on the meta device": we asked
    # Deprecations between libraries are for us to read in the tests, not for users in their logs.
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    leave(main())
