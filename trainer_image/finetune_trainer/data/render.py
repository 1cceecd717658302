"""Render an example with the model's own chat template, tokenise it, and label the tokens that are learnt.

Labels come from character offsets in the rendered text, never from token prefixes: the text of a conversation up to a
turn is a prefix of the whole text (where it is not, see below), and a token is learnt when it lies inside an assistant
turn, stop token included. What follows the stop token (many templates end a turn with a newline) is not learnt, since
generation ends at the stop token.

Some templates are not prefix-stable for some chats: they rewrite earlier turns (drop reasoning, move the system
message). Such a conversation becomes one row for each assistant turn, rendered exactly as at inference.

What a template leaves out would be lost without a word, so that such a row is refused.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import OverlongPolicy, Supervised
from finetune_trainer.data.examples import Conversation, Example, Judged, Message, Preference, Text
from finetune_trainer.data.rows import RowError
from finetune_trainer.data.token_rows import IGNORED, LabelledRow, PairRow, PreparedRow, TokenRow

THOUGHT_END = "</think>"
"""Ends the reasoning in the content of many models' answers."""

TEMPLATE_DATE = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
"""What a template is told as today's date: the same data must give the same tokens tomorrow. It is in the manifest."""


@dataclass(frozen=True)
class Rules:
    """What of the dataset's settings decides the tokens and labels of a row."""

    max_length: int
    overlong: OverlongPolicy = OverlongPolicy.FAIL
    supervised: Supervised = Supervised.ASSISTANT_TURNS
    reasoning: bool = True
    """Whether it is learnt."""


@dataclass
class Counts:
    """What was done to rows beside rendering them."""

    split_conversations: int = 0
    """Conversations that became one row per assistant turn, because the template rewrites earlier turns."""
    overlong: int = 0
    """Examples that were longer than allowed."""
    dropped: int = 0
    """Examples, or turns of them, that were left out because they were too long."""
    truncated: int = 0
    """Rows that were cut."""
    truncated_tokens: int = 0


@dataclass(frozen=True)
class _Span:
    start: int
    end: int


@dataclass(frozen=True)
class _Rendered:
    text: str
    spans: list[_Span] | None
    """What is learnt of it; None for all."""
    unlearnt: list[_Span] = field(default_factory=list)
    """What is not, within those."""


