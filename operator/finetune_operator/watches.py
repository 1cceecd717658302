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
        self._absent: set[Name] = set()

    def show(self, name: Name, version: str) -> None:
        """The watch has shown this version of an object."""
        self._shown[name] = version

    def compare(self, found: Mapping[Name, str]) -> set[Name]:
        """Versions in a list. News may be on their way; what is missing from one list to the next never comes. Returns
        the names of objects that were shown or listed before, and are gone."""
        absent = self._shown.keys() - found.keys()
        gone = absent | (self._missed.keys() - found.keys())
        for name in absent & self._absent:
            # Once it may have been made while the list was on its way.
            del self._shown[name]
        self._absent = absent
        missed = {name: version for name, version in found.items() if self._shown.get(name) != version}
        self.silent = any(self._missed.get(name) == version for name, version in missed.items())
        self._missed = missed
        return gone
