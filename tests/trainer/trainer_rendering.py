"""Conversations, and tokenizers that speak the templates of real models."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import trl

from finetune_trainer.data.examples import Conversation, Message, Text
from finetune_trainer.data.render import Renderer, Rules
from finetune_trainer.data.token_rows import IGNORED, TokenRow

STOP = "<|im_end|>"


def conversation(*turns: str, learnt: tuple[bool, ...] = (), system: str | None = None) -> Conversation:
    """User and assistant by turns. `learnt` says it of each answer."""
    weights = iter(learnt or [True] * len(turns))
    messages = [
        Message("user", text) if number % 2 == 0 else Message("assistant", text, next(weights))
        for number, text in enumerate(turns)
    ]
    return Conversation(tuple([Message("system", system)] if system else []) + tuple(messages))


def rows_of(tokenizer: Any, example: Conversation | Text, max_length: int = 4096) -> list[TokenRow]:
    return Renderer(tokenizer, None, Rules(max_length)).token_rows(example)


def supervised(tokenizer: Any, row: TokenRow) -> str:
    text: str = tokenizer.decode([label for label in row.labels if label != IGNORED])
    return text


def with_template(tokenizer: Any, template: str, **specials: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    if specials:
        changed.add_special_tokens(specials)
    return changed


TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
SPECIAL = re.compile(r"<[|｜][^<>'\"{}\s]{1,40}[|｜]>|<(?:start_of_turn|end_of_turn|turn\||\|turn)>|\[/?INST\]|</?s>")


def speaker(tokenizer: Any, path: Path) -> Any:
    """The tiny tokenizer made to speak a template: its control tokens are special tokens, its stop token the stop."""
    template = path.read_text()
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(sorted(set(SPECIAL.findall(template))), special_tokens=True)
    changed.bos_token = "<|endoftext|>"
    changed.chat_template = template
    try:
        text = str(
            changed.apply_chat_template(
                [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], tokenize=False
            )
        )
    except Exception:
        return changed
    stop = SPECIAL.search(text, text.rfind("Hello"))
    if stop and "Hello" in text:
        changed.eos_token = stop[0]
    return changed
