"""What is learnt of a rendered conversation: the answers with their stop tokens, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import ByteLevel
from trainer_rendering import STOP, TEMPLATES, conversation, rows_of, speaker, supervised, with_template
from transformers import GenerationConfig

from finetune_api.failures import FailureClass, JobError
from finetune_trainer.data.examples import Text
from finetune_trainer.data.render import Renderer, Rules
from finetune_trainer.data.rows import RowError
from finetune_trainer.data.token_rows import IGNORED


class TestLabels:
    def test_only_the_answer_and_its_stop_token(self, tokenizer: Any) -> None:
        (row,) = rows_of(tokenizer, conversation("What is 2+2?", "It is 4.", system="Be brief"))
        assert supervised(tokenizer, row) == f"It is 4.{STOP}"
        assert tokenizer.decode(row.input_ids) == (
            f"<|im_start|>system\nBe brief{STOP}\n<|im_start|>user\nWhat is 2+2?{STOP}\n"
            f"<|im_start|>assistant\nIt is 4.{STOP}\n"
        )
        # The newline behind the stop token is there, and not learnt.
        assert tokenizer.decode(row.input_ids[-1:]) == "\n"
        assert row.labels[-1] == IGNORED
        assert row.labels[-2] == tokenizer.eos_token_id
        assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))

    def test_every_answer_of_several_turns(self, tokenizer: Any) -> None:
        (row,) = rows_of(tokenizer, conversation("Hi", "Hello", "More?", "No", "Bye", "Bye bye"))
        assert supervised(tokenizer, row) == f"Hello{STOP}No{STOP}Bye bye{STOP}"

    def test_weight_zero(self, tokenizer: Any) -> None:
        example = conversation("Hi", "Hello", "More?", "No", "Bye", "Bye bye", learnt=(False, True, False))
        (row,) = rows_of(tokenizer, example)
        assert supervised(tokenizer, row) == f"No{STOP}"
        assert "Bye bye" in tokenizer.decode(row.input_ids)

    def test_the_prompt_is_that_of_inference(self, tokenizer: Any) -> None:
        (row,) = rows_of(tokenizer, conversation("Hi", "Hello"))
        first = next(i for i, label in enumerate(row.labels) if label != IGNORED)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
        )
        assert row.input_ids[:first] == prompt

    def test_one_beginning_of_sequence(self, tokenizer: Any) -> None:
        """The template writes it, and so does the tokenizer: only one may come out."""
        from tokenizers.processors import TemplateProcessing

        template = "{{ bos_token }}" + tokenizer.chat_template
        changed = with_template(tokenizer, template, bos_token="<|endoftext|>")
        bos = changed.bos_token_id
        changed.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
        )
        assert changed("x")["input_ids"][0] == bos
        (row,) = rows_of(changed, conversation("Hi", "Hello"))
        assert row.input_ids.count(bos) == 1
        assert row.input_ids[0] == bos
        assert supervised(changed, row) == f"Hello{STOP}"
        (text,) = rows_of(changed, Text("Once"))
        assert text.input_ids.count(bos) == 1
        assert text.labels[0] == IGNORED

    def test_stop_tokens_of_the_generation_config(self, tokenizer: Any) -> None:
        changed = with_template(tokenizer, tokenizer.chat_template.replace(STOP, "<|endoftext|>"))
        with pytest.raises(JobError) as caught:
            rows_of(changed, conversation("Hi", "Hello"))
        assert caught.value.failure_class is FailureClass.MODEL_ERROR
        assert "could not learn to stop" in caught.value.message
        assert "Set eos_token_id in the model's generation_config.json" in caught.value.message
        end = changed.convert_tokens_to_ids("<|endoftext|>")
        renderer = Renderer(changed, GenerationConfig(eos_token_id=[end, 7]), Rules(512))
        (row,) = renderer.token_rows(conversation("Hi", "Hello"))
        assert supervised(changed, row) == "Hello<|endoftext|>"
        assert renderer.stop_ids == sorted({end, 7, changed.eos_token_id})

    def test_a_second_stop_token_behind_the_first_is_not_learnt(self, tokenizer: Any) -> None:
        """Phi 3 ends the turn, and then the text."""
        template = tokenizer.chat_template + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
        changed = with_template(tokenizer, template)
        end = changed.convert_tokens_to_ids("<|endoftext|>")
        (row,) = Renderer(changed, GenerationConfig(eos_token_id=end), Rules(512)).token_rows(
            conversation("Hi", "Hello\n")
        )
        assert supervised(changed, row) == f"Hello\n{STOP}"

    def test_a_stop_token_within_an_answer_is_learnt(self, tokenizer: Any) -> None:
        (row,) = rows_of(tokenizer, conversation("Hi", f"A{STOP}B"))
        assert supervised(tokenizer, row) == f"A{STOP}B{STOP}"

    def test_a_row_that_is_too_long_is_refused_and_not_cut(self, tokenizer: Any) -> None:
        example = conversation("Hi", "Hello " * 100)
        length = len(rows_of(tokenizer, example)[0].input_ids)
        assert rows_of(tokenizer, example, max_length=length)
        with pytest.raises(RowError, match=rf"^is longer than {length - 1} tokens \(dataset.maxLength\)$"):
            rows_of(tokenizer, example, max_length=length - 1)

    @settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        turns=st.lists(
            st.tuples(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40), st.booleans()),
            min_size=1,
            max_size=4,
        ),
        system=st.none() | st.text(min_size=1, max_size=20),
    )
    def test_decoded_labels_are_the_answers(
        self, tokenizer: Any, turns: list[tuple[str, str, bool]], system: str | None
    ) -> None:
        def clean(text: str) -> str:
            return text.encode("utf-8", "replace").decode().replace("<|", "< |")

        texts = [clean(text) for user, answer, _ in turns for text in (user, answer)]
        learnt = tuple(flag for *_, flag in turns)
        example = conversation(*texts, learnt=learnt, system=clean(system) if system else None)
        if not any(learnt):
            with pytest.raises(RowError):
                rows_of(tokenizer, example)
            return
        (row,) = rows_of(tokenizer, example)
        expected = "".join(clean(answer) + STOP for _, answer, flag in turns if flag)
        assert supervised(tokenizer, row) == expected


REWRITING = (
    "{% set last = namespace(index=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.index = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 < last.index %}[short]{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Rewrites earlier answers, as reasoning models drop their earlier thoughts."""


