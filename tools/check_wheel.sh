#!/usr/bin/env bash
# Builds wheel and sdist into ./dist, installs the wheel in a new environment without the source tree, and runs
# the example of the README there.
#
#     tools/check_wheel.sh PYTHON        an interpreter whose environment has torch and the extras [cli,test]
#
# The new environment finds the packages of that one (torch is not downloaded again), but not what an editable
# install there points to.
set -euo pipefail
python=$(cd "$(dirname "$(command -v "$1")")" && pwd)/$(basename "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
unset PYTHONPATH

rm -rf dist
mkdir dist "$scratch/tree" "$scratch/elsewhere"
# Building leaves files behind, so a copy of the tree is built.
tar --exclude='./.*' --exclude=./dist --exclude=./site --exclude=./build \
    --exclude=./coda_demo --exclude=./coda_runs --exclude=./gpu_run --exclude='*.egg-info' -cf - . |
    tar -xf - -C "$scratch/tree"
cd "$scratch/tree"
"$python" -c "from setuptools import build_meta; build_meta.build_sdist('$root/dist')" >"$scratch/log" 2>&1 ||
    { cat "$scratch/log" >&2; exit 1; }
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --no-index --wheel-dir "$root/dist" \
    "$root"/dist/*.tar.gz

"$python" -m venv --without-pip "$scratch/environment"
folder='import sysconfig; print(sysconfig.get_path("purelib"))'
here=$("$scratch/environment/bin/python" -c "$folder")
"$python" -m pip install --quiet --no-deps --no-index --target "$here" "$root"/dist/*.whl
"$python" -c "$folder" >"$here/packages.pth" # the .pth files of that folder are not read

cd "$scratch/elsewhere"
sed -n '/\[start:example\]/,/\[end:example\]/p' "$root/README.md" | sed '/^```/d; /^<!--/d' >example.py
test "$(grep -c . example.py)" -ge 5
cat >>example.py <<'END'

import coda_kernels, pathlib, sys

for package in (coda_fast, coda_kernels):
    assert pathlib.Path(package.__file__).is_relative_to(sys.prefix), package.__file__
assert pathlib.Path("why.png").stat().st_size > 1000
assert float(e.completeness_error.max()) < 1e-5
print("coda_fast", coda_fast.__version__, "explains pictures from its wheel")
END
# One thread: so small a network gains nothing by more, which wait for each other on a machine with other work.
OMP_NUM_THREADS=1 "$scratch/environment/bin/python" example.py
ls -l "$root/dist"
