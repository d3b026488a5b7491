"""The README's examples with datasets run as they stand, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = [
    block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    if "load_dataset" in block
]  # fmt: skip


@pytest.mark.parametrize("library", ["d3rlpy", "minari"])
def test_examples_run(tmp_path, library):
    pytest.importorskip(library)
    (code,) = (block for block in EXAMPLES if f"import {library}" in block or f", {library}" in block)
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    if library == "minari":  # another process needs no import of ours to make the environment again
        again = 'import minari; print(minari.load_dataset("lede/tiny-random-v0").recover_environment())'
        command = [sys.executable, "-c", again]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "LEDE-Tiny-v0" in done.stdout, done.stderr[-2000:]