class TestUnstableTemplates:
    def test_a_conversation_becomes_one_row_for_each_answer(self, tokenizer: Any) -> None:
        changed = with_template(tokenizer, REWRITING)
        renderer = Renderer(changed, None, Rules(512))
        rows = list(renderer.token_rows(conversation("Hi", "Hello", "More?", "No")))
        assert [supervised(changed, row) for row in rows] == [f"Hello{STOP}", f"No{STOP}"]
        # Each is rendered as at inference.
        assert changed.decode(rows[0].input_ids) == f"<|im_start|>user\nHi{STOP}\n<|im_start|>assistant\nHello{STOP}\n"
        assert "[short]" in changed.decode(rows[1].input_ids)
        assert renderer.counts.split_conversations == 1

    def test_a_stable_conversation_stays_whole(self, tokenizer: Any) -> None:
        renderer = Renderer(with_template(tokenizer, REWRITING), None, Rules(512))
        assert len(list(renderer.token_rows(conversation("Hi", "Hello")))) == 1
        assert renderer.counts.split_conversations == 0

    def test_weight_zero_makes_no_row(self, tokenizer: Any) -> None:
        changed = with_template(tokenizer, REWRITING)
        rows = rows_of(changed, conversation("Hi", "Hello", "More?", "No", "So?", "Yes", learnt=(True, False, True)))
        assert [supervised(changed, row) for row in rows] == [f"Hello{STOP}", f"Yes{STOP}"]

    def test_a_template_that_hides_the_answer(self, tokenizer: Any) -> None:
        template = tokenizer.chat_template.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>bot\n{% endif %}")
        with pytest.raises(RowError, match="hides where the answer begins"):
            rows_of(with_template(tokenizer, template), conversation("Hi", "Hello"))


