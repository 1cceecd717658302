"""Understand messages: OpenAI's chat objects and ShareGPT's turns become `Message`s in an order that makes sense."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from finetune_trainer.data.examples import Message, ToolCall
from finetune_trainer.data.rows import RowError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SHAREGPT_ROLES = ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""What data sets of that shape call the speakers."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
KNOWN_KEYS = {"role", "content", "weight", "name", "tool_calls", "tool_call_id", "function_call", *REASONING_KEYS}


def characters(text: str) -> str:
    """JSON can escape half of a surrogate pair, as is left of an emoji that was cut; no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("has text with half a surrogate pair, which is no character") from error
    return text


def message_list(raw: Any, column: str) -> list[Any]:
    """A list of messages. A CSV cell holds it as JSON text."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{column!r} is not a list of messages") from error
    if not isinstance(raw, list):
        raise RowError(f"{column!r} is not a list of messages")
    if not raw:
        raise RowError(f"{column!r} is empty")
    return raw


def messages_in(text: str) -> Any:
    """The messages that a CSV cell holds as JSON text; None when it holds something else."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    several = found if isinstance(found, list) else [found]
    shaped = several and all(isinstance(item, dict) and ({"role", "from"} & item.keys()) for item in several)
    return found if shaped else None


def parse_messages(raw: list[Any]) -> tuple[Message, ...]:
    """Messages in either shape.

    Raises:
        RowError: one of them cannot be understood.
    """
    shaped = [message for message in raw if isinstance(message, dict)]
    if len(shaped) < len(raw):
        raise RowError("has a message that is not an object")
    sharegpt = all("from" in message for message in shaped)
    turns = [_parse_turn(message) if sharegpt else _parse_message(message) for message in shaped]
    # An empty system message says nothing.
    return tuple(_with_ids(message for message in turns if message.role != "system" or message.content))


def parse_tools(raw: Any) -> str:
    """The tools of a row, as JSON text in the order of the row; empty when there are none."""
    if isinstance(raw, str) and raw.strip():
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise RowError("has tools that are not JSON") from error
    if not raw:
        return ""
    if not isinstance(raw, list) or not all(isinstance(tool, dict) for tool in raw):
        raise RowError("has tools that are not a list of objects")
    tools = [tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool} for tool in raw]
    if not all(isinstance(tool["function"].get("name"), str) and tool["function"]["name"] for tool in tools):
        raise RowError("has a tool without a name")
    return _json(tools, "has tools that are not JSON")


def _json(value: Any, problem: str) -> str:
    try:
        return characters(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError) as error:
        raise RowError(problem) from error  # a date of a Parquet file, say


def require_conversation(messages: Sequence[Message], *, answered: bool = True) -> None:
    """
    Raises:
        RowError: the messages are in no order that a model could have met.
    """
    spoken = [message for message in messages if message.role != "system"]
    if not spoken or spoken[0].role != "user":
        raise RowError("does not begin with a user turn")
    if any(message.role == "system" for message in messages[1:]):
        raise RowError("has a system message that is not the first one")
    if answered and spoken[-1].role != "assistant":
        raise RowError("does not end with an assistant turn")
    if not answered and spoken[-1].role == "assistant":
        raise RowError("has a prompt that ends with an assistant turn, so that nothing is left to answer")
    called = 0
    for before, message in pairwise(spoken):
        if before.role != "tool":
            called = len(before.tool_calls)
        if message.role == "tool":
            if called == 0:
                raise RowError("has a tool's answer that no tool call asked for")
            called -= 1


def _parse_message(raw: dict[str, Any]) -> Message:
    role = ROLES.get(raw["role"]) if isinstance(raw.get("role"), str) else None
    if role is None:
        raise RowError("has a message whose role is none of system, user, assistant and tool")
    unknown = {key for key, item in raw.items() if item not in (None, [], "")} - KNOWN_KEYS
    if unknown:
        raise RowError(f"has a message with the unknown key {min(unknown, key=str)!r}")
    calls = tuple(_calls(raw)) if role == "assistant" else ()
    if role != "assistant" and (raw.get("tool_calls") or raw.get("function_call")):
        raise RowError(f"has a message of the {role} that calls tools")
    content = _content(raw.get("content"), role, may_be_empty=bool(calls) or role in ("system", "tool"))
    weight = raw.get("weight")
    if weight not in (None, 0, 1):
        raise RowError("has a message whose weight is neither 0 nor 1")
    return Message(
        role,
        content,
        learnt=weight != 0,
        reasoning=_reasoning(raw) if role == "assistant" else "",
        tool_calls=calls,
        name=_optional(raw, "name") if role == "tool" else "",
        tool_call_id=_optional(raw, "tool_call_id") if role == "tool" else "",
    )


