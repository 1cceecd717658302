"""Rows of tokens, as methods learn from them. There are three kinds, and each method learns from one."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100
"""Label of a token that is not learnt, as torch's cross entropy has it."""


@dataclass(frozen=True)
class TokenRow:
    input_ids: list[int]
    labels: list[int]
    """As long as input_ids; IGNORED where nothing is learnt."""


@dataclass(frozen=True)
class PairRow:
    """Two answers to one prompt, of which one is better."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class LabelledRow:
    """An answer that is good or bad."""

    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool


PreparedRow = TokenRow | PairRow | LabelledRow
RowKind = type[TokenRow] | type[PairRow] | type[LabelledRow]


def sequences(row: PreparedRow) -> list[TokenRow]:
    """What a model sees of a row: each sequence with the labels of its answer."""
    match row:
        case TokenRow():
            return [row]
        case PairRow():
            return [answered(row.prompt_ids, row.chosen_ids), answered(row.prompt_ids, row.rejected_ids)]
        case LabelledRow():
            return [answered(row.prompt_ids, row.completion_ids)]


def answered(prompt_ids: list[int], answer_ids: list[int]) -> TokenRow:
    return TokenRow(prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids)
