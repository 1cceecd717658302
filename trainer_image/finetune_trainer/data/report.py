"""The data report: what prepare read, what it made of it, and what of it the model learns, for a person to look at."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from finetune_api import SCHEMA_VERSION
from finetune_api.base import ApiModel
from finetune_api.spec import MethodType
from finetune_trainer.data import prepared
from finetune_trainer.data.pipeline import ROWS, PreparedData
from finetune_trainer.data.prepared import SetSummary
from finetune_trainer.data.render import Renderer
from finetune_trainer.data.token_rows import IGNORED, LabelledRow, PairRow, PreparedRow, TokenRow, answered

SAMPLES = 3
SAMPLE_CHARACTERS = 3000
"""Of a sample in the Markdown; the JSON has all of it."""
LEARNT = ("⟦", "⟧")
"""Around what is learnt, in the Markdown."""


class Source(ApiModel):
    uri: str
    format: str
    rows: int
    """Rows that were read, whether or not they could be used."""
    examples: int
    """Rows that can be used."""
    weight: str = "1"


class Lengths(ApiModel):
    """Of the longest sequence that a model sees of each row, in tokens."""

    median: int
    percentile_90: int
    percentile_99: int
    longest: int
    histogram: dict[str, int]
    """Rows by length: "65-128" and so on."""


class Rows(ApiModel):
    rows: int
    tokens: int
    supervised_tokens: int
    lengths: Lengths


class BadRows(ApiModel):
    count: int
    reasons: dict[str, int]
    examples: list[str]
    """The first ones, by file and number of the row."""


class Overlong(ApiModel):
    """Examples that were longer than dataset.maxLength, where that is no fault."""

    examples: int
    dropped: int
    """Examples, or turns of them, that were left out."""
    truncated_rows: int
    truncated_tokens: int


class Segment(ApiModel):
    text: str
    learnt: bool


class Sample(ApiModel):
    row: int
    """Place in the train set, from 0."""
    answer: str | None = None
    """Chosen, rejected, good or bad, where answers are judged."""
    segments: list[Segment]


class DataReport(ApiModel):
    schema_version: int = SCHEMA_VERSION
    model: str
    method: str
    max_length: int
    stop_tokens: list[str]
    """What ends an answer."""
    train: Rows
    validation: Rows
    train_sources: list[Source]
    validation_sources: list[Source]
    bad_rows: BadRows
    overlong: Overlong
    split_conversations: int
    """Conversations that became one row for each assistant turn, because the template rewrites earlier turns."""
    duplicates: int
    """Train examples that are equal to another one before them, and are not in the validation set."""
    duplicates_removed: bool
    leaked: int
    """Train examples that are in the validation set, too; they are not learnt."""
    samples: list[Sample]

    def encode(self) -> bytes:
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=1).encode()


def build(
    data: PreparedData,
    renderer: Renderer,
    *,
    model: str,
    method: MethodType,
    weights: list[str],
    duplicates_removed: bool,
    train: Path,
    validation: Path,
    seed: int,
) -> DataReport:
    """Of both sets as they were written. `weights` are those of the train sources."""
    counts, problems = renderer.counts, data.problems
    return DataReport(
        model=model,
        method=method.value,
        max_length=renderer.max_length,
        stop_tokens=[_token(renderer.tokenizer, token) for token in renderer.stop_ids],
        train=_rows(data.train, train),
        validation=_rows(data.validation, validation),
        train_sources=[
            Source(**vars(source), weight=weight) for source, weight in zip(data.train_sources, weights, strict=True)
        ],
        validation_sources=[Source(**vars(source)) for source in data.validation_sources],
        bad_rows=BadRows(
            count=problems.count, reasons=dict(problems.reasons.most_common()), examples=[*map(str, problems.examples)]
        ),
        overlong=Overlong(
            examples=counts.overlong,
            dropped=counts.dropped,
            truncated_rows=counts.truncated,
            truncated_tokens=counts.truncated_tokens,
        ),
        split_conversations=counts.split_conversations,
        duplicates=data.duplicates,
        duplicates_removed=duplicates_removed,
        leaked=data.leaked,
        samples=[*_samples(train, data.train.rows, method, renderer.tokenizer, seed)],
    )


def _token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Some models name stop tokens that their tokenizer does not have."""
    found = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
    return str(found or f"({token})")


def _rows(summary: SetSummary, path: Path) -> Rows:
    lengths = _lengths(path)
    median, ninety, ninety_nine = np.percentile(lengths, (50, 90, 99), method="higher") if len(lengths) else (0, 0, 0)
    # Bucket n holds the lengths above 2^(n-1) and up to 2^n.
    buckets = Counter(max(5, (int(length) - 1).bit_length()) for length in lengths)
    named = {f"{(1 << n - 1) + 1 if n > 5 else 1}-{1 << n}": buckets[n] for n in sorted(buckets)}
    return Rows(
        rows=summary.rows,
        tokens=summary.tokens,
        supervised_tokens=summary.supervised_tokens,
        lengths=Lengths(
            median=int(median),
            percentile_90=int(ninety),
            percentile_99=int(ninety_nine),
            longest=summary.longest,
            histogram=named,
        ),
    )


