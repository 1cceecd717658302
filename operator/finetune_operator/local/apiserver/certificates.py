"""TLS and the kubeconfig: kubectl sends a bearer token over https only."""

from __future__ import annotations

import base64
import ipaddress
import os
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_LIFETIME = timedelta(days=3650)


class Identity:
    """A certificate of its own, made anew for each run: nobody else's files are trusted, none are left behind."""

    def __init__(self, host: str) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-local")])
        now = datetime.now(UTC)
        alternatives = [x509.IPAddress(ipaddress.ip_address(host)), x509.DNSName("localhost")]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + _LIFETIME)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()),
                critical=False,
            )
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(key, hashes.SHA256())
        )
        self.certificate = certificate.public_bytes(serialization.Encoding.PEM)
        self._key = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def server_context(self) -> ssl.SSLContext:
        """What the server listens with."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        # The ssl module loads from files only; this one is readable by the owner alone and gone at once.
        with tempfile.NamedTemporaryFile() as file:
            file.write(self._key + self.certificate)
            file.flush()
            context.load_cert_chain(file.name)
        return context

    def write_kubeconfig(self, path: Path, url: str, token: str) -> None:
        """How clients get in. The token is a password: only the owner may read the file."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "finetune-local",
            "clusters": [
                {
                    "name": "finetune-local",
                    "cluster": {
                        "server": url,
                        "certificate-authority-data": base64.b64encode(self.certificate).decode(),
                    },
                }
            ],
            "users": [{"name": "finetune-local", "user": {"token": token}}],
            "contexts": [
                {
                    "name": "finetune-local",
                    "context": {"cluster": "finetune-local", "user": "finetune-local", "namespace": "default"},
                }
            ],
        }
        new = path.with_name(f"{path.name}.new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            yaml.safe_dump(config, file)
        new.replace(path)
