"""Tables on a terminal: whole at any width."""

import io

import pytest
from rich.console import Console

from benchmarks.harness import print_table

ROWS = [
    {"method": name, "setting": "e=3 threshold=0.05", "tokens/s": 270.0, "over the best early exit": ratio,
     "95 %": "1.05 to 1.18", "LEDE over it": "1.12 (1.06 to 1.18)", "as the eager text": 1.0, "paper": "8 / 5.9 / -"}
    for name, ratio in (("LEDE w/o adaptive drafting", 1.123), ("LayerSkip", 0.987))
]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_no_cell_is_cut(width):
    out = io.StringIO()
    print_table("all tasks", ROWS, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for cell in ("270.0", "1.123", "0.987", "1.05 to 1.18", "1.12 (1.06 to 1.18)", "8 / 5.9 / -", "LayerSkip"):
        assert any(cell in line for line in lines), cell
    heads = [line.replace("┃", "|").split("|")[1].strip() for line in lines if "method" in line]
    assert heads and set(heads) == {"method"}  # each part of the table begins with the names
    assert (len(heads) == 1) == (width == 300)
