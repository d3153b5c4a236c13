# make setup   a virtual environment with vLLM's CPU build, pinned; does nothing when it is up to date
# make demo    learn masks, convert, serve, compare: everything once, on a model trained on the spot
# make test    the tests, a process for each core: under 20 minutes on two; says which took longest
# make test-slow engines with several ranks, the wheel, and other long runs that make test leaves out
# make check   before a commit: lint, and the tests that need no engine, in a minute or two
# make real    every method on a real pretrained model (SmolLM2-135M): quality, speed; under 90 minutes, can be interrupted
# make real-gemma3  two methods on Gemma 3 270M in the same way; about 40 minutes
# make compare   methods, kinds of text and recovery at equal size on SmolLM2-135M; about 8 hours, can be interrupted;
#                with ONLY="ddp-20 flap-20" some of them
# make methods   perplexities of pico models that each method has pruned, under 40 minutes on two cores
# make ablations whether the papers' orderings hold, over three seeds
# make lint    formatting, static checks, types
# make lm-eval lm-evaluation-harness on a pruned model, through Transformers and through vLLM; installs it first

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# No engine, no training run, no process of several ranks.
QUICK_TESTS := tests/formats tests/converter tests/bench tests/common/test_environment.py tests/test_documents.py tests/test_house.py

.PHONY: setup demo test test-slow check real real-gemma3 compare methods ablations lint lm-eval clean

setup: $(VENV)/.installed

# torch comes first and with its own dependencies, so that pip may take the build that its index offers, CPU or CUDA.
# The rest is a full pin without torchvision, torchaudio and torchcodec, which vLLM's text models do not need and whose
# builds break a CPU torch: hence --no-deps.
$(VENV)/.installed: requirements/cpu.txt requirements/vllm-name/pyproject.toml pyproject.toml
	@command -v $${CXX:-g++} > /dev/null || echo "There is no C++ compiler, which vLLM's CPU build needs; install g++" >&2
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet --no-deps -r requirements/cpu.txt
	$(PIP) install --quiet --no-deps --no-build-isolation ./requirements/vllm-name -e .
	touch $@

demo: setup
	$(BIN)/python -m bench.demo

test: setup
	$(BIN)/python -m pytest -q --durations=15 --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

check: lint
	$(BIN)/python -m pytest -q $(QUICK_TESTS)

real: setup
	$(BIN)/python -m bench.real --output-dir real
	mkdir -p bench/results/real
	cp real/real.json real/real.png real/report.md real/report.html bench/results/real/

real-gemma3: setup
	$(BIN)/python -m bench.real --model gemma3 --output-dir real-gemma3
	mkdir -p bench/results/real_gemma3
	cp $(addprefix real-gemma3/,real.json real.png report.md report.html) bench/results/real_gemma3/

compare: setup
	$(BIN)/python -m bench.compare --output-dir compare $(if $(ONLY),--only $(ONLY))
	mkdir -p bench/results/compare
	cp compare/compare.json compare/compare.png bench/results/compare/

methods: setup
	$(BIN)/python -m bench.methods table --output-dir bench/results/methods

ablations: setup
	$(BIN)/python -m bench.methods ablations --output-dir bench/results/method_ablations

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lm-eval: setup
	$(PIP) install --quiet --no-deps -r requirements/lm-eval.txt
	$(BIN)/python -m pytest -q tests/serving/test_lm_eval.py

clean:
	rm -rf $(VENV) demo *.egg-info .pytest_cache .ruff_cache .mypy_cache
