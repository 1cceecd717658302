"""Understand a row: chat messages, Alpaca, question and answer, or plain text become a `Conversation` or a `Text`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import Columns, DataFormat
from finetune_trainer.data.rows import Row, RowError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    learnt: bool = True
    """False for an assistant turn with OpenAI's "weight": 0."""


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Text:
    text: str


Example = Conversation | Text

_DEFAULT_COLUMNS = {
    DataFormat.CHAT: Columns(messages="messages"),
    DataFormat.ALPACA: Columns(prompt="instruction", completion="output", input="input", system="system"),
    DataFormat.QUESTION_ANSWER: Columns(prompt="question", completion="answer"),
    DataFormat.TEXT: Columns(text="text"),
}
_PROMPT_COMPLETION = Columns(prompt="prompt", completion="completion")


@dataclass(frozen=True)
class RowFormat:
    """A format with its columns: all that is needed to understand a row."""

    format: DataFormat
    columns: Columns

    def parse(self, row: Row) -> Example:
        """
        Raises:
            RowError: the row does not have this shape.
        """
        if self.columns.messages:
            return _parse_chat(row.value, self.columns.messages)
        if self.columns.text:
            return Text(_string(row.value, self.columns.text))
        return _parse_prompt_completion(row.value, self.columns)


def row_format(asked: DataFormat, columns: Columns | None, first: Row) -> RowFormat:
    """The format of a file: the one asked for, or the one its first row shows.

    Raises:
        JobError: DataError, when it cannot be found out.
    """
    if asked is not DataFormat.AUTO:
        return RowFormat(asked, columns or _DEFAULT_COLUMNS[asked])
    keys = first.value.keys()
    if "messages" in keys:
        found = DataFormat.CHAT
    elif {"instruction", "output"} <= keys:
        found = DataFormat.ALPACA
    elif {"question", "answer"} <= keys:
        found = DataFormat.QUESTION_ANSWER
    elif {"prompt", "completion"} <= keys:
        return RowFormat(DataFormat.QUESTION_ANSWER, _PROMPT_COMPLETION)
    elif "text" in keys:
        found = DataFormat.TEXT
    else:
        shown = ", ".join(sorted(str(key) for key in keys)[:12]) or "none"
        raise JobError(
            FailureClass.DATA_ERROR,
            f"{first.file}: the format cannot be found out from the columns ({shown}). Set dataset.format and "
            "dataset.columns.",
        )
    return RowFormat(found, _DEFAULT_COLUMNS[found])


def _string(value: dict[str, Any], column: str, *, optional: bool = False) -> str:
    text = value.get(column)
    if text is None:
        if optional:
            return ""
        raise RowError(f"has no {column!r}")
    if not isinstance(text, str):
        raise RowError(f"{column!r} is not a string")
    if not text.strip() and not optional:
        raise RowError(f"{column!r} is empty")
    return _characters(text)


def _characters(text: str) -> str:
    """JSON can escape half of a surrogate pair, as is left of an emoji that was cut; no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("has text with half a surrogate pair, which is no character") from error
    return text


def _parse_prompt_completion(value: dict[str, Any], columns: Columns) -> Conversation:
    assert columns.prompt is not None
    assert columns.completion is not None
    prompt = _string(value, columns.prompt)
    completion = _string(value, columns.completion)
    context = _string(value, columns.input, optional=True) if columns.input else ""
    system = _string(value, columns.system, optional=True) if columns.system else ""
    messages = [Message("user", f"{prompt}\n\n{context}" if context.strip() else prompt)]
    if system.strip():
        messages.insert(0, Message("system", system))
    return Conversation((*messages, Message("assistant", completion)))


def _parse_chat(value: dict[str, Any], column: str) -> Conversation:
    raw = value.get(column)
    if isinstance(raw, str):
        # A CSV cell holds the list as JSON text.
        try:
            raw = json.loads(raw)
        except ValueError as error:
            raise RowError(f"{column!r} is not a list of messages") from error
    if not isinstance(raw, list):
        raise RowError(f"{column!r} is not a list of messages" if column in value else f"has no {column!r}")
    if not raw:
        raise RowError(f"{column!r} is empty")
    if value.get("tools") or value.get("functions"):
        raise RowError("has tools, which are not supported yet")
    messages = tuple(_parse_message(message) for message in raw)
    if messages[-1].role != "assistant":
        raise RowError("does not end with an assistant turn")
    if next((message.role for message in messages if message.role != "system"), "") != "user":
        raise RowError("does not begin with a user turn")
    if any(message.role == "system" for message in messages[1:]):
        raise RowError("has a system message that is not the first one")
    if not any(message.learnt for message in messages if message.role == "assistant"):
        raise RowError("has no assistant turn to learn from (all have weight 0)")
    return Conversation(messages)


def _parse_message(raw: Any) -> Message:
    if not isinstance(raw, dict):
        raise RowError("has a message that is not an object")
    role = raw.get("role")
    if role not in ROLES:
        raise RowError("has a message whose role is none of system, user and assistant")
    if raw.get("tool_calls") or raw.get("function_call"):
        raise RowError("has tool calls, which are not supported yet")
    content = raw.get("content")
    if not isinstance(content, str):
        raise RowError(f"has a message of the {role} whose content is not a string")
    if not content.strip():
        raise RowError(f"has a message of the {role} without content")
    _characters(content)
    weight = raw.get("weight", 1)
    if weight not in (0, 1):
        raise RowError("has a message whose weight is neither 0 nor 1")
    unknown = {key for key, item in raw.items() if item is not None} - {"role", "content", "weight", "name"}
    if unknown:
        raise RowError(f"has a message with the unknown key {min(unknown)!r}")
    return Message(role, content, learnt=bool(weight))