class Renderer:
    """Turns examples into token rows for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, rules: Rules) -> None:
        if not tokenizer.is_fast:
            raise JobError(
                FailureClass.MODEL_ERROR,
                "The model's tokenizer has no tokenizer.json, so that token positions are unknown. Add the fast "
                "tokenizer to the model folder.",
            )
        self.tokenizer = tokenizer
        self._template = _dated(tokenizer.get_chat_template()) if tokenizer.chat_template else None
        self._rules = rules
        self._stop_ids = _stop_ids(tokenizer, generation)
        self.counts = Counts()

    @property
    def max_length(self) -> int:
        return self._rules.max_length

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an assistant turn; generation_config must name them."""
        return sorted(self._stop_ids)

    def rows(self, example: Example) -> Sequence[PreparedRow]:
        """The rows of one example; most have one, and one that was dropped for its length has none.

        Raises:
            RowError: the example cannot be used.
            JobError: ModelError, when the model cannot be used with any such example.
        """
        match example:
            case Preference():
                return self._pair(example)
            case Judged():
                return self._judged(example)
            case _:
                return self.token_rows(example)

    def token_rows(self, example: Conversation | Text) -> list[TokenRow]:
        """
        Raises:
            RowError, JobError: as `rows`.
        """
        rows = list(self._text_rows(example) if isinstance(example, Text) else self._turn_rows(example))
        self.counts.split_conversations += len(rows) > 1
        # The first token is predicted from nothing, so that a label on it teaches nothing.
        if any(all(label == IGNORED for label in row.labels[1:]) for row in rows):
            raise RowError("has no token to learn")
        if all(len(row.input_ids) <= self._rules.max_length for row in rows):
            return rows
        if self._rules.overlong is OverlongPolicy.FAIL:
            raise RowError(f"is longer than {self._rules.max_length} tokens (dataset.maxLength)")
        self.counts.overlong += 1
        if self._rules.overlong is OverlongPolicy.TRUNCATE:
            return [cut for row in rows if (cut := self._truncated(row))]
        if self._rules.overlong is OverlongPolicy.SPLIT:
            return list(self._pieces(rows[0]) if isinstance(example, Text) else self._by_turns(example))
        self.counts.dropped += 1
        return []

    # Text

    def _text_rows(self, example: Text) -> Iterator[TokenRow]:
        ids = list(self.tokenizer(example.text)["input_ids"])
        if self.tokenizer.eos_token_id is None:
            raise JobError(FailureClass.MODEL_ERROR, "The tokenizer has no eos_token, so that no text could end.")
        if ids[-1:] != [self.tokenizer.eos_token_id]:
            ids.append(self.tokenizer.eos_token_id)
        labels = list(ids)
        if ids[0] == self.tokenizer.bos_token_id and len(ids) > 1:
            labels[0] = IGNORED
        yield TokenRow(ids, labels)

    # Conversations

    def _turn_rows(self, conversation: Conversation, supervised: Supervised | None = None) -> Iterator[TokenRow]:
        for rendered in self._rendered(conversation, supervised or self._rules.supervised):
            yield self._labelled(rendered)

    def _rendered(self, conversation: Conversation, supervised: Supervised) -> Iterator[_Rendered]:
        """Rendered texts with the character spans of what is learnt."""
        messages = conversation.messages
        whole = self._render(messages, conversation.tools)
        self._require_all(whole, conversation)
        if supervised is Supervised.ALL:
            if not all(message.learnt for message in messages):
                raise RowError("has a weight of 0, and dataset.supervised All learns everything")
            for message in messages:
                _require_said(whole, message)
            yield _Rendered(whole, None)
            return
        learnt = [turn for turn in _turns(messages, supervised) if messages[turn].learnt]
        spans = [self._span(whole, conversation, turn) for turn in learnt]
        if all(spans):
            # Text behind the last turn that is learnt (weights) is context of nothing, and stays as it was written.
            found = [span for span in spans if span]
            yield self._with_reasoning(whole, found, [messages[turn] for turn in learnt])
            return
        for turn in learnt:
            text = self._render(messages[: turn + 1], conversation.tools)
            span = self._span(text, conversation, turn)
            if span is None:
                raise RowError("is rendered by the chat template in a way that hides where the answer begins")
            yield self._with_reasoning(text, [span], [messages[turn]])

    def _require_all(self, text: str, conversation: Conversation) -> None:
        """
        Raises:
            RowError: the template leaves out what somebody said, or what there was to call.
        """
        # The name of a tool may be in the text for other reasons.
        if conversation.tools and text == self._render(conversation.messages, ""):
            raise RowError("has tools, which the model's chat template leaves out")
        for message in conversation.messages:
            # Earlier turns of the assistant are rewritten on purpose, and tools' answers are often reformatted.
            if message.role in ("system", "user") and message.content.strip() not in text:
                raise RowError(f"has a message of the {message.role} that the model's chat template leaves out")
            if any(call.name not in text for call in message.tool_calls):
                raise RowError("has tool calls, which the model's chat template leaves out")
        if any(message.role == "tool" for message in conversation.messages):
            silent = [replace(m, content="") if m.role == "tool" else m for m in conversation.messages]
            if text == self._render(silent, conversation.tools):
                raise RowError("has answers of tools, which the model's chat template leaves out")

    def _with_reasoning(self, text: str, spans: list[_Span], turns: Sequence[Message]) -> _Rendered:
        """
        Raises:
            RowError: the template leaves a turn's reasoning or tool calls out.
        """
        unlearnt = []
        for span, message in zip(spans, turns, strict=True):
            said = text[span.start : span.end]
            _require_said(said, message)
            thought = message.reasoning.strip()
            # Some rows hold the reasoning in the content.
            end = max(said.find(thought) + len(thought) if thought else 0, said.rfind(THOUGHT_END) + len(THOUGHT_END))
            if not self._rules.reasoning and (thought or THOUGHT_END in said):
                unlearnt.append(_Span(span.start, span.start + end))
        return _Rendered(text, spans, unlearnt)

    def _span(self, text: str, conversation: Conversation, turn: int) -> _Span | None:
        """Where the turn's answer is in `text`; None when the template rewrote what came before it."""
        messages, tools = conversation.messages, conversation.tools
        before = self._render(messages[:turn], tools, add_generation_prompt=True)
        after = self._render(messages[: turn + 1], tools)
        if not (text.startswith(before) and text.startswith(after) and len(after) > len(before)):
            return None
        return _Span(len(before), len(after))

    def _render(self, messages: Sequence[Message], tools: str, *, add_generation_prompt: bool = False) -> str:
        if self._template is None:
            raise JobError(
                FailureClass.MODEL_ERROR,
                "The data are conversations, but the model's tokenizer has no chat template. Use an instruct model, "
                "add chat_template.jinja to the model folder, or train on plain text (dataset.format: Text).",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [message.to_template() for message in messages],
                chat_template=self._template,
                tools=json.loads(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise RowError(f"is refused by the model's chat template ({error})") from error
        return str(text)

    def _labelled(self, rendered: _Rendered) -> TokenRow:
        encoded = self.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        if rendered.spans is None:
            return TokenRow(ids, [IGNORED if i == 0 else token for i, token in enumerate(ids)])
        labels = [IGNORED] * len(ids)
        for span in rendered.spans:
            inside = [i for i, (start, end) in enumerate(offsets) if span.start <= start < span.end and end > start]
            # Some tokenizers give a token of spaces no width, and so no place: it lies between those that have one.
            inside = list(range(inside[0], inside[-1] + 1)) if inside else []
            stop = self._stop(rendered.text, ids, offsets, inside)
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
        for span in rendered.unlearnt:
            for i, (start, _) in enumerate(offsets):
                if span.start <= start < span.end:
                    labels[i] = IGNORED
        return TokenRow(ids, labels)

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

    # Preferences

    def _pair(self, example: Preference) -> list[PairRow]:
        """
        Raises:
            RowError: the pair cannot be used.
        """
        chosen = self._answer(example.prompt, example.chosen)
        rejected = self._answer(example.prompt, example.rejected)
        # A tokenizer may join the end of the prompt with the beginning of an answer, which such a token belongs to.
        start = min(_start(chosen), _start(rejected), _common(chosen.input_ids, rejected.input_ids))
        if chosen == rejected:
            raise RowError("has the same answer as chosen and as rejected")
        fitting = self._fitted([chosen.input_ids, rejected.input_ids], start)
        if not fitting:
            return []
        better, worse = (ids[start:] for ids in fitting)
        return [PairRow(chosen.input_ids[:start], better, worse)]

    def _judged(self, example: Judged) -> list[LabelledRow]:
        row = self._answer(example.prompt, example.completion)
        start = _start(row)
        fitting = self._fitted([row.input_ids], start)
        return [LabelledRow(ids[:start], ids[start:], example.desirable) for ids in fitting]

    def _answer(self, prompt: Conversation, answer: Sequence[Message]) -> TokenRow:
        """A prompt with one answer, of which only the answer is learnt, up to its stop token: what some templates write
        behind it is never generated."""
        if len(answer) != 1:
            raise RowError("has an answer of several messages")
        messages = (*prompt.messages, replace(answer[0], learnt=True))
        (row,) = self._turn_rows(Conversation(messages, prompt.tools), Supervised.LAST_TURN)
        end = max(i for i, label in enumerate(row.labels) if label != IGNORED) + 1
        return TokenRow(row.input_ids[:end], row.labels[:end])

    def _fitted(self, answers: list[list[int]], start: int) -> list[list[int]]:
        """A prompt with each of its answers, which begin at `start`; empty when they were dropped for their length."""
        length = self._rules.max_length
        if all(len(ids) <= length for ids in answers):
            return answers
        if self._rules.overlong is OverlongPolicy.FAIL:
            raise RowError(f"is longer than {length} tokens (dataset.maxLength)")
        self.counts.overlong += 1
        cut = [ids[:length] for ids in answers]
        # Two answers may differ only behind the cut.
        told_apart = len(answers) == 1 or cut[0] != cut[1]
        if self._rules.overlong is OverlongPolicy.TRUNCATE and start < length and told_apart:
            self.counts.truncated += 1
            self.counts.truncated_tokens += sum(max(0, len(ids) - length) for ids in answers)
            return cut
        self.counts.dropped += 1
        return []

    # Rows that are too long

    def _truncated(self, row: TokenRow) -> TokenRow | None:
        """The beginning of a row; None when nothing in it is learnt."""
        length = self._rules.max_length
        if len(row.input_ids) <= length:
            return row
        cut = TokenRow(row.input_ids[:length], row.labels[:length])
        if all(label == IGNORED for label in cut.labels[1:]):
            self.counts.dropped += 1
            return None
        self.counts.truncated += 1
        self.counts.truncated_tokens += len(row.input_ids) - length
        return cut

    def _pieces(self, row: TokenRow) -> Iterator[TokenRow]:
        """Plain text in pieces, each token in one of them; each begins as the whole did."""
        head = 1 if row.labels[0] == IGNORED else 0
        length = self._rules.max_length - head
        for start in range(head, len(row.input_ids), length):
            ids = row.input_ids[start : start + length]
            if len(ids) + head < 2:
                # One token alone has nothing to be predicted from.
                self.counts.dropped += 1
                continue
            yield TokenRow([*row.input_ids[:head], *ids], [*row.labels[:head], *row.labels[start : start + length]])

    def _by_turns(self, conversation: Conversation) -> Iterator[TokenRow]:
        """Rows of as many whole turns as there is room for, each with the system message before them."""
        kept = {*_turns(conversation.messages, self._rules.supervised)}
        messages = tuple(
            replace(message, learnt=message.learnt and (message.role != "assistant" or turn in kept))
            for turn, message in enumerate(conversation.messages)
        )
        system = messages[:1] if messages[0].role == "system" else ()
        turns: list[tuple[Message, ...]] = []
        for message in messages[len(system) :]:
            if message.role == "user":
                turns.append(())
            turns[-1] = (*turns[-1], message)
        start = 0
        while start < len(turns):
            fitting: list[TokenRow] = []
            end = start
            while end < len(turns):
                rows = self._fitting(conversation, (*system, *(m for turn in turns[start : end + 1] for m in turn)))
                if rows is None:
                    break
                fitting, end = rows, end + 1
            if end == start:
                self.counts.dropped += 1
                end += 1
            yield from fitting
            start = end

    def _fitting(self, conversation: Conversation, messages: tuple[Message, ...]) -> list[TokenRow] | None:
        """The rows of a part of a conversation; None when one is too long. A part in which nothing is learnt has
        none."""
        if not any(message.learnt for message in messages if message.role == "assistant"):
            return []
        # Which turns are learnt is decided for the whole.
        rule = Supervised.ALL if self._rules.supervised is Supervised.ALL else Supervised.ASSISTANT_TURNS
        rows = list(self._turn_rows(Conversation(messages, conversation.tools), rule))
        if any(len(row.input_ids) > self._rules.max_length for row in rows):
            return None
        return [row for row in rows if any(label != IGNORED for label in row.labels[1:])]


def _turns(messages: Sequence[Message], supervised: Supervised) -> list[int]:
    """Places of the assistant's turns that the rule is about."""
    turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
    return turns[-1:] if supervised is Supervised.LAST_TURN else turns


def _require_said(text: str, message: Message) -> None:
    """
    Raises:
        RowError: the template leaves out a part of what the assistant says.
    """
    if any(call.name not in text for call in message.tool_calls):
        raise RowError("has tool calls, which the model's chat template leaves out")
    if message.reasoning.strip() not in text:
        raise RowError("has reasoning, which the model's chat template leaves out")
    # Reasoning within the content is often written in another way.
    if message.role == "assistant" and message.content.rpartition(THOUGHT_END)[2].strip() not in text:
        raise RowError("has a message of the assistant that the model's chat template leaves out")


def _start(row: TokenRow) -> int:
    """Where the answer begins."""
    return next(i for i, label in enumerate(row.labels) if label != IGNORED)


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


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
