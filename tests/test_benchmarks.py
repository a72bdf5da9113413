"""Benchmarks and the tests on a GPU, which no other session runs, import names that exist."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted([*TESTS.glob("benchmarks/*.py"), *TESTS.glob("gpu/*.py")])


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_imported_names_exist(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        module = getattr(node, "module", None) or ""
        if module.partition(".")[0] in ("hijacklens", "probes", "analyses"):
            found = import_module(module)
            missing = [name.name for name in node.names if not hasattr(found, name.name)]
            assert not missing, (module, missing)
