# Developer commands. Each works alone on a machine with Rust, Python 3.10+ and a package registry.
#   make serve   the small model that ships, on http://127.0.0.1:8000   (ARGS="MODEL --port 9000 ...")
#   make test    everything that CI runs
#   make test-lowest  a part of the tests with the lowest versions of tests/lowest.txt (Python 3.10 to 3.12; 7 GB in .venv-lowest)
#   make test-clients  Claude Code, Codex, aider, SDKs and frameworks, unmodified, against a scripted model (3 GB in .venv-clients)
#   make test-tools  lm-eval, aiperf, guidellm and schemathesis, unmodified, against a scripted model (2 GB in .venv-tools)
#   make test-ray  the example for Ray Serve on a Ray of this machine (400 MB in .venv-ray)
#   make test-fleet  dsv4 dynamo behind Dynamo's frontend and router, on this machine (330 MB in .venv-fleet); CI runs ARGS="-m contract"
#   make test-gpu  the Python tests that may touch a GPU, JOBS at a time (PYTHON=python3 takes its torch)
#   make test-ready  what a GPU engine still compiles or captures under load (needs CUDA)
#   make lint    formatting, lints, stubs               make fmt     format in place
#   make bench   core benchmarks (criterion)            make counts  instruction counts (needs valgrind)
#   make grammar  answers to 1,000 random schemas (SCHEMAS=1000)
#   make bench-gpu  kernels against the GPU's limits (needs CUDA; PYTHON=python3, ARGS="--quick --only attention")
#   make bench-engine  decode, prefill, cached prompts, starts, memory, vLLM beside (needs CUDA; ARGS="--budget 480 --model nano")
#   make bench-peers  the core beside other engines' caches (ARGS="--trace FILE"; fetches peers from the registries)
#   make soak    hours of mixed requests, every one accounted for (HOURS=2); make streams: 10,000 at once (STREAMS=10000)
#   make rolling  200 restarts of servers behind a proxy, under load, without a failed request (ROLLING=200)
#   make wheel   the wheel that pip installs            make seeds   the simulator on many seeds (SEEDS=10000)
#   make fuzz    each fuzz target for a minute          make coverage  lines of the core that no test runs

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
SEEDS ?= 10000
SCHEMAS ?= 1000
JOBS ?= 8
HOURS ?= 2
STREAMS ?= 10000
WORKERS ?= 3
ROLLING ?= 200
# pip's own reader of TOML, as Python 3.10 has none.
define NEEDS
from pip._vendor import tomli
project = tomli.load(open("pyproject.toml", "rb"))["project"]
print("\n".join(project["dependencies"] + project["optional-dependencies"]["test"]))
endef
export NEEDS
# What an old package would break: the command line, the server, the tokenizer, the model, the kernels in the interpreter.
LOWEST := tests/api tests/text tests/engine tests/ops tests/plan tests/simulate tests/test_config.py tests/test_mistakes.py \
  tests/test_requirements.py tests/test_core_border.py tests/test_formats.py tests/test_sampler.py tests/model/test_config.py \
  tests/model/test_foreign_checkpoints.py tests/model/test_paged_cache.py tests/model/test_resume.py \
  tests/model/test_weights.py tests/e2e/test_nano.py tests/kernels/test_dense_ops.py tests/kernels/test_rows.py tests/kernels/test_compiling.py
