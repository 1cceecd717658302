"""Runs at the start of each process of an agent under test: applies the test's own code to one module, once loaded.

$TEST_INJECT and $TEST_INJECT_ALSO are `module=path`: when that module has been imported, the file's `apply(module)` is
called.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


class _Finder(MetaPathFinder):
    def __init__(self, module: str, path: str) -> None:
        self._module = module
        self._path = path

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            runpy.run_path(self._path)["apply"](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


for _name in ("TEST_INJECT", "TEST_INJECT_ALSO"):
    _module, _, _path = os.environ.get(_name, "").partition("=")
    if _module:
        sys.meta_path.insert(0, _Finder(_module, _path))
