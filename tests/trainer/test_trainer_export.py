"""What is published is the trained model, complete and verified, or nothing is published."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trained
from safetensors.torch import load_file, save_file
from trainer_lab import Bucket, TestJob, save_tiny_model
from trainer_servers import MotoServer, Proxy

from finetune_api.document import StorageSettings
from finetune_api.failures import FailureClass, JobError
from finetune_api.report import Outcome, Report
from finetune_trainer.base_model import TOKENIZER_FILES, BaseModel
from finetune_trainer.data import prepared
from finetune_trainer.manifest import Manifest
from finetune_trainer.merge import LoraDeltas, Merge
from finetune_trainer.quantized import QuantizedWeights
from finetune_trainer.storage.files import FileFolder
from finetune_trainer.storage.s3 import S3Folder

ADAPTERS = ["Full", "LoRA", "QLoRA"]
Exported = Callable[[str], Report]
GetTrained = Callable[[str], Trained]
MakeJob = Callable[..., TestJob]


def published(job: TestJob, folder: Path) -> Path:
    """A copy of what is at output.uri."""
    for key in job.bucket.keys(f"{job.output}/"):
        if "/.finetune/" not in key:
            path = folder / key.removeprefix(f"{job.output}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(job.bucket.get(key))
    return folder


def manifest_of(job: TestJob) -> Manifest:
    return Manifest.model_validate(job.bucket.json(f"{job.output}/manifest.json"))


def logits(model: Any, job: TestJob) -> torch.Tensor:
    rows = prepared.read_rows(job.disk("train").data / prepared.VALIDATION_FILE)
    model.eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row["input_ids"]])).logits[0].float() for row in rows])


def load(folder: Path) -> Any:
    """As anybody would."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def clear_output(job: TestJob) -> None:
    job.bucket.delete(*[key for key in job.bucket.keys(f"{job.output}/") if "/.finetune/" not in key])


