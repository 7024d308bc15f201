#!/bin/sh
# Prints the path of a working Python 3.12, or says on stderr how to get one.
# A candidate counts only if it runs: pyenv leaves shims on PATH that end in an error when the version is not selected.
set -u

works() {
    [ -n "$1" ] && "$1" -c '
import sys
import ensurepip, venv
sys.exit(0 if (3, 12) <= sys.version_info[:2] < (3, 13) else 1)' >/dev/null 2>&1
}

try() {
    if works "$1"; then
        # The real interpreter, not the shim: a venv made from a shim breaks when the selected version changes.
        "$1" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable) or sys.executable)'
        exit 0
    fi
}

if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON"
    echo "PYTHON=$PYTHON is not a working Python 3.12 with venv and ensurepip; unset PYTHON or point it at one." >&2
    exit 2
fi

try "$(command -v python3.12 || true)"

pyenv_root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || true)}
for root in "$pyenv_root" "${HOME:-/nonexistent}/.pyenv"; do
    for candidate in "$root"/versions/3.12.*/bin/python3.12; do
        try "$candidate"
    done
done

try "$(command -v python3 || true)"
try "$(command -v python || true)"

if command -v uv >/dev/null 2>&1; then
    try "$(uv python find --system --no-project --no-python-downloads '>=3.12,<3.13' 2>/dev/null || true)"
fi
uv_pythons=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-/nonexistent}/.local/share}/uv/python}
for candidate in "$uv_pythons"/cpython-3.12*/bin/python3.12; do
    try "$candidate"
done

cat >&2 <<'MESSAGE'
No working Python 3.12 found (looked at $PYTHON, python3.12, pyenv, python3, python and uv).
Get one of these, then start again:
    uv python install 3.12
    pyenv install 3.12
    apt-get install python3.12 python3.12-venv      # Debian, Ubuntu
or name one: make setup PYTHON=/path/to/python3.12
MESSAGE
exit 2
