"""What reads the operator and the jobs' pods over the network: monitors and policy, against the objects they name."""

from __future__ import annotations

import pytest
from builders import job_body
from helm_chart import Object, of_kind, render, rendered_example, the

from finetune_api.names import AGENT_PORT, Stage
from finetune_operator import children
from finetune_operator.config import Settings
from finetune_operator.resource import FineTuneJob

MONITORS = ("ServiceMonitor", "PodMonitor")


@pytest.fixture(scope="module")
def job_pod() -> Object:
    """The pod template of a train attempt."""
    job = FineTuneJob.parse(job_body())
    assert job.spec is not None
    _, child = children.build(job, job.spec, Stage.TRAIN, 1, Settings())
    template: Object = child["spec"]["template"]
    return template


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector of matchLabels, and of matchExpressions with Exists, finds an object."""
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(set(item) == {"key", "operator"} and item["operator"] == "Exists" for item in expressions)
    assert wanted or expressions
    return wanted.items() <= labels.items() and all(item["key"] in labels for item in expressions)


def test_off_by_default() -> None:
    assert not {"NetworkPolicy", *MONITORS} & {item["kind"] for item in rendered_example("default")}


def test_service_monitor_reads_the_operator() -> None:
    objects = rendered_example("everything")
    service = the(objects, "Service")
    spec = the(objects, "ServiceMonitor")["spec"]
    assert selects(spec["selector"], service["metadata"]["labels"])
    (endpoint,) = spec["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    # Otherwise Prometheus writes the operator's own namespace over that of the jobs.
    assert endpoint["honorLabels"] is True
    others = [item for item in objects if item["kind"] == "Service" and item is not service]
    assert others == []


def test_pod_monitor_reads_the_jobs_pods(job_pod: Object) -> None:
    spec = the(rendered_example("everything"), "PodMonitor")["spec"]
    labels = job_pod["metadata"]["labels"]
    assert selects(spec["selector"], labels)
    assert set(spec["podTargetLabels"]) < set(labels)
    (endpoint,) = spec["podMetricsEndpoints"]
    (container,) = job_pod["spec"]["containers"]
    assert endpoint["port"] in {port["name"] for port in container["ports"]}


@pytest.mark.parametrize(
    ("namespaces", "selector"), [([], {"any": True}), (["team-a", "team-b"], {"matchNames": ["team-a", "team-b"]})]
)
def test_pod_monitor_looks_where_the_operator_does(namespaces: list[str], selector: Object) -> None:
    objects = render({"watchNamespaces": namespaces, "metrics": {"podMonitor": {"enabled": True}}})
    assert the(objects, "PodMonitor")["spec"]["namespaceSelector"] == selector


@pytest.mark.parametrize("kind", MONITORS)
def test_monitors_say_what_they_are_told(kind: str) -> None:
    monitor = the(rendered_example("everything"), kind)
    assert monitor["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    (endpoint,) = monitor["spec"].get("endpoints") or monitor["spec"]["podMetricsEndpoints"]
    assert {"interval", "scrapeTimeout", "relabelings", "metricRelabelings"} < set(endpoint)


def test_policy_lets_the_operator_reach_the_jobs_pods(job_pod: Object) -> None:
    spec = the(rendered_example("everything"), "NetworkPolicy")["spec"]
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    rule = next(rule for rule in spec["egress"] if AGENT_PORT in {port["port"] for port in rule["ports"]})
    (peer,) = rule["to"]
    assert peer["namespaceSelector"] == {}
    assert selects(peer["podSelector"], job_pod["metadata"]["labels"])


def test_policy_names_ports_and_nothing_more() -> None:
    spec = the(rendered_example("everything"), "NetworkPolicy")["spec"]
    ports = [port["port"] for rule in spec["egress"] for port in rule["ports"]]
    assert sorted(ports) == sorted([53, 53, 8443, AGENT_PORT])
    (ingress,) = spec["ingress"]
    assert ingress["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    (ingress,) = the(rendered_example("namespaced"), "NetworkPolicy")["spec"]["ingress"]
    assert "from" not in ingress


def test_only_one_policy() -> None:
    assert len(of_kind(rendered_example("everything"), "NetworkPolicy")) == 1
