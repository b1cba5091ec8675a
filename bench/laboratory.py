"""Measures a group, the providers of one case in one mode side by side, and makes rows of it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable

import torch

from bench import cases, measure, providers, results
from bench.measure import Measurement, Runner
from bench.providers import COMPILED, MATERIALISING, OURS, PEERS, PRODUCT

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
SPEEDUPS_ON = (*PEERS, *(name + COMPILED for name in PEERS), providers.FACTORED, providers.RESNET, providers.BCOS)


@dataclasses.dataclass
class Laboratory:
    """One device, one dtype. ``seconds``: how long to measure a group; ``verified``: whether the op's own tests passed here."""

    device: torch.device
    dtype: str
    seconds: float
    turns: tuple[int, int] = measure.TURNS
    verified: Callable[[], bool] = lambda: True
    groups: dict = dataclasses.field(default_factory=dict)
    _bandwidth: float | None = None

    def bandwidth(self) -> float:
        """Bytes a second of a copy within the device, read and written."""
        if self._bandwidth is None:
            inputs, function = providers.Copy(COPY_BYTES[self.device.type]).setup(self.device)
            found = measure.in_turn({"copy": Runner(inputs, function)}, self.device, 0.5)["copy"]
            self._bandwidth = 2 * COPY_BYTES[self.device.type] / (1e-6 * measure.quantiles(found.device_us)[1])
        return self._bandwidth

    def measure(self, case, mode: str, names: list[str]) -> dict[str, Measurement]:
        """Measured at the first call for a group, remembered afterwards."""
        if (key := (case, mode)) not in self.groups:
            self.groups[key] = self._measure(case, mode, names)
        return self.groups[key]

    def _measure(self, case, mode, names):
        if isinstance(case, cases.Layer):
            self.bandwidth()
        runners, failed = {}, {}
        for name in names:
            try:
                runners[name] = Runner(*providers.setup(name, case, mode, getattr(torch, self.dtype), self.device))
            except (providers.Missing, torch.cuda.OutOfMemoryError) as error:
                failed[name] = Measurement(missing=str(error) if isinstance(error, providers.Missing) else "out of memory")
        seconds = self.seconds / 2 if getattr(case, "axis", "") else self.seconds
        found = measure.in_turn(runners, self.device, seconds, self.turns)
        alive = {name: runner for name, runner in runners.items() if not found[name].missing}
        for name, runner in alive.items():
            if name != PRODUCT:
                found[name].peak_bytes = measure.peak_bytes(runner, self.device) + found[name].graph_bytes
        if isinstance(case, cases.Layer) and not case.axis:
            self._errors(case, mode, alive, found)
        runners.clear(), alive.clear()
        if any(COMPILED in name for name in names):
            providers.forget_compiled()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {name: found.get(name) or failed[name] for name in names}

    def _errors(self, case, mode, runners, found):
        exact = None
        for name, runner in runners.items():
            if name == PRODUCT:
                continue
            inputs = runner.inputs[0]
            exact = exact or providers.truth(case, mode, inputs)  # the same inputs for every provider
            found[name].error = measure.error(runner.function(*inputs), exact)

    # -- rows ----

    def rows(self, case, mode: str, found: dict[str, Measurement]) -> list[dict]:
        """A row for each provider. ``speedup``: of coda_fast on every peer, turn by turn; none where its tests or its error fail."""
        good = not wrong(found) and self.verified()
        stamp = results.environment(self.device)
        rows = []
        for name, m in found.items():
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
                "peak_bytes": m.peak_bytes,
                "error": _short(m.error),
                "ceiling": _short(self._ceiling(case, mode, found, m)),
                "speedup": self._speedups(name, m, found) if good else None,
                "verified": good if name in _ours(found) else None,
                "missing": m.missing,
            }
            rows.append(row | stamp)
        return rows

    def _ceiling(self, case, mode, found, m):
        """Which share of its time a provider would need if it did nothing but the products and moved nothing but its arguments."""
        product = found.get(PRODUCT)
        if not (isinstance(case, cases.Layer) and product and product.device_us and m.device_us):
            return None
        moving = 1e6 * least_bytes(case, mode, getattr(torch, self.dtype).itemsize) / self.bandwidth()
        return max(measure.quantiles(product.device_us)[1], moving) / measure.quantiles(m.device_us)[1]

    def _speedups(self, name, m, found):
        if name not in _ours(found) or not m.device_us:
            return None
        peers = {p: found[p] for p in SPEEDUPS_ON if p in found and p != name and found[p].device_us}
        return {p: [_short(value) for value in measure.ratios(peer, m)] for p, peer in peers.items()}


def _ours(found):
    return [name for name in found if name.removesuffix(COMPILED) in OURS]


def wrong(found: dict[str, Measurement]) -> str | None:
    """What coda_fast computes worse than eager torch does in the same dtype: its error against float64 may be twice that of the
    materialising formula plus one part in a million. None where errors were not measured.
    """
    peer = found.get(MATERIALISING)
    if peer is None or peer.error is None:
        return None
    bound = 2 * peer.error + 1e-6
    bad = {name: found[name].error for name in _ours(found) if found[name].error is not None and not found[name].error <= bound}
    return "; ".join(f"{name}: error {value:.1e}, allowed {bound:.1e}" for name, value in bad.items()) or None


def least_bytes(case: cases.Layer, mode: str, itemsize: int) -> int:
    """Input, output and parameters once, and their gradients where there are any."""
    images = case.batch * case.channels * case.size**2
    outputs = case.pixels * case.units
    parameters = case.depth * (case.rank + case.units * (case.rank + 1))
    once = images + outputs + parameters
    return itemsize * (once if mode == cases.FORWARD else once + outputs + images + (parameters if mode == cases.TRAINING else 0))


def _short(value):
    """Four digits: more would pretend."""
    return value if value is None else float(f"{value:.4g}")
