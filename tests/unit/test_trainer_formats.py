"""Rows of every format become conversations or texts, or are refused for a reason that holds none of their content."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import Columns, DataFormat
from finetune_trainer.data.examples import Conversation, Message, Text
from finetune_trainer.data.formats import RowFormat, row_format
from finetune_trainer.data.rows import Row, RowError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CONTENT = "the content of a row"
ROLE = "has a message whose role is none of system, user, assistant and tool"


def row(value: dict[str, Any]) -> Row:
    return Row("s3://b/x.jsonl", 1, value)


def parse(value: dict[str, Any], asked: DataFormat = DataFormat.AUTO, columns: Columns | None = None) -> Any:
    return row_format(asked, columns, row(value)).parse(row(value))


def reason(value: dict[str, Any], asked: DataFormat = DataFormat.AUTO) -> str:
    with pytest.raises(RowError) as caught:
        parse(value, asked)
    assert CONTENT not in str(caught.value)
    return str(caught.value)


FORMATS = {
    DataFormat.CHAT: {"messages": [USER, ANSWER]},
    DataFormat.ALPACA: {"instruction": "Hi", "output": "Hello"},
    DataFormat.QUESTION_ANSWER: {"question": "Hi", "answer": "Hello"},
}
PLAIN = Conversation((Message("user", "Hi"), Message("assistant", "Hello")))


class TestFindingTheFormat:
    @pytest.mark.parametrize("name", FORMATS)
    def test_from_the_columns_or_by_name(self, name: DataFormat) -> None:
        for asked in (DataFormat.AUTO, name):
            shape = row_format(asked, None, row(FORMATS[name]))
            assert shape.format is name
            assert shape.parse(row(FORMATS[name])) == PLAIN

    def test_prompt_and_completion(self) -> None:
        assert parse({"prompt": "Hi", "completion": "Hello"}) == PLAIN

    def test_text(self) -> None:
        for asked in (DataFormat.AUTO, DataFormat.TEXT):
            assert parse({"text": "Once upon a time"}, asked) == Text("Once upon a time")

    def test_other_columns_do_not_matter(self) -> None:
        assert parse({"question": "Hi", "answer": "Hello", "id": 7, "source": None}) == PLAIN

    @pytest.mark.parametrize("value", [{"input": "Hi", "reply": "Hello"}, {}, {"instruction": "Hi"}])
    def test_unknown_columns_are_named_with_a_remedy(self, value: dict[str, Any]) -> None:
        with pytest.raises(JobError) as caught:
            row_format(DataFormat.AUTO, None, row(value))
        assert caught.value.failure_class is FailureClass.DATA_ERROR
        assert caught.value.message.startswith("s3://b/x.jsonl: the format cannot be found out from the columns (")
        assert caught.value.message.endswith("Set dataset.format and dataset.columns.")
        assert all(name in caught.value.message for name in value)
        assert "Hi" not in caught.value.message

    @pytest.mark.parametrize(
        ("asked", "columns", "value"),
        [
            (DataFormat.CHAT, Columns(messages="turns"), {"turns": [USER, ANSWER]}),
            (DataFormat.QUESTION_ANSWER, Columns(prompt="q", completion="a"), {"q": "Hi", "a": "Hello"}),
            (DataFormat.ALPACA, Columns(prompt="task", completion="reply"), {"task": "Hi", "reply": "Hello"}),
        ],
    )
    def test_columns_can_be_mapped(self, asked: DataFormat, columns: Columns, value: dict[str, Any]) -> None:
        assert parse(value, asked, columns) == PLAIN

    def test_a_mapped_text_column(self) -> None:
        assert parse({"body": "Once"}, DataFormat.TEXT, Columns(text="body")) == Text("Once")

    def test_input_and_system_can_be_mapped(self) -> None:
        columns = Columns(prompt="q", completion="a", input="context", system="tone")
        value = {"q": "Sum?", "a": "3", "context": "1 2", "tone": "Be brief"}
        assert parse(value, DataFormat.QUESTION_ANSWER, columns).messages == (
            Message("system", "Be brief"),
            Message("user", "Sum?\n\n1 2"),
            Message("assistant", "3"),
        )


def test_a_row_in_the_place_of_a_header_is_not_shown() -> None:
    with pytest.raises(JobError) as caught:
        row_format(DataFormat.AUTO, None, row({CONTENT * 10: "x"}))
    assert CONTENT * 10 not in caught.value.message
    assert len(caught.value.message) < 300


def test_a_system_message_beside_the_messages() -> None:
    parsed = parse({"messages": [USER, ANSWER], "system": "Be brief"})
    assert parsed.messages[0] == Message("system", "Be brief")


class TestPromptAndCompletion:
    def test_a_history_is_not_lost(self) -> None:
        assert reason({"instruction": "a", "output": "b", "history": [["c", "d"]]}, DataFormat.ALPACA) == (
            "has a history: write its turns as messages"
        )

    @pytest.mark.parametrize("context", [{}, {"input": ""}, {"input": None}, {"input": "  "}])
    def test_alpaca_without_context(self, context: dict[str, Any]) -> None:
        assert parse({"instruction": "Hi", "output": "Hello", **context}) == PLAIN

    def test_alpaca_context_follows_a_blank_line(self) -> None:
        messages = parse({"instruction": "Sum?", "input": "1 2", "output": "3"}).messages
        assert messages == (Message("user", "Sum?\n\n1 2"), Message("assistant", "3"))

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ({"question": CONTENT, "answer": ""}, "'answer' is empty"),
            ({"question": CONTENT, "answer": " \n"}, "'answer' is empty"),
            ({"question": CONTENT, "answer": None}, "has no 'answer'"),
            ({"question": "", "answer": CONTENT}, "'question' is empty"),
            ({"question": CONTENT, "answer": 4}, "'answer' is not a string"),
            ({"question": [CONTENT], "answer": "x"}, "has a message that is not an object"),
            ({"answer": CONTENT}, "has no 'question'"),
            ({"question": "\ud83d", "answer": "x"}, "has text with half a surrogate pair, which is no character"),
        ],
    )
    def test_refuses(self, value: dict[str, Any], expected: str) -> None:
        assert reason(value, DataFormat.QUESTION_ANSWER) == expected

    @pytest.mark.parametrize(
        ("value", "expected"),
        [({"text": ""}, "'text' is empty"), ({"text": 3}, "'text' is not a string"), ({"b": 1}, "has no 'text'")],
    )
    def test_refuses_text(self, value: dict[str, Any], expected: str) -> None:
        assert reason(value, DataFormat.TEXT) == expected


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


SYSTEM = {"role": "system", "content": "Be brief"}


class TestChat:
    def test_turns_and_system(self) -> None:
        messages = parse(chat(SYSTEM, USER, ANSWER, USER, ANSWER)).messages
        assert [message.role for message in messages] == ["system", "user", "assistant", "user", "assistant"]
        assert all(message.learnt for message in messages)

    def test_weight_zero_is_not_learnt(self) -> None:
        messages = parse(chat(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1})).messages
        assert [message.learnt for message in messages] == [True, False, True, True]

    def test_a_csv_cell_holds_json(self) -> None:
        assert parse({"messages": json.dumps([USER, ANSWER])}) == PLAIN

    def test_absent_and_null_keys_are_alike(self) -> None:
        empty = {"tool_calls": None, "function_call": None, "refusal": None, "name": "Ann"}
        assert parse(chat({**USER, **empty}, {**ANSWER, **empty}, tools=None)) == PLAIN

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ({"messages": None}, "'messages' is not a list of messages"),
            ({"messages": CONTENT}, "'messages' is not a list of messages"),
            ({"messages": {"role": "user"}}, "'messages' is not a list of messages"),
            ({"messages": []}, "'messages' is empty"),
            ({"other": []}, "has no 'messages'"),
            (chat(USER), "does not end with an assistant turn"),
            (chat(USER, ANSWER, USER), "does not end with an assistant turn"),
            (chat(ANSWER), "does not begin with a user turn"),
            (chat(SYSTEM, ANSWER), "does not begin with a user turn"),
            (chat(USER, ANSWER, SYSTEM, USER, ANSWER), "has a system message that is not the first one"),
            (chat(SYSTEM, SYSTEM, USER, ANSWER), "has a system message that is not the first one"),
            (chat(USER, {**ANSWER, "weight": 0}), "has no assistant turn to learn from (all have weight 0)"),
            (chat(USER, {**ANSWER, "weight": 0.5}), "has a message whose weight is neither 0 nor 1"),
            (chat(USER, {**ANSWER, "weight": CONTENT}), "has a message whose weight is neither 0 nor 1"),
            (chat(USER, CONTENT), "has a message that is not an object"),
            (chat(USER, None), "has a message that is not an object"),
            (chat({"role": CONTENT, "content": "x"}, ANSWER), ROLE),
            (chat({"role": "tool", "content": CONTENT}, ANSWER), "has a tool's answer that no tool call asked for"),
            (chat({"content": CONTENT}, ANSWER), ROLE),
            (chat({"role": [], "content": ""}, ANSWER), ROLE),
            (
                chat({"role": "user", "content": None}, ANSWER),
                "has a message of the user whose content is not a string",
            ),
            (
                chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": CONTENT}}]}, ANSWER),
                "has a message of the user with a part that is no text, such as an image",
            ),
            (chat(USER, {"role": "assistant", "content": " "}), "has a message of the assistant without content"),
            (
                chat(USER, {"role": "assistant", "content": "cut emoji \ud83d"}),
                "has text with half a surrogate pair, which is no character",
            ),
            (chat(USER, {**ANSWER, "tool_calls": [{"id": CONTENT}]}), "has a tool call without the name of a tool"),
            (chat(USER, {**ANSWER, "tool_calls": CONTENT}), "has tool_calls that are not a list"),
            (chat({**USER, "tool_calls": [{"name": CONTENT}]}, ANSWER), "has a message of the user that calls tools"),
            (
                chat(USER, {**ANSWER, "function_call": {"name": CONTENT, "arguments": "{"}}),
                "has a tool call whose arguments are not JSON",
            ),
            (
                chat(USER, {**ANSWER, "function_call": {"name": CONTENT, "arguments": "[1]"}}),
                "has a tool call whose arguments are not an object",
            ),
            (
                chat(USER, {"role": "tool", "content": CONTENT}, ANSWER),
                "has a tool's answer that no tool call asked for",
            ),
            (chat(USER, ANSWER, tools=CONTENT), "has tools that are not JSON"),
            (chat(USER, ANSWER, tools={"name": CONTENT}), "has tools that are not a list of objects"),
            (chat(USER, ANSWER, tools=[{"type": "function", "function": {}}]), "has a tool without a name"),
            (chat(USER, ANSWER, functions=[{"description": CONTENT}]), "has a tool without a name"),
            (
                chat(USER, {**ANSWER, "reasoning": [CONTENT]}),
                "has a message with reasoning that is not one string",
            ),
            (
                chat(USER, {**ANSWER, "reasoning": CONTENT, "thinking": "other"}),
                "has a message with reasoning that is not one string",
            ),
            (chat(USER, {**ANSWER, "mood": CONTENT}), "has a message with the unknown key 'mood'"),
        ],
    )
    def test_refuses(self, value: dict[str, Any], expected: str) -> None:
        assert reason(value, DataFormat.CHAT) == expected


def test_a_later_row_of_another_shape_is_a_bad_row() -> None:
    shape = row_format(DataFormat.AUTO, None, row({"question": "a", "answer": "b"}))
    assert isinstance(shape, RowFormat)
    with pytest.raises(RowError, match="has no 'question'"):
        shape.parse(row({"messages": [USER, ANSWER]}))
