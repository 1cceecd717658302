"""Render an example with the model's own chat template, tokenise it, and label the tokens that are learnt.

Labels come from character offsets in the rendered text, never from token prefixes: the text of a conversation up to a
turn is a prefix of the whole text (where it is not, see below), and a token is learnt when it lies inside an assistant
turn, stop token included. What follows the stop token (many templates end a turn with a newline) is not learnt, since
generation ends at the stop token.

Some templates are not prefix-stable for some chats: they rewrite earlier turns (drop reasoning, move the system
message). Such a conversation becomes one row for each assistant turn, rendered exactly as at inference.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetune_api.failures import FailureClass, JobError
from finetune_trainer.data.formats import Conversation, Example, Message, Text
from finetune_trainer.data.rows import RowError

IGNORED = -100
"""Label of a token that is not learnt, as torch's cross entropy has it."""

TEMPLATE_DATE = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
"""What a template is told as today's date: the same data must give the same tokens tomorrow. It is in the manifest."""


@dataclass(frozen=True)
class TokenRow:
    input_ids: list[int]
    labels: list[int]
    """As long as input_ids; IGNORED where nothing is learnt."""


@dataclass(frozen=True)
class _Span:
    start: int
    end: int


class Renderer:
    """Turns examples into token rows for one tokenizer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, max_length: int
    ) -> None:
        if not tokenizer.is_fast:
            raise JobError(
                FailureClass.MODEL_ERROR,
                "The model's tokenizer has no tokenizer.json, so that token positions are unknown. Add the fast "
                "tokenizer to the model folder.",
            )
        self._tokenizer = tokenizer
        self._template = _dated(tokenizer.get_chat_template()) if tokenizer.chat_template else None
        self._max_length = max_length
        self._stop_ids = _stop_ids(tokenizer, generation)
        self.split_conversations = 0
        """Conversations that became one row per assistant turn."""

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an assistant turn; generation_config must name them."""
        return sorted(self._stop_ids)

    def rows(self, example: Example) -> Iterator[TokenRow]:
        """The token rows of one example; most have one.

        Raises:
            RowError: the example cannot be used.
            JobError: ModelError, when the model cannot be used with any such example.
        """
        if isinstance(example, Text):
            yield self._text_row(example)
            return
        for text, spans in self._rendered(example):
            yield self._labelled(text, spans)

    def _text_row(self, example: Text) -> TokenRow:
        ids = list(self._tokenizer(example.text)["input_ids"])
        if self._tokenizer.eos_token_id is None:
            raise JobError(FailureClass.MODEL_ERROR, "The tokenizer has no eos_token, so that no text could end.")
        if ids[-1:] != [self._tokenizer.eos_token_id]:
            ids.append(self._tokenizer.eos_token_id)
        labels = list(ids)
        if ids[0] == self._tokenizer.bos_token_id and len(ids) > 1:
            labels[0] = IGNORED
        return self._checked(TokenRow(ids, labels))

    def _rendered(self, conversation: Conversation) -> Iterator[tuple[str, list[_Span]]]:
        """Rendered texts with the character spans of the assistant turns that are learnt."""
        messages = conversation.messages
        learnt = [i for i, message in enumerate(messages) if message.role == "assistant" and message.learnt]
        whole = self._render(messages)
        spans = [self._span(whole, messages, turn) for turn in learnt]
        if all(spans):
            yield whole, [span for span in spans if span]
            return
        self.split_conversations += 1
        for turn in learnt:
            text = self._render(messages[: turn + 1])
            span = self._span(text, messages[: turn + 1], turn)
            if span is None:
                raise RowError("is rendered by the chat template in a way that hides where the answer begins")
            yield text, [span]

    def _span(self, text: str, messages: tuple[Message, ...], turn: int) -> _Span | None:
        """Where the turn's answer is in `text`; None when the template rewrote what came before it."""
        before = self._render(messages[:turn], add_generation_prompt=True)
        after = self._render(messages[: turn + 1])
        if not (text.startswith(before) and text.startswith(after) and len(after) > len(before)):
            return None
        return _Span(len(before), len(after))

    def _render(self, messages: tuple[Message, ...], *, add_generation_prompt: bool = False) -> str:
        if self._template is None:
            raise JobError(
                FailureClass.MODEL_ERROR,
                "The data are conversations, but the model's tokenizer has no chat template. Use an instruct model, "
                "add chat_template.jinja to the model folder, or train on plain text (dataset.format: Text).",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise RowError(f"is refused by the model's chat template ({error})") from error
        return str(text)

    def _labelled(self, text: str, spans: list[_Span]) -> TokenRow:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        labels = [IGNORED] * len(ids)
        for span in spans:
            inside = [i for i, (start, end) in enumerate(offsets) if span.start <= start < span.end and end > start]
            # Some tokenizers give a token of spaces no width, and so no place: it lies between those that have one.
            inside = list(range(inside[0], inside[-1] + 1)) if inside else []
            stop = self._stop(text, ids, offsets, inside)
            if stop is None:
                raise JobError(
                    FailureClass.MODEL_ERROR,
                    "The chat template does not end the assistant's turn with a stop token that the tokenizer or "
                    "generation_config.json names, so that the model could not learn to stop. Set eos_token_id in the "
                    "model's generation_config.json.",
                )
            for i in inside:
                if i <= stop:
                    labels[i] = ids[i]
        return self._checked(TokenRow(ids, labels))

    def _stop(self, text: str, ids: list[int], offsets: list[tuple[int, int]], inside: list[int]) -> int | None:
        """The stop token at the end of a turn. Some templates write another one behind it (Phi 3 ends a turn, and then
        the whole text): generation ends at the first."""
        stop = None
        for i in reversed(inside):
            if ids[i] in self._stop_ids:
                stop = i
            elif stop is not None and text[slice(*offsets[i])].strip():
                break
        return stop

    def _checked(self, row: TokenRow) -> TokenRow:
        if len(row.input_ids) > self._max_length:
            raise RowError(f"is longer than {self._max_length} tokens (dataset.maxLength)")
        # The first token is predicted from nothing, so that a label on it teaches nothing.
        if all(label == IGNORED for label in row.labels[1:]):
            raise RowError("has no token to learn")
        return row


def _dated(template: str) -> str:
    """The template with a clock that stands still.

    transformers lets templates call `strftime_now` and gives them nothing but plain data beside it, so that only a
    macro of the same name in the template itself can take its place.
    """
    if "strftime_now" not in template:
        return template
    replacements = "".join(
        f" | replace('%{directive}', {json.dumps(TEMPLATE_DATE.strftime(f'%{directive}'))})"
        for directive in ("-d", "-m", *"aAbBdeHIjmMpSuUwWyYZ%")
    )
    # The empty expression keeps a newline at the start of the template from being trimmed as one behind a block.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replacements} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


def _stop_ids(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> set[int]:
    named: Any = generation.eos_token_id if generation is not None else None
    stops = {named} if isinstance(named, int) else set(named or [])
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    return stops
