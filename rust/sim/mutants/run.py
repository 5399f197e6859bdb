"""Negative control of the core's tests: known bugs are put into a copy of the code, and random runs must catch each of them.

    python3 rust/sim/mutants/run.py

Each `NAME.patch` here is one bug: a sentence, and for each file (`---`) hunks (`@@`) of lines that stay (` `), go (`-`) or come (`+`). A hunk
is found by its lines alone, which must be in the file exactly once, so line numbers do not matter. `BUG` in it is whether
this bug is switched on: all bugs are compiled once, into one copy in `target/mutants`, and tried one after the other.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
COPY = ROOT / "target" / "mutants"


def copied() -> dict[Path, str]:
    """The text of each file of the workspace, by its path in it."""
    files = [ROOT / "Cargo.toml", ROOT / "Cargo.lock"]
    for crate in ("core", "sim", "py"):
        files += [p for p in (ROOT / "rust" / crate).rglob("*") if p.suffix in (".rs", ".toml", ".json")]
    return {p.relative_to(ROOT): p.read_text() for p in files if HERE not in p.parents}


def apply(patch: Path, files: dict[Path, str]) -> None:
    """Puts one bug into the files. Exits with what is not there when a hunk does not fit."""
    for part in patch.read_text().split("\n--- ")[1:]:
        head, *hunks = part.split("\n@@\n")
        path = Path(head.strip())
        for hunk in hunks:
            lines = hunk.rstrip("\n").split("\n")
            old = "".join(line[1:] + "\n" for line in lines if line[0] != "+")
            new = "".join(line[1:] + "\n" for line in lines if line[0] != "-")
            found = files[path].count(old) if path in files else 0
            if found != 1:
                sys.exit(
                    f"{patch.relative_to(ROOT)}: these lines are in {path} {found} times, not once:\n{old}"
                )
            files[path] = files[path].replace(old, new.replace("BUG", f'crate::mutant::on("{patch.stem}")'))


def write(files: dict[Path, str]) -> None:
    """Writes what differs, so that cargo builds no more than it must, and removes what is no longer there."""
    for old in COPY.rglob("*"):
        if old.is_file() and old.relative_to(COPY) not in files:
            old.unlink()
    for path, text in files.items():
        to = COPY / path
        if not to.is_file() or to.read_text() != text:
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(text)


def main() -> int:
    patches = sorted(HERE.glob("*.patch"))
    files = copied()
    for patch in patches:
        apply(patch, files)
    source = Path("rust", "core", "src")
    names = ", ".join(f'"{patch.stem}"' for patch in patches)
    every = f"\n/// All of them.\npub const ALL: [&str; {len(patches)}] = [{names}];\n"
    files[source / "mutant.rs"] = (HERE / "switch.rs").read_text() + every
    files[source / "lib.rs"] += "\npub mod mutant;\n"
    files[Path("rust", "sim", "tests", "mutants.rs")] = (HERE / "test.rs").read_text()
    write(files)
    target = os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))
    command = ["cargo", "test", "--quiet", "-p", "dsv4-sim", "--test", "mutants", *sys.argv[1:]]
    return subprocess.run(command, cwd=COPY, env={**os.environ, "CARGO_TARGET_DIR": target}).returncode


if __name__ == "__main__":
    sys.exit(main())
