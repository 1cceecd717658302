"""Understand a row: each format with its columns makes one kind of example out of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import Columns, DataFormat
from finetune_trainer.data.examples import Conversation, Example, Judged, Message, Preference, Text
from finetune_trainer.data.messages import (
    characters,
    message_list,
    messages_in,
    parse_messages,
    parse_tools,
    require_conversation,
)
from finetune_trainer.data.rows import Row, RowError

USUAL_COLUMNS = {
    DataFormat.CHAT: Columns(messages="messages", system="system", tools="tools"),
    DataFormat.SHAREGPT: Columns(messages="conversations", system="system", tools="tools"),
    DataFormat.ALPACA: Columns(prompt="instruction", completion="output", input="input", system="system"),
    DataFormat.QUESTION_ANSWER: Columns(prompt="question", completion="answer", system="system"),
    DataFormat.PROMPT_COMPLETION: Columns(prompt="prompt", completion="completion", system="system", tools="tools"),
    DataFormat.TEXT: Columns(text="text"),
    DataFormat.PREFERENCE: Columns(chosen="chosen", rejected="rejected", system="system", tools="tools"),
    DataFormat.UNPAIRED_PREFERENCE: Columns(completion="completion", label="label", system="system", tools="tools"),
}
"""What the columns of a format are called when nobody says otherwise."""
PROMPTS = ("prompt", "question", "instruction")
CONVERSATIONS = ("messages", "conversations")
LABELS = ("label", "kto_tag")
OPENAI_PREFERENCE = {"input", "preferred_output", "non_preferred_output"}
DIALOGUE = re.compile(r"\n\n(Human|Assistant): ?")
"""How the oldest preference sets write a conversation into one string."""


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
        match self.format:
            case DataFormat.TEXT:
                assert self.columns.text is not None
                return Text(_string(row.value, self.columns.text))
            case DataFormat.CHAT | DataFormat.SHAREGPT:
                return _parse_conversation(row.value, self.columns)
            case DataFormat.PREFERENCE:
                return _parse_preference(row.value, self.columns)
            case DataFormat.UNPAIRED_PREFERENCE:
                return _parse_judged(row.value, self.columns)
            case _:
                prompt, completion = _parse_answer(row.value, self.columns)
                return replace(prompt, messages=(*prompt.messages, *completion))


def row_format(asked: DataFormat, columns: Columns | None, first: Row) -> RowFormat:
    """The format of a file: the one asked for, or the one its first row shows. Columns that were not named have their
    usual names.

    Raises:
        JobError: DataError, when it cannot be found out.
    """
    keys = first.value.keys()
    found = asked if asked is not DataFormat.AUTO else _format_of(keys)
    if found is None:
        # A CSV file without a header has a row in its place.
        shown = ", ".join(sorted(str(key)[:40] for key in keys)[:12]) or "none"
        raise JobError(
            FailureClass.DATA_ERROR,
            f"{first.file}: the format cannot be found out from the columns ({shown}). Set dataset.format and "
            "dataset.columns.",
        )
    named = columns.model_dump(exclude_none=True) if columns else {}
    return RowFormat(found, _usual(found, keys, named).model_copy(update=named))


def _format_of(keys: Any) -> DataFormat | None:
    if keys >= {"chosen", "rejected"} or keys >= OPENAI_PREFERENCE:
        return DataFormat.PREFERENCE
    spoken = any(name in keys for name in CONVERSATIONS)
    if any(name in keys for name in LABELS) and (spoken or "completion" in keys):
        return DataFormat.UNPAIRED_PREFERENCE
    if "messages" in keys:
        return DataFormat.CHAT
    if "conversations" in keys:
        return DataFormat.SHAREGPT
    if keys >= {"instruction", "output"}:
        return DataFormat.ALPACA
    if keys >= {"question", "answer"}:
        return DataFormat.QUESTION_ANSWER
    if keys >= {"prompt", "completion"}:
        return DataFormat.PROMPT_COMPLETION
    return DataFormat.TEXT if "text" in keys else None


def _usual(found: DataFormat, keys: Any, named: dict[str, str]) -> Columns:
    """The usual columns; of preferences there are several usual shapes, which the first row tells apart."""
    usual = USUAL_COLUMNS[found]
    if found not in (DataFormat.PREFERENCE, DataFormat.UNPAIRED_PREFERENCE) or {"prompt", "messages"} & named.keys():
        return usual
    prompt = next((name for name in PROMPTS if name in keys), None)
    messages = next((name for name in CONVERSATIONS if name in keys), None) if prompt is None else None
    changes: dict[str, str | None] = {"prompt": prompt, "messages": messages}
    if found is DataFormat.UNPAIRED_PREFERENCE:
        changes["label"] = next((name for name in LABELS if name in keys), "label")
    return usual.model_copy(update=changes)


# Plain values


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
    return characters(text)


def _spoken(value: dict[str, Any], column: str, role: str) -> tuple[Message, ...]:
    """A column that holds what one speaker says: as a string, as one message, or as a list of messages."""
    raw = value.get(column)
    if isinstance(raw, str):
        raw = messages_in(raw) or raw
    if not isinstance(raw, list | dict):
        return (Message(role, _string(value, column)),)
    return parse_messages([raw] if isinstance(raw, dict) else message_list(raw, column))


def _system(value: dict[str, Any], columns: Columns) -> tuple[Message, ...]:
    text = _string(value, columns.system, optional=True) if columns.system else ""
    return (Message("system", text),) if text.strip() else ()


def _tools(value: dict[str, Any], columns: Columns) -> str:
    if value.get("functions"):
        return parse_tools(value["functions"])
    return parse_tools(value.get(columns.tools)) if columns.tools else ""


# Conversations


def _parse_conversation(value: dict[str, Any], columns: Columns) -> Conversation:
    assert columns.messages is not None
    if columns.messages not in value:
        raise RowError(f"has no {columns.messages!r}")
    spoken = parse_messages(message_list(value[columns.messages], columns.messages))
    conversation = Conversation((*_system(value, columns), *spoken), _tools(value, columns))
    require_conversation(conversation.messages)
    if not any(message.learnt for message in conversation.messages if message.role == "assistant"):
        raise RowError("has no assistant turn to learn from (all have weight 0)")
    return conversation


def _parse_answer(value: dict[str, Any], columns: Columns) -> tuple[Conversation, tuple[Message, ...]]:
    """A prompt, whose turns are not learnt, and the answer to it."""
    assert columns.completion is not None
    prompt = _prompt(value, columns)
    completion = _spoken(value, columns.completion, "assistant")
    require_conversation((*prompt.messages, *completion))
    return prompt, completion


def _prompt(value: dict[str, Any], columns: Columns) -> Conversation:
    assert columns.prompt is not None
    if value.get("history"):
        raise RowError("has a history: write its turns as messages")
    spoken = _dialogue(value, columns.prompt, "user")
    context = _string(value, columns.input, optional=True) if columns.input else ""
    if context.strip():
        spoken = (*spoken[:-1], replace(spoken[-1], content=f"{spoken[-1].content}\n\n{context}"))
    return _unlearnt((*_system(value, columns), *spoken), _tools(value, columns))


def _unlearnt(messages: Sequence[Message], tools: str) -> Conversation:
    seen = (replace(message, learnt=False) if message.role == "assistant" else message for message in messages)
    prompt = Conversation(tuple(seen), tools)
    require_conversation(prompt.messages, answered=False)
    return prompt


# Preferences


def _parse_preference(value: dict[str, Any], columns: Columns) -> Preference:
    if value.keys() >= OPENAI_PREFERENCE:
        asked = value["input"]
        if not isinstance(asked, dict):
            raise RowError("'input' is not an object with messages")
        spoken = parse_messages(message_list(asked.get("messages"), "messages"))
        prompt = _unlearnt(spoken, parse_tools(asked.get("tools")))
        chosen = _spoken(value, "preferred_output", "assistant")
        rejected = _spoken(value, "non_preferred_output", "assistant")
        return _preference(prompt, chosen, rejected)
    assert columns.chosen is not None
    assert columns.rejected is not None
    before: tuple[Message, ...] = ()
    if columns.messages:
        before = parse_messages(message_list(value.get(columns.messages), columns.messages))
    elif columns.prompt:
        before = _prompt(value, columns).messages
    chosen = _dialogue(value, columns.chosen, "assistant")
    rejected = _dialogue(value, columns.rejected, "assistant")
    if before:
        before = _with_system(before, chosen, rejected)
        chosen, rejected = _without(before, chosen), _without(before, rejected)
    else:
        shared = _shared(chosen, rejected)
        before, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not before:
            raise RowError("has no prompt: neither a column of its own nor a beginning that both answers share")
    spoken_system = () if before[0].role == "system" else _system(value, columns)
    return _preference(_unlearnt((*spoken_system, *before), _tools(value, columns)), chosen, rejected)


def _preference(prompt: Conversation, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Preference:
    for answer in (chosen, rejected):
        if not answer:
            raise RowError("has an answer that holds nothing but the prompt")
        require_conversation((*prompt.messages, *answer))
    if chosen == rejected:
        raise RowError("has the same answer as chosen and as rejected")
    return Preference(prompt, chosen, rejected)


def _dialogue(value: dict[str, Any], column: str, role: str) -> tuple[Message, ...]:
    """What one says, or a whole conversation that ends with it."""
    raw = value.get(column)
    if isinstance(raw, str) and DIALOGUE.match(raw):
        _, *parts = DIALOGUE.split(raw)
        turns = [*zip(parts[::2], parts[1::2], strict=True)]
        if role == "user" and not turns[-1][1].strip():
            turns.pop()  # the answer comes here
        said = [{"role": "user" if who == "Human" else "assistant", "content": text.strip()} for who, text in turns]
        return parse_messages(said)
    return _spoken(value, column, role)


def _with_system(prompt: tuple[Message, ...], *answers: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt with the system message that the answers repeat with it."""
    said = {message for messages in (prompt, *answers) for message in messages[:1] if message.role == "system"}
    if len(said) > 1:
        raise RowError("has different system messages in prompt and answers")
    return prompt if not said or prompt[0] in said else (*said, *prompt)


