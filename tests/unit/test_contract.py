"""The contract between operator and trainer: exit codes, document, report, URIs, and the generated CRD."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cel_cost
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api import crd, report, uri
from finetune_api.document import JobDocument, JobIdentity, spec_digest
from finetune_api.failures import RULES, Disposition, FailureClass, class_of_exit_code, disposition_of, exit_code_of
from finetune_api.names import Stage, child_name
from finetune_api.spec import MAX_NAME_LENGTH, Checkpoint, FineTuneJobSpec
from finetune_api.status import (
    ArtifactResult,
    CheckpointResult,
    EvaluationResult,
    FineTuneJobStatus,
    Measurement,
    Resolved,
    Verification,
)

ROOT = Path(__file__).parents[2]


def minimal_spec(**changes: object) -> FineTuneJobSpec:
    spec = {
        "model": {"uri": "s3://models/base"},
        "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
        "output": {"uri": "s3://models/tuned"},
    }
    return FineTuneJobSpec.model_validate(spec | changes)


class TestGeneratedCrd:
    def test_the_file_is_what_the_models_say(self) -> None:
        assert (ROOT / "crds" / "finetunejobs.yaml").read_text() == crd.render(), "run `make crds`"

    def test_every_field_has_a_description(self) -> None:
        def missing(node: dict[str, object], path: str) -> list[str]:
            found = [] if node.get("description") or path in ("", "metadata") else [path]
            for name, child in (node.get("properties") or {}).items():
                found += missing(child, f"{path}.{name}".lstrip("."))
            if isinstance(node.get("items"), dict):
                # A list of scalars is described by the list itself.
                found += [
                    p for p in missing(node["items"], f"{path}[]") if "properties" in node["items"] or p != f"{path}[]"
                ]
            return found

        schema = crd.build()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        assert missing(schema, "") == []

    def test_every_string_and_list_is_bounded(self) -> None:
        def unbounded(node: dict[str, object], path: str) -> list[str]:
            found = []
            if node.get("type") == "string" and not {"maxLength", "enum", "format"} & node.keys():
                found.append(path)
            if node.get("type") == "array" and "maxItems" not in node:
                found.append(path)
            for name, child in (node.get("properties") or {}).items():
                found += unbounded(child, f"{path}.{name}")
            for inner in ("items", "additionalProperties"):
                if isinstance(node.get(inner), dict):
                    found += unbounded(node[inner], f"{path}[]")
            return found

        schema = crd.build()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
        assert unbounded(schema["spec"], "spec") + unbounded(schema["status"], "status") == []

    def test_the_schema_is_structural(self) -> None:
        text = json.dumps(crd.build())
        for word in ("$ref", "anyOf", "allOf", "title", 'additionalProperties": false'):
            assert word not in text

    def test_no_rule_costs_more_than_a_server_takes(self) -> None:
        """A tenth of the limits, since the estimate is not the server's own."""
        costs: dict[str, float] = {}

        def collect(node: dict[str, Any], path: str, times: int) -> None:
            for rule in node.get("x-kubernetes-validations", ()):
                costs[f"{path}: {rule['rule']}"] = times * cel_cost.estimate(rule["rule"], node)
            for name, child in (node.get("properties") or {}).items():
                collect(child, f"{path}.{name}", times)
            if "items" in node:
                collect(node["items"], f"{path}[]", times * node["maxItems"])
            if "additionalProperties" in node:
                collect(node["additionalProperties"], f"{path}[]", times * node["maxProperties"])

        collect(crd.build()["spec"]["versions"][0]["schema"]["openAPIV3Schema"], "", 1)
        assert {path: cost for path, cost in costs.items() if cost > cel_cost.PER_RULE / 10} == {}
        assert sum(costs.values()) < cel_cost.PER_CRD / 10

    def test_printer_columns_are_scalars(self) -> None:
        version = crd.build()["spec"]["versions"][0]
        for column in version["additionalPrinterColumns"]:
            node = version["schema"]["openAPIV3Schema"]
            if column["jsonPath"].startswith(".metadata"):
                continue
            for part in column["jsonPath"].strip(".").split("."):
                node = node["properties"][part]
            assert node["type"] in ("string", "integer"), column["name"]


