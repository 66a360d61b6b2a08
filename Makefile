# `make demo` and `make test` need python3 (3.10 or newer, with venv), a C++ compiler and make; everything else
# they set up themselves, in .venv. What is up to date is not built again.
SHELL  := /bin/bash
PYTHON ?= python3
TORCH  ?= torch==2.13.0

VENV    := .venv
PY      := $(VENV)/bin/python
PIP     := $(PY) -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml bnn_fast/_version.py $(shell find csrc -type f)
SETTINGS := $(TORCH) cuda=$(BNN_FAST_CUDA) architectures=$(TORCH_CUDA_ARCH_LIST)

export BNN_FAST_STRICT ?= 1

.PHONY: build demo demos test slow sanitize bench ptx-report gpu-check clean FORCE
.DELETE_ON_ERROR:

build: $(VENV)/installed

demo: build
	$(PY) -m bnn_fast.demos bayes_by_backprop digits

demos: build
	$(PY) -m bnn_fast.demos variational_regression bayes_by_backprop bayesian_linear_regression \
	  bayesian_neural_networks digits images pretrained series

# In two processes, one of which runs the kernels' PTX. Their threads outnumber two processors: none is to wait by spinning.
test: build
	OMP_WAIT_POLICY=passive $(PY) -m pytest -rs -n 2

slow: build
	$(PY) -m pytest -rs -m slow

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set that the machine has.
sanitize: build
	$(PY) tests/sanitize.py

# Side by side with other libraries, in under ten minutes on two cores. OPTIONS="--device cuda --data FOLDER"
bench: build $(VENV)/peers
	$(PY) -m benchmarks all $(OPTIONS)
	$(PY) -m benchmarks plot

# Registers, shared memory and spills of every CUDA kernel, and the instructions that the fused ones issue for a weight; needs nvcc, and
# for the latter nvdisasm, and the build, whose operators' arguments it packs.
ptx-report: build
	PYTHONPATH=tests $(PY) -m ptx.report

# On a machine with a GPU, with the python3 that has torch and without a network: build in place, tests,
# sanitizer, timings. STEPS="tests timings" does some of it; OUT=FOLDER takes the results; COMMIT=NAME is what
# they say they are of, where there is no git.
gpu-check:
	@$(PYTHON) -m benchmarks gpu $(if $(STEPS),--steps $(STEPS)) $(if $(OUT),--out "$(OUT)") \
	  $(if $(COMMIT),--commit "$(COMMIT)")

# The environment stays: remove .venv by hand to start from nothing.
clean:
	rm -rf build dist figures *.egg-info bnn_fast/*.so $(VENV)/installed .pytest_cache .hypothesis
	find bnn_fast tests -name __pycache__ -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "bnn_fast needs Python 3.10 or newer with venv; $(PYTHON) is not that. Remedy: install it" \
	         "(on Debian and Ubuntu: python3-venv), or name another one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch: $(VENV)/settings
	$(PIP) install "$(TORCH)"
	$(PIP) install "setuptools>=77" wheel ninja
	touch $@

# Without their dependencies, which would bring another torch; one that cannot be had is left out of the bench.
$(VENV)/peers: benchmarks/peers.txt $(VENV)/torch
	-$(PIP) install --no-deps -r $< && touch $@

$(VENV)/installed: $(SOURCES) $(VENV)/torch
	$(PIP) install --no-build-isolation -e ".[demos,test]"
	@$(PY) -c 'import bnn_fast; print(bnn_fast.build_info())'
	touch $@

# Changes only when a setting does.
$(VENV)/settings: FORCE | $(PY)
	@[ "$$(cat $@ 2>/dev/null)" = '$(SETTINGS)' ] || echo '$(SETTINGS)' > $@
