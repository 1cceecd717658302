"""What the chart renders: valid objects that fit together, from values that all do something."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import aiohttp
import kopf
import kubernetes_validate
import pytest
from helm_chart import (
    CHART,
    EXAMPLES,
    NAMESPACE,
    POD,
    ROOT,
    HelmError,
    at,
    changed,
    documented_values,
    helm,
    leaves,
    load,
    of_kind,
    operator_container,
    operator_environment,
    pod_template,
    render,
    rendered_example,
    the,
)

from finetune_api import crd
from finetune_operator import handlers, server
from finetune_operator.config import Settings
from finetune_operator.metrics import Metrics

#: The oldest Kubernetes that the chart accepts, and the newest whose schemas are known here.
KUBERNETES = ("1.32.0", "1.37.0")
#: Their schemas are not those of Kubernetes itself.
FOREIGN_KINDS = {"CustomResourceDefinition", "ServiceMonitor", "PodMonitor"}
EXAMPLE_NAMES = [path.name.removesuffix("-values.yaml") for path in EXAMPLES]
EVERYTHING = load(CHART / "ci" / "everything-values.yaml")
DIGEST = "sha256:" + 64 * "a"
VERSION = load(CHART / "Chart.yaml")["version"]

examples = pytest.mark.parametrize("example", EXAMPLE_NAMES)


# The chart as a whole


@pytest.mark.parametrize("path", EXAMPLES, ids=EXAMPLE_NAMES)
def test_lint(path: Path) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), values=load(path))


@examples
@pytest.mark.parametrize("version", KUBERNETES)
def test_objects_are_valid(example: str, version: str) -> None:
    objects = rendered_example(example)
    for item in objects:
        if item["kind"] not in FOREIGN_KINDS:
            kubernetes_validate.validate(item, version, strict=True)


def test_older_kubernetes_is_refused() -> None:
    with pytest.raises(HelmError, match="incompatible with Kubernetes"):
        render({}, "--kube-version", "1.31.0")


@examples
def test_objects_have_a_place_and_labels(example: str) -> None:
    objects = rendered_example(example)
    common = load(CHART / "ci" / f"{example}-values.yaml").get("commonLabels", {})
    identities = [(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects]
    assert len(identities) == len(set(identities))
    for kind, namespace, _ in identities:
        cluster_wide = kind in {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}
        assert (namespace is None) == cluster_wide, kind
    for item in objects:
        labels = item["metadata"]["labels"]
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["helm.sh/chart"] == f"finetune-operator-{VERSION}"
        assert common.items() <= labels.items()


def test_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = load(CHART / "Chart.yaml")
    assert (chart["version"], chart["appVersion"]) == (project["version"], project["version"])
    assert chart["description"] == project["description"]


def test_release_notes_name_what_is_served() -> None:
    notes = helm("install", "tuner", str(CHART), "--dry-run=client", values={"watchNamespaces": ["team-a"]})
    assert "serves FineTuneJobs in: team-a." in notes


# Values


@pytest.mark.parametrize("path", documented_values())
def test_every_value_does_something(path: str) -> None:
    default, _ = documented_values()[path]
    value = at(EVERYTHING, path)
    other = not value if isinstance(value, bool) else default
    if render(changed(EVERYTHING, path, other)) == rendered_example("everything"):
        # Another value hides it there, as the digest hides the tag.
        assert render(changed({}, path, value)) != rendered_example("default")


def test_every_value_is_documented() -> None:
    documented = documented_values()
    defaults = load(CHART / "values.yaml")
    undocumented = [
        path for path in leaves(defaults) if not f"{path}.".startswith(tuple(f"{key}." for key in documented))
    ]
    assert undocumented == []
    readme = (CHART / "README.md").read_text()
    rows = [f"| `{path}` | `{json.dumps(default)}` | {text} |" for path, (default, text) in documented.items()]
    assert "\n".join(rows) in readme, "the table of values in the chart's README.md should be:\n" + "\n".join(rows)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("typo", 1),
        ("image.typo", 1),
        ("trainer.typo", 1),
        ("trainer.image.typo", 1),
        ("crds.typo", 1),
        ("s3.typo", 1),
        ("settings.typo", 1),
        ("serviceAccount.typo", 1),
        ("rbac.typo", 1),
        ("metrics.typo", 1),
        ("metrics.serviceMonitor.typo", 1),
        ("metrics.podMonitor.typo", 1),
        ("networkPolicy.typo", 1),
        ("image.pullPolicy", "Sometimes"),
        ("image.digest", "latest"),
        ("trainer.proxy.https", "http://user:password@proxy:3128"),
        ("trainer.proxy.typo", ""),
        ("trainer.spotLabels", {"a=b": "c"}),
        ("trainer.gpuTypeLabels", {"nvidia.com": "a,b"}),
        ("s3.accessKeyId", "AKIA"),
        ("s3.secretAccessKey", "x"),
        ("s3.endpoint", "https://user:password@minio:9000"),
        ("s3.endpoint", "minio:9000"),
        ("s3.addressingStyle", "path"),
        ("watchNamespaces", "team-a"),
        ("watchNamespaces", ["Team A"]),
        ("replicas", 0),
        ("settings.workers", 0),
        ("settings.resyncSeconds", 1.5),
        ("settings.leaseSeconds", 2),
        ("settings.logFormat", "yaml"),
        ("settings.logLevel", "info"),
        ("metrics.podMonitor.interval", "soon"),
        ("networkPolicy.apiServerPorts", []),
    ],
)
def test_wrong_values_are_refused(path: str, value: Any) -> None:
    with pytest.raises(HelmError, match="don't meet the specifications of the schema") as refused:
        render(changed({}, path, value))
    unknown = f"additional properties '{path.rpartition('.')[2]}' not allowed"
    assert unknown in str(refused.value) or f"at '/{path.replace('.', '/')}" in str(refused.value)


def test_a_parent_chart_may_set_globals() -> None:
    assert render({"global": {"anything": 1}}) == rendered_example("default")


# Images and settings


@pytest.mark.parametrize(
    ("values", "reference"),
    [
        ({}, f"ghcr.io/finetune-operator/NAME:{VERSION}"),
        ({"tag": "1.2.3"}, "ghcr.io/finetune-operator/NAME:1.2.3"),
        ({"tag": "1.2.3", "digest": DIGEST}, f"ghcr.io/finetune-operator/NAME@{DIGEST}"),
        ({"registry": "r.example.com:5000", "repository": "x/y"}, f"r.example.com:5000/x/y:{VERSION}"),
        ({"registry": "", "repository": "local"}, f"local:{VERSION}"),
    ],
)
def test_image_references(values: dict[str, str], reference: str) -> None:
    objects = render({"image": values, "trainer": {"image": values}})
    assert operator_container(objects)["image"] == reference.replace("NAME", "operator")
    assert operator_environment(objects)["FINETUNE_TRAINER_IMAGE"] == reference.replace("NAME", "trainer")


def test_chart_and_code_have_the_same_defaults() -> None:
    settings = Settings.from_environment(operator_environment(rendered_example("default")))
    assert settings == replace(
        Settings(),
        trainer_image=f"ghcr.io/finetune-operator/trainer:{VERSION}",
        lease_name="tuner-finetune-operator",
        lease_namespace=NAMESPACE,
        pod_name=POD,
        log_format="json",
    )


def test_every_setting_can_be_set() -> None:
    settings = Settings.from_environment(operator_environment(rendered_example("everything")))
    # Address and port are nobody's business outside the pod; and pods of a cluster share no file system with anybody.
    # The format of the logs is text where nobody says anything, and json in the chart.
    fixed = {"http_host", "http_port", "allow_files", "log_format"}
    names = {field.name for field in fields(Settings)}
    assert {name for name in names if getattr(settings, name) == getattr(Settings(), name)} == fixed
    assert settings.lease_name == "the-tuner"
    assert settings.stall_seconds == 2592000
    assert settings.namespaces == ("team-a", "team-b")
    assert settings.image_pull_secrets == ("registry-jobs", "registry-base")
    # A label is added, and with null one is taken away.
    assert "example.com/cheap=yes" in settings.spot_labels
    assert not any(label.startswith("karpenter.sh/") for label in settings.spot_labels)
    assert "nvidia.com=cloud.google.com/gke-accelerator" in settings.gpu_type_labels


@examples
def test_port_of_the_process_is_the_port_of_the_container(example: str) -> None:
    objects = rendered_example(example)
    settings = Settings.from_environment(operator_environment(objects))
    assert operator_container(objects)["ports"] == [{"name": "metrics", "containerPort": settings.http_port}]


# The operator's pod


def test_a_new_replica_starts_before_an_old_one_stops() -> None:
    spec = the(rendered_example("default"), "Deployment")["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_several_replicas_are_spread_and_not_drained_together(replicas: int) -> None:
    objects = render({"replicas": replicas})
    assert the(objects, "Deployment")["spec"]["replicas"] == replicas
    budgets = of_kind(objects, "PodDisruptionBudget")
    spread = pod_template(objects)["spec"].get("topologySpreadConstraints", [])
    assert len(budgets) == len(spread) == (0 if replicas == 1 else 1)
    for item in budgets:
        assert item["spec"]["maxUnavailable"] == 1
    for item in spread:
        assert (item["topologyKey"], item["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")


def test_the_kubelet_waits_longer_than_a_stop_takes() -> None:
    kopf_settings = kopf.OperatorSettings()
    handlers.configure(kopf_settings, Settings())
    grace = pod_template(rendered_example("default"))["spec"]["terminationGracePeriodSeconds"]
    assert handlers.STOP_SECONDS < kopf_settings.process.ultimate_exiting_timeout < grace


@pytest.mark.parametrize("place", ["commonLabels", "podLabels"])
def test_selectors_find_the_operator_whatever_labels_are_given(place: str) -> None:
    given = {"app.kubernetes.io/name": "other", "app.kubernetes.io/instance": "other", "given": "yes"}
    objects = render(changed(EVERYTHING, place, given))
    pod = pod_template(objects)["metadata"]["labels"]
    deployment, service = the(objects, "Deployment")["spec"], the(objects, "Service")["spec"]
    policy = the(objects, "NetworkPolicy")["spec"]
    budget = the(objects, "PodDisruptionBudget")["spec"]
    (spread,) = pod_template(objects)["spec"]["topologySpreadConstraints"]
    for selector in (
        deployment["selector"]["matchLabels"],
        service["selector"],
        policy["podSelector"]["matchLabels"],
        budget["selector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
    ):
        assert set(selector) == {"app.kubernetes.io/name", "app.kubernetes.io/instance"}
        assert selector.items() <= pod.items()
    assert pod["given"] == "yes"


@examples
def test_named_ports_exist(example: str) -> None:
    objects = rendered_example(example)
    container = operator_container(objects)
    names = {port["name"] for port in container["ports"]}
    used = {container[probe]["httpGet"]["port"] for probe in ("livenessProbe", "readinessProbe")}
    used |= {port["targetPort"] for port in the(objects, "Service")["spec"]["ports"]}
    for policy in of_kind(objects, "NetworkPolicy"):
        used |= {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    assert used == names


@pytest.mark.parametrize(
    ("unhealthy", "unready", "expected"),
    [("", "", (200, 200)), ("", "no lease\n", (200, 503)), ("a dead task\n", "a dead task\n", (503, 503))],
)
async def test_probes_ask_what_the_server_answers(unhealthy: str, unready: str, expected: tuple[int, int]) -> None:
    container = operator_container(rendered_example("default"))
    runner = await server.serve("127.0.0.1", 0, Metrics(), lambda: unhealthy, lambda: unready)
    host, port = runner.addresses[0]
    found = []
    async with aiohttp.ClientSession(f"http://{host}:{port}") as session:
        for probe in ("livenessProbe", "readinessProbe"):
            async with session.get(container[probe]["httpGet"]["path"]) as response:
                found.append(response.status)
    assert tuple(found) == expected
    await runner.cleanup()


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "tuner-finetune-operator"),
        ({"name": "given"}, "given"),
        ({"create": False}, "default"),
        ({"create": False, "name": "given"}, "given"),
    ],
)
def test_service_account(values: dict[str, Any], name: str) -> None:
    objects = render({"serviceAccount": values})
    assert pod_template(objects)["spec"]["serviceAccountName"] == name
    assert the(objects, "ClusterRoleBinding")["subjects"] == [
        {"kind": "ServiceAccount", "name": name, "namespace": NAMESPACE}
    ]
    created = [
        (item["metadata"]["name"], item["automountServiceAccountToken"]) for item in of_kind(objects, "ServiceAccount")
    ]
    assert created == ([(name, False)] if values.get("create", True) else [])
    assert pod_template(objects)["spec"]["automountServiceAccountToken"] is True


# The CRD


def test_copy_of_the_crd_is_current() -> None:
    source = ROOT / "crds" / "finetunejobs.yaml"
    assert (CHART / "files" / "crds" / "finetunejobs.yaml").read_bytes() == source.read_bytes(), "run make crds"


@pytest.mark.parametrize(("keep", "annotations"), [(True, {"helm.sh/resource-policy": "keep"}), (False, None)])
def test_crd_is_rendered_unchanged(keep: bool, annotations: dict[str, str] | None) -> None:
    rendered = the(render({"crds": {"keep": keep}}), "CustomResourceDefinition")
    assert rendered["metadata"].pop("annotations", None) == annotations
    rendered["metadata"].pop("labels")
    assert json.dumps(rendered, sort_keys=True) == json.dumps(crd.load(), sort_keys=True)


def test_crd_can_be_left_to_others() -> None:
    assert of_kind(render({"crds": {"enabled": False}}), "CustomResourceDefinition") == []


# Nothing secret


@examples
def test_no_credentials(example: str) -> None:
    objects = rendered_example(example)
    assert of_kind(objects, "Secret") == []
    container = operator_container(objects)
    assert "envFrom" not in container
    assert not any("secretKeyRef" in variable.get("valueFrom", {}) for variable in container["env"])
    assert "volumes" not in pod_template(objects)["spec"]
    values = {path for path in leaves(load(CHART / "values.yaml")) if re.search("(?i)secret|key|token|password", path)}
    assert values == {"imagePullSecrets", "trainer.imagePullSecrets"}
