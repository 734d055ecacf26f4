# The main commands are `make demo` and `make test`. Each creates or updates .venv.
PYTHON ?= python3
WORKDIR ?= runs/demo
OUT ?= device_check.jsonl

.PHONY: demo device-check docs evidence lint soak test test-light test-random test-serve test-slow test-web

# Trains, evaluates and exports the model, and checks that the export gives the same answers in PyTorch (if torch is
# installed). Huge pages make steps on CPUs a seventh faster (docs/BENCHMARKS.md).
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: .venv/ready-demo
	.venv/bin/python -m stf_jax.main --config=configs/demo.py --workdir=$(WORKDIR)
	rm -rf $(WORKDIR)/export
	.venv/bin/python -m stf_jax.convert export $(WORKDIR)/finetune --format=hf --to=$(WORKDIR)/export
	@if .venv/bin/python -c "import torch" 2> /dev/null; then \
	    .venv/bin/python -m stf_jax.convert verify $(WORKDIR)/finetune $(WORKDIR)/export; \
	else \
	    echo "Install torch in .venv and repeat make demo to check that the export gives the same answers in PyTorch."; \
	fi
	@echo "Look at $(WORKDIR)/contact_sheet.png. The exported model is in $(WORKDIR)/export."

# The studies of docs/EVIDENCE.md. Resumes after an interruption.
evidence: .venv/ready
	for study in fusions kernel_and_taps initialization backbone; do \
	    .venv/bin/python -m stf_jax.ablate --config=configs/ablations/$$study.py --out=runs/evidence/$$study \
	        --cells=runs/evidence/cells || exit; \
	done

test: lint
	.venv/bin/python -m pytest

# The tests that need neither torch nor processes of their own, for while you work.
test-light: .venv/ready-light
	.venv/bin/python -m pytest --light

# The same tests in random order with a printed seed, to check that no test depends on another.
test-random: .venv/ready-dev
	.venv/bin/python -m pytest -p randomly

# Only the pages, driven in Chromium (apt-get install chromium). `make test` has these tests too.
test-web: .venv/ready-dev
	.venv/bin/python -m pytest -n 0 tests/test_web.py tests/test_look.py tests/looking/test_page.py \
	    tests/comparisons/test_page.py

# Fault injection, fuzzing and other tests that take minutes; one at a time, because some measure time.
test-slow: .venv/ready-dev
	.venv/bin/python -m pytest -n 0 -m "slow and not soak" --durations=0 --durations-min=1

# Exports in transformers and vLLM, in a separate environment; runs the demo first if necessary.
test-serve: export DEMO = $(WORKDIR)
test-serve: .venv/ready-dev .venv-serve/ready
	test -d $(WORKDIR)/export || $(MAKE) demo
	.venv/bin/python -m pytest -n 0 tests/serve/check_serving.py

soak: .venv/ready-dev
	.venv/bin/python -m pytest -n 0 -m soak tests/test_soak.py

# Ten minutes on one GPU: prints one JSON line per figure, and writes them to OUT (docs/BENCHMARKS.md). Set PYTHON to one
# that has jax with CUDA, flax, jaxtyping, optax, orbax-checkpoint, transformers and torch.
device-check:
	$(PYTHON) -m benchmarks.device_check --out=$(OUT)

# Pages that are generated from code.
docs: .venv/ready-dev
	.venv/bin/python -m docs.make_configuration

lint: .venv/ready-dev
	.venv/bin/ruff check --no-cache .
	.venv/bin/ruff format --no-cache --check .
	.venv/bin/codespell
	.venv/bin/shellcheck --enable=require-double-brackets,quote-safe-variables launch/*.sh launch/slurm.sbatch
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache --no-logo

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The first part of requirements.txt.
.venv/ready-demo: requirements.txt | .venv/bin/python
	sed '/^# ---- The rest/,$$d' requirements.txt > .venv/requirements-demo.txt
	.venv/bin/python -m pip install --quiet --requirement .venv/requirements-demo.txt
	touch $@

.venv/ready: .venv/ready-demo
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

# The first part of requirements-dev.txt.
.venv/ready-light: requirements-dev.txt .venv/ready
	sed '/^# ---- The rest/,$$d' requirements-dev.txt > .venv/requirements-light.txt
	sed -i 's|^-r |-r ../|' .venv/requirements-light.txt
	.venv/bin/python -m pip install --quiet --requirement .venv/requirements-light.txt
	touch $@

.venv/ready-dev: requirements-dev.txt requirements-data.txt requirements-plan.txt .venv/ready
	.venv/bin/python -m pip install --quiet --requirement requirements-dev.txt
	.venv/bin/python -m pip install --quiet --no-deps --requirement requirements-data.txt --requirement requirements-plan.txt
	touch $@

.venv-serve/ready: requirements-serve.txt
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/python -m pip install --quiet --requirement requirements-serve.txt
	.venv-serve/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
