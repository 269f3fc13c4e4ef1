#!/usr/bin/env bash
# Every linter, even when an earlier one complains; `make lint` calls it. Exits 1 if any complained.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
status=0

run() { # name, command...
    local name=$1 start=$SECONDS
    shift
    if "$@"; then
        echo "lint: $name passed ($((SECONDS - start)) s)"
    else
        echo "lint: $name FAILED ($((SECONDS - start)) s)"
        status=1
    fi
}

run "ruff check" "$bin/ruff" check --quiet --output-format concise .
run "ruff format" "$bin/ruff" format --check --quiet --output-format concise .
run "import direction" "$bin/lint-imports" --no-logo
run "mypy" "$bin/mypy"
exit "$status"
