# Two commands do everything: `make demo` and `make test`. Each makes .venv and installs what it needs; the second time takes seconds.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PORT ?= 7860

.PHONY: demo test sync card weights data clean
.DEFAULT_GOAL := demo

demo: .venv/.stamp-apps  ## classify shipped pictures, print the measured accuracy, open the app (APP=0: no app)
	$(BIN)/clip-lab demo --port $(PORT) $(if $(filter 0,$(APP)),--no-app)

test: .venv/.stamp-dev  ## library and notebooks in sync and clean, README up to date, notebooks run, tests pass
	tools/system_packages.sh
	$(BIN)/python tools/sync.py --check
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest

sync: .venv/.stamp-dev  ## after editing a notebook: export the library, clean the notebooks, write the README
	$(BIN)/python tools/sync.py

card: .venv/.stamp-apps  ## measure the model card's table again
	$(BIN)/clip-lab card

weights: .venv/.stamp-dev  ## train the shipped weights again (under two hours on two cores)
	$(BIN)/accelerate launch --cpu --num_processes 1 -m clip_lab.train --output runs/emoji

data: .venv/.stamp-dev  ## rebuild the shipped pictures from the studios' packages
	$(PIP) -e '.[build]'
	$(BIN)/python tools/build_data.py --work build/data

clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.stamp-apps: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[apps]'
	@touch $@

.venv/.stamp-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[dev]'
	# A reference for tests, read file by file: its own dependencies are not needed.
	$(PIP) --no-deps open-clip-torch
	@touch $@ .venv/.stamp-apps
