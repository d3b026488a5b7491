"""The benchmark programs import: nothing else in the default tests would notice a slip in one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

import benchmarks

PROGRAMS = sorted(path.stem for folder in benchmarks.__path__ for path in Path(folder).glob("*.py"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_imports(name):
    assert import_module(f"benchmarks.{name}").__doc__