class TestTemplates:
    def test_the_date_stands_still(self, tokenizer: Any) -> None:
        template = "{{ strftime_now('%d %b %Y, %B %-d, %A %H:%M, %y%m%d %%') }}\n" + tokenizer.chat_template
        (row,) = rows_of(with_template(tokenizer, template), conversation("Hi", "Hello"))
        assert tokenizer.decode(row.input_ids).startswith("01 Jan 2025, January 1, Wednesday 00:00, 250101 %\n")

    def test_the_date_within_a_macro(self, tokenizer: Any) -> None:
        """As gpt-oss has it."""
        template = "\n{% macro head() %}[{{ strftime_now('%Y-%m-%d') }}]{% endmacro %}{{ head() }}" + (
            tokenizer.chat_template
        )
        (row,) = rows_of(with_template(tokenizer, template), conversation("Hi", "Hello"))
        assert tokenizer.decode(row.input_ids).startswith("\n[2025-01-01]<|im_start|>")

    def test_a_refusal_of_the_template_is_told(self, tokenizer: Any) -> None:
        template = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            + tokenizer.chat_template
        )
        with pytest.raises(RowError, match=r"is refused by the model's chat template \(System role not supported\)"):
            rows_of(with_template(tokenizer, template), conversation("Hi", "Hello", system="Be brief"))

    def test_no_template(self, tokenizer: Any) -> None:
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = None
        with pytest.raises(JobError) as caught:
            rows_of(changed, conversation("Hi", "Hello"))
        assert caught.value.failure_class is FailureClass.MODEL_ERROR
        assert "has no chat template" in caught.value.message
        assert "add chat_template.jinja" in caught.value.message
        assert rows_of(changed, Text("plain text needs none"))


class TestText:
    def test_every_token_is_learnt_and_it_ends(self, tokenizer: Any) -> None:
        """The padding token is the stop token here, which must not hide the stop."""
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        (row,) = rows_of(tokenizer, Text("Once upon a time"))
        assert row.labels == row.input_ids
        assert tokenizer.decode(row.input_ids) == f"Once upon a time{STOP}"

    def test_a_text_that_ends_already(self, tokenizer: Any) -> None:
        (row,) = rows_of(tokenizer, Text(f"Once{STOP}"))
        assert tokenizer.decode(row.input_ids) == f"Once{STOP}"

    def test_no_stop_token(self, tokenizer: Any) -> None:
        changed = copy.deepcopy(tokenizer)
        changed.eos_token = None
        with pytest.raises(JobError, match="has no eos_token") as caught:
            rows_of(changed, Text("Once"))
        assert caught.value.failure_class is FailureClass.MODEL_ERROR

    def test_too_long(self, tokenizer: Any) -> None:
        with pytest.raises(RowError, match="is longer than 16 tokens"):
            rows_of(tokenizer, Text("word " * 100), max_length=16)

    @settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(text=st.text(min_size=1, max_size=80))
    def test_the_text_comes_back(self, tokenizer: Any, text: str) -> None:
        text = text.encode("utf-8", "replace").decode().replace("<|", "< |")
        (row,) = rows_of(tokenizer, Text(text))
        assert supervised(tokenizer, row) == text + STOP


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(JobError, match=r"has no tokenizer\.json") as caught:
        Renderer(Slow(), None, Rules(512))  # type: ignore[arg-type]
    assert caught.value.failure_class is FailureClass.MODEL_ERROR


