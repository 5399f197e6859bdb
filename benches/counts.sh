#!/usr/bin/env bash
# Instruction counts of hot paths: repeatable whatever else the machine does. Needs valgrind.
#   benches/counts.sh          the core: 4,096 pages, 262,144 tokens, a step of 1,024 decodes
#   benches/counts.sh peers    match, insert and evict of 262,144 tokens by dsv4, the floor and public crates
set -euo pipefail
cd "$(dirname "$0")/.."
command -v valgrind >/dev/null || { echo "valgrind is not installed; on Debian: apt-get install valgrind" >&2; exit 1; }

count() {
  valgrind --tool=callgrind --callgrind-out-file=/dev/null "$@" 2>&1 | awk '/Collected/ {print $4}'
}
difference() {
  # Twice the repetitions minus once leaves set-up out.
  local once twice
  once=$(count "$@" 1) twice=$(count "$@" 2)
  printf '%16d\n' "$((twice - once))"
}

if [ "${1:-}" = peers ]; then
  (cd benches/peers/rust && cargo build --release --quiet)
  for path in match insert evict; do
    for system in dsv4 floor dynamo-kv-router kvbm-logical; do
      printf '%-8s %-18s' "$path" "$system"
      difference benches/peers/rust/target/release/dsv4-peer-bench count "$system" "$path"
    done
  done
else
  cargo build --release --quiet -p dsv4-core --example counts
  for path in alloc match insert evict step; do
    printf '%-8s' "$path"
    difference "${CARGO_TARGET_DIR:-target}/release/examples/counts" "$path"
  done
fi
