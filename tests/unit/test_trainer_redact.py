"""Secrets leave a pod neither by the name of their variable nor by their shape."""

from __future__ import annotations

import pytest

from finetune_trainer.redact import MASK, Redactor

SECRET = "wJalrXUtnFEMI/K7MDENG"


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "HF_TOKEN",
        "DB_PASSWORD",
        "my_api_key",
        "GOOGLE_CREDENTIALS",
    ],
)
def test_values_of_secret_variables(name: str) -> None:
    redact = Redactor({name: SECRET, "HOME": "/root"})
    assert redact(f"a {SECRET} b /root {SECRET}{SECRET}") == f"a {MASK} b /root {MASK}{MASK}"


def test_a_secret_that_begins_with_a_slash() -> None:
    assert Redactor({"AWS_SECRET_ACCESS_KEY": "/" + SECRET})(f"key /{SECRET}!") == f"key {MASK}!"


def test_values_that_come_from_a_secret_whatever_they_are_called() -> None:
    redact = Redactor({"HUB": SECRET, "MODE": "plain text"}, secret_names={"HUB", "ABSENT"})
    assert redact(f"{SECRET} plain text") == f"{MASK} plain text"


def test_a_secret_within_another() -> None:
    redact = Redactor({"HF_TOKEN": "abcdef", "OTHER_TOKEN": "abcdef-long"})
    assert redact("abcdef-long abcdef") == f"{MASK} {MASK}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("LANG", "C.UTF-8"),
        ("HF_TOKEN_PATH", "/root/token"),
    ],
)
def test_other_values_stay(name: str, value: str) -> None:
    assert Redactor({name: value})(f"read {value}") == f"read {value}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("id AKIAIOSFODNN7EXAMPLE.", f"id {MASK}."),
        ("hf_abcdefghijklmnopqrstuv failed", f"{MASK} failed"),
        ("Authorization: Bearer abc.def-ghi=", f"Authorization: {MASK}"),
        ("http://user:pass@host/x", f"http://{MASK}@host/x"),
        ("/o?X-Amz-Signature=0a1b2c&X-Amz-Date=1", f"/o?{MASK}&X-Amz-Date=1"),
        ("http://host:9000/a@b", "http://host:9000/a@b"),
        ("s3://bucket/key is no secret", "s3://bucket/key is no secret"),
    ],
)
def test_shapes(text: str, expected: str) -> None:
    assert Redactor({})(text) == expected
