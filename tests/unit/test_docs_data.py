"""Every row that docs/data.md shows is understood as what it is shown for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune_api.spec import METHOD_FORMATS, DataFormat
from finetune_trainer.data.examples import Conversation, Judged, Preference, Text
from finetune_trainer.data.formats import row_format
from finetune_trainer.data.rows import Row

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
EXAMPLES = [
    (name, line)
    for name, rows in re.findall(r"### (\w+)\n\n```json\n(.*?)```", PAGE, re.DOTALL)
    for line in rows.splitlines()
]
KINDS = {DataFormat.TEXT: Text, DataFormat.PREFERENCE: Preference, DataFormat.UNPAIRED_PREFERENCE: Judged}


def test_every_format_has_an_example_and_a_line_in_the_table() -> None:
    formats = {name.value for name in DataFormat} - {"Auto"}
    assert {name for name, _ in EXAMPLES} == formats
    assert set(re.findall(r"^\| \[`(\w+)`\]", PAGE, re.MULTILINE)) == formats


@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=[f"{name} {n}" for n, (name, _) in enumerate(EXAMPLES)])
def test_a_row_is_understood_as_it_is_shown(name: str, line: str) -> None:
    row = Row("data.jsonl", 1, json.loads(line))
    for asked in (DataFormat.AUTO, DataFormat(name)):
        shape = row_format(asked, None, row)
        assert shape.format == name
        assert isinstance(shape.parse(row), KINDS.get(DataFormat(name), Conversation))


def test_the_table_says_which_methods_learn_from_a_format() -> None:
    for name, methods in re.findall(r"^\| \[`(\w+)`\]\S+ \| .* \| ([^|]+) \|$", PAGE, re.MULTILINE):
        told = set(re.findall(r"[A-Z]{3,}", methods))
        assert told == {method.value for method, formats in METHOD_FORMATS.items() if DataFormat(name) in formats}
