# These do all the set-up on a fresh machine: make demo, make test, make test-all.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: demo claim test test-long test-all evaluate detection segmentation lint clean
.PHONY: run-given run-and-data-given

demo: .venv/installed
	$(VENV)/python eval/demo.py

# a claim of a paper on photographs, in minutes: make claim NAME=…; without NAME the list of them (a
# variable NAME of the shell, as some have it, is another)
claim: .venv/installed
	$(VENV)/python results/claim.py $(if $(filter command%,$(origin NAME)),$(NAME)) $(FLAGS)

# linear probe and k-NN of a run, by its recipe's protocol: make evaluate RUN=runs/… [FLAGS=…]
evaluate: run-given .venv/installed
	$(VENV)/python eval/linear_probe/run.py --backbone $(RUN) $(FLAGS)

# COCO detection, ADE20K segmentation: make detection RUN=runs/… DATA=/path/to/coco [FLAGS=…]
detection segmentation: run-and-data-given .venv/installed
	$(VENV)/python eval/$@/run.py --backbone $(RUN) \
		--data $(DATA) $(FLAGS)

# what is lacking is said before anything is installed
run-given:
	@test -n "$(RUN)" || { echo "error: which run? make evaluate RUN=runs/RECIPE/NAME"; exit 2; }

run-and-data-given:
	@test -n "$(RUN)" -a -n "$(DATA)" || \
		{ echo "error: make $(MAKECMDGOALS) RUN=runs/RECIPE/NAME DATA=FOLDER"; exit 2; }

# whether the project is right, in minutes. A thread for each of the two workers: with two they wait
# for each other on two cores
PYTEST = OMP_NUM_THREADS=1 $(VENV)/pytest -q -n 2 --dist worksteal --durations 10
test: .venv/installed-dev
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(PYTEST) -m "not long"

# the other tests; test-all runs every test
test-long: .venv/installed-dev
	$(PYTEST) -m long

test-all: test test-long

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; try make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt pyproject.toml | .venv/bin/python
	$(VENV)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(VENV)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	@touch $@

lint: .venv/installed-dev
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

clean:
	rm -rf .venv
