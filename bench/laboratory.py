"""Measures a group, the providers of one case in one mode, in turns, and makes rows of the results."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch

from bench import cases, layers, measure, providers, results
from bench.measure import Measurement, Runner
from bench.providers import COMPILED, COPY, OURS, PEERS, PRODUCT

FORKSERVER = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}


@dataclasses.dataclass
class Laboratory:
    """One device and one dtype.

    ``seconds``: how long to measure a group. ``verified``: whether the op's own tests passed here. ``apart``:
    measure each group in a separate process. On a CPU memory comes from the C library. Whether it keeps the
    pages of large tensors or requests them again in every call depends on earlier groups, which changed
    ratios by up to 1.8.
    """

    device: torch.device
    dtype: str
    seconds: float
    turns: tuple[int, int] | None = None
    verified: Callable[[], bool] = lambda: True
    apart: bool = False
    groups: dict = dataclasses.field(default_factory=dict)
    _copy: Measurement | None = None

    def copy(self) -> Measurement:
        """The measurement of a copy of COPY_BYTES within the device, the other ceiling."""
        if self._copy is None:
            runners = {COPY: Runner(*layers.copy(COPY_BYTES[self.device.type], self.device))}
            self._copy = measure.in_turn(runners, self.device, 0.5)[COPY]
            runners.clear()
            measure.empty(self.device)
            if not self._copy.device_us:
                raise RuntimeError(f"copy: {self._copy.missing}")
        return self._copy

    def bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy within the device."""
        return 2 * COPY_BYTES[self.device.type] / (1e-6 * measure.quantiles(self.copy().device_us)[1])

    def measure(self, case, mode: str, names: list[str]) -> dict[str, Measurement]:
        """The measurements of a group. Later calls return those of the first call, or the failure of the
        whole group.
        """
        if (key := (case, mode)) not in self.groups:
            try:
                if isinstance(case, cases.Layer):
                    self.copy()
                self.groups[key] = (
                    self._measure_apart(case, mode, names) if self.apart else self._measure(case, mode, names)
                )
            except Exception as error:
                self.groups[key] = RuntimeError(measure.reason(error))
        if isinstance(self.groups[key], Exception):
            raise self.groups[key]
        return self.groups[key]

    def begin(self) -> None:
        """Start the server from which the processes of the groups are forked. Its imports take seconds,
        during which the caller can do something else.
        """
        if self.apart and FORKSERVER:
            from multiprocessing import forkserver  # not available on every system

            # modules that take long to import; those that are not installed are ignored
            slow = ("torch._inductor.compile_fx", "torchvision.models", "captum.attr", "bcos.models.resnet")
            multiprocessing.set_forkserver_preload([__name__, *slow])
            forkserver.ensure_running()

    def _measure_apart(self, case, mode, names):
        # the process gets a plain copy of this laboratory, because arguments are pickled
        there = Laboratory(self.device, self.dtype, self.seconds, self.turns, verified=None)
        context = multiprocessing.get_context("forkserver" if FORKSERVER else "spawn")
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            return executor.submit(there._measure, case, mode, names).result()

    def _measure(self, case, mode, names):
        runners, found = {}, {}
        try:
            exact = self._truth(case, mode)
            for name in names:
                try:
                    runners[name] = Runner(
                        *providers.setup(name, case, mode, getattr(torch, self.dtype), self.device)
                    )
                    runners[name].captures_itself = COMPILED in name
                except (providers.Missing, torch.cuda.OutOfMemoryError) as error:
                    found[name] = Measurement(
                        missing=str(error) if isinstance(error, providers.Missing) else measure.reason(error)
                    )
            seconds = self.seconds / 2 if getattr(case, "axis", "") else self.seconds
            found |= measure.in_turn(
                runners, self.device, seconds, self.turns, lambda *first: self._error(case, exact, *first)
            )
            if PRODUCT in found:
                found[PRODUCT].peak_bytes = None  # it writes into an existing tensor
        finally:
            runners.clear()
            if any(COMPILED in name for name in names):
                providers.forget_compiled()
            measure.empty(self.device)
        return {name: found[name] for name in names}

    def _truth(self, case, mode):
        """The results in float64, in host memory to leave the device free, or None if they cannot be
        computed.
        """
        if getattr(case, "axis", ""):
            return None
        try:
            return [t.cpu() for t in providers.truth(case, mode, getattr(torch, self.dtype), self.device)]
        except Exception as error:  # for example no memory, or a library without float64
            print(f"{case.name}, {mode}: no truth to compare with: {measure.reason(error)}")
            return None
        finally:
            measure.empty(self.device)

    def _error(self, case, exact, name, results):
        """The error of a result, or infinity if it cannot be determined: no speed-up is shown of results that
        may be wrong.
        """
        if getattr(case, "axis", "") or name in (PRODUCT, *providers.YARDSTICKS):
            return None
        if exact is None:
            return math.inf
        try:
            if isinstance(case, cases.Network):  # an image's results do not depend on the others
                few = slice(providers.TRUE_IMAGES)
                # [classes, N, C, H, W] or [N, ...]
                results = [t[:, few] if t.dim() == 5 else t[few] for t in results]
            return measure.error(results, [t.to(self.device) for t in exact])
        except Exception as error:
            print(f"{case.name}, {name}: error not known: {measure.reason(error)}")
            return math.inf

    # -- rows ----

    def rows(self, case, mode: str, found: dict[str, Measurement]) -> list[dict]:
        """A row for each provider. ``speedup``: of coda_fast over every peer, turn by turn; None where its
        tests or its error fail.
        """
        # a network has few outputs, so that the ratio of two errors varies more
        bad, verified = wrong(found, 2.0 if isinstance(case, cases.Layer) else 4.0), self.verified()
        ceilings = self._ceilings(case, mode, found)
        bound = max(ceilings, key=ceilings.get, default=None)
        rows = []
        for name, m in found.items():
            good = verified and name not in bad
            p20, p50, p80 = measure.quantiles(m.device_us) if m.device_us else (None,) * 3
            row = {
                "op": ("scaling " + case.axis) if getattr(case, "axis", "") else case.name,
                "provider": name,
                "mode": mode,
                "dtype": self.dtype,
                "shape": case.shape,
                "p20_us": _short(p20),
                "p50_us": _short(p50),
                "p80_us": _short(p80),
                "host_p50_us": _short(measure.quantiles(m.host_us)[1] if m.host_us else None),
                "turns": len(m.device_us),
                "timed": m.timed,
                "peak_bytes": m.peak_bytes,
                "error": _short(m.error),
                "ceiling": _short(ceilings[bound] / p50) if bound and p50 else None,
                "bound": bound,
                "speedup": self._speedups(name, m, found) if good else None,
                "verified": good if name in _ours(found) else None,
                "missing": m.missing,
            }
            rows.append(row | self._stamp())
        return rows

    def _stamp(self):
        return results.environment(self.device)

    def copy_row(self) -> dict:
        """The row of the copy, whose share of the ceiling is 1 by definition."""
        p20, p50, p80 = measure.quantiles(self.copy().device_us)
        row = {
            "op": COPY,
            "provider": COPY,
            "mode": COPY,
            "dtype": "uint8",
            "shape": {"bytes": COPY_BYTES[self.device.type]},
        }
        times = {
            "p20_us": p20,
            "p50_us": p50,
            "p80_us": p80,
            "host_p50_us": measure.quantiles(self.copy().host_us)[1],
        }
        row |= {key: _short(value) for key, value in times.items()} | {
            "turns": len(self.copy().device_us),
            "peak_bytes": None,
        }
        return (
            row
            | {
                "error": None,
                "ceiling": 1.0,
                "bound": COPY,
                "speedup": None,
                "verified": None,
                "missing": None,
            }
            | self._stamp()
        )

    def _ceilings(self, case, mode, found):
        """{name: microseconds} of the matrix products alone, and of moving arguments and results alone."""
        product = found.get(PRODUCT)
        if not (isinstance(case, cases.Layer) and product and product.device_us):
            return {}
        moving = 1e6 * least_bytes(case, mode, getattr(torch, self.dtype).itemsize) / self.bandwidth()
        return {PRODUCT: measure.quantiles(product.device_us)[1], COPY: moving}

    def _speedups(self, name, m, found):
        if name not in _ours(found) or not m.device_us:
            return None
        peers = {p: found[p] for p in providers.compared() if p in found and p != name and found[p].device_us}
        return {p: [_short(value) for value in measure.ratios(peer, m)] for p, peer in peers.items()}


