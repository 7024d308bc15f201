#!/bin/sh
# An environment with NeMo-Run above the trainer's: nemo_venv.sh VENV TRAINERS_VENV. NeMo-Run brings a hundred packages,
# which the trainer's pinned set should not hold; what both have is taken from NeMo-Run's.
set -eu
venv=$1
trainer=$2
stamp=$venv/.done
wanted=$("$trainer/bin/python" -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["project"]["optional-dependencies"]["nemo-run"]))')
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0
echo "[test-nemo-run] installing NeMo-Run into $venv (0.5 GB)"
rm -rf "$venv"
"$trainer/bin/python" -m venv "$venv"
echo "$wanted" >"$venv/wanted.txt"
"$venv/bin/python" -m pip install --quiet --requirement "$venv/wanted.txt"
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
"$trainer/bin/python" -c "$packages" >"$("$venv/bin/python" -c "$packages")/trainer.pth"
echo "$wanted" >"$stamp"
