# Python 3.10 or later and make are all that these targets need; each sets up `.venv` first.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin

.PHONY: setup demo transformer test test-oldest check format derivations benchmark accuracy clean

setup: $(VENV)/.installed

demo: setup
	$(BIN)/python examples/digits.py

transformer: setup
	$(BIN)/python examples/transformer.py

test: setup
	$(BIN)/python -m pytest -n auto

# The core of the suite on the oldest JAX that the library supports.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n auto -m core

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

benchmark: setup
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.position_axis
	$(BIN)/python -m benchmarks.probabilities
	$(BIN)/python -m benchmarks.inference
	$(BIN)/python -m benchmarks.attention

# Goes on with what an interrupted run has saved; ACCURACY holds options, such as --quick.
accuracy: setup
	$(BIN)/python -m benchmarks.accuracy $(ACCURACY)

clean:
	rm -rf $(VENV) $(OLDEST)

# uv reads `override-dependencies` from pyproject.toml, which keeps TensorFlow out; pip cannot.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	touch $@

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --editable '.[dev]' \
		'jax==0.4.38' 'jaxlib==0.4.38'
	touch $@
