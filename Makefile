# make repair       train a small network on embedded data, repair it, show before and after
# make test         everything CI runs
# make fuzz         100,000 strange inputs; an interrupted run goes on: make fuzz KINDS="arrays lists" INPUTS=5000
# make faults       kills, damaged files, full disks by the hundred; fewer: make faults FAULTS=2
# make test-slurm   a sweep on a Slurm cluster on this host, with disturbances; needs root and slurmctld, slurmd, slurm-client, munge
# make test-oldest  the same with the oldest releases that settings.ini allows: make test-oldest PYTHON=python3.11
# make bench        ratios against plain implementations, on this machine
# make gpu          all that is worth doing on a GPU in so many minutes: make gpu MINUTES=10; a second call goes on
# make paper        every table and figure: make paper TIER=smoke (or lite, paper); what is recorded is not run again
# make docs         the documentation site, in _docs/
# make readme       README.md from nbs/index.ipynb
# make clean        remove what the above made
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
META := settings.ini setup.py pyproject.toml
TIER ?= auto
MINUTES ?= 10
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: repair test fuzz faults test-slurm repair-oldest test-oldest bench gpu paper docs readme clean
.DEFAULT_GOAL := repair

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("archrepair needs Python 3.11 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# What pip is held to: nothing, or the oldest releases.
$(VENV)/constraints.txt: $(BIN)/python settings.ini tests/oldest.py
	$(if $(OLDEST),$(BIN)/python tests/oldest.py,:) > $@

# One stamp per kind of install: a second call installs nothing until the metadata change.
$(VENV)/.run: $(VENV)/constraints.txt $(META)
	$(PIP) -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/constraints.txt $(META)
	$(PIP) -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.run

repair: $(VENV)/.run
	$(BIN)/archrepair repair --tier smoke --dataset digits:fog:3 --out outputs/repair --force

test: $(VENV)/.dev
	$(BIN)/python tests/run.py

fuzz: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python tests/fuzz/run.py $(if $(INPUTS),--inputs $(INPUTS)) $(if $(KINDS),--only $(KINDS))

faults: $(VENV)/.dev
	FAULTS=$(or $(FAULTS),20) $(BIN)/python -m pytest -p no:cacheprovider -o faulthandler_timeout=4000 tests/journeys/test_kills.py

test-slurm: $(VENV)/.dev
	$(BIN)/python -m pytest -p no:cacheprovider -o faulthandler_timeout=3600 -s tests/cluster

repair-oldest test-oldest:
	$(MAKE) $(@:-oldest=) VENV=.venv-oldest OLDEST=1

bench: $(VENV)/.run
	$(BIN)/archrepair bench

# On a machine without a network, PYTHON has what is needed already: make gpu GPU_PYTHON=python3
gpu: $(if $(GPU_PYTHON),,$(VENV)/.dev)
	$(or $(GPU_PYTHON),$(BIN)/python) benchmarks/gpu.py --minutes $(MINUTES)

paper: $(VENV)/.run
	$(BIN)/archrepair paper --tier $(TIER)

docs: $(VENV)/.dev
	$(BIN)/python docs/prep.py
	$(BIN)/python -m sphinx -q -W --keep-going -j 2 -c docs docs/_nbs _docs

readme: $(VENV)/.dev
	$(BIN)/python tests/run.py --write-readme

clean:
	rm -rf .venv .venv-oldest outputs/repair outputs/smoke _proc _docs docs/_nbs