# The templates of real models, as TRL ships them.

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
PREAMBLES = {
    "glm4moe_training": "\n<think></think>\n",
    "gptoss": "<|channel|>final<|message|>",
    "gptoss_training": "<|channel|>final<|message|>",
    "muse_glimmer": " to=user<|message|>",
    "muse_glimmer_training": " to=user<|message|>",
    "qwen3": EMPTY_THOUGHT,
    "qwen3_training": EMPTY_THOUGHT,
    **dict.fromkeys(
        ("qwen3_5_think", "qwen3_5_think_training", "qwen3_6", "qwen3_6_training", "qwen3_8", "qwen3_8_training"),
        "\n</think>\n\n",
    ),
}
"""What a template itself puts before an answer, behind the prompt that it makes at inference: it is learnt, too."""
HIDES = "hides where the answer begins"
NO_STOP = "could not learn to stop"
LEFT_OUT = r"has a message of the (user|system) that the model.s chat template leaves out"
NEEDS_PARTS = "is refused by the model's chat template"
REFUSED = {
    **dict.fromkeys(
        ("deepseek_r1_distill", "deepseek_r1_distill_training", "deepseekv3", "deepseekv3_training"), HIDES
    ),
    **dict.fromkeys(
        (
            f"nemotron_3_{name}{training}"
            for name in ("5_lightning", "nano", "super", "ultra")
            for training in ("", "_training")
        ),
        HIDES,
    ),
    "glm4moe": NO_STOP,
    # Image models whose templates want content in parts.
    **dict.fromkeys(("idefics3", "idefics3_training", "smolvlm", "smolvlm_training"), LEFT_OUT),
    **dict.fromkeys(("llava_next", "llava_next_training"), NEEDS_PARTS),
}
"""Templates that cannot be used, and what is said then."""
NO_SYSTEM = {"gemma", "gemma_training"}
CONVERSATIONS = {
    "one turn": conversation("What is 2+2?", "It is 4."),
    "two turns": conversation("Hi there", "Hello you", "And then?", "Good bye"),
    "system": conversation("What is 2+2?", "It is 4.", "Sure?", "Yes, sure.", system="Be brief"),
}


@pytest.fixture(scope="module")
def speaker_of(tokenizer: Any) -> Callable[[Path], Any]:
    return lambda path: speaker(tokenizer, path)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_real_models(path: Path, speaker_of: Callable[[Path], Any]) -> None:
    speaks = speaker_of(path)
    for name, example in CONVERSATIONS.items():
        if path.stem in REFUSED or (path.stem in NO_SYSTEM and name == "system"):
            with pytest.raises((RowError, JobError), match=REFUSED.get(path.stem, "System role not supported")):
                rows_of(speaks, example)
            continue
        rows = rows_of(speaks, example)
        answers = [message.content for message in example.messages if message.role == "assistant"]
        assert len(rows) in (1, len(answers)), name
        learnt = "".join(supervised(speaks, row) for row in rows)
        preamble = PREAMBLES.get(path.stem, "")
        assert learnt == "".join(f"{preamble}{answer}{speaks.eos_token}" for answer in answers), name


def test_the_templates_are_there() -> None:
    """The parametrised test above is not empty, and its exceptions name real templates."""
    names = {path.stem for path in TEMPLATES}
    assert len(names) > 60
    assert {*REFUSED, *PREAMBLES, *NO_SYSTEM} <= names


def test_tokens_without_a_place_are_learnt_with_their_neighbours(tokenizer: Any) -> None:
    """With `trim_offsets`, as GPT-NeoX and RoBERTa tokenizers have it, a token of spaces has no width."""
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    answer = "1  2   3 - 4\n\n    five"
    (row,) = rows_of(changed, conversation("Count.", answer))
    encoded = changed(answer, return_offsets_mapping=True, add_special_tokens=False)
    assert any(start == end for start, end in encoded["offset_mapping"]), "the test would prove nothing"
    assert supervised(changed, row) == f"{answer}{STOP}"