class TestPublishedModel:
    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_it_is_the_trained_model(
        self, trained: GetTrained, exported: Exported, adapter: str, tiny_model: Path, tmp_path: Path
    ) -> None:
        run, report = trained(adapter), exported(adapter)
        model = load(published(run.job, tmp_path))
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
        found, expected = logits(model, run.job), logits(run.trainer.model, run.job)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
        # And neither is the base.
        assert (found - logits(load(tiny_model), run.job)).abs().max() > 0.1
        assert report.verification is not None
        assert report.verification.positions > 100
        assert float(report.verification.mean_kl) < 1e-6

    def test_full_is_exact(self, trained: GetTrained, exported: Exported, tmp_path: Path) -> None:
        exported("Full")
        weights = load_file(published(trained("Full").job, tmp_path) / "model.safetensors")
        state = trained("Full").trainer.model.state_dict()
        assert all(torch.equal(weights[name], state[name]) for name in weights)

    @pytest.mark.parametrize("adapter", ["LoRA", "QLoRA"])
    def test_the_adapter_loads_on_the_base(
        self, trained: GetTrained, exported: Exported, adapter: str, tiny_model: Path, tmp_path: Path
    ) -> None:
        from peft import PeftModel

        exported(adapter)
        folder = published(trained(adapter).job, tmp_path)
        assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
            trained(adapter).job.spec.model.uri
        )
        model = PeftModel.from_pretrained(load(tiny_model), folder / "adapter")
        # QLoRA was trained on the base in 4 bits, so that here it is only near.
        tolerance = 2e-4 if adapter == "LoRA" else 0.5
        expected = logits(trained(adapter).trainer.model, trained(adapter).job)
        torch.testing.assert_close(logits(model, trained(adapter).job), expected, rtol=0, atol=tolerance)

    def test_tokenizer_and_stop_token(
        self, trained: GetTrained, exported: Exported, tiny_model: Path, tmp_path: Path
    ) -> None:
        exported("LoRA")
        folder = published(trained("LoRA").job, tmp_path)
        present = [name for name in TOKENIZER_FILES if (tiny_model / name).exists()]
        assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(present)
        assert all((folder / name).read_bytes() == (tiny_model / name).read_bytes() for name in present)
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["eos_token_id"] == 2
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == "float32"
        assert "quantization_config" not in config

    def test_the_model_card(self, trained: GetTrained, exported: Exported, tmp_path: Path) -> None:
        report = exported("QLoRA")
        card = (published(trained("QLoRA").job, tmp_path) / "README.md").read_text()
        assert card.startswith("---\nbase_model: ")
        assert report.evaluation is not None
        assert report.evaluation.tuned is not None
        assert f"| tuned | {report.evaluation.tuned.loss} |" in card
        assert "| base in 4 bits |" in card
        assert "48 rows were learnt" in card

    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_the_manifest_names_every_file(self, trained: GetTrained, exported: Exported, adapter: str) -> None:
        report = exported(adapter)
        job = trained(adapter).job
        manifest = manifest_of(job)
        present = {
            key.removeprefix(f"{job.output}/") for key in job.bucket.keys(f"{job.output}/") if "/.finetune/" not in key
        }
        assert {file.path for file in manifest.files} | {"manifest.json"} == present
        for file in manifest.files:
            data = job.bucket.get(f"{job.output}/{file.path}")
            assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest()), file.path
        artifacts = {artifact.name: artifact for artifact in report.artifacts or []}
        assert artifacts["Manifest"].sha256 == hashlib.sha256(job.bucket.get(f"{job.output}/manifest.json")).hexdigest()
        assert ("Adapter" in artifacts) == (adapter != "Full")
        assert sum(artifact.size_bytes or 0 for artifact in manifest.artifacts) == sum(f.size for f in manifest.files)

    def test_the_lineage(self, trained: GetTrained, exported: Exported) -> None:
        exported("QLoRA")
        job = trained("QLoRA").job
        manifest = manifest_of(job)
        lineage = manifest.lineage
        assert manifest.document_digest == job.document("export", 1, (1,)).digest
        assert manifest.job.uid == job.uid
        assert lineage.spec == job.spec.to_json_dict()
        assert lineage.base.uri == job.spec.model.uri
        assert lineage.data.train_sources[0].uri == job.spec.dataset.train[0].uri
        assert lineage.trained_against == "the base in NF4"
        assert lineage.total_steps == 12
        assert lineage.resolved["precision"] == "F32"
        assert {"torch", "trl", "peft"} <= lineage.versions.keys()

    def test_a_second_export_finds_the_first(
        self, trained: GetTrained, exported: Exported, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = exported("LoRA")
        job = trained("LoRA").job
        monkeypatch.setattr(S3Folder, "upload", None)  # would be called to publish again
        second = job.run("export", 2, (1,))
        assert (second.artifacts, second.evaluation) == (first.artifacts, first.evaluation)
        assert second.verification == first.verification


class TestPublishing:
    @pytest.fixture
    def job(self, trained: GetTrained) -> TestJob:
        """The trained LoRA job with nothing published; what it publishes is what the others expect."""
        job = trained("LoRA").job
        clear_output(job)
        return job

    def test_the_manifest_is_written_last(self, job: TestJob, moto: MotoServer) -> None:
        with Proxy(moto.endpoint) as proxy:
            job.storage = StorageSettings(endpoint=proxy.endpoint, path_style=True)
            try:
                job.run("export", 3, (1,))
            finally:
                job.storage = None
            written = [request.path for request in proxy.requests if request.method == "PUT"]
        assert len(written) > 5
        assert written[-1] == f"/{job.bucket.name}/{job.output}/manifest.json"
        assert written.count(written[-1]) == 1

    def test_a_crash_before_it_leaves_none(self, job: TestJob, monkeypatch: pytest.MonkeyPatch) -> None:
        write = S3Folder.write

        def crash(folder: S3Folder, key: str, data: bytes) -> None:
            if key == "manifest.json":
                raise KeyboardInterrupt
            write(folder, key, data)

        with monkeypatch.context() as patch:
            patch.setattr(S3Folder, "write", crash)
            with pytest.raises(KeyboardInterrupt):
                job.run("export", 4, (1,))
        keys = job.bucket.keys(job.output)
        assert f"{job.output}/model.safetensors" in keys
        assert f"{job.output}/manifest.json" not in keys
        # The next attempt publishes without training again.
        job.run("export", 5, (1,))
        assert len(manifest_of(job).files) > 5

    def test_a_file_that_vanishes_meanwhile(self, job: TestJob, monkeypatch: pytest.MonkeyPatch) -> None:
        upload = S3Folder.upload

        def lose(folder: S3Folder, path: Path, key: str, sha256: str | None = None) -> Any:
            info = upload(folder, path, key, sha256)
            if key == "config.json":
                folder.delete([key])
            return info

        monkeypatch.setattr(S3Folder, "upload", lose)
        with pytest.raises(JobError, match=r"config\.json is not there as it was uploaded") as caught:
            job.run("export", 6, (1,))
        assert caught.value.failure_class is FailureClass.STORAGE_UNAVAILABLE
        assert f"{job.output}/manifest.json" not in job.bucket.keys(job.output)

    def test_a_merge_that_is_not_the_trained_model(self, job: TestJob, monkeypatch: pytest.MonkeyPatch) -> None:
        delta = LoraDeltas.delta
        monkeypatch.setattr(LoraDeltas, "delta", lambda self, name: 3 * delta(self, name))
        with pytest.raises(JobError, match=r"The merged model is not the trained one: mean KL .* allowed") as caught:
            job.run("export", 7, (1,))
        assert caught.value.failure_class is FailureClass.VERIFICATION_FAILED
        assert "Nothing was published" in caught.value.message
        assert [key for key in job.bucket.keys(f"{job.output}/") if "/.finetune/" not in key] == []

    def test_a_trained_model_that_was_deleted(self, make_job: MakeJob) -> None:
        job = make_job()
        job.run("prepare")
        with pytest.raises(JobError, match="the trained model was deleted") as caught:
            job.run("export", 1, (1,))
        assert caught.value.failure_class is FailureClass.NOT_FOUND


def test_training_that_changed_nothing(train: Callable[..., Trained]) -> None:
    run = train(hyperparameters={"maxSteps": 1, "learningRate": "0"})
    with pytest.raises(JobError, match=r"training changed nothing\. Raise hyperparameters\.learningRate") as caught:
        run.job.run("export", 1, (1,))
    assert caught.value.failure_class is FailureClass.VERIFICATION_FAILED


def test_a_model_that_changed_after_training(train: Callable[..., Trained], inputs: Bucket, tiny_model: Path) -> None:
    inputs.put_folder("replaced-model", tiny_model)
    run = train(model={"uri": inputs.uri("replaced-model")}, hyperparameters={"maxSteps": 1})
    inputs.put("replaced-model/tokenizer_config.json", b"{}")
    with pytest.raises(JobError, match="changed while the job ran") as caught:
        run.job.run("export", 1, (1,))
    assert caught.value.failure_class is FailureClass.MODEL_CHANGED
    assert "manifest.json" not in str(run.job.bucket.keys(f"{run.job.output}/manifest.json"))


def test_the_adapter_alone(train: Callable[..., Trained], tmp_path: Path) -> None:
    run = train(
        method={"adapter": {"type": "QLoRA"}}, hyperparameters={"maxSteps": 1}, output={"artifacts": ["Adapter"]}
    )
    report = run.job.run("export", 1, (1,))
    folder = published(run.job, tmp_path)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "manifest.json",
    ]
    assert [artifact.name for artifact in report.artifacts or []] == ["Adapter", "Manifest"]
    assert report.verification is None
    assert manifest_of(run.job).lineage.trained_against == "the base in NF4"


