"""Fails on register spills that the kernel's header does not announce.

    python .ci/spills.py build/kernels

Reads the ptxas report that the build keeps beside each object. A kernel that
spills on purpose says so in its header, with the reason on the same line:

    // SPILLS <kernel name> <bytes>: <why>
"""

import re
import sys
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "csrc" / "kernels"
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
ANNOUNCED = re.compile(r"// SPILLS (\w+) (\d+): \S+")


def announced() -> list[tuple[str, int]]:
    return [(m[1], int(m[2])) for header in KERNELS.glob("*.h") for m in ANNOUNCED.finditer(header.read_text())]


def spills(report: str):
    """(mangled kernel name, bytes) of every entry function in a ptxas report."""
    entry = None
    for line in report.splitlines():
        if found := ENTRY.search(line):
            entry = found[1]
        elif (found := SPILL.search(line)) and entry:
            yield entry, max(int(found[1]), int(found[2]))
            entry = None


def main() -> None:
    logs = sorted(Path(sys.argv[1]).glob("*.cu.o.log"))
    sources = sorted(KERNELS.glob("*.cu"))
    if len(logs) != len(sources):
        raise SystemExit(f"{len(sources)} kernel sources, but {len(logs)} compiled objects in {sys.argv[1]}: build them all first")
    allowed = announced()
    count, bad = 0, []
    for log in logs:
        for entry, size in spills(log.read_text()):
            count += 1
            if size > max((limit for name, limit in allowed if name in entry), default=0):
                bad.append(f"{log.name}: {entry} spills {size} bytes")
    print("\n".join(bad) if bad else f"{count} kernels in {len(logs)} files, no unannounced spills")
    raise SystemExit(1 if bad or (sources and not count) else 0)


if __name__ == "__main__":
    main()
