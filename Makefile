# make setup    .venv with the exact versions of constraints.txt
# make train    set up, train the default experiment and print a sample    make train ARGS="model=mini"
# make sample   sample from the newest run                                 make sample ARGS='prompt="To be"'
# make serve    the newest run over HTTP, with its playground               make serve ARGS="port=8001"
# make demo     train a small Shakespeare, once, and open the playground on it
# make docs     the documentation as a site, in site/
# make lint     ruff, mypy and hadolint
# make bench    all comparisons that need no GPU, into benchmarks/results  make bench NANOGPT=path/of/a/checkout
# make bench-quick   the same in minutes, only shown
# make test     the tests                                                  make test ARGS="-k tokenizer"
#
# PYTHON=python3.12 chooses the interpreter, JOBS=4 the test processes, THREADS=4 the threads of each.

VENV ?= .venv
JOBS ?= 2
THREADS ?= 1
ARGS ?=
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: setup lint test train sample serve demo docs bench bench-quick
.DEFAULT_GOAL := setup

setup: $(VENV)/core.stamp

train: setup
	$(VENV)/bin/python train.py $(ARGS)

sample: setup
	$(VENV)/bin/python sample.py ckpt=latest $(ARGS)

serve: $(VENV)/serve.stamp
	$(VENV)/bin/python serve.py ckpt=latest $(ARGS)

# resume=auto starts the training, goes on with it, or finds it done. Where the corpus cannot be had (2: train.py says why)
# the model learns from the text that comes with Python.
demo: $(VENV)/serve.stamp
	@run=outputs/demo; train="$(VENV)/bin/python train.py resume=auto"; \
	$$train hydra.run.dir=$$run experiment=shakespeare_char_cpu || { code=$$?; [ $$code -eq 2 ] || exit $$code; \
	    run=outputs/demo_pydocs; echo "so the demo is trained on the text that comes with Python" >&2; \
	    $$train hydra.run.dir=$$run; } && \
	exec $(VENV)/bin/python serve.py ckpt=$$run browser=true $(ARGS)

docs: $(VENV)/dev.stamp
	$(VENV)/bin/python -m mkdocs build --strict $(ARGS)

lint: $(VENV)/dev.stamp
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/hadolint Dockerfile

bench: $(VENV)/dev.stamp
	$(VENV)/bin/python benchmarks/bench.py --nanogpt "$(NANOGPT)" $(ARGS)

bench-quick: $(VENV)/dev.stamp
	$(VENV)/bin/python benchmarks/bench.py --quick --nanogpt "$(NANOGPT)" $(ARGS)

test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=$(THREADS) $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# A stamp is written last, so that an interrupted set-up is taken up again. torch comes first, and shows its progress:
# it is by far the largest. A build of torch that is already there (the CPU build, say) is kept.
$(VENV)/core.stamp: pyproject.toml constraints.txt | $(VENV)/venv.stamp
	@echo "Installing tinygpt into $(VENV): a minute or two, longer where torch is a large download"
	@$(VENV)/bin/python -m pip show --quiet torch 2>/dev/null || $(subst --quiet,,$(PIP)) torch
	$(PIP) -e .
	@touch $@

$(VENV)/serve.stamp: $(VENV)/core.stamp
	$(PIP) -e ".[serve]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/core.stamp
	$(PIP) -e ".[dev]"
	@touch $@

SUPPORTED = import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

$(VENV)/venv.stamp:
	@for python in $${PYTHON:-python3 python3.13 python3.12 python3.11}; do \
	    if $$python -c "$(SUPPORTED)" 2>/dev/null; then $$python -m venv $(VENV) && touch $@; exit; fi; \
	done; \
	echo "error: no Python 3.11, 3.12 or 3.13 with venv was found (tried: $${PYTHON:-python3 python3.13 python3.12 python3.11})" >&2; \
	echo "hint: install one (on Debian and Ubuntu also python3-venv), or name yours: make setup PYTHON=/path/to/python3.12" >&2; \
	exit 2