@pytest.mark.parametrize(
    ("base", "asked", "expected"),
    [("bfloat16", "Auto", torch.bfloat16), ("float32", "BF16", torch.bfloat16), ("float32", "F16", torch.float16)],
)
def test_number_formats(
    train: Callable[..., Trained],
    inputs: Bucket,
    tiny_model: Path,
    tmp_path: Path,
    base: str,
    asked: str,
    expected: torch.dtype,
) -> None:
    uri = inputs.uri("model")
    if base != "float32":
        inputs.put_folder("model-16", save_tiny_model(tmp_path / "base", dtype=base))
        uri = inputs.uri("model-16")
    run = train(
        model={"uri": uri},
        method={"adapter": {"type": "QLoRA"}},
        hyperparameters={"maxSteps": 2},
        output={"dtype": asked},
    )
    report = run.job.run("export", 1, (1,))
    model = load(published(run.job, tmp_path / "published"))
    assert {tensor.dtype for tensor in model.parameters()} == {expected}
    assert report.verification is not None
    assert 0 <= float(report.verification.mean_kl) < 1e-3


class TestOverwriting:
    def publish(self, train: Callable[..., Trained], uri: str, seed: int) -> TestJob:
        run = train(
            hyperparameters={"maxSteps": 1, "seed": seed},
            output={"uri": uri, "onExisting": "Overwrite", "artifacts": ["Merged"]},
        )
        run.job.run("export", 1, (1,))
        return run.job

    def test_files_of_the_old_model_are_removed(
        self, train: Callable[..., Trained], inputs: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        uri = inputs.uri("out/overwritten")
        with monkeypatch.context() as patch:
            patch.setattr("finetune_trainer.stages.export.write_model", sharded_writer())
            old = self.publish(train, uri, seed=1)
        assert "model.safetensors.index.json" in {file.path for file in manifest_of(old).files}
        inputs.put("out/overwritten/notes.txt", b"mine")
        new = self.publish(train, uri, seed=2)
        folder = published(new, tmp_path)
        assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
        assert (folder / "notes.txt").read_bytes() == b"mine"
        assert manifest_of(new).job.uid == new.uid
        load(folder)

    def test_a_model_without_a_manifest_does_not_shadow_the_new_one(
        self, train: Callable[..., Trained], inputs: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """A loader takes model.safetensors before shards, and an adapter_config.json for an adapter to load."""
        other = save_tiny_model(tmp_path / "other", seed=9)
        inputs.put_folder("out/shadowed", other)
        inputs.put("out/shadowed/adapter_config.json", b"{}")
        inputs.put("out/shadowed/notes.txt", b"mine")
        monkeypatch.setattr("finetune_trainer.stages.export.write_model", sharded_writer())
        job = self.publish(train, inputs.uri("out/shadowed"), seed=1)
        folder = published(job, tmp_path / "published")
        assert not (folder / "model.safetensors").exists()
        assert not (folder / "adapter_config.json").exists()
        assert (folder / "notes.txt").exists()
        found = load(folder).state_dict()
        assert not torch.equal(
            found["model.layers.0.mlp.up_proj.weight"], load(other).state_dict()["model.layers.0.mlp.up_proj.weight"]
        )


def sharded_writer() -> Callable[..., None]:
    """Writes models in small shards."""
    from finetune_trainer.shards import write_model

    return lambda tensors, specs, folder: write_model(tensors, specs, folder, max_shard_bytes=200_000)


class TestAlreadyPublished:
    @pytest.fixture(scope="class")
    @staticmethod
    def first(train: Callable[..., Trained]) -> TestJob:
        run = train(hyperparameters={"maxSteps": 1, "seed": 5})
        run.job.run("export", 1, (1,))
        return run.job

    def again(self, first: TestJob, uid: str) -> TestJob:
        """Another job of the same specification."""
        return TestJob(first.bucket, first.root, first.spec, uid, name="again")

    def test_nothing_is_done_again(self, first: TestJob) -> None:
        job = self.again(first, "uid-again")
        report = job.run("prepare")
        manifest = manifest_of(first)
        assert report.already_published is True
        assert [a.name for a in report.artifacts or []] == ["Merged", "Adapter", "Manifest"]
        assert (report.evaluation, report.verification) == (manifest.evaluation, manifest.verification)
        before = {key: job.bucket.get(key) for key in job.bucket.keys(f"{job.output}/") if "/uid-again/" not in key}
        for stage, earlier in (("train", ()), ("export", (1,))):
            run = job.agent(stage, 1, earlier)
            assert run.wait() == 0, run.text()
            assert run.report.outcome is Outcome.SUCCEEDED
        assert run.report.artifacts == report.artifacts
        after = {key: job.bucket.get(key) for key in job.bucket.keys(f"{job.output}/") if "/uid-again/" not in key}
        assert before == after
        assert [key for key in job.bucket.keys(f"{job.work}/train/") if "checkpoints" in key or "final" in key] == []

    def test_touched_files_are_no_result(self, first: TestJob) -> None:
        key = f"{first.output}/config.json"
        data = first.bucket.get(key)
        first.bucket.put(key, data + b" ")
        try:
            with pytest.raises(JobError) as caught:
                self.again(first, "uid-touched").run("prepare")
        finally:
            first.bucket.put(key, data)
        assert caught.value.failure_class is FailureClass.OUTPUT_EXISTS
        assert "already holds the model of job team-a/ticket-bot" in caught.value.message
        assert "set output.onExisting to Overwrite" in caught.value.message

    def test_another_specification_is_refused(self, first: TestJob) -> None:
        job = self.again(first, "uid-other")
        job.spec = job.spec.model_copy(
            update={"hyperparameters": job.spec.hyperparameters.model_copy(update={"seed": 6})}
        )
        with pytest.raises(JobError) as caught:
            job.run("prepare")
        assert caught.value.failure_class is FailureClass.OUTPUT_EXISTS

    def test_a_published_model_that_is_gone(self, first: TestJob) -> None:
        job = self.again(first, "uid-gone")
        job.run("prepare")
        key = f"{first.output}/manifest.json"
        data = first.bucket.get(key)
        first.bucket.delete(key)
        try:
            with pytest.raises(JobError, match="was there when the job was prepared and is gone") as caught:
                job.run("export", 1, (1,))
        finally:
            first.bucket.put(key, data)
        assert caught.value.failure_class is FailureClass.NOT_FOUND


class TestMerge:
    """Tensor by tensor, as peft does it in memory."""

    @pytest.fixture
    def sharded(self, tiny_model: Path, tmp_path: Path) -> BaseModel:
        shutil.copytree(tiny_model, tmp_path / "base")
        model = load(tmp_path / "base")
        (tmp_path / "base" / "model.safetensors").unlink()
        model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
        return BaseModel(FileFolder(str(tmp_path / "base")))

    def merged(self, base: BaseModel, run: Trained, tmp_path: Path) -> dict[str, torch.Tensor]:
        final = run.job.bucket.fetch_folder(run.final, tmp_path / "final")
        quantized = QuantizedWeights(final / "quantized") if (final / "quantized").is_dir() else None
        disk = tmp_path / "disk"
        merge = Merge(base, LoraDeltas(final / "adapter"), quantized, "F32", disk)
        found = {spec.name: tensor for spec, tensor in merge.tensors()}
        assert [spec.name for spec in merge.specs] == list(found)
        # Base files are fetched one by one and removed.
        assert not disk.exists() or list(disk.iterdir()) == []
        return found

    def test_lora(self, sharded: BaseModel, trained: GetTrained, tiny_model: Path, tmp_path: Path) -> None:
        from peft import PeftModel

        assert len(sharded.shards) > 2
        found = self.merged(sharded, trained("LoRA"), tmp_path)
        expected = PeftModel.from_pretrained(load(tiny_model), tmp_path / "final" / "adapter").merge_and_unload()
        for name, tensor in expected.state_dict().items():
            if name in found:
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
        assert found.keys() == {tensor.name for tensor in sharded.tensors}

    def test_qlora(self, sharded: BaseModel, trained: GetTrained, tmp_path: Path) -> None:
        """Into the base as bitsandbytes itself dequantises it."""
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit

        found = self.merged(sharded, trained("QLoRA"), tmp_path)
        deltas = LoraDeltas(tmp_path / "final" / "adapter")
        seen = 0
        for name, module in trained("QLoRA").trainer.model.named_modules():
            if isinstance(module, Linear4bit):
                weight = f"{name.removeprefix('base_model.model.').removesuffix('.base_layer')}.weight"
                base = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
                torch.testing.assert_close(found[weight], base + deltas.delta(weight), rtol=0, atol=1e-6, msg=weight)
                seen += 1
        assert seen == 14

    def test_an_adapter_of_another_model(self, sharded: BaseModel, tmp_path: Path) -> None:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
        tensors = {f"base_model.model.other.lora_{x}.weight": torch.ones(1, 1) for x in "AB"}
        save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
        with pytest.raises(
            JobError, match=r"changes other\.weight, which the base model's files do not hold"
        ) as caught:
            Merge(sharded, LoraDeltas(tmp_path / "adapter"), None, "F32", tmp_path / "disk")
        assert caught.value.failure_class is FailureClass.MODEL_ERROR
        assert "Publish the adapter alone" in caught.value.message


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A model of 600 MB is merged and run in a fraction of that."""
    base = tmp_path / "base"
    config = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
    config["num_key_value_heads"] = 16
    save_big_model(base, config)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert size > 600_000_000
    (tmp_path / "output").mkdir()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    modules = [f"model.layers.{n}.self_attn.{name}" for n in range(12) for name in ("q_proj", "o_proj")]
    tensors = {
        f"base_model.model.{module}.lora_{x}.weight": torch.ones(*shape)
        for module in modules
        for x, shape in (("A", (2, 1024)), ("B", (1024, 2)))
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    script = Path(__file__).parent / "merge_in_bounded_memory.py"
    done = subprocess.run(
        [sys.executable, str(script), str(base), str(adapter), str(tmp_path / "output")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    assert sum(path.stat().st_size for path in (tmp_path / "output").glob("*.safetensors")) > 600_000_000
    assert peak["merged"] - peak["start"] < size / 2
    assert peak["verified"] - peak["start"] < size / 2


def save_big_model(folder: Path, config: dict[str, int]) -> None:
    """A Llama of zeros and ones in several files, without ever being built in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    from finetune_trainer.shards import TensorSpec, write_model

    folder.mkdir()
    settings = LlamaConfig(vocab_size=1000, tie_word_embeddings=True, **config)
    settings.architectures = ["LlamaForCausalLM"]
    settings.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    specs = [
        TensorSpec(name, "F32", tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    ]
    write_model(((spec, torch.ones(spec.shape)) for spec in specs), specs, folder, max_shard_bytes=100_000_000)


class TestTwoJobsWithOneOutput:
    """Both found the folder free when they were prepared."""

    def test_the_second_does_not_replace_the_first(self, train: Callable[..., Trained], inputs: Bucket) -> None:
        uri = inputs.uri("out/shared-by-two")
        first, second = (train(output={"uri": uri}, hyperparameters={"maxSteps": 1, "seed": n}).job for n in (1, 2))
        first.run("export", 1, (1,))
        before = manifest_of(first)
        with pytest.raises(JobError) as caught:
            second.run("export", 1, (1,))
        assert caught.value.failure_class is FailureClass.OUTPUT_EXISTS
        assert manifest_of(first) == before
        for file in before.files:
            assert hashlib.sha256(inputs.get(f"{first.output}/{file.path}")).hexdigest() == file.sha256

    def test_files_that_another_export_wrote_meanwhile_are_not_published(
        self, train: Callable[..., Trained], inputs: Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = train(output={"uri": inputs.uri("out/mixed")}, hyperparameters={"maxSteps": 1}).job
        original = S3Folder.upload

        def upload(folder: S3Folder, path: Path, key: str, sha256: str | None = None) -> Any:
            info = original(folder, path, key, sha256)
            if key == "tokenizer.json":
                # The weights were uploaded before it; the other job's have the same size.
                inputs.put(f"{job.output}/model.safetensors", bytes(len(inputs.get(f"{job.output}/model.safetensors"))))
            return info

        monkeypatch.setattr(S3Folder, "upload", upload)
        with pytest.raises(JobError, match="Does another job write to the folder") as caught:
            job.run("export", 1, (1,))
        assert caught.value.failure_class is FailureClass.STORAGE_UNAVAILABLE
        assert f"{job.output}/manifest.json" not in inputs.keys(job.output)
