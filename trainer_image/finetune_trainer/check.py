"""`finetune data check`: the data report without a job, on the user's own machine.

Reads the spec of a FineTuneJob as JSON from standard input and writes the report to standard output. Of the model only
configuration and tokenizer are needed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from finetune_api.document import StorageSettings, path_style
from finetune_api.failures import JobError, exit_code_of
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.base_model import SMALL_FILES, BaseModel
from finetune_trainer.data import sources
from finetune_trainer.data.report import DataReport, to_markdown
from finetune_trainer.stages import prepare
from finetune_trainer.storage import open_folder


def check(spec: FineTuneJobSpec, folder: Path) -> DataReport:
    """
    Raises:
        JobError: what would fail the job in its prepare stage.
    """
    given = spec.storage
    storage = StorageSettings(
        endpoint=given.endpoint,
        region=given.region,
        path_style=path_style(given.addressing_style, given.endpoint),
        allow_files=True,
    )
    model = BaseModel(open_folder(spec.model.uri, storage))
    model.require_trainable()
    train, validation = sources.find(spec.dataset, storage)
    model.download(folder / "base", SMALL_FILES)
    renderer = prepare.load_renderer(folder / "base", model, spec.dataset)
    _, report = prepare.read_data(spec, storage, model.folder.uri, renderer, train, validation, folder / "data")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune_trainer.check", description=__doc__)
    parser.add_argument("--format", choices=("markdown", "json"), default="markdown")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    spec = FineTuneJobSpec.model_validate_json(sys.stdin.read())
    with tempfile.TemporaryDirectory(prefix="finetune-check-") as folder:
        try:
            report = check(spec, Path(folder))
        except JobError as error:
            sys.stderr.write(f"{error.failure_class}: {error.message}\n")
            return exit_code_of(error.failure_class)
    sys.stdout.write(report.encode().decode() + "\n" if options.format == "json" else to_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
