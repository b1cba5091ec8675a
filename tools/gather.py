"""Gather what the two runs on a GPU need into one folder, for a machine without a network, and check its size
(docs/gpu.md).

    python -m tools.gather --data cifar10.npz                     gpu_run/, which git ignores
    python -m tools.gather --data cifar10.npz --no-wheels --output FOLDER
    bash gpu_run/run.sh smoke RESULTS                             on that machine; then the same with report

The folder gets the file of the images, and wheels for Python 3.12 on Linux of packages that a machine with
torch, Triton and pytest may lack. The runs need none of these wheels, but the other commands of the package
do: WITH_WHEELS=1 installs them for a run. The tree travels once: it is the one around the folder, or, if the
folder is elsewhere, a copy in it of the tracked files including uncommitted changes. Exit status 1 if all
that travels is too large.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench import results

LIMIT = 64.0  # MiB
# Packages with their requirements, and packages without: those of captum include torch
WHEELS, ALONE = ("pydantic", "tqdm", "braceexpand"), ("captum", "webdataset")
PLATFORM = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
PLATFORM += [word for n in (28, 27, 17) for word in ("--platform", f"manylinux_2_{n}_x86_64")]
PLATFORM += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64"]
MARK = "gathered"  # only a folder with this file is replaced

RUN = """#!/usr/bin/env bash
# bash run.sh smoke|report RESULTS [options]: a run from this folder; what it found is in the folder
# RESULTS, in few files
set -euo pipefail
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
tree=$here/{tree}
which=${{1:?expected smoke or report}}
results=$(mkdir -p "${{2:?expected a folder for the results}}" && cd "$2" && pwd)
shift 2
scratch=$(mktemp -d)
export CODA_FAST_COMMIT={commit} PYTHONUNBUFFERED=1 PYTHONPATH="kernels${{PYTHONPATH:+:$PYTHONPATH}}"
python=${{PYTHON:-python3}}
if test -n "${{WITH_WHEELS:-}}"; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" \\
        "$here"/wheels/*.whl
    export PYTHONPATH="$scratch/site:$PYTHONPATH"
fi
cd "$tree"
if test "$("$python" -c "from bench import results; print(results.tree())")" != {digest}; then
    echo "run.sh: the tree has changed since it was gathered; results would name a wrong commit" >&2
    exit 2
fi
case $which in
    smoke) "$python" -m tools.gpu_smoke --output "$scratch/smoke" --pack "$results" "$@" ;;
    report) "$python" -m tools.gpu_report {data}--output "$scratch/report" --pack "$results" "$@" ;;
    *) echo "run.sh: expected smoke or report, got $which" >&2; exit 2 ;;
esac
"""


def tracked(root: Path = results.ROOT) -> list[Path]:
    """The tracked files of the tree, relative to its root. Raises RuntimeError if there is no git history."""
    done = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{root}: expected a clone of the repository: {done.stderr.strip()}")
    return [Path(name) for name in done.stdout.split("\0") if name and (root / name).is_file()]


def copy_tree(target: Path, root: Path = results.ROOT) -> None:
    for name in tracked(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)


def wheels(target: Path) -> None:
    """Download the wheels. Raises RuntimeError with the output of pip."""
    target.mkdir()
    for names, options in ((WHEELS, []), (ALONE, ["--no-deps"])):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            *PLATFORM,
            *options,
            "-d",
            str(target),
            *names,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip download {' '.join(names)}: {done.stderr.strip()[-500:]}")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def gather(output: Path, data: Path | None, with_wheels: bool) -> dict[str, int]:
    """Fill the folder, and return {part of what travels: bytes}."""
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / MARK).touch()
    around = results.ROOT in output.parents
    tree = results.ROOT if around else output / "tree"
    if not around:
        copy_tree(tree)
    if data is not None:
        shutil.copyfile(data, output / "images.npz")
    if with_wheels:
        wheels(output / "wheels")
    script = RUN.format(
        commit=results.commit(),
        tree=os.path.relpath(tree, output),
        digest=results.tree(tree),
        data='--data "$here/images.npz" ' if data is not None else "",
    )
    (output / "run.sh").write_text(script, encoding="utf-8")
    parts = {path.name: size(path) if path.is_dir() else path.stat().st_size for path in output.iterdir()}
    if around:
        parts["the tree around it"] = sum((tree / name).stat().st_size for name in tracked())
    return dict(sorted(parts.items()))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="the images to train with, an .npz file (experiments/fast_training/); none: no training",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=results.ROOT / "gpu_run",
        help="folder, replaced if this program made it (gpu_run)",
    )
    parser.add_argument("--no-wheels", action="store_true", help="only what is here")
    parser.add_argument("--limit", type=float, default=LIMIT, help="MiB in all (64)")
    options = parser.parse_args(argv)
    output = options.output.resolve()
    if options.data is not None and not options.data.is_file():
        parser.error(f"--data: no such file: {options.data}")
    if output.exists() and not (output / MARK).exists() and (not output.is_dir() or any(output.iterdir())):
        parser.error(f"--output: expected a new folder or one that this program made, got {options.output}")
    try:
        parts = gather(output, options.data, not options.no_wheels)
    except (RuntimeError, OSError) as error:
        print(f"gather: {error}", file=sys.stderr)
        return 2
    total = sum(parts.values())
    if results.commit().endswith("-dirty"):
        print("gather: the tree has changes that are not committed; its results will say so", file=sys.stderr)
    for name, count in parts.items():
        print(f"{count / 2**20:8.2f} MiB  {name}")
    print(f"{total / 2**20:8.2f} MiB of {options.limit:g} in {os.path.relpath(output)}")
    if total > options.limit * 2**20:
        print(f"gather: expected at most {options.limit:g} MiB, got {total / 2**20:.2f}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
