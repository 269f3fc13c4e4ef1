#!/usr/bin/env bash
# Makes the virtual environment; the Makefile calls it and keeps the stamps.
#   env.sh base      find Python, make $VENV, install shoal editable with its dev tools, pinned by constraints.txt
#   env.sh interop   add py-libp2p for the interop tests; without a C compiler they are skipped, which is said here
# pip writes to $VENV/install.log; on failure its tail is shown with addresses taken out.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
log=$venv/install.log

fail() { # message, fix
    printf 'make env: %s\n  fix: %s\n' "$1" "$2" >&2
    exit 1
}

# Sets `python` to the first interpreter that runs (a pyenv shim may exist and not run), is new enough and can make
# environments. 3.11 comes first because it is what the project is tested with.
find_python() {
    local candidate no_venv='' old=''
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python3.14}; do
        "$candidate" -c '' >/dev/null 2>&1 || continue
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            old="$candidate is $("$candidate" -V 2>&1)"
        elif ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            no_venv=${no_venv:-$candidate}
        else
            python=$candidate
            return
        fi
    done
    if [ -n "$no_venv" ]; then
        local package
        package=$("$no_venv" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        fail "$no_venv cannot make virtual environments: its module ensurepip is missing" \
            "apt-get install $package   (Debian, Ubuntu), then again"
    fi
    fail "no Python 3.11 or newer found${old:+ ($old)}" \
        "install one, for example: apt-get install python3 python3-venv, or name it: PYTHON=/path/to/python3.12 make env"
}

scrub() { sed -E "s#[a-z+]+://[^ ,;)']+#<address>#g; s#host='[^']+'#host=<address>#g"; }

# Runs "$@" into the log; meanwhile shows what pip is at: one changing line on a terminal, a line per half minute elsewhere.
logged() {
    local start=$SECONDS every=30 doing pid status=0 spent
    [ -t 1 ] && every=1
    "$@" >>"$log" 2>&1 </dev/null &
    pid=$!
    trap 'kill "$pid" 2>/dev/null || true' EXIT
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        spent=$((SECONDS - start))
        if [ "$spent" -ge "$every" ]; then
            doing=$(grep -aoE '^ *(Collecting [A-Za-z0-9_.-]+|Downloading [A-Za-z0-9_.-]+|Installing [a-z ]+)' "$log" |
                tail -n 1 | sed -E 's/^ *//; s/-[0-9].*//') || true
            if [ -t 1 ]; then
                printf '\r\033[K  %d s: %s' "$spent" "$doing"
                every=$((spent + 1))
            else
                printf '  %d s: %s\n' "$spent" "$doing"
                every=$((spent + 30))
            fi
        fi
    done
    wait "$pid" || status=$?
    trap - EXIT
    [ -t 1 ] && printf '\r\033[K'
    return "$status"
}

pip_install() {
    logged "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off \
        -c constraints.txt "$@"
}

base() {
    local start=$SECONDS python
    if [ "$(uname -s) $(uname -m)" != "Linux x86_64" ]; then
        fail "shoal runs on Linux x86-64; this is $(uname -s) $(uname -m) (hivemind has its p2p daemon for that only)" \
            "use a Linux x86-64 machine, virtual machine or container"
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        find_python
        echo "make env: making $venv with $("$python" -V) ($(command -v "$python"))"
        rm -rf "$venv"
        "$python" -m venv "$venv" || fail "$python -m venv $venv failed" "see the message above; apt-get install python3-venv helps on Debian"
    fi
    : >"$log"
    echo "make env: installing pinned dependencies: usually one to two minutes, longer where pip takes torch's CUDA build; log: $log"
    if ! pip_install -e '.[dev]'; then
        tail -n 25 "$log" | scrub >&2
        fail "pip could not install the dependencies (last lines above, all of it in $log)" \
            "check the network and the free disk space (2 GB; 8 GB with CUDA), then run make env again"
    fi
    echo "make env: ready after $((SECONDS - start)) s"
}

interop() {
    local start=$SECONDS
    echo "make env: adding py-libp2p for the interop tests (about half a minute)"
    if pip_install -e '.[interop]'; then
        echo "make env: ready after $((SECONDS - start)) s"
    else
        echo "make env: py-libp2p could not be installed; everything else works and its tests are skipped with this reason"
        echo "  fix: apt-get install gcc python3-dev libgmp-dev, then rm $venv/.interop and run make test again (log: $log)"
    fi
}

case ${1:-} in
    base | interop) "$1" ;;
    *) fail "unknown step '${1:-}'" "run it through make env" ;;
esac
