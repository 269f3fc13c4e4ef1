"""`python -m benchmarks [NAME] [--quick] [--json]`: run one benchmark, or all of them."""

from __future__ import annotations

import sys

from benchmarks import pipeline

BENCHMARKS = {"pipeline": pipeline.main}


def main(arguments: list[str]) -> int:
    names = [a for a in arguments if not a.startswith("-")] or list(BENCHMARKS)
    options = [a for a in arguments if a.startswith("-")]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    return max(BENCHMARKS[name](options) for name in names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
