#!/usr/bin/env bash
# Instruction counts of the core's hot paths: repeatable whatever else the machine does. Needs valgrind.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v valgrind >/dev/null || { echo "valgrind is not installed; on Debian: apt-get install valgrind" >&2; exit 1; }

cargo build --release --quiet -p dsv4-core --example counts
binary="${CARGO_TARGET_DIR:-target}/release/examples/counts"
count() {
  valgrind --tool=callgrind --callgrind-out-file=/dev/null "$binary" "$@" 2>&1 | awk '/Collected/ {print $4}'
}
printf '%-14s %16s\n' path instructions
for path in alloc match insert evict; do
  # Twice the repetitions minus once leaves set-up out.
  once=$(count "$path" 1) twice=$(count "$path" 2)
  printf '%-14s %16d\n' "$path" "$((twice - once))"
done
