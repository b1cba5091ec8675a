"""Every kernel compiled for GPUs that are not present: no spills, no local memory, tensor cores in use,
within the limits of the device (tools/aot.py).
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Prints reports of one launch of a layer as JSON. It runs in another process, because nothing compiles under
# the interpreter.
COMPILE = """
import dataclasses, json, sys
from tools import aot
name, layer, blocks = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
launch = next(l for l in aot.record(aot.layers()[layer], "bfloat16", 90) if l.kernel == name)
what = dataclasses.replace(launch.what, options=tuple((dict(launch.what.options) | blocks).items()))
launch = dataclasses.replace(launch, what=what)
print(json.dumps(dataclasses.asdict(aot.compile_launch(launch, layer))))
"""


def python(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 1500}
    return subprocess.run([sys.executable, *map(str, arguments)], **options)


def report(kernel, layer="S7", **blocks):
    done = python("-c", COMPILE, kernel, layer, json.dumps(blocks))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100", "gfx942"])
def test_the_kernels_compile_well(arch):
    """A layer of each form, forward, backward and explanation, for each architecture. `make aot` compiles all
    layers.
    """
    done = python("-m", "tools.aot", "--layers", "S7", "L7", "--arch", arch, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert {line.split()[2] for line in lines[:-1]} == {
        "contracted",
        "generated",
        "fold",
        "grad_z",
        "parameter_sums",
        "finish",
        "prepare",
        "prepare_backward",
    }
    assert lines[-1] == "0 faults"


@pytest.mark.slow
def test_float32_compiles_well():
    done = python("-m", "tools.aot", "--layers", "S7", "--arch", "90", "--dtype", "float32")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_nothing_compiled_is_not_a_pass():
    done = python("-m", "tools.aot", "--kernel", "banana")
    assert (done.returncode, "invalid choice: 'banana'" in done.stderr) == (2, True), done.stderr
    done = python(
        "-m", "tools.aot", "--layers", "S7", "--arch", "90", "--dtype", "bfloat16", "--kernel", "generated"
    )
    assert done.returncode == 2
    assert "--kernel: expected one that these layers launch, got generated" in done.stderr


def test_what_does_not_compile_is_a_fault():
    """The other kernels are compiled all the same."""
    broken = COMPILE.replace("print(", "launch.what.__class__.compile = lambda *_: 1 // 0\nprint(")
    done = python("-c", broken, "contracted", "S7", "{}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["faults"] == ["does not compile: ZeroDivisionError: integer division or modulo by zero"]
    assert (found["kernel"], found["arch"], found["registers"]) == ("contracted", 90, 0)


def test_the_forward_loop():
    """The main loop of the most important kernel uses wgmma 64 x 256, does not spill, and is not limited by
    issuing instructions.
    """
    found = report("contracted")
    assert "HGMMA.64x256x16" in found["mma"]
    assert found["spills"] == found["stack_bytes"] == 0
    assert found["loop_ratio"] < 0.5
    assert found["faults"] == []


@pytest.mark.parametrize("kernel", ["grad_z", "fold", "contracted"])
def test_operands_in_registers_are_not_overwritten(kernel):
    """The code does not write to a register that a running wgmma reads as its first operand. Loops are read
    twice.
    """
    found = report(kernel)
    assert "HGMMA" in found["mma"]
    assert found["overwritten"] == 0


def test_spills_are_found():
    """A tile that needs more registers than any compiler version has is reported with its spills."""
    found = report("contracted", BM=256)
    assert found["spills"] > 0
    assert any("spills" in fault for fault in found["faults"])


def test_missing_tensor_cores_are_found():
    interpret = os.environ.get("TRITON_INTERPRET")
    from tools import aot

    if interpret is not None:  # importing the tool switches the interpreter off
        os.environ["TRITON_INTERPRET"] = interpret
    from coda_kernels import config

    good = aot.Report(
        "fold", "S7", "bfloat16", 90, 4, 3, "", 200, 0, 0, 1000, 2, "6xHGMMA.64x64x16.F32.BF16", 0.6, ""
    )
    assert list(aot._faults(good, config)) == []
    faults = {
        "no tensor-core": dataclasses.replace(good, mma=""),
        "no HGMMA": dataclasses.replace(good, mma="8xHMMA.16816.F32"),
        "bytes of shared memory": dataclasses.replace(good, shared_bytes=300_000),
        "bytes of stack": dataclasses.replace(good, stack_bytes=8),
        "of a wgmma under way": dataclasses.replace(good, overwritten=1),
    }
    for expected, broken in faults.items():
        assert any(expected in fault for fault in aot._faults(broken, config)), expected


@pytest.mark.parametrize(("left", "expected"), [(1, ["MOV R20, R1 ", "LDS.64 R23, [R1] "]), (0, [])])
def test_overwritten_operands_are_found(left, expected):
    """The next iteration of a loop overwrites an operand that the second product of the previous one may
    still read, unless it waits for it.
    """
    from tools import aot

    lines = [
        (".L_x_1", "", ""),
        ("", "MOV", " R20, R1 "),
        ("", "LDS.64", " R23, [R1] "),
        ("", "MOV", " R10, R1 "),
    ]
    for operand in ("R10", "R20"):
        lines += [("", "HGMMA.64x64x16.F32.BF16", f" R56, {operand}, gdesc[UR4], R56, gsb0 ")]
        lines += [("", "WARPGROUP.DEPBAR.LE", f" gsb0, 0x{left} ")]
    lines += [("", "BRA", " `(.L_x_1) ")]
    assert [each.strip() for each in aot._overwritten(lines)] == [each.strip() for each in expected]


def test_refuses_unknown_layers():
    done = python("-m", "tools.aot", "--layers", "S10")
    assert done.returncode == 2
    assert "expected some of S1" in done.stderr
