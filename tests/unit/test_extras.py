"""Each extra alone is enough for its packages: their modules are imported where nothing else is installed."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = "finetune-operator"


def modules(folder: str, package: str, *, without: tuple[str, ...] = ()) -> list[str]:
    """All modules of a package, but for parts of it."""
    root = ROOT / folder
    names = [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for path in (root / package).rglob("*.py")
        if path.stem != "__main__"
    ]
    return sorted(name for name in names if not name.startswith(without or ("-",)))


CLI, LOCAL = "finetune_operator.cli", "finetune_operator.local"
PACKAGES = {
    "": modules("crds", "finetune_api", without=("finetune_api.crd",)),
    "operator": modules("operator", "finetune_operator", without=(CLI, LOCAL, "finetune_operator.schema")),
    "cli": [name for name in modules("operator", "finetune_operator") if name.startswith(CLI) and "local" not in name],
    "trainer": modules("trainer_image", "finetune_trainer"),
    "local": modules("operator", "finetune_operator"),
}


def closure(name: str, extras: frozenset[str], found: set[tuple[str, frozenset[str]]]) -> None:
    """Collect the distributions that pip would install for a requirement, of those that are here."""
    key = (canonicalize_name(name), extras)
    if key in found:
        return
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return
    found.add(key)
    for text in distribution.requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            closure(requirement.name, frozenset(requirement.extras), found)


def install(distribution: Distribution, site: Path) -> None:
    """Put a distribution into a folder, as links."""
    for name in {Path(str(file)).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
        link = site / name
        if not link.exists() and not name.endswith(".pth"):
            link.symlink_to(Path(str(distribution.locate_file(name))))


@pytest.mark.parametrize("extra", PACKAGES, ids=lambda extra: extra or "base")
def test_an_extra_alone_is_enough(extra: str, tmp_path: Path) -> None:
    found: set[tuple[str, frozenset[str]]] = set()
    closure(PROJECT, frozenset({extra} - {""}), found)
    names = {name for name, _ in found}
    assert "pytest" not in names
    for name in names:
        install(importlib.metadata.distribution(name), tmp_path)
    path = [str(tmp_path), *(str(ROOT / folder) for folder in ("crds", "operator", "trainer_image"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    # -S: without the site-packages of this environment.
    command = [sys.executable, "-S", "-c", "; ".join(f"import {module}" for module in PACKAGES[extra])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
