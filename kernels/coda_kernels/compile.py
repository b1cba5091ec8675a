"""Recording launches without launching anything, and compiling them ahead of time, in several processes, for
the GPU of this machine or another.

with recording(Device(90, 132)) as launches:
    on this thread, launchers only record what they would launch: tensors may be on the meta device
    ...
compile_launches(launches, arch=90, workers=16)   into Triton's cache, where the first real launch finds it
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

from coda_kernels import config, interpreted
from coda_kernels.config import Device

_recording: contextvars.ContextVar[tuple[Device, list[Launch]] | None] = contextvars.ContextVar(
    "coda_kernels_recording", default=None
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A recorded launch: ``kernel`` as "module.name", its grid, its arguments in order (numbers, or pointers
    as ("bfloat16", whether they are aligned to 16 bytes)), and constants and options by name (functions as
    ("function", "module.name")). ``bytes`` is the size of all its tensors, each counted once.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple
    options: tuple[tuple[str, object], ...]
    bytes: int = dataclasses.field(default=0, compare=False)

    @classmethod
    def make(cls, kernel, grid, named: dict) -> Launch:
        """The record of ``kernel[grid](**named)``."""
        runtime = _runtime_arguments(kernel)
        tensors = [a for a in named.values() if hasattr(a, "untyped_storage")]
        sizes = {
            (t.untyped_storage()._cdata, t.storage_offset()): t.numel() * t.element_size() for t in tensors
        }
        constants = {k: ("function", _name(v)) if hasattr(v, "fn") else v for k, v in named.items()}
        return cls(
            _name(kernel),
            tuple(grid),
            tuple(_pointer(a) if hasattr(a, "untyped_storage") else a for a in map(named.get, runtime)),
            tuple((k, v) for k, v in constants.items() if k not in runtime),
            sum(sizes.values()),
        )

    def specialised(self, arch: int | str):
        """(function, arguments, options) for which Triton compiles the kernel exactly as for the launch."""
        import torch
        from triton.runtime.jit import MockTensor

        _settle_keys()
        arguments = []
        for argument in self.arguments:
            if isinstance(argument, tuple):
                dtype, aligned = argument
                argument = MockTensor(getattr(torch, dtype))
                argument.data_ptr = (lambda: 0) if aligned else (lambda: 8)
            arguments.append(argument)
        options = {k: _function(v[1]) if isinstance(v, tuple) else v for k, v in self.options}
        return _function(self.kernel), arguments, options

    def compile(self, arch: int | str):
        """Compile into Triton's cache, without a GPU, and return Triton's CompiledKernel. ``arch`` is a
        compute capability such as 90, or AMD's "gfx942".
        """
        from triton.runtime import driver

        driver.set_active(_Absent(arch))
        try:
            function, arguments, options = self.specialised(arch)
            return function.warmup(*arguments, grid=self.grid, **options)
        finally:
            driver.set_active(None)  # Triton finds the real driver again when it needs one


@functools.cache
def _runtime_arguments(kernel) -> tuple[str, ...]:
    """The names of the arguments that are not compile-time constants, in order."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    return tuple(p.name for p in parameters if "constexpr" not in str(p.annotation))


def _name(function) -> str:
    return f"{function.fn.__module__}.{function.fn.__name__}"


def _function(name):
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module), function)


