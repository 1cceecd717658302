"""Rows of preferences: two answers to a prompt of which one is better, or an answer that is good or bad.

`{"prompt": …, "chosen": …, "rejected": …}` or `{"prompt": …, "completion": …, "label": true}`; prompt and answers are
strings, or lists of messages; an answer is one assistant message.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune_api.spec import Columns, DataFormat
from finetune_trainer.data.formats import Conversation, RowFormat
from finetune_trainer.data.prepared import LabelledRow, PairRow
from finetune_trainer.data.render import IGNORED, Renderer, TokenRow
from finetune_trainer.data.rows import Row, RowError

_CHAT = RowFormat(DataFormat.CHAT, Columns(messages="messages"))


def pair_row(row: Row, renderer: Renderer) -> PairRow:
    """
    Raises:
        RowError: the row cannot be used.
    """
    chosen = _rendered(_conversation(row, "chosen"), renderer)
    rejected = _rendered(_conversation(row, "rejected"), renderer)
    if chosen == rejected:
        raise RowError("has the same answer as chosen and rejected")
    # A tokenizer may join the end of the prompt with the beginning of an answer. Such a token belongs to the answer.
    start = min(_start(chosen), _start(rejected), _common(chosen.input_ids, rejected.input_ids))
    return PairRow(chosen.input_ids[:start], chosen.input_ids[start:], rejected.input_ids[start:])


def labelled_row(row: Row, renderer: Renderer) -> LabelledRow:
    """
    Raises:
        RowError: the row cannot be used.
    """
    label = row.value.get("label")
    if isinstance(label, str):
        # A cell of a CSV file.
        label = {"true": True, "false": False, "1": True, "0": False}.get(label.strip().lower())
    if label not in (True, False):
        raise RowError("'label' is neither true nor false" if "label" in row.value else "has no 'label'")
    rendered = _rendered(_conversation(row, "completion"), renderer)
    start = _start(rendered)
    return LabelledRow(rendered.input_ids[:start], rendered.input_ids[start:], bool(label))


def _conversation(row: Row, column: str) -> Conversation:
    """The prompt with one answer, of which only the answer is learnt."""
    prompt, answer = _messages(row, "prompt", "user"), _messages(row, column, "assistant")
    if len(answer) != 1:
        raise RowError(f"{column!r} is not one message")
    *before, last = _CHAT.parse(Row(row.file, row.number, {"messages": [*prompt, *answer]})).messages
    if before[-1].role == "assistant":
        raise RowError("'prompt' ends with an assistant turn")
    return Conversation((*(replace(message, learnt=False) for message in before), replace(last, learnt=True)))


def _messages(row: Row, column: str, role: str) -> list[Any]:
    value = row.value.get(column)
    if value is None:
        raise RowError(f"has no {column!r}")
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{column!r} is empty")
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise RowError(f"{column!r} is neither a string nor a list of messages")
    return value


def _rendered(conversation: Conversation, renderer: Renderer) -> TokenRow:
    """Up to the stop token of the answer: what some templates write behind it is never generated."""
    (row,) = renderer.rows(conversation)
    end = max(i for i, label in enumerate(row.labels) if label != IGNORED) + 1
    return TokenRow(row.input_ids[:end], row.labels[:end])


def _start(row: TokenRow) -> int:
    return next(i for i, label in enumerate(row.labels) if label != IGNORED)


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
