"""The README's commands, typed in its order in a copy of the project. Only the base model is another: a tiny one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TOOLS, program
from local_up import eventually

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def commands(section: str) -> list[str]:
    """The console lines of a section, with continued lines joined."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## )", README, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


@dataclass
class Terminal:
    """A shell in the folder; variables that one command exports are there for the next."""

    folder: Path
    exports: str = ""

    def start(self, command: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "KUBECONFIG"))}
        environment["PATH"] = f"{TOOLS}{os.pathsep}{environment['PATH']}"
        return subprocess.Popen(
            ["bash", "-c", f"{self.exports}exec {command}"],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str) -> str:
        if command.startswith("export "):
            self.exports += f"{command}\n"
            return ""
        process = self.start(command)
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, f"{command}: {output}"
        return output


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Terminal:
    """A copy of what the commands need, with this environment as its .venv and a tiny base model already written."""
    program("kubectl")
    folder = tmp_path_factory.mktemp("readme")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / ".venv").symlink_to(sys.prefix)
    shutil.copytree(tiny_model, folder / ".finetune" / "smollm2-135m-instruct")
    return Terminal(folder)


def test_try_it_on_this_machine(terminal: Terminal) -> None:
    quickstart, up, *others = commands("Try it on this machine")

    # The environment is this one, so that make shall not make it.
    output = terminal.run(f"{quickstart} -o .venv/.local")
    for word in ("Running", "Succeeded", "Perplexity", "60 held-out messages", "valid JSON", "export KUBECONFIG"):
        assert word in output, output
    assert (terminal.folder / ".finetune/s3/models/ticket-writer/manifest.json").is_file()

    cluster = terminal.start(up)
    try:
        eventually(lambda: (terminal.folder / ".finetune/stack.json").exists(), "the cluster starts")
        for command in others:
            if command.endswith(" -w"):
                watching = terminal.start(command)
                eventually(lambda: "-train-" in terminal.run("kubectl get pods"), "training starts")
                continue
            output = terminal.run(command)
            assert EXPECTED[command.split()[1]] in output, command
        watching.terminate()
        assert watching.communicate()[0].startswith("NAME")
    finally:
        cluster.send_signal(signal.SIGINT)
        assert cluster.wait(timeout=60) == 0
    published = terminal.folder / ".finetune/s3/models/ticket-writer-lora"
    assert json.loads((published / "manifest.json").read_text())["lineage"]


EXPECTED = {
    "KUBECONFIG=.finetune/kubeconfig": "",
    "get": "Succeeded",
    "describe": "TrainingComplete",
    "explain": "QLoRA",
    "'s/ticket-writer/ticket-writer-lora/;": "",
    "validate": "FineTuneJob ticket-writer-lora is valid",
    "apply": "created",
    "watch": "Succeeded",
    "logs": "published",
    "wait": "condition met",
}
"""By the second word of the command, what it prints."""


def test_install_it_in_a_cluster(tmp_path: Path) -> None:
    """There is no registry here, so that `make images` is only asked what it would do, and the chart is rendered: the
    images that one builds are those that the other runs."""
    terminal = Terminal(ROOT)
    images, *others = commands("Install it in a cluster")
    planned = terminal.run(f"{images} -n BUILDER=docker")
    pushed = [line.removeprefix("docker push ") for line in others if line.startswith("docker push ")]
    (install,) = [line for line in others if line.startswith("helm install ")]
    rendered = terminal.run(f"{program('helm')} {install.removeprefix('helm ').replace('install', 'template', 1)}")
    assert len(pushed) == 2
    for image in pushed:
        name, tag = image.rsplit("/", 1)[1].split(":")
        assert f"-t {image.removesuffix(f'{name}:{tag}')}$target:{tag}" in planned
        assert f"{image}" in rendered