def _ours(found):
    return [name for name in found if name.removesuffix(COMPILED) in OURS]


def wrong(found: dict[str, Measurement], factor: float = 2.0) -> dict[str, str]:
    """The results of coda_fast that are less accurate than those of eager torch in the same dtype, and by how
    much.

    Its error against float64 may be ``factor`` times that of the materialising formula (or of the algebraic
    one where that does not fit into memory) plus one part in a million. Empty where errors were not measured
    or there is nothing to compare them with.
    """
    errors = {name: found[name].error for name in found if found[name].error is not None}
    bound = next(
        (factor * errors[name] + 1e-6 for name in PEERS if math.isfinite(errors.get(name, math.inf))), None
    )
    if bound is None:
        return {name: "error not known" for name in _ours(errors) if errors[name] == math.inf}
    return {
        name: f"error {errors[name]:.1e}, allowed {bound:.1e}"
        for name in _ours(errors)
        if not errors[name] <= bound
    }


def least_bytes(case: cases.Layer, mode: str, itemsize: int) -> int:
    """The bytes of input, output and parameters, counted once, and of their gradients where there are any."""
    images = case.batch * case.channels * case.size**2
    outputs = case.pixels * case.units
    parameters = case.depth * (case.rank + case.units * (case.rank + 1))
    once = images + outputs + parameters
    return itemsize * (
        once
        if mode == cases.FORWARD
        else once + outputs + images + (parameters if mode == cases.TRAINING else 0)
    )


def _short(value):
    """Four significant digits, because more would not be meaningful."""
    return value if value is None else float(f"{value:.4g}")