class TestNames:
    def test_the_longest_name_fits_an_indexed_job(self) -> None:
        # 61 is the longest name of an Indexed Job that the API server takes with several pods.
        assert max(len(child_name("a" * MAX_NAME_LENGTH, stage, 9999)) for stage in Stage) <= 61


class TestExitCodes:
    def test_codes_are_unique_and_come_back_as_their_class(self) -> None:
        codes = [rule.exit_code for rule in RULES.values() if rule.exit_code is not None]
        assert len(codes) == len(set(codes))
        for name, rule in RULES.items():
            if rule.exit_code is not None:
                assert class_of_exit_code(exit_code_of(name)) is name

    def test_codes_are_fixed_for_ever(self) -> None:
        assert {name.value: rule.exit_code for name, rule in RULES.items() if rule.exit_code is not None} == {
            "UserError": 64,
            "DataError": 65,
            "ModelError": 66,
            "NotFound": 67,
            "StorageUnavailable": 69,
            "Unknown": 70,
            "OutputExists": 73,
            "DiskFull": 74,
            "Terminated": 75,
            "AccessDenied": 77,
            "OutOfMemoryGPU": 80,
            "OutOfMemoryHost": 81,
            "LossDiverged": 82,
            "NoProgress": 83,
            "Communication": 84,
            "VerificationFailed": 85,
            "ModelChanged": 86,
        }

    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            (137, FailureClass.KILLED),
            (143, FailureClass.TERMINATED),
            (1, FailureClass.UNKNOWN),
            (139, FailureClass.UNKNOWN),
        ],
    )
    def test_codes_that_are_not_ours(self, code: int, expected: str) -> None:
        assert class_of_exit_code(code) == expected

    def test_no_code_of_ours_can_be_taken_for_a_signal_or_a_shell_error(self) -> None:
        assert all(2 < rule.exit_code < 126 for rule in RULES.values() if rule.exit_code is not None)

    def test_what_the_user_must_mend_fails_at_once_and_what_the_cluster_did_is_free(self) -> None:
        for name in ("UserError", "DataError", "ModelError", "AccessDenied", "NotFound", "OutputExists"):
            assert disposition_of(FailureClass(name)) is Disposition.FAIL
        assert disposition_of(FailureClass.PREEMPTED) is Disposition.RESTART_FREE

    def test_every_class_has_a_sentence(self) -> None:
        assert set(RULES) == set(FailureClass)
        assert all(rule.sentence.endswith(".") for rule in RULES.values())


