#!/bin/sh
# Makes a virtual environment with a pinned set and this project: environment/install.sh VENV SET
#   VENV  folder, relative to the repository (.venv)
#   SET   name of a pin file beside this script (set-a)
# INSTALLER=pip keeps uv out of it. Done before and nothing changed: returns at once.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."
venv=${1:-.venv}
pins=environment/${2:-set-a}.txt
python=$venv/bin/python
unfinished=$venv/.unfinished
pins_stamp=$venv/.pins
project_stamp=$venv/.project

say() { echo "[setup] $*"; }
fail() { echo "[setup] $*" >&2; exit 2; }
digest() { cat "$@" | sha256sum | cut -d ' ' -f 1; }
holds() { [ "$(cat "$1" 2>/dev/null || true)" = "$2" ]; }

[ -f "$pins" ] || fail "no pin file $pins; there are: $(cd environment && echo set-*.txt)"
# The folder is part of the project's digest: a moved or copied checkout has console scripts that point elsewhere.
pins_digest=$(digest "$pins")
project_digest=$( { cat pyproject.toml megatron_klrl/__init__.py; pwd; } | sha256sum | cut -d ' ' -f 1)

ready() {
    [ ! -e "$unfinished" ] && [ -x "$python" ] && holds "$pins_stamp" "$pins_digest" \
        && holds "$project_stamp" "$project_digest"
}

ready && exit 0

# Two makes at once would write into the same folder; the second waits, then finds the work done.
if command -v flock >/dev/null 2>&1; then
    exec 9>"$venv.lock"
    flock -n 9 || { say "another setup of $venv is running; waiting for it"; flock 9; }
    ready && exit 0
fi

check_machine() {
    [ "$(uname -sm)" = "Linux x86_64" ] \
        || fail "the pinned sets are for Linux x86_64, this is $(uname -sm); see environment/README.md for other machines"
    free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
    [ "$free_kib" -ge 9000000 ] \
        || fail "about 9 GB of free disk are needed here, there are $((free_kib / 1000000)) GB; free some or clone elsewhere"
}

# Half-written packages cannot be told from whole ones, so an interrupted or differently pinned environment starts anew.
# One without a stamp was made by hand and is completed, not removed.
needs_new() {
    [ -e "$unfinished" ] || [ ! -x "$python" ] || ! "$python" -c 'import pip' >/dev/null 2>&1 \
        || { [ -e "$pins_stamp" ] && ! holds "$pins_stamp" "$pins_digest"; }
}

make_venv() {
    base=$(environment/find-python.sh) || exit 2
    if [ -e "$venv" ]; then
        [ -f "$venv/pyvenv.cfg" ] || [ -e "$unfinished" ] || fail "$venv is not a virtual environment; move it away"
        say "$venv is incomplete or has other pins; making it anew"
        rm -rf "$venv"
    fi
    say "making $venv with $base"
    mkdir -p "$venv" && : >"$unfinished"
    "$base" -m venv "$venv"
}

find_uv() {
    if command -v uv >/dev/null 2>&1; then command -v uv; return; fi
    only_uv=$venv/.uv.txt
    sed -n '/^uv==/,/[^\\]$/p' "$pins" >"$only_uv"
    "$python" -m pip install --quiet --no-deps --require-hashes -r "$only_uv" >&2 && echo "$venv/bin/uv"
}

with_uv() {
    uv=$(find_uv) || return 1
    settings=$("$python" environment/uv_settings.py) || return 1
    # uv lists every package; in a log that is 190 lines, on a terminal it is the progress.
    quiet=$([ -t 2 ] || echo --quiet)
    (eval "$settings"
     # shellcheck disable=SC2086  # empty means no argument
     "$uv" pip install $quiet --python "$python" --no-deps --require-hashes --compile-bytecode -r "$pins")
}

# Bytecode is written here, once: megatron, torch and vllm take half a minute to compile, and every rank would do it
# again where PYTHONDONTWRITEBYTECODE is set or the folder is read-only.
with_pip() {
    "$python" -m pip install --no-deps --require-hashes --compile --progress-bar off --quiet -r "$pins"
}

install_pins() {
    say "installing $(grep -c '^[a-zA-Z]' "$pins") pinned packages of $pins (about 6 GB; one minute with uv, three with pip)"
    if [ "${INSTALLER:-uv}" = uv ] && with_uv; then return; fi
    say "installing with pip"
    with_pip
}

install_project() {
    say "installing this project into $venv"
    "$python" -m pip install --quiet --no-deps --no-build-isolation --editable .
}

check_machine
if needs_new; then make_venv; fi
if ! holds "$pins_stamp" "$pins_digest"; then
    : >"$unfinished"
    install_pins
    # The stamp first, the marker last: an end at any point leaves either a whole set or an unfinished one.
    echo "$pins_digest" >"$pins_stamp"
    rm -f "$unfinished"
fi
install_project
echo "$project_digest" >"$project_stamp"
say "$venv is ready"
