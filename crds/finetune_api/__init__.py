"""The FineTuneJob API and the contract between operator and trainer.

Everything both sides must agree on lives here and nowhere else: the custom resource (`spec`, `status`), the job
document, the exit codes and the report. The package needs pydantic only.
"""

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
SINGULAR = "finetunejob"
SHORT_NAME = "ftj"

#: Version of the job document, the report and the progress body. A reader accepts this one and the one before it.
SCHEMA_VERSION = 1