class TestDocument:
    def test_the_digest_covers_what_decides_the_result_and_nothing_else(self) -> None:
        base = spec_digest(minimal_spec())
        assert base != spec_digest(minimal_spec(hyperparameters={"seed": 7}))
        assert base != spec_digest(minimal_spec(model={"uri": "s3://models/other"}))
        assert base != spec_digest(minimal_spec(output={"uri": "s3://models/tuned", "dtype": "F32"}))
        assert base == spec_digest(minimal_spec(resources={"memory": "64Gi"}))
        assert base == spec_digest(minimal_spec(failurePolicy={"maxRestarts": 9}))
        assert base == spec_digest(minimal_spec(output={"uri": "s3://models/tuned", "onExisting": "Overwrite"}))

    def test_writing_a_default_out_does_not_change_the_digest(self) -> None:
        assert spec_digest(minimal_spec()) == spec_digest(minimal_spec(hyperparameters={"seed": 42}))

    def test_the_digest_and_the_defaults_in_it_are_those_of_all_versions(self) -> None:
        """Another digest would train again what is published. Another default under the same one would take what was
        published with the old one for the result of a job that asks for the new one."""
        lora = {"rank": 16, "alpha": 32, "dropout": "0"}
        quantization = {"type": "NF4", "doubleQuantization": "Enabled"}
        written_out = {
            "model": {"uri": "s3://models/base"},
            "dataset": {
                "train": [{"uri": "s3://data/train.jsonl"}],
                "format": "Auto",
                "maxLength": 2048,
                "invalidRows": {"policy": "Fail", "limit": 100},
            },
            "method": {"type": "SFT", "adapter": {"type": "QLoRA"}},
            "hyperparameters": {
                "scheduler": "Cosine",
                "warmupRatio": "0.03",
                "batchSize": 16,
                "weightDecay": "0",
                "maxGradNorm": "1",
                "seed": 42,
                "optimizer": "AdamW",
                "precision": "Auto",
                "activationCheckpointing": "Auto",
            },
            "output": {"uri": "s3://models/tuned", "dtype": "Auto", "onExisting": "Fail"},
        }
        assert spec_digest(minimal_spec(**written_out)) == spec_digest(minimal_spec())
        assert spec_digest(minimal_spec()).startswith("ed032c998379aa07e8756f9e397819d9")
        method = {"adapter": {"type": "QLoRA", "lora": lora, "quantization": quantization}}
        short = {"adapter": {"type": "QLoRA", "lora": {}, "quantization": {}}}
        assert spec_digest(minimal_spec(method=method)) == spec_digest(minimal_spec(method=short))
        assert spec_digest(minimal_spec(method=method)).startswith("195bd2f49460f67538577e95333643f6")

    def test_an_older_trainer_reads_the_document_of_a_newer_operator(self) -> None:
        document = JobDocument(
            stage=Stage.TRAIN,
            attempt=2,
            job=JobIdentity(namespace="n", name="j", uid="u"),
            spec=minimal_spec(),
            work_uri="s3://b/w/u",
        )
        data = json.loads(document.model_dump_json(by_alias=True)) | {"somethingNew": 1}
        assert JobDocument.model_validate(data) == document


def full_report() -> report.Report:
    """A report with every field at a length that occurs."""
    long_uri = "s3://" + "b" * 60 + "/" + "p" * 200
    measured = Measurement(
        loss="10.1234",
        perplexity="2.345e+04",
        tokens=10**9,
        method_loss="10.1234",
        accuracy="0.1234",
        margin="-10.1234",
    )
    return report.Report(
        job_uid="3a977917-7975-406a-8fc5-389d3592b800",
        stage=Stage.TRAIN,
        attempt=12,
        outcome=report.Outcome.FAILED,
        phase="Training",
        update_time="2026-11-21T05:08:01Z",
        progress=report.StepProgress(
            step=10**6, total_steps=10**6, epoch=1.23456789, loss=1.2345678901234567, trained_tokens=10**12
        ),
        resumed_from_step=10**6,
        resolved=Resolved(model_type="llama", model_revision="f" * 64, work_uri=long_uri, parameters=10**11),
        evaluation=EvaluationResult(base=measured, quantized_base=measured, tuned=measured),
        checkpoint=CheckpointResult(step=10**6, uri=long_uri, time="2026-11-21T05:08:01Z", save_seconds="123.4"),
        artifacts=[ArtifactResult(name="Manifest", uri=long_uri, size_bytes=10**12, sha256="f" * 64)],
        verification=Verification(mean_kl="1.23e-08", max_kl="1.23e-04", positions=128),
        phase_seconds={f"Phase{i}": 12345.6 for i in range(10)},
        failure=report.ReportedFailure(
            failure_class=FailureClass.DATA_ERROR, message="x" * 2000, exit_code=65, rank=0, log_tail="y" * 1500
        ),
        log_uri=long_uri,
    )


