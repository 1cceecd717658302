"""What a row says, whatever its format was: one form for each kind of example that a method learns from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str
    """JSON text of an object."""
    id: str

    def to_template(self) -> dict[str, Any]:
        # Templates expect an object: those that print JSON would quote a string again.
        function = {"name": self.name, "arguments": json.loads(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Message:
    role: str
    """system, user, assistant or tool."""
    content: str
    """May be empty in an assistant turn that calls tools."""
    learnt: bool = True
    """False for an assistant turn whose weight is 0."""
    reasoning: str = ""
    """What the assistant thinks before it answers."""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    """Of the tool that answers."""
    tool_call_id: str = ""

    def to_template(self) -> dict[str, Any]:
        """As chat templates know a message."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            # Templates of different models look for it under different names.
            message |= {"reasoning_content": self.reasoning, "thinking": self.reasoning}
        if self.tool_calls:
            message["tool_calls"] = [call.to_template() for call in self.tool_calls]
        if self.role == "tool":
            message |= {"name": self.name, "tool_call_id": self.tool_call_id}
        return message


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: str = ""
    """JSON text of the list of tools that the assistant may call; empty without tools."""


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which one is better."""

    prompt: Conversation
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


@dataclass(frozen=True)
class Judged:
    """One answer to a prompt, and whether it is wanted."""

    prompt: Conversation
    completion: tuple[Message, ...]
    desirable: bool


Example = Conversation | Text | Preference | Judged
