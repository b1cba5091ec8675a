"""Compile every kernel in its shipped configuration for GPUs that need not be present, and report on the
machine code.

    python -m tools.aot
        all layers; bfloat16 everywhere, all dtypes on sm_90; bench/results/aot_triton<version>.json
    python -m tools.aot --layers S7 --arch 90 --dtype bfloat16     a part, printed only
    python -m tools.aot --table
        print the tables of the stored results ("make tables" puts them into docs/kernels.md)

Nothing is simulated: launches are recorded from the launchers themselves (shapes, constants, alignment) and
compiled by the installed Triton. Registers, stack, shared memory and instructions are read from the result.
Exit status 1 if a kernel does not compile, spills, exceeds the device, lacks tensor-core instructions, has
its wgmma serialised by the assembler, or writes over what a wgmma still reads.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

from bench import cases, measure, results
from tools import aot_tables

ARCHITECTURES = (80, 90, 100, "gfx942")
DTYPES = ("bfloat16", "float16", "float32")
PRODUCTS = {"contracted", "generated", "fold", "grad_z", "parameter_sums"}
BATCH = {"S": 256, "L": 64}


@dataclasses.dataclass(frozen=True)
class Report:
    """The machine code of one kernel, empty if it does not compile. ``loop_ratio``: instructions that a warp
    issues per tensor-core clock in the main loop; above 1, the kernel is limited by issuing instructions.
    """

    kernel: str
    layers: str
    dtype: str
    arch: int | str
    warps: int
    stages: int
    blocks: str
    registers: int = 0
    spills: int = 0  # instructions to or from local memory (NVIDIA), spilled registers (AMD)
    stack_bytes: int = 0
    shared_bytes: int = 0
    occupancy: int = 0  # programs per processor
    mma: str = ""
    loop_ratio: float | None = None
    serialised: str = ""  # the warning of the assembler, if any
    overwritten: int = 0  # writes to registers that a running wgmma may still read, see `_overwritten`
    faults: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch of a layer in one dtype, for one architecture."""

    what: object  # coda_kernels.compile.Launch
    dtype: str
    arch: int | str

    @property
    def kernel(self) -> str:
        return self.what.kernel.rpartition(".")[2]


def triton_version() -> tuple[int, int]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def layers():
    """{"S1": (C, n, r, k, stride, size, batch), ...}: the layers of both published networks."""
    return {
        name: (c.channels, c.units, c.rank, c.kernel, c.stride, c.size, c.batch)
        for name, c in cases.layers(BATCH).items()
    }


