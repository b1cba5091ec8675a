"""Measured results as data: one row per line in bench/results/<device>.jsonl, and the origin of a row."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
LOCAL = FOLDER / "local"  # measurements of users, which are not in the repository
FIELDS = ("op", "provider", "mode", "dtype", "shape", "device", "driver", "torch", "triton", "commit", "date")


def environment(device: torch.device) -> dict:
    """The columns that name the device, the versions and the date, and the folder of the tables if tiles come
    from others than the package's.
    """
    return {
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        **({"tables": Path(tables).name} if (tables := os.environ.get("CODA_FAST_TABLES")) else {}),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


@functools.cache
def commit() -> str:
    """The commit of the tree, with "-dirty" if files other than rows were changed. CODA_FAST_COMMIT names it
    for a tree without git history.
    """
    if named := os.environ.get("CODA_FAST_COMMIT"):
        return named
    git = lambda *a: subprocess.run(
        ["git", "-C", str(ROOT), *a], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def _driver():
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- files
# ------------------------------------------------------------------------------------------------------------


def path_of(device: str, folder: Path) -> Path:
    """The file of a device."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".jsonl")


@functools.cache
def tree(root: Path = ROOT) -> str:
    """Digest of the code that runs: package, kernels and tests, regardless of git."""
    digest = hashlib.sha256()
    for path in sorted(
        p
        for folder in ("coda_fast", "kernels", "tests")
        for p in (root / folder).rglob("*")
        if p.suffix in (".py", ".json")
    ):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def group_of(row: dict) -> tuple:
    """The columns that rows measured in turns have in common."""
    return (row["op"], row["mode"], row["dtype"], json.dumps(row["shape"], sort_keys=True))


def read(path: Path) -> list[dict]:
    """The rows of a file, none if it does not exist. Raises ValueError for a line that is not a row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
            missing = [field for field in FIELDS if field not in row]
        except (ValueError, TypeError):
            row, missing = None, ["JSON"]
        if missing:
            raise ValueError(
                f"{path}, line {number}: expected a row with {', '.join(FIELDS)}, got one without "
                f"{', '.join(missing)}"
            )
        rows.append(row)
    return rows


def replace(path: Path, rows: Iterable[dict]) -> None:
    """Replace the rows of the same groups in a file, atomically, so that a run can be cut off at any time.
    Rows of other providers stay if they were measured with the same code and versions.
    """
    rows = list(rows)
    same = ("device", "torch", "triton", "commit", "date")
    groups = {group_of(row): [row[key] for key in same] for row in rows}
    measured = {(group_of(row), row["provider"]) for row in rows}
    kept = [
        row
        for row in read(path)
        if group_of(row) not in groups
        or (
            groups[group_of(row)] == [row.get(key) for key in same]
            and (group_of(row), row["provider"]) not in measured
        )
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *rows]), encoding="utf-8")
    os.replace(scratch, path)


LOG = 200_000  # bytes that are packed from the beginning and from the end of a log


def pack(files: dict[Path, Path], archive: Path) -> None:
    """Pack files into a .tar.gz under these names, atomically. In folders named logs, long files lose their
    middle.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    scratch = archive.with_name(f".{archive.name}.{os.getpid()}")
    with tarfile.open(scratch, "w:gz") as tar:
        for name, path in sorted(files.items()):
            if not path.is_file() or path.name.startswith("."):
                continue
            data = path.read_bytes()
            if "logs" in name.parts and len(data) > 2 * LOG:
                data = data[:LOG] + b"\n...\n" + data[-LOG:]
            entry = tarfile.TarInfo(str(name))
            entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
            tar.addfile(entry, io.BytesIO(data))
    os.replace(scratch, archive)