RUST := $(shell find rust -name '*.rs' -not -path '*/target/*') $(wildcard rust/*/Cargo.toml) Cargo.toml Cargo.lock pyproject.toml

.PHONY: setup serve test grammar test-gpu test-ready test-lowest test-clients test-tools test-ray test-fleet test-rust test-seeds test-python lint fmt bench bench-gpu bench-engine bench-peers soak streams rolling counts wheel seeds fuzz coverage clean

setup: .venv/built

.venv/bin/maturin:
	@echo "setup: a virtual environment in .venv"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --upgrade pip maturin

# pip installs before maturin does, which would hide its bars. Where no terminal shows them, the size tells how far it is.
.venv/needs: .venv/bin/maturin pyproject.toml
	@echo "setup: Python packages, most of it torch with CUDA's libraries: about 6 GB on disk, 2 to 10 minutes"
	$(BIN)/python -c "$$NEEDS" > $@.txt
	@if [ -t 1 ]; then $(BIN)/pip install --disable-pip-version-check -r $@.txt; else \
	  while sleep 20; do echo "setup: $$(du -sh .venv | cut -f1) of about 6G"; done & watch=$$!; \
	  $(BIN)/pip install --disable-pip-version-check --progress-bar off -r $@.txt; done=$$?; kill $$watch; exit $$done; fi
	mv $@.txt $@

.venv/built: .venv/needs $(RUST)
	@echo "setup: the Rust core, about 2 minutes the first time"
	$(BIN)/maturin develop --release --extras test
	touch $@

serve: setup
	@echo "serve: dsv4 serve $(ARGS); Ctrl-C stops it"
	@$(BIN)/dsv4 serve $(ARGS)

test: test-rust test-seeds test-python

test-rust:
	cargo test --workspace --quiet
	$(PYTHON) rust/sim/mutants/run.py

# A minute of seeds that nobody has seen; a failure prints its seed.
test-seeds:
	cargo run --release --quiet -p dsv4-sim -- --seconds 60 --from fresh

# Whole files at a time on each processor, the longest first (tests/conftest.py has the order); many tests wait for servers, and torch has one
# thread in each process then.
test-python: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests $(ARGS)

# pytest and the clients are the newest; of what dsv4 needs, each is the lowest that pyproject.toml allows.
.venv-lowest/built: tests/lowest.txt
	@echo "test-lowest: the lowest versions of all packages in .venv-lowest: 7 GB on disk, 2 to 15 minutes"
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --disable-pip-version-check -r tests/lowest.txt pytest pytest-timeout hypothesis httpx openai
	touch $@

test-lowest: setup .venv-lowest/built
	PYTHONPATH=$(CURDIR)/python .venv-lowest/bin/python -m pytest -q $(LOWEST) $(ARGS)

# Each of the newest version, in environments of their own, as they pin each other's.
.venv-clients/built:
	@echo "test-clients: clients in .venv-clients: 3 GB on disk, 1 to 5 minutes"
	$(PYTHON) -m venv .venv-clients/sdks
	.venv-clients/sdks/bin/pip install --disable-pip-version-check -q openai anthropic litellm claude-agent-sdk openai-codex-cli-bin
	$(PYTHON) -m venv .venv-clients/frameworks
	.venv-clients/frameworks/bin/pip install --disable-pip-version-check -q langchain-openai langchain-anthropic \
	  "pydantic-ai-slim[openai,anthropic]"
	$(PYTHON) -m venv .venv-clients/tools
	.venv-clients/tools/bin/pip install --disable-pip-version-check -q llama-index-llms-openai-like instructor "smolagents[openai]"
	$(PYTHON) -m venv .venv-clients/llm
	.venv-clients/llm/bin/pip install --disable-pip-version-check -q llm
	$(PYTHON) -m venv .venv-clients/aider
	.venv-clients/aider/bin/pip install --disable-pip-version-check -q aider-chat
	touch $@

test-clients: setup .venv-clients/built
	CLIENTS=$(CURDIR)/.venv-clients $(BIN)/python -m pytest -q tests/clients $(ARGS)

# What may touch a GPU: kernels and ops, and engines that take the device of the machine. All else (HTTP, texts, the planner, the reference's model,
# ahead-of-time compiling, starts and signals, ranks and restarts on the CPU) is the same on every machine, and `make test` has it. Uses the machine's own torch and
# needs the built core and pytest-xdist; two threads a job, as torch would start one a core in each.
# The longest files come first.
ON_GPU := tests/engine tests/e2e tests/model/test_on_gpu.py tests/test_python_page.py tests/kernels tests/ops
NOT_ON_GPU := tests/kernels/test_aot.py tests/e2e/test_rolling_restarts.py tests/e2e/test_ranks.py tests/e2e/test_start.py tests/engine/test_ctrl_c.py
test-gpu:
	PYTHONPATH=$(CURDIR)/python:$(CURDIR) OMP_NUM_THREADS=2 $(PYTHON) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -p no:benchmark --durations 25 \
	  $(ON_GPU) $(addprefix --ignore ,$(NOT_ON_GPU)) $(ARGS)

.venv-tools/built: | setup
	@echo "test-tools: an evaluation harness, load generators and a fuzzer in .venv-tools: 2 GB on disk, 2 to 10 minutes"
	for tool in schemathesis lm_eval aiperf guidellm; do $(PYTHON) -m venv .venv-tools/$$tool || exit 1; done
	.venv-tools/schemathesis/bin/pip install --disable-pip-version-check -q schemathesis
	.venv-tools/lm_eval/bin/pip install --disable-pip-version-check -q "lm-eval[api]" transformers
	.venv-tools/aiperf/bin/pip install --disable-pip-version-check -q aiperf
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
	  $$(ls -d .venv-tools/guidellm/lib/python*/site-packages)/torch.pth  # the torch that is there, as another is 5 GB
	.venv-tools/guidellm/bin/pip install --disable-pip-version-check -q guidellm
	touch $@

