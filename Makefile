# make repair    train a small network on embedded data, repair it, show before and after
# make test      everything CI runs
# make paper     every table and figure: make paper TIER=smoke (or lite, paper); what is recorded is not run again
# make docs      the documentation site, in _docs/
# make readme    README.md from nbs/index.ipynb
# make clean     remove what the above made
PYTHON ?= python3
BIN := .venv/bin
META := settings.ini setup.py pyproject.toml
TIER ?= auto

.PHONY: repair test paper docs readme clean
.DEFAULT_GOAL := repair

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("archrepair needs Python 3.11 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

# A stamp each: a second call installs nothing until the metadata change. README.md is package metadata too.
.venv/.run: .venv/bin/python $(META)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/.dev: .venv/bin/python $(META)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ .venv/.run

repair: .venv/.run
	$(BIN)/archrepair repair --tier smoke --dataset digits:fog:3 --out outputs/repair --force

test: .venv/.dev
	$(BIN)/python tests/run.py

paper: .venv/.run
	$(BIN)/archrepair paper --tier $(TIER)

docs: .venv/.dev
	$(BIN)/python docs/prep.py
	$(BIN)/python -m sphinx -q -W --keep-going -j 2 -c docs docs/_nbs _docs

readme: .venv/.dev
	$(BIN)/python tests/run.py --write-readme

clean:
	rm -rf .venv outputs/repair outputs/smoke _proc _docs docs/_nbs
