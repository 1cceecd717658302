"""Tools, reasoning, what else may be supervised, and rows that are too long."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from trainer_rendering import STOP, TEMPLATES, conversation, rows_of, speaker, supervised, with_template

from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import OverlongPolicy, Supervised
from finetune_trainer.data.examples import Conversation, Message, Preference, Text, ToolCall
from finetune_trainer.data.render import Renderer, Rules
from finetune_trainer.data.rows import RowError
from finetune_trainer.data.token_rows import IGNORED, TokenRow

TOOLS = json.dumps(
    [{"type": "function", "function": {"name": "weather", "description": "of a town", "parameters": {}}}]
)
CALL = ToolCall("weather", '{"town": "Ulm"}', "call00001")
CALLED = Conversation(
    (
        Message("user", "Rain?"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "not a drop", name="weather", tool_call_id="call00001"),
        Message("assistant", "It is dry."),
    ),
    TOOLS,
)
THOUGHT = Conversation((Message("user", "Rain?"), Message("assistant", "It is dry.", reasoning="Look outside.")))

WITH_TOOLS = [
    "gemma4_v2",
    "lfm2_2_5",
    "lfm2_2_5_v2",
    "lfm2_2_5_vl",
    "lfm2_v2",
    "llama3_1",
    "llama3_2",
    "muse_glimmer",
    "qwen2_5",
    "qwen3",
    "qwen3_5_nothink",
    "qwen3_5_think",
    "qwen3_6",
    "qwen3_8",
    "qwen3_instruct_2507",
    "qwen3_vl",
]
"""Templates that can say a tool call, and whose end of it the tiny tokenizer knows."""

Speaks = Callable[[str], Any]


@pytest.fixture(scope="module")
def speaks(tokenizer: Any) -> Speaks:
    """A tokenizer with the template of a real model."""
    paths = {path.stem: path for path in TEMPLATES}
    return lambda name: speaker(tokenizer, paths[name])


def render(tokenizer: Any, example: Conversation | Text, **rules: Any) -> tuple[list[TokenRow], Renderer]:
    renderer = Renderer(tokenizer, None, Rules(**{"max_length": 4096, **rules}))
    return renderer.token_rows(example), renderer


class TestTools:
    @pytest.mark.parametrize("name", WITH_TOOLS)
    def test_calls_are_learnt_and_their_answers_are_not(self, speaks: Speaks, name: str) -> None:
        speech = speaks(name)
        rows = rows_of(speech, CALLED)
        learnt = "".join(supervised(speech, row) for row in rows)
        call, answer = learnt.split(speech.eos_token, 1)
        assert re.search(r"weather\b.*\btown\b.*\bUlm\b", call, re.DOTALL)
        assert answer.endswith(f"It is dry.{speech.eos_token}")
        assert "Rain?" not in learnt
        assert "not a drop" not in learnt
        text = speech.decode(rows[-1].input_ids)
        assert "not a drop" in text
        assert "of a town" in text

    def test_no_other_template_loses_them(self, speaks: Speaks) -> None:
        for path in TEMPLATES:
            if path.stem.removesuffix("_training") not in WITH_TOOLS:
                with pytest.raises((RowError, JobError)):
                    rows_of(speaks(path.stem), CALLED)

    def test_a_template_without_tools_does_not_lose_them(self, tokenizer: Any) -> None:
        with pytest.raises(RowError, match="has tools, which the model's chat template leaves out"):
            rows_of(tokenizer, CALLED)
        said = (Message("user", "What does weather do?"), Message("assistant", "It calls weather of a town."))
        with pytest.raises(RowError, match="has tools, which the model's chat template leaves out"):
            rows_of(tokenizer, Conversation(said, TOOLS))
        without = Conversation(CALLED.messages)
        with pytest.raises(RowError, match="has tool calls, which the model's chat template leaves out"):
            rows_of(tokenizer, without)

    def test_what_somebody_says_is_not_lost(self, tokenizer: Any) -> None:
        template = tokenizer.chat_template.replace("{% for message in messages %}", "{% for message in messages[1:] %}")
        assert template != tokenizer.chat_template
        with pytest.raises(RowError, match="has a message of the system that the model's chat template leaves out"):
            rows_of(with_template(tokenizer, template), conversation("Hi", "Hello", system="Be brief"))

    @pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
    def test_what_is_said_beside_a_call_is_not_lost(self, speaks: Speaks, name: str) -> None:
        """These templates say either."""
        user, call, *rest = CALLED.messages
        spoken = Conversation((user, replace(call, content="Let me look."), *rest), TOOLS)
        with pytest.raises(RowError, match="has a message of the assistant that the model's chat template leaves out"):
            rows_of(speaks(name), spoken)

    @pytest.mark.parametrize("name", ["llama3", "phi3", "qwen2_5_vl", "deepseek_r1_distill"])
    def test_calls_and_answers_that_are_not_learnt_are_not_lost_either(self, speaks: Speaks, name: str) -> None:
        user, call, answer, last = CALLED.messages
        seen = Conversation((user, replace(call, learnt=False), answer, last))
        with pytest.raises((RowError, JobError)):
            rows_of(speaks(name), seen)
        with pytest.raises((RowError, JobError)):
            render(speaks(name), Conversation(CALLED.messages), supervised=Supervised.ALL)


class TestReasoning:
    def test_it_is_learnt(self, speaks: Speaks) -> None:
        speech = speaks("qwen3")
        (row,) = rows_of(speech, THOUGHT)
        assert supervised(speech, row) == f"<think>\nLook outside.\n</think>\n\nIt is dry.{STOP}"

    def test_it_is_seen_and_not_learnt(self, speaks: Speaks) -> None:
        speech = speaks("qwen3")
        ((row,), _) = render(speech, THOUGHT, reasoning=False)
        assert supervised(speech, row).strip() == f"It is dry.{STOP}"
        assert "Look outside." not in supervised(speech, row)
        assert "Look outside." in speech.decode(row.input_ids)

    def test_within_the_content(self, tokenizer: Any) -> None:
        """As distilled data have it."""
        example = conversation("Rain?", "<think>Look outside.</think>It is dry.")
        ((row,), _) = render(tokenizer, example, reasoning=False)
        assert supervised(tokenizer, row) == f"It is dry.{STOP}"

    def test_everything_is_learnt_or_refused(self, tokenizer: Any) -> None:
        with pytest.raises(RowError, match="has reasoning, which the model's chat template leaves out"):
            render(tokenizer, THOUGHT, supervised=Supervised.ALL)
        example = conversation("Hi", "Hello", "More?", "No", learnt=(False, True))
        with pytest.raises(RowError, match=r"has a weight of 0, and dataset\.supervised All learns everything"):
            render(tokenizer, example, supervised=Supervised.ALL)

    def test_earlier_thoughts_are_forgotten_as_at_inference(self, speaks: Speaks) -> None:
        speech = speaks("qwen3")
        second = (Message("user", "Sun?"), Message("assistant", "Some.", reasoning="Look up."))
        first, last = rows_of(speech, Conversation((*THOUGHT.messages, *second)))
        assert "Look outside." in supervised(speech, first)
        assert "Look outside." not in speech.decode(last.input_ids)
        assert supervised(speech, last) == f"<think>\nLook up.\n</think>\n\nSome.{STOP}"

    def test_a_template_without_it_does_not_lose_it(self, tokenizer: Any) -> None:
        with pytest.raises(RowError, match="has reasoning, which the model's chat template leaves out"):
            rows_of(tokenizer, THOUGHT)


class TestSupervised:
    EXAMPLE = conversation("Hi", "Hello", "More?", "No", system="Be brief")

    def test_the_last_turn(self, tokenizer: Any) -> None:
        ((row,), _) = render(tokenizer, self.EXAMPLE, supervised=Supervised.LAST_TURN)
        assert supervised(tokenizer, row) == f"No{STOP}"
        assert "Hello" in tokenizer.decode(row.input_ids)

    def test_a_last_turn_without_weight(self, tokenizer: Any) -> None:
        example = conversation("Hi", "Hello", "More?", "No", learnt=(True, False))
        with pytest.raises(RowError, match="has no token to learn"):
            render(tokenizer, example, supervised=Supervised.LAST_TURN)

    def test_everything(self, tokenizer: Any) -> None:
        ((row,), _) = render(tokenizer, self.EXAMPLE, supervised=Supervised.ALL)
        assert row.labels[0] == IGNORED
        assert row.labels[1:] == row.input_ids[1:]


class TestOverlong:
    LONG = conversation("Hi", "word " * 100)

    def lengths(self, tokenizer: Any, example: Conversation | Text) -> int:
        ((row,), _) = render(tokenizer, example)
        return len(row.input_ids)

    @pytest.mark.parametrize("example", [LONG, Text("word " * 100)], ids=["chat", "text"])
    def test_fail_and_drop(self, tokenizer: Any, example: Conversation | Text) -> None:
        with pytest.raises(RowError, match="is longer than 32 tokens"):
            render(tokenizer, example, max_length=32)
        rows, renderer = render(tokenizer, example, max_length=32, overlong=OverlongPolicy.DROP)
        assert rows == []
        assert (renderer.counts.overlong, renderer.counts.dropped) == (1, 1)

    def test_truncate(self, tokenizer: Any) -> None:
        whole = rows_of(tokenizer, self.LONG)[0]
        ((row,), renderer) = render(tokenizer, self.LONG, max_length=32, overlong=OverlongPolicy.TRUNCATE)
        assert row == TokenRow(whole.input_ids[:32], whole.labels[:32])
        counts = renderer.counts
        assert (counts.overlong, counts.truncated, counts.dropped) == (1, 1, 0)
        assert counts.truncated_tokens == len(whole.input_ids) - 32

    def test_truncated_so_that_nothing_is_left_to_learn(self, tokenizer: Any) -> None:
        example = conversation("word " * 100, "Hello")
        rows, renderer = render(tokenizer, example, max_length=32, overlong=OverlongPolicy.TRUNCATE)
        assert rows == []
        assert (renderer.counts.truncated, renderer.counts.dropped) == (0, 1)

    @pytest.mark.parametrize("length", [16, 17, 101, 102])
    def test_plain_text_in_pieces(self, tokenizer: Any, length: int) -> None:
        example = Text("word " * 100)
        whole = rows_of(tokenizer, example)[0]
        rows, renderer = render(tokenizer, example, max_length=length, overlong=OverlongPolicy.SPLIT)
        assert all(len(row.input_ids) <= length for row in rows)
        together = [token for row in rows for token in row.input_ids]
        assert together == whole.input_ids[: len(together)]
        # A last token alone would have nothing to be predicted from.
        assert len(whole.input_ids) - len(together) == renderer.counts.dropped <= 1

    def test_a_conversation_by_turns(self, tokenizer: Any) -> None:
        texts = [f"{word} {number}" for number in range(8) for word in ("ask", "answer")]
        example = conversation(*texts, system="Be brief")
        whole = rows_of(tokenizer, example)[0]
        length = len(whole.input_ids) // 3
        rows, renderer = render(tokenizer, example, max_length=length, overlong=OverlongPolicy.SPLIT)
        assert len(rows) > 2
        assert all(len(row.input_ids) <= length for row in rows)
        assert "".join(supervised(tokenizer, row) for row in rows) == supervised(tokenizer, whole)
        assert all(tokenizer.decode(row.input_ids).startswith("<|im_start|>system\nBe brief") for row in rows)
        assert renderer.counts.dropped == 0
        # As many turns as there is room for: no two neighbours would fit into one row.
        sizes = [len(row.input_ids) for row in rows]
        system = self.lengths(tokenizer, conversation("ask 0", "answer 0", system="Be brief")) - self.lengths(
            tokenizer, conversation("ask 0", "answer 0")
        )
        turn = self.lengths(tokenizer, conversation("ask 0", "answer 0"))
        assert all(size + turn > length for size, _ in pairwise(sizes)), (sizes, system, turn)

    def test_the_last_turn_is_that_of_the_whole(self, tokenizer: Any) -> None:
        texts = [f"{word} {number}" for number in range(8) for word in ("ask", "answer")]
        rows, _ = render(
            tokenizer,
            conversation(*texts),
            max_length=60,
            overlong=OverlongPolicy.SPLIT,
            supervised=Supervised.LAST_TURN,
        )
        assert [supervised(tokenizer, row) for row in rows] == [f"answer 7{STOP}"]

    @pytest.mark.parametrize(("policy", "cut"), [(OverlongPolicy.DROP, 0), (OverlongPolicy.TRUNCATE, 1)])
    def test_a_pair_is_counted_once(self, tokenizer: Any, policy: OverlongPolicy, cut: int) -> None:
        renderer = Renderer(tokenizer, None, Rules(32, policy))
        prompt = Conversation((Message("user", "Hi"),))
        answers = [(Message("assistant", f"{word} " * 50),) for word in ("yes", "no")]
        assert len(renderer.rows(Preference(prompt, *answers))) == cut
        counts = renderer.counts
        assert (counts.overlong, counts.truncated, counts.dropped) == (1, cut, 1 - cut)

    def test_answers_that_differ_behind_the_cut(self, tokenizer: Any) -> None:
        renderer = Renderer(tokenizer, None, Rules(32, OverlongPolicy.TRUNCATE))
        answers = [(Message("assistant", "word " * 50 + end),) for end in ("yes", "no")]
        assert renderer.rows(Preference(Conversation((Message("user", "Hi"),)), *answers)) == []
        assert (renderer.counts.overlong, renderer.counts.dropped) == (1, 1)

    def test_a_turn_that_is_too_long_by_itself(self, tokenizer: Any) -> None:
        example = conversation("one", "1", "long", "word " * 100, "two", "2")
        rows, renderer = render(tokenizer, example, max_length=40, overlong=OverlongPolicy.SPLIT)
        assert [supervised(tokenizer, row) for row in rows] == [f"1{STOP}", f"2{STOP}"]
        assert renderer.counts.dropped == 1


def test_no_template_is_a_fault_of_the_model(tokenizer: Any) -> None:
    with pytest.raises(JobError) as caught:
        rows_of(with_template(tokenizer, ""), conversation("Hi", "Hello"))
    assert caught.value.failure_class is FailureClass.MODEL_ERROR
