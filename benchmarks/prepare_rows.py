"""Rows per second and peak memory of preparing data: `python benchmarks/prepare_rows.py MODEL [ROWS ...]`.

MODEL is a folder with a tokenizer, such as the quickstart's. For each number of ROWS (100,000 and 1,000,000 unless
others are named) a process of its own prepares a .jsonl file of so many short chats, of which one in a thousand is
there twice and one in all is damaged, with duplicates removed. Its peak memory is what Linux says of it at the end
(VmHWM). The damaged row must be named by file and line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DAMAGED_AT = 0.77
"""Where in the file the damaged row is."""


def write_rows(path: Path, count: int) -> int:
    """Returns the line of the damaged row."""
    damaged = int(count * DAMAGED_AT) + 1  # none of those that are there twice
    with path.open("w") as file:
        for number in range(1, count + 1):
            same = number - 1 if number % 1000 == 0 else number
            question = (
                f"Ticket {same}: the printer on floor {same % 97} says error {same * 7919 % 10007}. What is it about?"
            )
            answer = f"Hardware, urgency {same % 5}. Send somebody to floor {same % 97}, and quote ticket {same}."
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            line = json.dumps({"messages": turns})
            file.write((line[:-5] if number == damaged else line) + "\n")
    return damaged


def prepare(model: Path, path: Path) -> dict[str, object]:
    """Runs in the process that is measured."""
    from finetune_api.spec import FineTuneJobSpec
    from finetune_trainer.check import check

    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"uri": model.resolve().as_uri()},
            "dataset": {
                "train": [{"uri": path.as_uri()}],
                "duplicates": "Remove",
                "invalidRows": {"policy": "Skip", "limit": 1},
            },
            "output": {"uri": "s3://nowhere/at-all"},
        }
    )
    started = time.monotonic()
    report = check(spec, path.parent / "work")
    seconds = time.monotonic() - started
    peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return {
        "seconds": seconds,
        "peak": int(peak) / 1024,
        "bad": report.bad_rows.examples,
        "duplicates": report.duplicates,
        "leaked": report.leaked,
        "rows": report.train.rows + report.validation.rows,
    }


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    if sys.argv[1] == "--measured":
        say(json.dumps(prepare(Path(sys.argv[2]), Path(sys.argv[3]))))
        return
    counts = [int(text) for text in sys.argv[2:]] or [100_000, 1_000_000]
    say("| rows | seconds | rows per second | peak memory |\n|---:|---:|---:|---:|")
    peaks = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            damaged = write_rows(path, count)
            command = [sys.executable, __file__, "--measured", sys.argv[1], str(path)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
        (bad,) = found["bad"]
        assert f"rows.jsonl row {damaged}: not JSON" in bad, bad
        # One of them may be a copy of a row that is measured.
        assert found["duplicates"] + found["leaked"] == count // 1000, found
        assert found["rows"] == count - 1 - count // 1000, found
        peaks.append(found["peak"])
        rate = count / found["seconds"]
        say(f"| {count:,} | {found['seconds']:.0f} | {rate:,.0f} | {found['peak']:.0f} MiB |")
    say(f"\nThe last peak is {peaks[-1] / peaks[0]:.3f} times the first.")


if __name__ == "__main__":
    main()
