# `make help` lists the targets. Everything is installed into .venv in this folder; nothing outside it is touched.
PYTHON ?= python3
UV_VERSION := 0.13.8
UV := .uv/bin/uv
BIN := .venv/bin
STAMP := .venv/.installed
KILLS ?= 6
PORT ?= 8000

export PYTHONUNBUFFERED := 1
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo serve bench test check format chaos wheel lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(STAMP)  ## install the pinned environment into .venv

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mim_ray needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(UV) || { $(PYTHON) -m venv .uv && .uv/bin/pip install -q --disable-pip-version-check uv==$(UV_VERSION); }
	@test -x $(BIN)/python || $(UV) venv -q --python "$$(command -v $(PYTHON))" .venv
	$(UV) pip install -q --python $(BIN)/python -r requirements.lock
	$(UV) pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: $(STAMP)  ## run every stage on a synthetic shop; writes runs/demo/report.html
	$(BIN)/python jobs/demo.py

serve: $(STAMP)  ## serve the demo's models on 127.0.0.1, PORT=n (8000), until Ctrl-C; prints requests to try
	@$(BIN)/python jobs/serve_run.py serving.port=$(PORT)

bench: $(STAMP)  ## measure the contrastive loss in a minute; writes runs/contrastive.json
	$(BIN)/python benchmarks/contrastive.py --quick --json runs/contrastive.json

test: $(STAMP)  ## run the tests, in two halves side by side; the second is shown when both are done
	@mkdir -p runs; export OMP_NUM_THREADS=1; \
	$(BIN)/python -m pytest -m "ray_lane and not chaos" > runs/test-ray.log 2>&1 & ray=$$!; \
	trap "kill $$ray" INT TERM; \
	$(BIN)/python -m pytest -m "not ray_lane and not chaos"; rest=$$?; \
	wait $$ray; status=$$?; cat runs/test-ray.log; exit $$((rest + status))

chaos: $(STAMP)  ## long kill and soak tests; KILLS=n sets how many random kills of the extraction
	KILLS=$(KILLS) $(BIN)/python -m pytest -m chaos

check: $(STAMP)  ## lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(STAMP)  ## build dist/mim_ray-*.whl
	$(BIN)/python -m build --wheel --no-isolation

lock: $(STAMP)  ## renew requirements.lock from pyproject.toml
	$(UV) pip compile -q --universal --python-version 3.11 --no-annotate --no-header --no-emit-index-url \
	  --extra dev --extra search pyproject.toml -o requirements.lock

clean:  ## remove the environment, caches and runs
	rm -rf .venv .uv runs dist build .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache *.egg-info
