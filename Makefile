# Everything starts here: `make demo` shows the module at work, `make test` runs every check.
.DEFAULT_GOAL := help
.PHONY: help setup ssh-server demo screenshots stall test test-quick golden lint format bench default-model accuracy kills clean
TABLES := cross-validation n-curve encoder mr raters ranking ablations
.PHONY: $(TABLES:%=evaluate-%)

BIN := .venv/bin
# Passed to the recipes through the environment, so that spaces, semicolons and quotes in them need no escaping.
PROMPT ?= liver; left kidney; pancreas
OUT ?= demo-output
DATA ?= ../shared/data
WORK ?= evaluation-work
export INPUT PROMPT OUT DATA WORK BASE

help:
	@echo 'make setup           make .venv (Python 3.11 to 3.13); quick when nothing changed'
	@echo 'make demo            the module from prompt to accepted segments: INPUT=scan.nii.gz PROMPT="liver; spleen" OUT=folder'
	@echo 'make screenshots     pictures of the panel and the slice views: in screenshots/'
	@echo 'make test            lint, types and all tests, in two processes: PYTEST_ARGS="-k ranking"'
	@echo 'make test-quick      the tests but for those that are marked slow, without lint and types'
	@echo 'make golden          what another commit and this checkout do, compared bit for bit: BASE=commit'
	@echo 'make lint | format   ruff and mypy | let ruff rewrite the files'
	@echo 'make bench           proposals per second beside the plain diffusers pipeline: ARGS="..."'
	@echo 'make stall           longest pause of the window while a volume is proposed, or saved; 512x512x100: ARGS="..."'
	@echo 'make default-model   train the bundled model again (long; resumes): ARGS="..."'
	@echo 'make accuracy        measure the bundled model: ARGS="..."'
	@echo 'make evaluate-TABLE  print a table of docs/results.md; long; resumes: $(TABLES)'
	@echo '                     DATA=folder of the labelled images WORK=folder of what is kept ARGS="..."'
	@echo 'make kills           kill processes that write into a curated set, and count what is lost: ARGS="--kills 300"'
	@echo 'make ssh-server      install what the tests of the worker over ssh need; Debian and Ubuntu, as root'
	@echo 'make clean           remove caches, builds and demo-output'

setup:
	@sh Utilities/setup.sh

# The package may start its own server as a service; the tests start theirs, on the loopback address, and leave that one alone.
ssh-server:
	@PATH="$$PATH:/usr/sbin" command -v sshd || { apt-get update && apt-get install -y --no-install-recommends openssh-client openssh-server; }

demo: setup
	@$(BIN)/python -m Testing.panel.demo --prompt "$$PROMPT" --out "$$OUT" $${INPUT:+--input "$$INPUT"}

screenshots: setup
	@$(BIN)/python -m Testing.panel.screenshots --out screenshots $(ARGS)

stall: setup
	@$(BIN)/python -m Testing.panel.bench_stall $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(PYTEST_ARGS)

golden: setup
	@$(BIN)/python -m Testing.golden.compare $${BASE:+"$$BASE"} $(ARGS)

bench: setup
	$(BIN)/python -m experiments bench $(ARGS)

default-model: setup
	$(BIN)/progidiff train default $(ARGS)

accuracy: setup
	$(BIN)/python -m experiments accuracy $(ARGS)

$(TABLES:%=evaluate-%): evaluate-%: setup
	@$(BIN)/python -m experiments table $* --data "$$DATA" --work "$$WORK" $(ARGS)

kills: setup
	@$(BIN)/python -m Testing.engine.curation_kills $(ARGS)

clean:
	rm -rf build dist demo-output screenshots .mypy_cache .pytest_cache .ruff_cache
	find ProGiDiffSlicer Testing experiments -name __pycache__ -type d -prune -exec rm -rf {} +
