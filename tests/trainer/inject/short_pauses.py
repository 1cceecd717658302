"""Requests to S3 are repeated as often as ever, with a twentieth of the pauses."""

from __future__ import annotations

from typing import Any


def apply(standard: Any) -> None:
    original = standard.ExponentialBackoff.delay_amount
    standard.ExponentialBackoff.delay_amount = lambda self, context: original(self, context) / 20
