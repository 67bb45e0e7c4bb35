# Python 3.10 or later and make are all that these targets need; each sets up `.venv` first.
PYTHON ?= python3
VENV := .venv
# Of `make test-oldest`; another one with `make test-oldest JAX=0.5.3`.
JAX := 0.4.38
OLDEST := .venv-jax-$(JAX)
DOCS := .venv-docs
BIN := $(VENV)/bin
# Of `make gpu`: the extra that installs JAX for the GPU.
CUDA := cuda12
EXECUTE := true

.PHONY: setup demo classification transformer sequences test test-all test-slow test-oldest test-install check format \
	derivations docs benchmark accuracy gpu large-kernel build clean

setup: $(VENV)/.dev

# Examples need plots and digits, and nothing of what develops the library.
demo: $(VENV)/.examples
	$(BIN)/python examples/digits.py

classification: $(VENV)/.examples
	$(BIN)/python examples/classification.py

transformer: $(VENV)/.examples
	$(BIN)/python examples/transformer.py

# The data are in aeon; nothing here needs what it requires, such as numba.
sequences: $(VENV)/.examples
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps aeon
	$(BIN)/python examples/sequences.py

test: setup
	@echo 'One test of each kind: about 4 minutes on two cores the first time, since XLA compiles, then less.'
	@echo '`make test-all` runs all of the suite but what takes minutes each, which `make test-slow` runs.'
	$(BIN)/python -m pytest -n auto --dist worksteal -m quick

test-all: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

# What `make test` runs, on the oldest JAX that the library supports.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n auto --dist worksteal -m quick

# Installs as the README says, and the wheel, in fresh environments: needs a network.
test-install: setup
	$(BIN)/python -m pytest -m install

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m derivations --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

derivations: setup
	$(BIN)/python -m derivations

# The site in site/, strict, with its notebooks executed: minutes. `make docs EXECUTE=false` shows a
# page that is being written within seconds, without what notebooks print and draw.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 EXECUTE=$(EXECUTE) $(DOCS)/bin/mkdocs build \
		$(if $(filter false,$(EXECUTE)),--no-strict)

benchmark: setup
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.first_calls
	$(BIN)/python -m benchmarks.position_axis
	$(BIN)/python -m benchmarks.probabilities
	$(BIN)/python -m benchmarks.inference
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.fuzz
	$(BIN)/python -m benchmarks.distributed

# Goes on with what an interrupted run has saved; ACCURACY holds options, such as --quick.
accuracy: setup
	$(BIN)/python -m benchmarks.accuracy $(ACCURACY)

# Nine minutes on a machine with a GPU; GPU holds options, such as --only attention.
gpu: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python 'jax[$(CUDA)]'
	$(BIN)/python -m benchmarks.gpu $(GPU)

# Into ./kernel; after an interruption, on from there. OPTIONS has more, such as --scheduler.
large-kernel: setup
	$(BIN)/python examples/large_kernel.py --resume $(OPTIONS)

# Source distribution and wheel, in dist/.
build: setup
	$(BIN)/uv build

clean:
	rm -rf $(VENV) .venv-jax-* $(DOCS) dist site

# uv reads `override-dependencies` from pyproject.toml, which keeps TensorFlow out; pip cannot.
$(VENV)/.dev $(VENV)/.examples: $(VENV)/.%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[$*]'
	touch $@

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --compile-bytecode --python $(OLDEST)/bin/python --editable '.[dev]' \
		'jax==$(JAX)' 'jaxlib==$(JAX)'
	touch $@

$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet uv
	$(DOCS)/bin/uv pip install --quiet --python $(DOCS)/bin/python --editable '.[docs]'
	touch $@
