"""The images that the chart names are those that the Dockerfile makes."""

from __future__ import annotations

import re
import tomllib

import pytest
from helm_chart import CHART, ROOT, load
from test_chart_pods import build

from finetune_api.names import Stage
from finetune_operator.config import Settings

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def stage(name: str) -> str:
    """The lines of a stage."""
    return re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]


@pytest.mark.parametrize("target", ["operator", "trainer"])
def test_images_run_as_a_number(target: str) -> None:
    # The kubelet cannot tell whether a name is root, and refuses it under runAsNonRoot.
    uid, gid = re.findall(r"^USER (\d+):(\d+)$", stage(target), re.MULTILINE)[-1]
    assert int(uid) > 0
    assert int(gid) > 0


def test_entry_points_are_scripts_of_the_project() -> None:
    scripts = PROJECT["project"]["scripts"]
    (operator,) = re.findall(r'^ENTRYPOINT \["(.+)"\]$', stage("operator"), re.MULTILINE)
    (trainer,) = re.findall(r'^ENTRYPOINT \["(.+)"\]$', stage("trainer"), re.MULTILINE)
    assert scripts[operator] == "finetune_operator.main:main"
    assert scripts[trainer] == "finetune_trainer.main:main"
    _, job = build(Stage.TRAIN)
    assert job["spec"]["template"]["spec"]["containers"][0]["command"][0] == trainer


@pytest.mark.parametrize("target", ["operator", "trainer"])
def test_extras_exist(target: str) -> None:
    assert re.findall(r"\[(\w+)\]\"$", stage(target), re.MULTILINE) == [target]
    assert target in PROJECT["project"]["optional-dependencies"]


def test_torch_is_what_the_project_asks_for() -> None:
    (version,) = re.findall(r'^ARG TORCH="torch==([\d.]+)"$', DOCKERFILE, re.MULTILINE)
    assert f"torch=={version}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_context_holds_what_the_wheel_is_made_of() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {path.split("/")[0] for path in [*wheel["packages"], *wheel["force-include"]]}
    project = PROJECT["project"]
    assert sent == needed | {"pyproject.toml", "constraints.txt", project["readme"], *project["license-files"]}


def test_names_are_the_same_everywhere() -> None:
    values = load(CHART / "values.yaml")
    for image, target in ((values["image"], "operator"), (values["trainer"]["image"], "trainer")):
        assert f"--target {target} --tag {image['registry']}/{image['repository']} ." in DOCKERFILE
    trainer = values["trainer"]["image"]
    assert Settings().trainer_image == f"{trainer['registry']}/{trainer['repository']}:latest"
