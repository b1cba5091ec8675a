"""Measure everything that the README may claim about a GPU, in one command (``make gpu-report``) and within
nine minutes.

    python -m tools.gpu_report
        rows into bench/results, the rest into bench/results/report
    python -m tools.gpu_report --output FOLDER       all of it into FOLDER
    python -m tools.gpu_report --data cifar10.npz --output FOLDER --pack RESULTS
        with the training; results as two files
    python -m tools.gpu_report --later FOLDER/later.json --output FOLDER
        the tests that had no time, in a second call

The stages run in this order. Each writes its results to disk as it goes, so that a run that is cut off loses
only the last one:

    compile          the kernels of both networks, in many processes, for the later stages
    tests            golden values, layers, operators, many processes at once        tests.json
    configurations   the tile that is taken first of every kernel and layer           configurations.json
    large            more than 2^31 elements                                          large.json
    layers           every layer beside its peers, then beside the compiled one       <device>.jsonl
    networks         whole networks and the yardsticks                                <device>.jsonl
    train
        with --data: cifar10-s-fast, at most 3.5 minutes    training.json, the weights in half precision
    profile          with ncu: every kernel of a layer once                           ncu.csv
    tune             proposes rows of the configuration table                         tuned.json

A stage replaces its own results only. later.json names the tests that had no time, and those that take longer
than nine minutes: tiles that are used only where the first one does not fit, other numbers of warps and
stages. Once tests, configurations and large have all passed, in one call or in several calls of one commit,
sm_XX.json says so and lists what was run: in kernels/coda_kernels/tables/, it makes backend="auto" pick the
kernels. The report needs no network connection and no packages except torch, Triton, NumPy, pytest and
pytest-benchmark; training also needs Pillow, PyYAML and safetensors. ``--device cpu`` rehearses it anywhere:
the same stages, with tests under Triton's interpreter. Exit status 1 if something failed or was not run. For
the use of the results see docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from bench import guard, results, tables
from bench.verify import Verdict
from tools.gpu_mark import propose_table
from tools.gpu_stages import FILES, STAGES, VERDICTS, Report, say


def run(report: Report, stages: dict[str, float]) -> dict[str, Verdict]:
    """Run the stages one after the other. A share is relative to the remaining time, so that a fast stage
    leaves time to the later ones.
    """
    found = {}
    for i, (stage, share) in enumerate(stages.items()):
        left, now = sum(list(stages.values())[i:]), time.monotonic()
        until = now + (report.finish - now) * share / left
        say(f"{stage}: until {until - now:.0f} s from now")
        try:
            found[stage] = getattr(report, stage)(until)
        except Exception as error:  # the later stages can still give results
            found[stage] = Verdict(failures=(f"{type(error).__name__}: {error}",))
            if stage in VERDICTS:
                found[stage].write(report.output / FILES[stage][0], **report.stamp)
        report.pack()
        say(
            f"{stage}: {found[stage] if found[stage] != Verdict() else 'done'} "
            f"({time.monotonic() - now:.0f} s)"
        )
    return found


def read_later(path: Path, refuse) -> dict:
    """Read a later.json; ``refuse`` is called with the error."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["of"], dict) or not all(
            isinstance(tests, list) for tests in found["tests"].values()
        ):
            raise ValueError("another kind of file")
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return refuse(f"--later: {path}: expected a later.json of this report: {error}")


def _arguments(argv):
    """The options, and the tests that a later.json lists, if one is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for everything, made if it is not there")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, help="default: all, the training only with --data"
    )
    parser.add_argument(
        "--data", type=Path, help="the images to train with, an .npz file (experiments/fast_training/)"
    )
    parser.add_argument(
        "--pack", type=Path, help="folder for an archive of the results and the weights, two files"
    )
    parser.add_argument(
        "--later",
        type=Path,
        help="only the tests that this later.json names, beside the verdicts in its folder",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="one small part of each stage")
    parser.add_argument(
        "--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes for the tests"
    )
    options = parser.parse_args(argv)
    for name in ("minutes", "jobs"):
        if (value := getattr(options, name)) <= 0:
            parser.error(f"--{name}: expected a positive number, got {value}")
    if options.data and not options.data.is_file():
        parser.error(f"--data: no such file: {options.data}")
    if options.later and options.stages:
        parser.error("--later: expected no --stages beside it")
    if options.later:
        options.stages = []
    elif options.stages is None:  # generated images are for rehearsals
        options.stages = [stage for stage in STAGES if stage != "train" or options.data or options.quick]
    return options, read_later(options.later, parser.error) if options.later else None


def _report_of(options, start) -> Report:
    """The report, after results of these stages from an earlier report were removed."""
    output = options.output or results.FOLDER / "report"
    output.mkdir(parents=True, exist_ok=True)
    for stage in options.stages:
        for name in FILES.get(stage, ()):
            (output / name).unlink(missing_ok=True)
    (output / "op.json").unlink(missing_ok=True)
    return Report(
        output.resolve(),
        (options.output or results.FOLDER).resolve(),
        options.device,
        start + 60 * options.minutes - 5,
        options.quick,
        options.jobs,
        data=options.data and options.data.resolve(),
        packed=options.pack and options.pack.resolve(),
    )


def _show(report, found, before) -> None:
    after = results.read(report.path)
    if new := [row for row in after if row not in before]:
        print(tables.everything(after))
        print(f"\nratios beside those before (advisory)\n{guard.report(new, before)}\n")
    for stage, verdict in found.items():
        print(f"{stage}: {verdict if verdict != Verdict() else 'done'}")
        for failure in verdict.failures:
            print(f"  {failure}")


def main(argv=None) -> int:
    start = time.monotonic()
    options, listed = _arguments(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-report: needs a CUDA device, torch sees none; --device cpu rehearses it", file=sys.stderr)
        return 2
    report = _report_of(options, start)
    before = results.read(report.path)
    if listed is None:
        found = run(report, {stage: STAGES[stage] for stage in STAGES if stage in options.stages})
    elif listed["of"] == report.key:
        found = {"later": report.later(report.finish, listed["tests"], options.later.resolve().parent)}
    else:
        of = f"expected tests of {report.key}, got those of {listed['of']}"
        print(f"gpu-report: --later: {of}", file=sys.stderr)
        return 2
    if any(found[stage].failures for stage in found if stage in (*VERDICTS, "later")):
        report.doubt(before)
    _show(report, found, before)
    if table := propose_table(report):
        print(f"all passed: {table} may go into kernels/coda_kernels/tables/")
    report.pack()
    print(f"{time.monotonic() - start:.0f} s; rows: {report.path}; the rest: {report.output}")
    return int(any(v.failures or v.unfinished for v in found.values()))


if __name__ == "__main__":
    sys.exit(main())
