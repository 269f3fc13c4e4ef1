"""`python -m benchmarks [NAME …] [--quick] [--json] …`: run the named benchmarks, or all; options come last."""

from __future__ import annotations

import sys

from benchmarks import pipeline

BENCHMARKS = {"pipeline": pipeline.main}


def main(arguments: list[str]) -> int:
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    names, options = arguments[:count] or list(BENCHMARKS), arguments[count:]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    return max(BENCHMARKS[name](options) for name in names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
