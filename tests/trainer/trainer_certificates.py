"""A certificate authority of a company, and servers that only it vouches for."""

from __future__ import annotations

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Authority:
    """Signs certificates for 127.0.0.1."""

    def __init__(self, folder: Path, name: str = "Example Corp CA") -> None:
        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._signed(self._name, self._key, timedelta(days=1), is_authority=True)
        self.bundle = folder / "bundle.pem"
        # As such files come: with words around the certificate, and not only ASCII ones.
        self.bundle.write_bytes("# Zertifikat für Example\n".encode() + self._pem(self._certificate) + b"# end\n")

    def server(self, lifetime: timedelta = timedelta(days=1)) -> Path:
        """A file with the certificate and key of a server; with a negative lifetime it has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "storage.example.com")])
        certificate = self._signed(name, key, lifetime, is_authority=False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = self._folder / f"server-{certificate.serial_number}.pem"
        path.write_bytes(private + self._pem(certificate))
        return path

    def context(self) -> ssl.SSLContext:
        """What a server in this process listens with."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.server())
        return context

    def _signed(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, lifetime: timedelta, *, is_authority: bool
    ) -> x509.Certificate:
        end = datetime.now(UTC) + lifetime
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(end, datetime.now(UTC)) - timedelta(days=1))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if not is_authority:
            host = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([host]), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    @staticmethod
    def _pem(certificate: x509.Certificate) -> bytes:
        return certificate.public_bytes(serialization.Encoding.PEM)