def _parse_turn(raw: dict[str, Any]) -> Message:
    """ShareGPT: {"from": "gpt", "value": "..."}."""
    speaker = SHAREGPT_ROLES.get(raw["from"]) if isinstance(raw["from"], str) else None
    if speaker is None:
        raise RowError('has a turn whose "from" is no speaker that is known (human, gpt, system, observation, ...)')
    unknown = {key for key, item in raw.items() if item not in (None, [], "")} - {"from", "value", "weight", "loss"}
    if unknown:
        raise RowError(f"has a turn with the unknown key {min(unknown, key=str)!r}")
    weight = raw.get("weight") if raw.get("weight") is not None else raw.get("loss")
    if weight not in (None, 0, 1):
        raise RowError("has a turn whose weight is neither 0 nor 1")
    if speaker == "call":
        return Message("assistant", "", learnt=weight != 0, tool_calls=tuple(_called(raw.get("value"))))
    content = _content(raw.get("value"), speaker, may_be_empty=speaker in ("system", "tool"))
    return Message(speaker, content, learnt=weight != 0)


def _content(raw: Any, role: str, *, may_be_empty: bool) -> str:
    if isinstance(raw, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in raw]
        if not all(isinstance(part, str) for part in parts):
            raise RowError(f"has a message of the {role} with a part that is no text, such as an image")
        raw = "".join(str(part) for part in parts)
    if raw is None and may_be_empty:
        return ""
    if not isinstance(raw, str):
        raise RowError(f"has a message of the {role} whose content is not a string")
    if not raw.strip():
        if may_be_empty:
            return ""
        raise RowError(f"has a message of the {role} without content")
    return characters(raw)


def _reasoning(raw: dict[str, Any]) -> str:
    said = [raw[key] for key in REASONING_KEYS if raw.get(key)]
    if not said:
        return ""
    if any(not isinstance(text, str) for text in said) or len(set(said)) > 1:
        raise RowError("has a message with reasoning that is not one string")
    return characters(said[0])


def _optional(raw: dict[str, Any], key: str) -> str:
    value = raw.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"has a message whose {key} is not a string")
    return characters(value)


def _calls(raw: dict[str, Any]) -> Iterator[ToolCall]:
    """OpenAI's tool_calls, and function_call, which came before them."""
    calls = raw.get("tool_calls") or []
    if not isinstance(calls, list):
        raise RowError("has tool_calls that are not a list")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        identity = call.get("id") if isinstance(call, dict) else None
        yield _call(function, identity if isinstance(identity, str) else "")
    if raw.get("function_call"):
        yield _call(raw["function_call"], "")


def _called(raw: Any) -> Iterator[ToolCall]:
    """ShareGPT's function_call: JSON text of one call, or of a list of them."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise RowError("has a tool call that is not JSON") from error
    for call in raw if isinstance(raw, list) and raw else [raw]:
        yield _call(call, "")


def _call(raw: Any, identity: str) -> ToolCall:
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str) or not raw["name"]:
        raise RowError("has a tool call without the name of a tool")
    arguments = raw.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RowError("has a tool call whose arguments are not JSON") from error
    if not isinstance(arguments, dict):
        raise RowError("has a tool call whose arguments are not an object")
    text = _json(arguments, "has a tool call whose arguments are not JSON")
    return ToolCall(characters(raw["name"]), text, identity)


def _with_ids(messages: Iterator[Message]) -> Iterator[Message]:
    """Calls without an id get one, and the answers to them name it, with the tool: some templates want both."""
    made = 0
    waiting: list[ToolCall] = []
    for message in messages:
        if message.tool_calls:
            calls = []
            for call in message.tool_calls:
                made += 1
                # Nine letters and digits are what the strictest template takes.
                calls.append(replace(call, id=call.id or f"call{made:05d}"))
            waiting = calls
            yield replace(message, tool_calls=tuple(calls))
        elif message.role == "tool":
            named = message.tool_call_id
            answered = next((call for call in waiting if not named or call.id == named), None)
            if answered is None:
                raise RowError("has a tool's answer that no tool call asked for")
            waiting = [call for call in waiting if call is not answered]
            yield replace(message, name=message.name or answered.name, tool_call_id=message.tool_call_id or answered.id)
        else:
            yield message
