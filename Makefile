# `make demo` and `make test` each create .venv and install on first use.
PYTHON ?= python3.11
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test browser lint bench datasets leaderboard-check clean

setup: $(STAMP)

# torch first: a range resolved without it would pull gigabytes of CUDA packages on some indexes.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(PY) -m benchmarks.demo

# A process more than there are cores, for some tests wait; each begins with files of its own, and helps out at the end.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $$($(PY) -c 'import os; print(os.cpu_count() + 1)') --dist worksteal

# The report page in Chromium (`apt-get install chromium`); `make test` skips this where there is none.
browser: $(STAMP)
	LEDE_REQUIRE_BROWSER=1 $(PY) -m pytest -m browser

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP)
	$(PY) -m benchmarks.cpu_speed

# The collectors, the datasets that ship, their cards and the catalogue; after a change of traces or features.
datasets: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m agents.collectors
	$(PY) -m lede_env.cli dataset make all --out datasets --force

# A few agents of the leaderboard again, against the committed intervals.
leaderboard-check: $(STAMP)
	$(PY) -m benchmarks.offline_rl --check

clean:
	rm -rf $(VENV) build *.egg-info runs
