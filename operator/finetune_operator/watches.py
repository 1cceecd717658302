"""Tells when a watch has gone silent, which nothing else does: no error comes, only no news."""

from __future__ import annotations

from collections.abc import Mapping

Name = tuple[str, str]
"""Namespace and name."""


class Watch:
    """What one watch has shown, compared with what lists show now and then."""

    def __init__(self) -> None:
        self.silent = False
        self._shown: dict[Name, str] = {}
        self._missed: dict[Name, str] = {}

    def show(self, name: Name, version: str) -> None:
        """The watch has shown this version of an object."""
        self._shown[name] = version

    def compare(self, found: Mapping[Name, str]) -> None:
        """Versions in a list. News may be on their way; what is missing from one list to the next never comes."""
        self._shown = {name: version for name, version in self._shown.items() if name in found}
        missed = {name: version for name, version in found.items() if self._shown.get(name) != version}
        self.silent = any(self._missed.get(name) == version for name, version in missed.items())
        self._missed = missed