def _without(prompt: tuple[Message, ...], answer: tuple[Message, ...]) -> tuple[Message, ...]:
    """The answer alone, where it repeats the prompt."""
    asked = [(message.role, message.content) for message in prompt if message.role != "system"]
    alone = tuple(message for message in answer if message.role != "system")
    said = [(message.role, message.content) for message in alone]
    return alone[len(asked) :] if len(said) > len(asked) and said[: len(asked)] == asked else alone


def _shared(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """Messages at the beginning that both have, up to the last turn that is not the assistant's."""
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    while count and chosen[count - 1].role == "assistant":
        count -= 1
    return count


def _parse_judged(value: dict[str, Any], columns: Columns) -> Judged:
    assert columns.label is not None
    desirable = _truth(value, columns.label)
    if columns.messages:
        conversation = _parse_conversation(value, columns)
        last = max(i for i, message in enumerate(conversation.messages) if message.role != "assistant") + 1
        before, completion = conversation.messages[:last], conversation.messages[last:]
        return Judged(_unlearnt(before, conversation.tools), completion, desirable)
    if columns.prompt is None:
        raise RowError("has no prompt")
    prompt, completion = _parse_answer(value, columns)
    return Judged(prompt, completion, desirable)


def _truth(value: dict[str, Any], column: str) -> bool:
    if column not in value:
        raise RowError(f"has no {column!r}")
    raw = value[column]
    if isinstance(raw, str):  # of a CSV file
        raw = {"true": True, "1": True, "false": False, "0": False}.get(raw.strip().lower())
    if raw not in (True, False):
        raise RowError(f"{column!r} is neither true nor false")
    return bool(raw)
