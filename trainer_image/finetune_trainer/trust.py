"""Whom the pod trusts: the well-known certificate authorities, and those of the job's storage.caBundle."""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path

from finetune_api.failures import FailureClass, JobError
from finetune_api.names import ENV_CA_BUNDLE
from finetune_trainer.reporting import write_atomically

VARIABLES = ("SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
"""What the hub's client, boto3 and others read. Each replaces what they would trust else, so that the file has all."""

_EXPIRED = re.compile(r"expired|not yet valid")


def trust_bundle(folder: Path) -> None:
    """Let this process and its children trust the job's authorities besides the well-known ones, so that an S3 server
    inside a company and the public hub serve one job. The file for both is kept in `folder`.

    Raises:
        JobError: UserError, when the bundle holds no certificates.
    """
    given = os.environ.get(ENV_CA_BUNDLE)
    together = folder / "ca.pem"
    known = os.environ.get("SSL_CERT_FILE")
    if given is None or known == str(together):
        return  # nothing was given, or the agent has done it for its children
    # It takes the certificates out of whatever text is around them.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(given)
    except (ssl.SSLError, OSError) as error:
        raise JobError(
            FailureClass.USER_ERROR,
            "The key that storage.caBundle names holds no certificates in PEM. Put the certificate of the authority "
            "there, from BEGIN CERTIFICATE to END CERTIFICATE.",
        ) from error
    if known is None:
        from botocore.httpsession import get_cert_path

        known = get_cert_path(True)
    write_atomically(together, Path(known).read_bytes() + b"\n" + Path(given).read_bytes())
    os.environ.update(dict.fromkeys(VARIABLES, str(together)))


def distrust(name: str, error: BaseException) -> JobError | None:
    """What to say when the server's certificate was not accepted; None when something else went wrong."""
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" not in text:
        return None
    reason = text.partition("certificate verify failed: ")[2].partition(" (_ssl")[0].strip(". ") or "not trusted"
    if _EXPIRED.search(reason):
        # The server's own affair, which is mended there.
        return JobError(FailureClass.STORAGE_UNAVAILABLE, f"{name}: the server's certificate is not valid ({reason}).")
    return JobError(
        FailureClass.USER_ERROR,
        f"{name}: the server's certificate is not trusted ({reason}). Name the certificate of its authority in "
        "storage.caBundle, or correct storage.endpoint.",
    )