test-tools: .venv-tools/built
	TOOLS=$(CURDIR)/.venv-tools $(BIN)/python -m pytest -q tests/clients/test_tools.py $(ARGS)

.venv-ray/built: | setup
	@echo "test-ray: Ray Serve in .venv-ray, beside the torch of .venv"
	$(PYTHON) -m venv .venv-ray
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
	  $$(ls -d .venv-ray/lib/python*/site-packages)/torch.pth
	.venv-ray/bin/pip install --disable-pip-version-check -q "ray[serve]"
	touch $@

test-ray: .venv-ray/built
	PYTHONPATH=$(CURDIR)/python:$(CURDIR) .venv-ray/bin/python -m pytest -q tests/examples/test_ray_serve.py $(ARGS)

# Dynamo pins a package of which the package index has a stub only, so its own requirements are left out; dynamo.txt has those that count.
.venv-fleet/built: tests/fleet/dynamo.txt | setup
	@echo "test-fleet: Dynamo in .venv-fleet, beside the torch of .venv"
	$(PYTHON) -m venv .venv-fleet
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
	  $$(ls -d .venv-fleet/lib/python*/site-packages)/torch.pth
	.venv-fleet/bin/pip install --disable-pip-version-check -q --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
	.venv-fleet/bin/pip install --disable-pip-version-check -q -r tests/fleet/dynamo.txt
	touch $@

# Without Dynamo its tests would skip themselves.
test-fleet: .venv-fleet/built
	.venv-fleet/bin/python -c "import dynamo.common, dynamo.llm"
	PYTHONPATH=$(CURDIR)/python:$(CURDIR) .venv-fleet/bin/python -m pytest -q tests/fleet $(ARGS)

# Nothing is left to compile or to capture when the engine is ready: 0 in every line.
test-ready:
	PYTHONPATH=$(CURDIR)/python:$(CURDIR) $(PYTHON) -m tests.kernels.mixed_load

lint: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	cargo clippy --manifest-path benches/peers/rust/Cargo.toml --no-default-features --target-dir target --quiet -- -D warnings
	$(BIN)/ruff format --check python tests benches examples
	$(BIN)/ruff check python tests benches examples
	$(BIN)/python -m mypy.stubtest dsv4._core
	$(BIN)/python tests/check_size.py

fmt: setup
	cargo fmt --all
	$(BIN)/ruff format python tests benches examples
	$(BIN)/ruff check --fix python tests benches examples

grammar: setup
	GRAMMAR_SCHEMAS=$(SCHEMAS) $(BIN)/python -m pytest -q tests/grammar -n $(WORKERS)

bench:
	cargo bench --workspace --quiet

bench-gpu:
	PYTHONPATH=$(CURDIR)/python:$(CURDIR) $(PYTHON) -m benches.gpu $(ARGS)

# The engine with real prompts; ARGS="--budget 480" stops in time, with what it has. PYTHON=python3 takes the machine's torch.
bench-engine:
	PYTHONPATH=$(CURDIR)/python:$(CURDIR) $(PYTHON) -m benches.engine $(ARGS)

bench-peers: setup
	$(BIN)/pip install -q matplotlib xxhash cbor2
	$(BIN)/python -m benches.peers $(ARGS)

# Both leave with 1 where a request is lost, an answer is wrong, or memory pages or descriptors do not come back.
soak: setup
	$(BIN)/python -m benches.soak --hours $(HOURS) $(ARGS)

streams: setup
	$(BIN)/python -m benches.many_streams --streams $(STREAMS) $(ARGS)

# CI does a few of them; 200 of each kind take about an hour.
rolling: setup
	ROLLING=$(ROLLING) $(BIN)/python -m pytest -q tests/e2e/test_rolling_restarts.py $(ARGS)

counts:
	benches/counts.sh

wheel: .venv/bin/maturin
	$(BIN)/maturin build --release --out dist

seeds:
	cargo run --release --quiet -p dsv4-sim -- --seeds $(SEEDS)

# Needs `cargo install cargo-fuzz`; the sanitizer's flags are unstable, hence RUSTC_BOOTSTRAP.
fuzz:
	for target in $$(RUSTC_BOOTSTRAP=1 cargo fuzz list --fuzz-dir rust/fuzz); do \
	  RUSTC_BOOTSTRAP=1 cargo fuzz run $$target --fuzz-dir rust/fuzz -- -max_total_time=60 || exit 1; done

# Needs `cargo install cargo-tarpaulin`.
coverage:
	cargo tarpaulin --engine llvm -p dsv4-core -p dsv4-sim --release --include-files 'rust/core/src/*' --out Stdout

clean:
	cargo clean
	rm -rf .venv .venv-lowest .venv-clients .venv-tools .venv-ray .venv-fleet dist