def _lengths(path: Path) -> npt.NDArray[np.int32]:
    """Of the longest sequence of each row, without reading the tokens."""
    parts: list[npt.NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
    for batch in prepared.batches(path):
        length = {name: _list_lengths(batch, name) for name in batch.schema.names if name not in ("labels", "label")}
        prompt = length.pop("prompt_ids", np.int32(0))
        parts.append(prompt + np.maximum.reduce([*length.values()]))
    return np.concatenate(parts)


def _list_lengths(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.int32]:
    return np.asarray(pc.list_value_length(batch.column(name)))


def _samples(
    path: Path, rows: int, method: MethodType, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[Sample]:
    stored = prepared.read_rows(path)
    for place in sorted(random.Random(seed).sample(range(rows), min(SAMPLES, rows))):
        for answer, sequence in _sequences(ROWS[method](**stored[place])):
            yield Sample(row=place, answer=answer, segments=[*_segments(sequence, tokenizer)])


def _sequences(row: PreparedRow) -> list[tuple[str | None, TokenRow]]:
    match row:
        case TokenRow():
            return [(None, row)]
        case PairRow():
            return [
                ("chosen", answered(row.prompt_ids, row.chosen_ids)),
                ("rejected", answered(row.prompt_ids, row.rejected_ids)),
            ]
        case LabelledRow():
            return [("good" if row.label else "bad", answered(row.prompt_ids, row.completion_ids))]


def _segments(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> Iterator[Segment]:
    pairs = zip(row.input_ids, row.labels, strict=True)
    for learnt, tokens in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        yield Segment(text=tokenizer.decode([token for token, _ in tokens]), learnt=learnt)


# For people


def to_markdown(report: DataReport) -> str:
    lines = ["# Data report", "", f"For method {report.method} with the tokenizer of `{report.model}`.", ""]
    lines += ["| | train | validation |", "|---|---:|---:|"]
    both = (report.train, report.validation)
    for name, values in (
        ("rows", [rows.rows for rows in both]),
        ("tokens", [rows.tokens for rows in both]),
        ("tokens that are learnt", [rows.supervised_tokens for rows in both]),
        ("median length", [rows.lengths.median for rows in both]),
        ("90 of 100 rows are no longer than", [rows.lengths.percentile_90 for rows in both]),
        ("99 of 100 rows are no longer than", [rows.lengths.percentile_99 for rows in both]),
        ("longest row", [rows.lengths.longest for rows in both]),
    ):
        lines.append(f"| {name} | {values[0]:,} | {values[1]:,} |")
    lines += ["", "## Sources", "", "| source | format | rows | usable | weight |", "|---|---|---:|---:|---:|"]
    for source in report.train_sources:
        lines.append(f"| `{source.uri}` | {source.format} | {source.rows:,} | {source.examples:,} | {source.weight} |")
    for source in report.validation_sources:
        lines.append(f"| `{source.uri}` (validation) | {source.format} | {source.rows:,} | {source.examples:,} | |")
    lines += ["", "## What was not taken as it is", "", *_remarks(report)]
    if report.bad_rows.count:
        lines += ["", "| rows that cannot be used | reason |", "|---:|---|"]
        lines += [f"| {count:,} | {_cell(reason)} |" for reason, count in report.bad_rows.reasons.items()]
        lines += ["", *(f"- {_cell(example)}" for example in report.bad_rows.examples)]
    lines += ["", "## Lengths", "", "| tokens | train rows | validation rows |", "|---|---:|---:|"]
    train, validation = (rows.lengths.histogram for rows in both)
    for bucket in sorted(train.keys() | validation.keys(), key=lambda name: int(name.partition("-")[0])):
        lines.append(f"| {bucket} | {train.get(bucket, 0):,} | {validation.get(bucket, 0):,} |")
    lines += ["", "## Samples", "", f"What is learnt is between {LEARNT[0]} and {LEARNT[1]}."]
    for sample in report.samples:
        answer = f", {sample.answer} answer" if sample.answer else ""
        text = "".join(f"{LEARNT[0]}{s.text}{LEARNT[1]}" if s.learnt else s.text for s in sample.segments)
        if len(text) > SAMPLE_CHARACTERS:
            text = f"{text[:SAMPLE_CHARACTERS]}… ({len(text) - SAMPLE_CHARACTERS:,} more characters)"
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        lines += ["", f"Train row {sample.row}{answer}:", "", f"{fence}text", text, fence]
    return "\n".join(lines) + "\n"


def _remarks(report: DataReport) -> list[str]:
    overlong = report.overlong
    said = [
        (report.bad_rows.count, "rows cannot be used and were left out"),
        (overlong.examples, f"examples were longer than {report.max_length:,} tokens"),
        (
            overlong.dropped,
            "examples or parts of them were left out because they were too long, or too short to learn from",
        ),
        (overlong.truncated_rows, f"rows were cut, {overlong.truncated_tokens:,} tokens in all"),
        (report.leaked, "train examples are in the validation set, too, and are not learnt"),
        (
            report.duplicates,
            "train examples are equal to another one, "
            + ("and were removed" if report.duplicates_removed else "and are learnt as often as they are there"),
        ),
        (
            report.split_conversations,
            "conversations became one row for each assistant turn, because the chat template rewrites earlier turns",
        ),
    ]
    remarks = [f"- {count:,} {text}." for count, text in said if count]
    return remarks or ["Nothing: every row is learnt or measured as it was found."]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
