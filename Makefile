# `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/digits
# One process per core: on networks this small that is faster than one process with two threads.
PROCESSES ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install distill app test test-browser test-load bench study lint format clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_INDEX) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[training,test,safety,demo,browser]"
	@touch $@

install: $(INSTALLED)  ## Make .venv and install everything, in the tested versions

distill: $(INSTALLED)  ## Distil the embedded teacher, evaluate, save, draw: a CTM in OUT=runs/digits
	trap : INT TERM; \
	ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node $(PROCESSES) \
		-m training.train_ctm --config training/configs/digits.yaml --output_dir $(OUT) --resume_from_checkpoint latest || \
		{ printf '\n%s\n' 'Not finished. The same command goes on from the newest checkpoint in $(OUT).'; exit 1; }
	$(BIN)/python -m training.evaluate --config training/configs/digits_evaluate.yaml --model $(OUT)/pipeline --output_dir $(OUT)/evaluation
	@printf '%s\n' '' 'Load it:' '' '  import diffusers_ctm' '  from diffusers import DiffusionPipeline' \
		'  pipe = DiffusionPipeline.from_pretrained("$(OUT)/pipeline")' \
		'  pipe(class_labels=[3, 7], num_inference_steps=2, gamma=0.5).images[0].save("three.png")' '' \
		'Pictures: $(OUT)/evaluation/evaluation.png and gammas.png, $(OUT)/samples'

app: $(INSTALLED)  ## Open the page of the shipped checkpoints on this machine: http://127.0.0.1:7860
	$(BIN)/python app.py

test: $(INSTALLED)  ## Run the tests, one process per core
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m "not browser"

test-browser: $(INSTALLED)  ## Click through the page in Chromium, which is installed if it is missing; pictures in runs/screenshots
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
		(apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium)
	$(BIN)/python -m pytest -m browser tests/demo

test-load: $(INSTALLED)  ## Hold 20 visitors for a minute: latencies and errors
	PYTHONPATH=tests $(BIN)/python tests/helpers/load.py

bench: $(INSTALLED)  ## Measure the cost of training and sampling as ratios; about 10 minutes
	$(BIN)/python -m training.benchmark --output_dir runs/benchmark

study: $(INSTALLED)  ## See which recipe comes soonest to the quality of the first, three seeds each; hours of one core
	OMP_NUM_THREADS=1 $(BIN)/python -m training.study --output_dir runs/study

lint: $(INSTALLED)  ## Check style with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## Apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv and caches; runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
