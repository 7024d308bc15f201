#!/bin/sh
# Installs Transformer Engine into an environment that has torch: environment/gpu/build_transformer_engine.sh PYTHON [ARCHS]
#   PYTHON  of the environment (.venv/bin/python)
#   ARCHS   compute capabilities to compile for, as 90 (Hopper, the default) or 90;100
# Its torch part has no wheel: it is compiled here, 23 CPU-minutes (MAX_JOBS=1, the default, needs the least memory).
# Needs nvcc of CUDA 13 and a C++ compiler; no GPU and no driver. KEEP=FOLDER keeps the wheels there.
set -eu

python=${1:?usage: build_transformer_engine.sh PYTHON [ARCHS]}
archs=${2:-90}
version=2.20.2
wheels=${KEEP:-$(mktemp -d)}
say() { echo "[transformer-engine] $*"; }
fail() { echo "[transformer-engine] $*" >&2; exit 2; }

"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch; install the pinned set first"
"$python" -c 'import onnx, onnxscript' 2>/dev/null || fail "$python lacks onnx or onnxscript of environment/gpu/gpu.txt"
# Where the toolkit is, the compiler knows: on PATH there may be a script that calls it.
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
CUDA_HOME=${CUDA_HOME:-$("$nvcc" --dryrun toolkit.cu 2>&1 | sed -n 's/^#\$ TOP=//p')}
[ -x "$CUDA_HOME/bin/nvcc" ] || fail "no nvcc; install the CUDA 13 toolkit or set CUDA_HOME"
[ -f "$CUDA_HOME/include/crt/host_defines.h" ] || fail "$CUDA_HOME has no include/crt; set CUDA_HOME to a whole toolkit"
export CUDA_HOME

# The headers of cuDNN and NCCL come with torch's own wheels.
site=$("$python" -c 'import sysconfig, torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])')
includes=$(find "$site"/nvidia -maxdepth 2 -name include -type d | tr '\n' ':')
[ -n "$includes" ] || fail "$site has no nvidia/*/include; this torch brings no CUDA packages"
export CPLUS_INCLUDE_PATH="$includes" C_INCLUDE_PATH="$includes"
export NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="$archs" MAX_JOBS="${MAX_JOBS:-1}"

say "fetching $version"
"$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$wheels" \
    "transformer-engine==$version" "transformer-engine-cu13==$version"
"$python" -m pip install --quiet --no-deps pybind11
"$python" -m pip install --quiet --no-deps "$wheels"/transformer_engine-*.whl "$wheels"/transformer_engine_cu13-*.whl
say "compiling the torch part for $archs with $MAX_JOBS jobs; nothing is shown until it is done"
# pip keeps what it once compiled and does not ask for which GPUs, so without its cache
"$python" -m pip wheel --quiet --no-cache-dir --no-deps --no-build-isolation --no-binary :all: --wheel-dir "$wheels" \
    "transformer-engine-torch==$version"
"$python" -m pip install --quiet --no-deps "$wheels"/transformer_engine_torch-*.whl

libraries=$(find "$site"/nvidia -maxdepth 2 -name lib -type d | tr '\n' ':')
export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:-}"
needs="LD_LIBRARY_PATH=$libraries"
if [ "$site" != "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" ]; then
    # it looks for these beside itself, and torch lies in an environment below this one
    export CUDNN_HOME="$site/nvidia/cudnn" NVRTC_HOME="$site/nvidia/cu13" CURAND_HOME="$site/nvidia/cu13"
    needs="$needs CUDNN_HOME=$CUDNN_HOME NVRTC_HOME=$NVRTC_HOME CURAND_HOME=$CURAND_HOME"
fi
"$python" -c 'import transformer_engine.pytorch' || fail "built, but it does not import"
say "installed; whoever imports it needs $needs"
