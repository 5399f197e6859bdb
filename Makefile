# Developer commands. Each works alone on a machine with Rust, Python 3.10+ and a package registry.
#   make serve   the small model that ships, on http://127.0.0.1:8000   (ARGS="MODEL --port 9000 ...")
#   make test    everything that CI runs
#   make test-gpu  the Python tests on a GPU machine, JOBS at a time (PYTHON=python3 takes its torch)
#   make lint    formatting, lints, types, stubs        make fmt     format in place
#   make bench   core benchmarks (criterion)            make counts  instruction counts (needs valgrind)
#   make bench-gpu  kernels against the GPU's limits (needs CUDA; PYTHON=python3, ARGS="--quick --only attention")
#   make bench-peers  the core beside other engines' caches (ARGS="--trace FILE"; fetches peers from the registries)
#   make wheel   the wheel that pip installs            make seeds   the simulator on many seeds (SEEDS=10000)
#   make fuzz    each fuzz target for a minute          make coverage  lines of the core that no test runs

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
SEEDS ?= 10000
JOBS ?= 8
RUST := $(shell find rust -name '*.rs' -not -path '*/target/*') $(wildcard rust/*/Cargo.toml) Cargo.toml Cargo.lock pyproject.toml

.PHONY: setup serve test test-gpu test-rust test-seeds test-python lint fmt bench bench-gpu bench-peers counts wheel seeds fuzz coverage clean

setup: .venv/built

.venv/bin/maturin:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip maturin

.venv/built: .venv/bin/maturin $(RUST)
	$(BIN)/maturin develop --release --extras test
	touch $@

serve: setup
	$(BIN)/dsv4 serve $(ARGS)

test: test-rust test-seeds test-python

test-rust:
	cargo test --workspace --quiet
	cargo test --quiet -p dsv4-sim --features mutants --test mutants

# Two minutes of seeds that nobody has seen; a failure prints its seed.
test-seeds:
	cargo run --release --quiet -p dsv4-sim -- --seconds 120 --from fresh

test-python: setup
	$(BIN)/python -m pytest -q tests $(ARGS)

# Uses the machine's own torch and needs the built core and pytest-xdist. What tests ahead-of-time compiling and training runs
# without a GPU; `make test` has it.
test-gpu:
	PYTHONPATH=python:. $(PYTHON) -m pytest -q -n $(JOBS) --dist loadfile -p no:benchmark tests \
	  --ignore tests/kernels/test_aot.py --ignore tests/examples $(ARGS)

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

bench:
	cargo bench --workspace --quiet

bench-gpu:
	PYTHONPATH=python:. $(PYTHON) -m benches.gpu $(ARGS)

bench-peers: setup
	$(BIN)/pip install -q matplotlib xxhash cbor2
	$(BIN)/python -m benches.peers $(ARGS)

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
	rm -rf .venv dist
