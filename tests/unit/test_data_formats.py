"""ShareGPT turns, tools and preferences in every usual shape become the same examples."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.spec import FORMAT_COLUMNS, Columns, DataFormat
from finetune_trainer.data.examples import Conversation, Judged, Message, Preference, Text, ToolCall
from finetune_trainer.data.formats import USUAL_COLUMNS, row_format
from finetune_trainer.data.rows import Row, RowError

CONTENT = "the content of a row"
ASKED = Message("user", "Hi")
BETTER = Message("assistant", "Hello")
WORSE = Message("assistant", "Go away")
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
RUDE = {"role": "assistant", "content": "Go away"}
HUMAN = {"from": "human", "value": "Hi"}
GPT = {"from": "gpt", "value": "Hello"}


def parse(value: dict[str, Any], asked: DataFormat = DataFormat.AUTO, columns: Columns | None = None) -> Any:
    row = Row("s3://b/x.jsonl", 1, value)
    return row_format(asked, columns, row).parse(row)


def found(value: dict[str, Any]) -> DataFormat:
    return row_format(DataFormat.AUTO, None, Row("s3://b/x.jsonl", 1, value)).format


def reason(value: dict[str, Any], asked: DataFormat = DataFormat.AUTO) -> str:
    with pytest.raises(RowError) as caught:
        parse(value, asked)
    assert CONTENT not in str(caught.value)
    return str(caught.value)


def test_the_usual_columns_are_columns_of_the_format() -> None:
    assert USUAL_COLUMNS.keys() == FORMAT_COLUMNS.keys() == set(DataFormat) - {DataFormat.AUTO}
    for name, columns in USUAL_COLUMNS.items():
        assert columns.model_dump(exclude_none=True).keys() <= set(FORMAT_COLUMNS[name])


def test_columns_that_are_not_named_have_their_usual_names() -> None:
    """Naming one must not lose the others."""
    value = {"task": "Sum?", "input": "1 2", "output": "3", "system": "Be brief"}
    parsed = parse(value, DataFormat.ALPACA, Columns(prompt="task"))
    assert [message.content for message in parsed.messages] == ["Be brief", "Sum?\n\n1 2", "3"]


class TestShareGPT:
    def test_turns(self) -> None:
        assert found({"conversations": [HUMAN, GPT]}) is DataFormat.SHAREGPT
        assert parse({"conversations": [HUMAN, GPT]}) == Conversation((ASKED, BETTER))

    @pytest.mark.parametrize("speaker", ["gpt", "chatgpt", "bing", "bard", "assistant", "model"])
    def test_what_the_assistant_is_called(self, speaker: str) -> None:
        assert parse({"conversations": [HUMAN, {**GPT, "from": speaker}]}) == Conversation((ASKED, BETTER))

    def test_a_system_message_as_a_turn_or_a_column(self) -> None:
        expected = Conversation((Message("system", "Be brief"), ASKED, BETTER))
        assert parse({"conversations": [{"from": "system", "value": "Be brief"}, HUMAN, GPT]}) == expected
        assert parse({"conversations": [HUMAN, GPT], "system": "Be brief"}) == expected

    def test_an_empty_system_message_says_nothing(self) -> None:
        value = {"conversations": [{"from": "system", "value": ""}, HUMAN, GPT], "system": ""}
        assert parse(value) == Conversation((ASKED, BETTER))

    def test_a_weight_that_is_null(self) -> None:
        with pytest.raises(RowError, match="all have weight 0"):
            parse({"conversations": [HUMAN, {**GPT, "weight": None, "loss": 0}]})

    @pytest.mark.parametrize("key", ["weight", "loss"])
    def test_weights(self, key: str) -> None:
        messages = parse({"conversations": [HUMAN, {**GPT, key: 0}, HUMAN, {**GPT, key: 1}]}).messages
        assert [message.learnt for message in messages if message.role == "assistant"] == [False, True]

    def test_openai_objects_under_that_name_and_turns_under_the_other(self) -> None:
        assert parse({"conversations": [USER, ANSWER]}) == Conversation((ASKED, BETTER))
        assert parse({"messages": [HUMAN, GPT]}) == Conversation((ASKED, BETTER))

    @pytest.mark.parametrize(
        ("turns", "expected"),
        [
            ([HUMAN, {"from": CONTENT, "value": "x"}], 'whose "from" is no speaker that is known'),
            ([HUMAN, {"from": "gpt", "value": 3}], "content is not a string"),
            ([HUMAN, {"from": "gpt", "value": ""}], "without content"),
            ([HUMAN, {"from": "gpt"}], "content is not a string"),
            ([HUMAN, {**GPT, "weight": 2}], "weight is neither 0 nor 1"),
            ([HUMAN, {**GPT, "mood": CONTENT}], "unknown key 'mood'"),
            ([HUMAN, ANSWER], "role is none of"),
            ([GPT, HUMAN], "does not begin with a user turn"),
            ([HUMAN, {"from": "function_call", "value": CONTENT}], "tool call that is not JSON"),
            ([HUMAN, {"from": "function_call", "value": "3"}], "tool call without the name of a tool"),
        ],
    )
    def test_refuses(self, turns: list[Any], expected: str) -> None:
        assert expected in reason({"conversations": turns})


WEATHER = {"name": "weather", "description": "of a town", "parameters": {"type": "object"}}
TOOLS = json.dumps([{"type": "function", "function": WEATHER}])
CALL = ToolCall("weather", '{"town": "Ulm"}', "call00001")
CALLED = Conversation(
    (
        Message("user", "Rain?"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "no", name="weather", tool_call_id="call00001"),
        Message("assistant", "It is dry."),
    ),
    TOOLS,
)


class TestTools:
    def test_sharegpt(self) -> None:
        value = {
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Ulm"}}'},
                {"from": "observation", "value": "no"},
                {"from": "gpt", "value": "It is dry."},
            ],
            "tools": json.dumps([WEATHER]),
        }
        assert parse(value) == CALLED

    @pytest.mark.parametrize("arguments", ['{"town": "Ulm"}', {"town": "Ulm"}], ids=["text", "object"])
    def test_openai(self, arguments: Any) -> None:
        call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        value = {
            "messages": [
                {"role": "user", "content": "Rain?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call00001", "content": "no"},
                {"role": "assistant", "content": "It is dry."},
            ],
            "tools": [{"type": "function", "function": WEATHER}],
        }
        assert parse(value) == CALLED

    def test_functions_which_came_before_tools(self) -> None:
        value = {
            "messages": [
                {"role": "user", "content": "Rain?"},
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "weather", "arguments": '{"town": "Ulm"}'},
                },
                {"role": "function", "name": "weather", "content": "no"},
                {"role": "assistant", "content": "It is dry."},
            ],
            "functions": [WEATHER],
        }
        assert parse(value) == CALLED

    def test_several_calls_at_once_and_their_answers_in_another_order(self) -> None:
        calls = [{"id": name, "function": {"name": name, "arguments": "{}"}} for name in ("one", "two")]
        value = {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": calls},
                {"role": "tool", "tool_call_id": "two", "content": "2"},
                {"role": "tool", "tool_call_id": "one", "content": "1"},
                ANSWER,
            ]
        }
        messages = parse(value).messages
        assert [(m.name, m.tool_call_id, m.content) for m in messages if m.role == "tool"] == [
            ("two", "two", "2"),
            ("one", "one", "1"),
        ]

    def test_a_row_may_end_with_a_call(self) -> None:
        value = {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "weather"}}]}]}
        assert parse(value).messages[-1].tool_calls == (ToolCall("weather", "{}", "call00001"),)

    def test_more_answers_than_calls(self) -> None:
        answer = {"role": "tool", "content": "2"}
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather"}}]}
        assert reason({"messages": [USER, call, answer, answer, ANSWER]}) == (
            "has a tool's answer that no tool call asked for"
        )

    @pytest.mark.parametrize("value", [Decimal(1), date(2026, 1, 1), b"x"])
    def test_values_of_a_parquet_file_that_json_does_not_have(self, value: Any) -> None:
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"day": value}}}]}
        assert reason({"messages": [USER, call]}) == "has a tool call whose arguments are not JSON"
        assert reason({"messages": [USER, ANSWER], "tools": [{"name": "a", "since": value}]}) == (
            "has tools that are not JSON"
        )

    def test_an_answer_to_another_call(self) -> None:
        call = {"role": "assistant", "tool_calls": [{"id": "one", "function": {"name": "weather"}}]}
        answer = {"role": "tool", "tool_call_id": "two", "content": "2"}
        assert reason({"messages": [USER, call, answer, ANSWER]}) == "has a tool's answer that no tool call asked for"
        late = [USER, call, USER, {**answer, "tool_call_id": "one"}, ANSWER]
        assert reason({"messages": late}) == "has a tool's answer that no tool call asked for"


class TestReasoning:
    @pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
    def test_under_every_name(self, key: str) -> None:
        messages = parse({"messages": [USER, {**ANSWER, key: "Say hello."}]}).messages
        assert messages[-1] == Message("assistant", "Hello", reasoning="Say hello.")


PREFERRED = Preference(Conversation((ASKED,)), (BETTER,), (WORSE,))
PAIRS: dict[str, dict[str, Any]] = {
    "strings": {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
    "messages": {"prompt": [USER], "chosen": [ANSWER], "rejected": [RUDE]},
    "one message": {"prompt": [USER], "chosen": ANSWER, "rejected": RUDE},
    "without a prompt": {"chosen": [USER, ANSWER], "rejected": [USER, RUDE]},
    "with a prompt that the answers repeat": {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, RUDE]},
    "ShareGPT": {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "Go away"}},
    "a dialogue in one string": {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Go away",
    },
    "question": {"question": "Hi", "chosen": "Hello", "rejected": "Go away"},
    "instruction": {"instruction": "Hi", "chosen": "Hello", "rejected": "Go away"},
    "OpenAI": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [ANSWER],
        "non_preferred_output": [RUDE],
    },
}


class TestPreference:
    @pytest.mark.parametrize("name", PAIRS)
    def test_every_usual_shape(self, name: str) -> None:
        assert found(PAIRS[name]) is DataFormat.PREFERENCE
        assert parse(PAIRS[name]) == PREFERRED
        assert parse(PAIRS[name], DataFormat.PREFERENCE) == PREFERRED

    def test_a_system_message_that_the_answers_repeat(self) -> None:
        system = {"role": "system", "content": "Be brief"}
        parsed = parse({"prompt": "Hi", "chosen": [system, USER, ANSWER], "rejected": [system, USER, RUDE]})
        assert parsed.prompt.messages == (Message("system", "Be brief"), ASKED)
        assert (parsed.chosen, parsed.rejected) == ((BETTER,), (WORSE,))
        other = {**system, "content": "Be kind"}
        assert "different system messages" in reason(
            {"prompt": "Hi", "chosen": [system, USER, ANSWER], "rejected": [other, USER, RUDE]}
        )

    def test_a_dialogue_as_the_prompt(self) -> None:
        value = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello", "rejected": "Go away"}
        assert parse(value) == PREFERRED

    def test_cells_of_a_csv_file_that_hold_messages(self) -> None:
        value = {"prompt": [USER], "chosen": [ANSWER], "rejected": [RUDE]}
        assert parse({name: json.dumps(item) for name, item in value.items()}) == PREFERRED
        # A text that looks like JSON stays a text.
        text = parse({"prompt": "[1, 2]", "completion": '{"name": "Ann"}'}).messages
        assert [message.content for message in text] == ["[1, 2]", '{"name": "Ann"}']

    def test_several_turns_before(self) -> None:
        first = {"role": "assistant", "content": "Yes?"}
        parsed = parse({"chosen": [USER, first, USER, ANSWER], "rejected": [USER, first, USER, RUDE]})
        assert [message.role for message in parsed.prompt.messages] == ["user", "assistant", "user"]
        assert (parsed.chosen, parsed.rejected) == ((BETTER,), (WORSE,))
        assert not parsed.prompt.messages[1].learnt, "the answer alone is judged"

    def test_the_system_message_of_a_column(self) -> None:
        parsed = parse({"system": "Be brief", "question": "Hi", "chosen": "Hello", "rejected": "Go away"})
        assert parsed.prompt.messages[0] == Message("system", "Be brief")

    def test_the_columns_can_be_mapped(self) -> None:
        columns = Columns(prompt="q", chosen="good", rejected="bad")
        assert parse({"q": "Hi", "good": "Hello", "bad": "Go away"}, DataFormat.PREFERENCE, columns) == PREFERRED

    def test_answers_that_call_tools(self) -> None:
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather"}}]}
        parsed = parse({"prompt": [USER], "chosen": [call], "rejected": [RUDE], "tools": [WEATHER]})
        assert parsed.prompt.tools == TOOLS
        assert parsed.chosen[0].tool_calls[0].name == "weather"

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ({"prompt": "Hi", "chosen": CONTENT, "rejected": CONTENT}, "has the same answer as chosen and as rejected"),
            ({"prompt": "Hi", "chosen": "", "rejected": CONTENT}, "'chosen' is empty"),
            ({"prompt": "Hi", "chosen": None, "rejected": CONTENT}, "has no 'chosen'"),
            ({"prompt": "", "chosen": "x", "rejected": CONTENT}, "'prompt' is empty"),
            ({"prompt": "Hi", "chosen": 3, "rejected": CONTENT}, "'chosen' is not a string"),
            ({"chosen": "x", "rejected": CONTENT}, "has no prompt"),
            ({"chosen": [USER, ANSWER], "rejected": [{**USER, "content": CONTENT}, ANSWER]}, "has no prompt"),
            ({"prompt": [USER, ANSWER], "chosen": "x", "rejected": CONTENT}, "ends with an assistant turn"),
            ({"prompt": [USER], "chosen": [USER], "rejected": [RUDE]}, "does not end with an assistant turn"),
            ({**PAIRS["OpenAI"], "input": CONTENT}, "'input' is not an object with messages"),
        ],
    )
    def test_refuses(self, value: dict[str, Any], expected: str) -> None:
        assert expected in reason(value)


class TestUnpaired:
    @pytest.mark.parametrize(
        "value",
        [
            {"prompt": "Hi", "completion": "Hello"},
            {"prompt": [USER], "completion": [ANSWER]},
            {"messages": [USER, ANSWER]},
            {"conversations": [HUMAN, GPT]},
        ],
        ids=["strings", "messages", "a chat", "ShareGPT"],
    )
    def test_every_usual_shape(self, value: dict[str, Any]) -> None:
        for label, raw in ((True, True), (False, False), (True, "True"), (False, "0"), (True, 1)):
            judged = Judged(Conversation((ASKED,)), (BETTER,), label)
            assert found({**value, "label": raw}) is DataFormat.UNPAIRED_PREFERENCE
            assert parse({**value, "label": raw}) == judged
        assert parse({**value, "kto_tag": True}) == Judged(Conversation((ASKED,)), (BETTER,), True)

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ({"prompt": "Hi", "completion": "x", "label": CONTENT}, "'label' is neither true nor false"),
            ({"prompt": "Hi", "completion": "x", "label": None}, "'label' is neither true nor false"),
            ({"prompt": "Hi", "completion": "x", "label": 0.5}, "'label' is neither true nor false"),
            ({"completion": CONTENT, "label": True}, "has no prompt"),
        ],
    )
    def test_refuses(self, value: dict[str, Any], expected: str) -> None:
        assert reason(value) == expected


# Whatever a row holds, it is understood or refused for a reason that holds nothing of it.

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["[]", "{", "[{}]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "weight"]
            ),
            inner | st.sampled_from(["user", "assistant", "human", "gpt", "tool", "system", "function_call"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)
ROWS = st.dictionaries(
    st.sampled_from(
        sorted(
            {column for columns in USUAL_COLUMNS.values() for column in columns.model_dump(exclude_none=True).values()}
            | {"conversations", "prompt", "preferred_output", "non_preferred_output", "functions"}
        )
    ),
    VALUES,
    max_size=6,
)


@settings(max_examples=400, deadline=None)
@given(row=ROWS, asked=st.sampled_from([name for name in DataFormat if name is not DataFormat.AUTO]))
def test_any_row_is_understood_or_refused(row: dict[str, Any], asked: DataFormat) -> None:
    try:
        example = parse(row, asked)
    except RowError:
        return
    assert isinstance(example, Conversation | Text | Preference | Judged)