class TestReport:
    def test_the_largest_report_fits_and_keeps_class_and_message(self) -> None:
        encoded = full_report().encode()
        assert len(encoded) <= report.MAX_REPORT_BYTES
        decoded = report.decode(encoded)
        assert decoded is not None
        assert decoded.failure is not None
        assert decoded.failure.failure_class is FailureClass.DATA_ERROR
        assert decoded.failure.message.startswith("x" * 900)
        assert decoded.evaluation == full_report().evaluation

    def test_a_report_that_fits_is_left_whole(self) -> None:
        small = full_report().model_copy(update={"failure": None})
        assert report.decode(small.encode()) == small

    @settings(deadline=None)
    @given(st.binary(max_size=200))
    def test_anything_can_be_decoded_and_most_of_it_is_no_report(self, data: bytes) -> None:
        report.decode(data)

    @settings(deadline=None)
    @given(st.text(max_size=400))
    def test_what_a_longer_older_report_left_behind_is_ignored(self, rest: str) -> None:
        new = report.Report(job_uid="u", stage=Stage.PREPARE, attempt=1)
        assert report.decode(new.encode() + rest.encode()) == new

    def test_a_report_of_a_future_version_is_not_understood(self) -> None:
        new = report.Report(job_uid="u", stage=Stage.PREPARE, attempt=1, schema_version=2)
        assert report.decode(new.encode()) is None


class TestUri:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("s3://bucket/a/b/", uri.S3Location("bucket", "a/b")),
            ("hf://org/name", uri.HubLocation("model", "org/name", None, "")),
            ("hf://org/name@main", uri.HubLocation("model", "org/name", "main", "")),
            ("hf://org/name@refs/pr/1", uri.HubLocation("model", "org/name", "refs/pr/1", "")),
            ("hf://datasets/org/name@v1/a/b.jsonl", uri.HubLocation("dataset", "org/name", "v1", "a/b.jsonl")),
            ("file:///a/b%20c", uri.FileLocation("/a/b c")),
        ],
    )
    def test_parse(self, text: str, expected: uri.Location) -> None:
        assert uri.parse(text) == expected

    @pytest.mark.parametrize(
        "text", ["bucket/key", "s3://bucket", "s3:///key", "gs://b/k", "hf://name", "file://host/x"]
    )
    def test_a_wrong_uri_is_refused_with_a_sentence(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"write|use"):
            uri.parse(text)

    @pytest.mark.parametrize("text", ["s3://b/k", "hf://o/n@r", "hf://datasets/o/n/f.csv", "file:///a"])
    def test_what_was_parsed_prints_as_it_was(self, text: str) -> None:
        assert str(uri.parse(text)) == text


def test_the_status_at_the_maximum_of_every_list_and_string_stays_under_40_kib() -> None:
    """etcd, watches and kubectl carry the object on each change."""

    def largest(node: dict[str, object]) -> object:
        kind = node.get("type")
        if "enum" in node:
            return max(node["enum"], key=len)
        if kind == "object":
            return {name: largest(child) for name, child in (node.get("properties") or {}).items()}
        if kind == "array":
            return [largest(node["items"]) for _ in range(int(node["maxItems"]))]
        if kind == "integer":
            return 10**15
        if node.get("format") == "date-time":
            return "2026-11-21T05:08:01Z"
        return "x" * int(node["maxLength"])

    schema = crd.structural_schema(FineTuneJobStatus.model_json_schema(by_alias=True), defaults=False)
    size = len(json.dumps(largest(schema)))
    assert size <= 40 * 1024, f"{size} bytes"


def test_examples_are_valid_yaml_documents() -> None:
    for path in (ROOT / "examples").rglob("*.yaml"):
        assert list(yaml.safe_load_all(path.read_text())), path


def test_checkpoints_are_saved_without_asking() -> None:
    checkpoint = Checkpoint()
    assert (checkpoint.every_seconds, checkpoint.keep_last) == (600, 2)
