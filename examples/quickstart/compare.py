"""Ask the base and the tuned model for the held-out tickets: `python compare.py BASE TUNED VALIDATION`.

BASE and TUNED are model folders, loaded with nothing but transformers. Prints examples and the shares of answers that
are valid JSON, that have the four fields, and that are right word for word.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

FIELDS = ("category", "product", "priority", "customer")
BATCH = 20
MAX_NEW_TOKENS = 64
SHOWN = 3


def main(base: Path, tuned: Path, validation: Path) -> None:
    rows = [json.loads(line)["messages"] for line in validation.read_text().splitlines()]
    expected = [json.loads(row[-1]["content"]) for row in rows]
    answers = {name: answer(folder, [row[:-1] for row in rows]) for name, folder in (("base", base), ("tuned", tuned))}

    for row, wanted, before, after in list(zip(rows, expected, answers["base"], answers["tuned"], strict=True))[:SHOWN]:
        say(f"\ncustomer  {row[-2]['content']}")
        say(f"base      {' '.join(before.split())[:110]}")
        say(f"tuned     {after}")
        say(f"expected  {json.dumps(wanted, ensure_ascii=False, separators=(',', ':'))}")

    say(f"\n{len(rows)} held-out messages     base   tuned")
    scores = {
        name: [score(text, wanted) for text, wanted in zip(texts, expected, strict=True)]
        for name, texts in answers.items()
    }
    for label, key in [
        ("valid JSON with all fields", "valid"),
        ("all four fields right", "exact"),
        *((f"  {field} right", field) for field in FIELDS),
    ]:
        shares = [sum(s[key] for s in scores[name]) / len(rows) for name in ("base", "tuned")]
        say(f"{label:<28}{shares[0]:>5.0%}   {shares[1]:>5.0%}")
    # For scripts and tests.
    result = {name: {key: sum(s[key] for s in found) / len(rows) for key in found[0]} for name, found in scores.items()}
    (tuned.parent / "comparison.json").write_text(json.dumps(result, indent=1))


def answer(folder: Path, prompts: list[list[dict[str, str]]]) -> list[str]:
    """Greedy answers of a model to chats."""
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH):
        texts = [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in prompts[start : start + BATCH]
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    say(f"{len(prompts)} answers of {folder.name} in {time.monotonic() - started:.0f} s")
    return answers


def score(text: str, expected: dict[str, str]) -> dict[str, bool]:
    try:
        found: Any = json.loads(text)
    except ValueError:
        found = None
    valid = isinstance(found, dict) and set(found) == set(FIELDS)
    fields = {field: valid and found[field] == expected[field] for field in FIELDS}
    return {"valid": valid, "exact": all(fields.values()), **fields}


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    main(*map(Path, sys.argv[1:4]))
