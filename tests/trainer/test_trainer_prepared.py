"""Prepared sets: what was written is what is read, with a hash over all of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from finetune_trainer.data import prepared
from finetune_trainer.data.prepared import write_rows
from finetune_trainer.data.token_rows import LabelledRow, PairRow, PreparedRow, TokenRow

ROWS: list[tuple[list[PreparedRow], tuple[int, int, int]]] = [
    ([TokenRow([5, 6, 7], [-100, 6, 7]), TokenRow([8, 9], [-100, 9])], (5, 3, 3)),
    ([PairRow([1, 2], [3], [4, 5]), PairRow([1], [2], [3])], (11, 5, 4)),
    ([LabelledRow([1, 2], [3, 4], True), LabelledRow([1], [2], False)], (6, 3, 4)),
]


@pytest.mark.parametrize(("rows", "sizes"), ROWS, ids=lambda value: type(value[0]).__name__)
class TestKinds:
    def test_rows_come_back(self, rows: list[PreparedRow], sizes: tuple[int, int, int], tmp_path: Path) -> None:
        summary = write_rows(rows, tmp_path / "set", type(rows[0]))
        assert list(prepared.read_rows(tmp_path / "set")) == [asdict(row) for row in rows]
        assert (summary.rows, summary.tokens, summary.supervised_tokens, summary.longest) == (2, *sizes)

    def test_an_empty_set_has_its_columns(
        self, rows: list[PreparedRow], sizes: tuple[int, int, int], tmp_path: Path
    ) -> None:
        summary = write_rows([], tmp_path / "set", type(rows[0]))
        assert (summary.rows, summary.tokens, summary.longest) == (0, 0, 0)
        assert prepared.read_rows(tmp_path / "set").column_names == list(asdict(rows[0]))

    def test_the_hash_covers_every_value_and_the_order(
        self, rows: list[PreparedRow], sizes: tuple[int, int, int], tmp_path: Path
    ) -> None:
        first = asdict(rows[0])
        changed = [
            replace(rows[0], **{name: (not value) if isinstance(value, bool) else [*value[:-1], 99]})
            for name, value in first.items()
        ]
        sets = [rows, rows[::-1], rows[:1], *([other, rows[1]] for other in changed)]
        hashes = [write_rows(one, tmp_path / "set", type(rows[0])).sha256 for one in sets]
        assert len(set(hashes)) == len(sets)
        assert write_rows(rows, tmp_path / "set", type(rows[0])).sha256 == hashes[0]


def test_the_hash_sees_where_one_answer_ends(tmp_path: Path) -> None:
    hashes = {
        write_rows([row], tmp_path / "set", PairRow).sha256
        for row in (PairRow([1, 2], [3], [4]), PairRow([1], [2, 3], [4]), PairRow([1], [2], [3, 4]))
    }
    assert len(hashes) == 3


def test_the_hash_of_token_rows_is_what_it_was(tmp_path: Path) -> None:
    """Checkpoints and manifests of earlier versions name it."""
    summary = write_rows([TokenRow([5, 6, 7], [-100, 6, 7])], tmp_path / "set", TokenRow)
    assert summary.sha256 == "01c52b59d4f0c168f9046fa5e71ca0ce5955d17225238386d7b0775b7bfa20f3"


def test_of_a_pair_the_chosen_answer_is_learnt() -> None:
    assert prepared.learnt({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}) == {
        "input_ids": [1, 2, 3],
        "labels": [-100, -100, 3],
    }
