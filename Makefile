# Everything a developer types. `make` alone lists it.
#
# The development environment is pinned; the package itself takes any torch from 2.10 on.
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
PYTHON ?= python3

VENV := .venv
BIN  := $(VENV)/bin
SOURCES := $(shell find kernels csrc python -name '*.h' -o -name '*.cpp' -o -name '*.cu*' -o -name '*.py' -o -name '*.pyi') \
           CMakeLists.txt setup.py pyproject.toml

# The kernels are compiled while pip installs packages; a lock keeps two pips from installing at once.
# Without pip's byte-compilation, half of the time that torch takes to install. TORCH is named each
# time, so that nothing brings another.
IN_PARALLEL := @$(MAKE) --no-print-directory --jobs=2
INSTALL := @flock $(VENV)/.lock $(BIN)/python -m pip install -q --no-compile

# Python keeps what it compiles, whatever the environment says: torch is imported in 3 s, and in 9 s
# without, by each of the processes that tests start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help build demo test quick test-huge digests docs bench report recipes experiments gpu lint \
        format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

build: ## make the environment in .venv and install warpstep into it
	$(IN_PARALLEL) $(VENV)/.installed

demo: build ## train a small GPT with torch's AdamW and with warpstep's, side by side
	@$(BIN)/python examples/train_gpt.py

# A process a core. Each has two threads, whatever the machine; they wait asleep, because threads that
# spin take the cores from those that work: half of the suite's time, on two cores.
PYTEST := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 \
          --dist loadgroup -o console_output_style=count

quick: build ## run one case of each test, some three minutes on two cores
	@$(PYTEST) --quick --ignore tests/integrations

test: ## run the test suite, some 25 minutes of one core
	$(IN_PARALLEL) $(VENV)/.wheel $(VENV)/.integrations $(VENV)/.docs $(VENV)/.installed
	@echo "The whole suite takes some 25 minutes of one core; make quick takes some three on two."
	@$(PYTEST)

test-huge: build ## step 2^31 elements on the CPU (some minutes)
	WARPSTEP_TEST_HUGE=1 $(BIN)/python -m pytest tests/test_huge.py

# CROSS: the prefix of a cross compiler, whose program runs under EMULATOR. With Debian's
# g++-aarch64-linux-gnu and qemu-user: make digests CROSS=aarch64-linux-gnu- \
#   EMULATOR="qemu-aarch64 -L /usr/aarch64-linux-gnu"
DIGESTS := build/$(CROSS)digests
digests: export PATH := $(abspath $(BIN)):$(PATH)
digests: ## step every recipe without Python; the bits must be x86-64's (CROSS=, EMULATOR=)
	cmake -G Ninja -S . -B $(DIGESTS) -DWARPSTEP_DIGESTS_ONLY=ON $(if $(CROSS),\
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$(firstword $(subst -, ,$(CROSS))) \
	  -DCMAKE_CXX_COMPILER=$(CROSS)g++)
	cmake --build $(DIGESTS) --target digests
	$(EMULATOR) $(DIGESTS)/digests | diff tests/digests.txt - && echo "All bits are those of x86-64."

# Material's banner about its future helps nobody here.
docs: $(VENV)/.installed $(VENV)/.docs ## build the documentation site into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The site is in build/docs; $(BIN)/mkdocs serve shows it."

bench: build ## run the benchmark for this machine, write build/bench/ (BENCH=--record: bench/results/)
	$(BIN)/python -m bench.run $(BENCH)

report: build ## make the documents' tables and plots again from bench/results/
	$(BIN)/python -m bench.report

recipes: build ## train two small models with every low-precision recipe, five seeds each
	$(BIN)/python -m bench.recipes $(RECIPES)

# CIFAR10: a folder with its pictures, instead of scikit-learn's. ONLY: decay-maps, one-cycle or voronoi.
experiments: build ## what AdamW rests on, some 45 minutes; goes on where it ended (QUICK=1: minutes)
	@nice $(BIN)/python -m bench.experiments $(if $(QUICK),--quick) \
	  $(if $(CIFAR10),--cifar10 "$(CIFAR10)") $(if $(ONLY),--only $(ONLY))

# PARTS: some of build, stress, test, sanitize, bench, bench-cpu. RESULTS: the folder for logs and
# results. COMMIT: what is measured, where there is no .git. MINUTES: the limit of a part, 8. Each may
# be an environment variable.
gpu: ## all that needs an NVIDIA GPU, with the Python that is there (PARTS="build stress": some of it)
	@$(PYTHON) -m bench.gpu $(if $(RESULTS),--results "$(RESULTS)") \
	  $(if $(COMMIT),--commit "$(COMMIT)") $(if $(MINUTES),--minutes $(MINUTES)) $(PARTS)

lint: $(VENV)/.dev ## ruff, mypy, clang-format and the workflows' schema, as pre-commit runs them
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/clang-format --dry-run -Werror $(shell find kernels csrc tests -name "*.h" -o -name "*.cpp" -o -name "*.cu*")

format: $(VENV)/.dev ## format all sources
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find kernels csrc tests -name "*.h" -o -name "*.cpp" -o -name "*.cu*")

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info python/warpstep/*.so

$(VENV)/.venv:
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade pip
	@touch $@

$(VENV)/.environment: $(VENV)/.venv
	@echo "Installing $(TORCH) and $(TRITON) into $(VENV)."
	$(INSTALL) "$(TORCH)" "$(TRITON)"
	@touch $@

# Compiled while torch is installed. The folder is emptied first: nothing old is installed. The date is
# that of the beginning, so that what is edited meanwhile is compiled the next time.
$(VENV)/.wheel: $(VENV)/.venv $(SOURCES)
	@echo "Building warpstep: a minute or two, with nvcc some more."
	@rm -rf $(VENV)/wheel
	@touch $@.begun
	@MAKEFLAGS= $(BIN)/python -m pip wheel -q --no-deps --wheel-dir $(VENV)/wheel .
	@mv $@.begun $@

$(VENV)/.test: $(VENV)/.environment
	$(INSTALL) "$(TORCH)" --group test --group bench
	@touch $@

# Installed, not linked: what is tested is what a user gets, also where an older build with the same
# version is there.
$(VENV)/.installed: $(VENV)/.test $(VENV)/.wheel
	$(INSTALL) --no-deps --force-reinstall $(VENV)/wheel/*.whl
	@touch $@

# timm alone without its dependencies: see pyproject.toml.
$(VENV)/.integrations: $(VENV)/.environment
	$(INSTALL) "$(TORCH)" --group integrations
	$(INSTALL) --no-deps timm
	@touch $@

$(VENV)/.docs: $(VENV)/.environment
	$(INSTALL) --group docs
	@touch $@

$(VENV)/.dev: $(VENV)/.environment
	$(INSTALL) "$(TORCH)" --group dev --group test --group bench
	@touch $@