class _Absent:
    """The part of a Triton driver that compiling needs, for a GPU that is absent."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch  # keeps the kernels of different architectures apart

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return (
            GPUTarget("hip", self.arch, 64)
            if isinstance(self.arch, str)
            else GPUTarget("cuda", self.arch, 32)
        )


def _pointer(tensor):
    aligned = (
        tensor.storage_offset() * tensor.element_size() % 16 == 0
        if tensor.device.type == "meta"
        else tensor.data_ptr() % 16 == 0
    )
    return str(tensor.dtype).removeprefix("torch."), aligned


@contextlib.contextmanager
def recording(device: Device) -> Iterator[list[Launch]]:
    """A context in which, on this thread, launches for ``device`` are recorded in the list that it yields,
    and nothing is computed.
    """
    launches: list[Launch] = []
    token = _recording.set((device, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def recorded_device() -> Device | None:
    """The device for which launches are recorded; None if launches are real."""
    found = _recording.get()
    return found and found[0]


def launch(kernel, grid, **arguments) -> None:
    """Launch ``kernel[grid](**arguments)``, or record the launch."""
    _settle_keys()
    if (found := _recording.get()) is None:
        kernel[grid](**arguments)
    else:
        found[1].append(Launch.make(kernel, grid, arguments))


@functools.cache
def _settle_keys() -> None:
    """Compute the cache keys of all functions in a fixed order. In Triton 3.6 the key of a compiled kernel
    depends on which functions computed theirs before; in a fixed order, every process finds in the cache what
    another one has compiled.
    """
    if not interpreted():
        from triton.runtime import JITFunction

        for module in config.modules():
            for function in vars(module).values():
                if isinstance(function, JITFunction):
                    function.cache_key  # noqa: B018


def distinct(launches: Iterable[Launch], arch: int | str) -> list[Launch]:
    """One launch for each compilation that the launches need, in order."""
    found: dict[tuple, Launch] = {}
    for each in launches:
        found.setdefault(specialisation(each, arch), each)
    return list(found.values())


def specialisation(each: Launch, arch: int | str) -> tuple:
    """The key by which Triton decides, by its own rules, whether a launch needs a compilation of its own."""
    from triton.runtime import driver

    driver.set_active(_Absent(arch))
    try:
        function, arguments, options = each.specialised(arch)
        # Triton's interpreter does not compile: take everything but the grid
        if not hasattr(function, "device_caches"):
            return each.kernel, each.arguments, each.options
        binder = function.device_caches[arch][-1]
        _, specialisation, rest = binder(*arguments, **options, debug=False)
        return each.kernel, str(specialisation), str(sorted(rest.items()))
    finally:
        driver.set_active(None)


def compile_launches(
    launches: Iterable[Launch],
    arch: int | str,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Compile every kernel that ``launches`` need, in ``workers`` processes (None: one for each processor),
    and return their number.

    ``progress`` is called with the number of kernels done and the number of all. RuntimeError: the compiler
    refused some; the message holds what it said about each.
    """
    pending = distinct(launches, arch)
    count, done, failures, lock = len(pending), 0, [], threading.Lock()
    progress(0, count)

    def work():
        nonlocal done
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "coda_kernels.compile", json.dumps(arch)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            while True:
                with lock:
                    if not pending:
                        break
                    each = pending.pop(0)
                try:
                    process.stdin.write(json.dumps(dataclasses.astuple(each)) + "\n")
                    process.stdin.flush()
                    answer = process.stdout.readline()
                except BrokenPipeError:
                    answer = ""
                with lock:
                    done += 1
                    if answer.strip() != "ok":
                        failures.append(f"{each.kernel}: {answer.strip() or 'the compiler ended'}")
                        if not answer:
                            break
                    progress(done, count)
            process.stdin.close()

    threads = [threading.Thread(target=work) for _ in range(min(count, workers or os.cpu_count() or 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures or pending:
        raise RuntimeError(
            f"compile: {len(failures) + len(pending)} of {count} kernels failed: {'; '.join(failures)}"
        )
    return count


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def main() -> None:
    """A worker process: it reads launches as lines of JSON from standard input, and writes for each "ok" or
    what went wrong to standard output.
    """
    arch, out = json.loads(sys.argv[1]), sys.stdout
    sys.stdout = sys.stderr  # where anything that a compiler prints goes
    for line in sys.stdin:
        try:
            Launch(*_tuples(json.loads(line))).compile(arch)
            answer = "ok"
        except Exception as error:
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")[-700:]
        print(answer, file=out, flush=True)


if __name__ == "__main__":
    main()