def record(shape, dtype, arch, norm="squash"):
    """Every launch of forward, backward and explanation of a layer, with and without bias. Nothing runs,
    because the tensors are meta tensors.
    """
    import torch

    from coda_fast._geometry import Geometry
    from coda_fast._spec import Gradients, Kept, Parameters, Spec
    from coda_fast.backends import triton
    from coda_kernels.compile import recording
    from coda_kernels.config import Device

    channels, units, rank, kernel, stride, size, batch = shape
    options = dict(dtype=getattr(torch, dtype), device="meta")
    geometry = Geometry.make((kernel, kernel), stride, (kernel - 1) // 2)
    new = lambda *s: torch.empty(*s, **options).to(memory_format=torch.channels_last)
    last = lambda *s: torch.empty(*s, kernel, kernel, channels, **options).movedim(-1, -3)
    image, output = new(batch, channels, size, size), new(batch, units, *geometry.output_size(size, size))
    spec, all_of_them = Spec(geometry, norm, 1e-6), Gradients(*[True] * 5)
    with recording(Device(arch, 132)) as launches:
        for bias in (last(units), None):
            parameters = Parameters(last(rank), last(units, rank), bias)
            backward = lambda applied, kept, detach=False, parameters=parameters: triton.align_backward(
                output, image, applied, parameters, kept, spec, detach=detach, needs=all_of_them
            )
            for applied, keep in ((None, "products"), (None, "contraction"), (image, "products")):
                kept: Kept = triton.align(image, applied, parameters, spec, keep=keep)[1]
                backward(applied, kept)
            backward(None, kept, detach=True)  # explanation
            triton.adjoint(image, output, parameters, spec)
    return [Launch(launch, dtype, arch) for launch in launches]


def compile_launch(launch: Launch, layers: str) -> Report:
    """Compile one launch and read the result."""
    from coda_kernels import config

    function, _, options = launch.what.specialised(launch.arch)
    constants = {p.name: options[p.name] for p in function.params if p.is_constexpr}
    blocks = {name: value for name, value in constants.items() if re.fullmatch("B[A-Z]", name)}
    report = Report(
        kernel=launch.kernel,
        layers=layers,
        dtype=launch.dtype,
        arch=launch.arch,
        warps=options["num_warps"],
        stages=options["num_stages"],
        blocks=" ".join(f"{k}{v}" for k, v in blocks.items()),
    )
    try:
        compiled = launch.what.compile(launch.arch)
    except Exception as error:  # errors of Triton and of the assembler have no common class
        return dataclasses.replace(report, faults=(f"does not compile: {measure.reason(error)}",))
    read = _read_amd if isinstance(launch.arch, str) else _read_nvidia
    found = read(compiled, options["num_warps"], launch.arch)
    report = dataclasses.replace(report, shared_bytes=compiled.metadata.shared, **found)
    # some launches of `prepare` pad an image or sum squares only
    products = launch.kernel != "prepare" or constants["Z"] or constants["BETA"]
    return dataclasses.replace(report, faults=tuple(_faults(report, config, products)))


def _faults(report, config, products=True):
    if report.spills or report.stack_bytes:
        yield f"{report.spills} spills, {report.stack_bytes} bytes of stack"
    if report.shared_bytes > config.SHARED_BYTES[report.arch]:
        yield f"{report.shared_bytes} bytes of shared memory, {config.SHARED_BYTES[report.arch]} there"
    if products and not report.mma:
        yield "no tensor-core instructions"
    wanted = {90: "HGMMA", 100: "UTC"}.get(report.arch)
    if wanted and report.mma and report.kernel in PRODUCTS and wanted not in report.mma:
        yield f"no {wanted}"
    if report.serialised:
        yield report.serialised
    if report.overwritten:
        yield f"{report.overwritten} writes to registers of a wgmma under way"


def _read_nvidia(compiled, warps, arch):
    from triton.backends import nvidia

    folder = Path(nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as scratch:
        cubin, ptx = Path(scratch, "k.cubin"), Path(scratch, "k.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _run(folder / "cuobjdump", "--dump-resource-usage", cubin)
        code = _run(folder / "nvdisasm", cubin)
        log = ""
        if arch == 90:
            log = _run(folder / "ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", "/dev/null")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    lines = re.findall(
        r"^\s*(\.L_x_\d+):|^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", code, re.MULTILINE
    )
    opcodes = [opcode for _, opcode, _ in lines if opcode]
    mma = collections.Counter(o for o in opcodes if _is_mma(o))
    spills = sum(o.split(".")[0] in ("LDL", "STL") for o in opcodes)
    threads, shared = warps * 32, compiled.metadata.shared
    room = {80: 167_936, 90: 233_472, 100: 233_472}[arch]
    occupancy = min(65_536 // (-(-registers // 8) * 8 * threads), room // (shared + 1024), 2048 // threads)
    return dict(
        registers=registers,
        spills=spills,
        stack_bytes=stack,
        occupancy=occupancy,
        mma=" ".join(f"{count}x{name}" for name, count in mma.most_common(3)),
        loop_ratio=_loop_ratio(lines) if arch in (80, 90) else None,
        serialised="; ".join(sorted(set(re.findall(r"C75\d\d[^\n]*serialized[^\n]*", log)))),
        overwritten=len(_overwritten(lines)) if arch == 90 else 0,
    )


def _is_mma(opcode):
    return re.match(r"(HG?|Q|I|D|UTC\w*)MMA|HGMMA", opcode) is not None


def _loops(lines):
    """The instructions, and the positions where loops begin and end among them."""
    position, loops, code = {}, [], []
    for label, opcode, operands in lines:
        if label:
            position[label] = len(code)
            continue
        code.append((opcode, operands))
        target = re.search(r"(\.L_x_\d+)", operands) if opcode.startswith("BRA") else None
        if target and target[1] in position:
            loops.append((position[target[1]], len(code)))
    return code, loops


def _overwritten(lines):
    """Instructions of a loop that write a register which is the first operand of a wgmma that is still
    running and may read it later.

    Every loop is read twice in a row, so that instructions meet what the previous iteration left running.
    """
    code, loops = _loops(lines)
    found = []
    for begin, end in loops:
        groups, group = [], set()
        for opcode, operands in code[begin:end] * 2:
            if opcode.startswith("HGMMA"):
                if first := re.match(r"\s*R\d+, R(\d+)", operands):
                    group |= set(range(int(first[1]), int(first[1]) + 4))
                if "gsb0" in operands:
                    groups, group = [*groups, group], set()
            elif opcode.startswith("WARPGROUP.DEPBAR"):
                left = int(re.search(r"gsb0, 0x([0-9a-f]+)", operands)[1], 16)
                groups = groups[max(0, len(groups) - left) :]
            elif written := re.match(r"\s*(?:P\d, )?R(\d+)", operands):
                width = 4 if ".128" in opcode else 2 if ".64" in opcode or ".WIDE" in opcode else 1
                if group.union(*groups) & set(range(int(written[1]), int(written[1]) + width)):
                    found.append(opcode + operands)
    return found


def _loop_ratio(lines):
    """Instructions over tensor-core clocks of the innermost loop with the most tensor-core work, or of the
    whole kernel where there is no loop.
    """
    code, loops = _loops(lines)
    opcodes = [opcode for opcode, _ in code]
    clocks = [_clocks(o) for o in opcodes]
    bodies = [(a, b) for a, b in loops if sum(clocks[a:b])]
    bodies = [x for x in bodies if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in bodies)] or [
        (0, len(opcodes))
    ]
    a, b = max(bodies, key=lambda body: sum(clocks[body[0] : body[1]]))
    return round((b - a) / sum(clocks[a:b]), 2) if sum(clocks[a:b]) else None


def _clocks(opcode):
    """Tensor-core clocks of an instruction per warp. Per clock and processor, an H100 does 2048 16-bit
    multiply-adds and an A100 1024; in float32 half as many.
    """
    if found := re.match(r"HGMMA\.64x(\d+)x", opcode):
        return int(found[1]) / 2
    if re.match(r"HMMA\.(16816|1688)", opcode):
        return 8
    return 0


def _read_amd(compiled, warps, arch):
    text = compiled.asm["amdgcn"]
    number = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
    registers = number("vgpr_count")
    mma = collections.Counter(re.findall(r"\b(v_mfma\w+)", text))
    waves = min(8, 512 // max(1, -(-registers // 8) * 8)) * 4 // warps
    shared = compiled.metadata.shared
    return dict(
        registers=registers,
        spills=number("vgpr_spill_count"),
        stack_bytes=number("private_segment_fixed_size"),
        occupancy=min(waves, 65_536 // max(1, shared)),
        mma=" ".join(f"{count}x{name}" for name, count in mma.most_common(3)),
        loop_ratio=None,
        serialised="",
    )


def _run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def sweep(wanted, dtypes, architectures, kernels=None, jobs=None, progress=lambda text: None):
    """A report for every distinct compilation that these layers need."""
    from coda_kernels.compile import specialisation

    known, jobs_by_launch = layers(), collections.defaultdict(list)
    for arch in architectures:
        for dtype in dtypes:
            first = {}  # the first of the launches that share a compilation
            for name in wanted:
                for launch in record(known[name], dtype, arch):
                    if kernels and launch.kernel not in kernels:
                        continue
                    key = specialisation(launch.what, arch)
                    names = jobs_by_launch[first.setdefault(key, launch)]
                    if name not in names:
                        names.append(name)
    reports = []
    with concurrent.futures.ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        futures = {
            pool.submit(compile_launch, launch, " ".join(names)): launch
            for launch, names in jobs_by_launch.items()
        }
        for future in concurrent.futures.as_completed(futures):
            reports.append(future.result())
            report = reports[-1]
            progress(
                f"{len(reports)}/{len(futures)} sm_{report.arch} {report.dtype} {report.kernel} "
                f"{report.layers} {report.faults}"
            )
    return sorted(reports, key=lambda r: (str(r.arch), r.dtype, r.kernel, r.layers, r.blocks))


# -- the stored results (their tables: tools/aot_tables.py)
# ----------------------------------------------------------------------------


def store(reports):
    """Replace the rows of the same kernel, dtype, architecture and layers in the file of this version of
    Triton, atomically.
    """
    import triton

    path = results.FOLDER / f"aot_triton{'.'.join(map(str, triton_version()))}.json"
    commit = _run("git", "-C", results.ROOT, "rev-parse", "--short", "HEAD").strip()
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    done = {(r.arch, r.dtype) for r in reports}
    rows = [row for row in old if (row["arch"], row["dtype"]) not in done] + [
        dataclasses.asdict(r) for r in reports
    ]
    rows.sort(key=lambda row: (str(row["arch"]), row["dtype"], row["kernel"], row["layers"], row["blocks"]))
    head = {"triton": triton.__version__, "commit": commit, "date": datetime.date.today().isoformat()}
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps(head)[:-1] + ', "rows": [\n' + lines + "\n]}\n"
    scratch = path.with_suffix(".partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", nargs="+", metavar="S1", help="S1 to S9, L1 to L9")
    parser.add_argument("--arch", nargs="+", metavar="90", help=f"of {', '.join(map(str, ARCHITECTURES))}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    from coda_kernels import config

    kernels = [module.__name__.rpartition(".")[2] for module in config.modules() if hasattr(module, "run")]
    parser.add_argument("--kernel", nargs="+", choices=kernels)
    parser.add_argument("--jobs", type=int, help="processes; all cores")
    parser.add_argument(
        "--store",
        action="store_true",
        help="store a part too, in place of what was stored for its architecture and dtype",
    )
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(argv)
    if options.table:
        print(aot_tables.tables())
        return 0
    known = layers()
    if unknown := set(options.layers or []) - known.keys():
        parser.error(f"--layers: expected some of {' '.join(known)}, got {' '.join(sorted(unknown))}")
    architectures = [int(a) if a.isdigit() else a for a in options.arch or map(str, ARCHITECTURES)]
    if unknown := set(architectures) - set(ARCHITECTURES):
        parser.error(f"--arch: expected some of {ARCHITECTURES}, got {unknown}")
    part = options.layers or options.kernel
    compiled = failed = 0
    for arch in architectures:
        for dtype in options.dtype or (DTYPES if arch == 90 else ("bfloat16",)):
            reports = sweep(
                options.layers or known,
                [dtype],
                [arch],
                options.kernel,
                options.jobs,
                lambda t: print(t, file=sys.stderr),
            )
            compiled, failed = compiled + len(reports), failed + sum(bool(r.faults) for r in reports)
            for r in reports:
                print(
                    f"{r.arch} {r.dtype} {r.kernel} | {r.layers} | {r.blocks} w{r.warps} s{r.stages} | reg "
                    f"{r.registers} spill {r.spills} "
                    f"stack {r.stack_bytes} smem {r.shared_bytes} occ {r.occupancy} i/c {r.loop_ratio} | "
                    f"{r.mma} | "
                    f"{'; '.join(r.faults) or ('serialised' if r.serialised else 'ok')}"
                )
            if options.store or not part:
                print(f"stored in {store(reports)}")
    if not compiled:
        parser.error(f"--kernel: expected one that these layers launch, got {' '.join(options.kernel)}")
    print(f"{failed} faults")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
