#!/usr/bin/env bash
# Checks that need a GPU, in three parts; each fits into one call of 8 minutes on one H200 (an A100 or H100 with 80 GB does too).
#
#   tools/gpu_check.sh numerics|e2e|speed [--dry-run] [--budget SECONDS]
#
# numerics  every Triton provider against the op's reference in float64; the card's bandwidth and rate of matrix products
# e2e       12 small model families against eager Hugging Face, without and with CUDA graphs, float32 and bfloat16
# speed     random weights of published shapes: decode and prefill against what the card can do, and against generate()
#
# Results: a table on stdout, and gpu_check_<part>.json in $OUT (else in this folder), written anew after each row. COMMIT names
# the commit where there is no git. Without a GPU, or with --dry-run, small versions run on the CPU, and the rest is skipped.
#
# A machine with torch and triton but no network is given the other packages as wheels in the folder wheels/ beside pyproject.toml.
# To fetch them here for its Python, without torch, which it has (a run there says what it lacks; pydantic-core is the one that
# pydantic asks for by its exact version):
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d wheels \
#       'transformers>=5.23' pydantic==2.14.3 pydantic-core==2.50.4 typing-inspection annotated-types typing-extensions
#
# If a run still names huggingface-hub, tokenizers, safetensors or another package, fetch that one too.
# They are installed into a folder of their own, and only if something that pyproject.toml asks for is missing or too old.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ -x .venv/bin/python ] && python=.venv/bin/python
fi

missing() {
    "$python" - <<'PY'
import tomllib
from importlib.metadata import PackageNotFoundError, version

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

with open("pyproject.toml", "rb") as file:
    wanted = [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"]]
for item in wanted:
    try:
        found = version(item.name)
    except PackageNotFoundError:
        found = None
    if found is None or not item.specifier.contains(found.partition("+")[0], prereleases=True):
        print(f"{item} (found: {found})")
PY
}

lacking=$(missing)
if [ -n "$lacking" ] && compgen -G "wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    echo "from wheels/: $lacking" | tr '\n' ' ' && echo
    "$python" -m pip install -q --no-index --no-deps --no-compile --find-links wheels --target "$site" wheels/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
    lacking=$(missing)
fi
if [ -n "$lacking" ]; then
    echo "missing, and not in wheels/ (the head of this file says how to fetch them): $lacking" >&2
    exit 2
fi

export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" tools/gpu_check.py "$@"
