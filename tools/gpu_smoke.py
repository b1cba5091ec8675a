"""The first two and a half minutes on a GPU: do the kernels compile, are they right, and how close to the
ceilings are they (``make gpu-smoke``)?

    python -m tools.gpu_smoke                          into bench/results/report/smoke
    python -m tools.gpu_smoke --output FOLDER --minutes 2.5
    python -m tools.gpu_smoke --device cpu --quick     rehearses it anywhere

Each verdict is one line, followed by failures with their shape and worst coordinate. Each stage writes its
results to smoke.json when it ends:

    ceilings     the limits of the device: a matrix product, a copy
    compile      every kernel of both networks, in many processes
    tests
        golden values, every kernel in every dtype, the three known miscompilations, determinism and graphs,
        from tests/, in many processes
    ratios
        S7 and L7, forward and with backward, replayed from CUDA graphs, compared with the product of the same
        size and the algebraic peer
    training
        two steps of cifar10-s compared with the factored backend; the step of cifar10-s-fast in a CUDA graph

Exit status 1 if something failed or had no time. For the use of the results see docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from bench import cases, measure, providers, results, verify
from experiments import fast_training
from tools import warm

CHECKS, GPU_TESTS = "tests/kernels/smoke_checks.py", "tests/kernels/test_gpu.py"
FILES = ("tests/test_golden.py", CHECKS, GPU_TESTS)
# {verdict: whether a test belongs to it}, the most informative ones first
GROUPS = {
    "golden values": lambda name: "test_golden.py" in name and "triton" in name,
    "every kernel and dtype": lambda name: "smoke_checks.py::test_kernels" in name,
    "miscompilation: 8 warps in loops over taps": lambda name: (
        "::test_warps_and_stages" in name and "k3x3" in name and "-8-3]" in name
    ),
    "miscompilation: masked copies at borders": lambda name: "::test_no_masked_address_is_read" in name,
    "miscompilation: operands in registers": lambda name: "::test_operands_in_registers_do_not_race" in name,
    "determinism": lambda name: "::test_same_bits_twice" in name,
    "graphs": lambda name: "::test_graph_of" in name,
}
QUICK = (
    "test_layer[layer_1-float32-triton]",
    "test_kernels[S9-bfloat16]",
    "test_no_masked_address_is_read[S1-bfloat16]",
    "test_same_bits",
)
LAYERS = ("S7", "L7")


class Smoke:
    """The stages, and their verdicts and results, which are written to disk after each stage."""

    def __init__(
        self,
        output: Path,
        device: str,
        finish: float,
        quick: bool = False,
        jobs: int = 1,
        packed: Path | None = None,
    ):
        self.output, self.device, self.finish, self.quick, self.jobs = (
            output,
            torch.device(device),
            finish,
            quick,
            jobs,
        )
        self.found = {"of": {**results.environment(self.device), "tree": results.tree()}, "verdicts": {}}
        self.cuda, self.packed = device == "cuda", packed

    def verdict(self, name: str, result: str, detail: str = "") -> None:
        """Record and print a verdict. ``result``: pass; FAIL; left: there was no time; none: a rehearsal
        without a GPU cannot tell.
        """
        self.found["verdicts"][name] = {"result": result, "detail": detail}
        print(f"{result:<5} {name}{': ' * bool(detail)}{detail}", flush=True)
        self.keep()

    def keep(self):
        scratch = self.output / ".smoke.json"
        scratch.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, self.output / "smoke.json")

    def pack(self):
        if self.packed is not None:
            results.pack(
                {path.relative_to(self.output): path for path in self.output.rglob("*")},
                self.packed / "smoke.tar.gz",
            )

    def run(self, stages) -> bool:
        """Run all stages. A stage that raises is a failure, and the later ones run. Returns whether nothing
        failed or was left.
        """
        shown = ("device", "driver", "torch", "triton", "python", "commit")
        self.verdict("versions", "pass", ", ".join(f"{key} {self.found['of'][key]}" for key in shown))
        for stage in stages:
            begun = time.monotonic()
            try:
                getattr(self, stage)()
            except Exception as error:
                traceback.print_exc()
                self.verdict(stage, "FAIL", measure.reason(error))
            self.found.setdefault("seconds", {})[stage] = round(time.monotonic() - begun, 1)
            self.keep()
            self.pack()
        return all(verdict["result"] in ("pass", "none") for verdict in self.found["verdicts"].values())

    # -- stages ----

    def ceilings(self):
        """The product of two matrices of 8192 x 8192 in bfloat16, and a copy of 1 GiB, read and written."""
        side, count, dtype = (8192, 1 << 30, torch.bfloat16) if self.cuda else (256, 1 << 20, torch.float32)
        a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        source = torch.empty(count, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        self.found["product_tflops"] = round(2 * side**3 / self._us(lambda: a @ b, [()])[0] / 1e6, 3)
        self.found["copy_tb_s"] = round(2 * count / self._us(lambda: target.copy_(source), [()])[0] / 1e6, 3)
        self.verdict(
            "ceilings", "pass", f"{self.found['product_tflops']} TFLOP/s, {self.found['copy_tb_s']} TB/s"
        )

    def compile(self):
        wanted, begun = (
            [(network, "bfloat16") for network in warm.NETWORKS[: 1 if self.quick else None]],
            time.monotonic(),
        )
        problems = warm.warm(
            wanted, self.device.type, self.jobs, ("inference",) if self.quick else warm.PASSES
        )
        detail = f"{self.jobs} processes, {time.monotonic() - begun:.0f} s"
        self.verdict("compile", "FAIL" if problems else "pass", "; ".join([detail, *problems[:8]]))
        self.found["compile"] = problems

    def tests(self):
        begun = time.monotonic()
        until = begun + 0.7 * (self.finish - begun)
        names = verify.collect(*FILES, timeout=max(1.0, until - begun))
        groups = {group: [name for name in names if is_of(name)] for group, is_of in GROUPS.items()}
        if self.quick:
            groups = {
                group: [name for name in some if any(chosen in name for chosen in QUICK)]
                for group, some in groups.items()
            }
        chosen = [name for some in groups.values() for name in some]
        folder = self.output / "logs" / "tests"
        total = verify.shards(chosen, self.jobs, until, folder)
        total.write(self.output / "smoke_tests.json", **self.found["of"])
        outcomes = verify.outcomes(folder)
        self.found["tests"] = {name: outcomes.get(name, {"outcome": "left"}) for name in chosen}
        for group, some in groups.items():
            kinds = [outcomes[name]["outcome"] if name in outcomes else "left" for name in some]
            count = {
                kind: kinds.count(kind) for kind in ("passed", "failed", "skipped", "left") if kind in kinds
            }
            result = (
                "FAIL" if count.get("failed") else "pass" if kinds and set(kinds) == {"passed"} else "left"
            )
            result = "none" if not self.cuda and set(kinds) <= {"skipped"} else result
            self.verdict(
                group, result, ", ".join(f"{n} {kind}" for kind, n in count.items()) or "no test was chosen"
            )
            for name in some:
                if outcomes.get(name, {}).get("outcome") == "failed":
                    lines = verify.what_differs(outcomes[name].get("reason"))
                    print(f"      {name}", *(f"        {line}" for line in lines), sep="\n", flush=True)
        if broken := [failure for failure in total.failures if failure not in outcomes]:
            self.verdict("processes of tests", "FAIL", "; ".join(broken))

    def ratios(self):
        """The share of the product of the same size, and the speed-up over the algebraic peer, in device time
        alone.
        """
        batch = {"S": 256, "L": 64} if self.cuda else {"S": 1, "L": 1}
        found = cases.layers(batch)
        for name in LAYERS[:1] if self.quick else LAYERS:
            case = found[name] if self.cuda else cases.dataclasses.replace(found[name], units=4)
            for mode in (cases.FORWARD, cases.TRAINING):
                if time.monotonic() > self.finish - 12:
                    self.verdict(f"{name} {mode}", "left", verify.NO_TIME)
                    continue
                row = {"layer": name, "mode": mode, "shape": case.shape}
                self.found.setdefault("rows", []).append(row)
                dtype, timed = torch.bfloat16 if self.cuda else torch.float32, {}
                try:
                    for provider in (providers.PRODUCT, providers.CODA, providers.ALGEBRAIC):
                        inputs, function = providers.setup(provider, case, mode, dtype, self.device)
                        us, timed[provider] = self._us(function, inputs)
                        row[f"{provider} us"] = round(us, 1)
                        if provider == providers.CODA and self.cuda:
                            row["kernels"] = by_kernel(function, inputs)
                        measure.empty(self.device)
                except Exception as error:
                    row["error"] = measure.reason(error)
                    self.verdict(f"{name} {mode}", "FAIL", f"{case.shape}: {row['error']}")
                    continue
                row["timed"] = timed
                us, product, peer = (
                    row[f"{p} us"] for p in (providers.CODA, providers.PRODUCT, providers.ALGEBRAIC)
                )
                detail = (
                    f"{us:.0f} us, {100 * product / us:.0f} % of the product, {peer / us:.2f}x the "
                    "algebraic peer"
                )
                why = timed[providers.CODA]
                self.verdict(
                    f"{name} {mode}",
                    "pass" if why == "graph" or not self.cuda else "FAIL",
                    f"{detail}; timed: {why}",
                )

    def training(self):
        if time.monotonic() > self.finish - 5:
            self.verdict("training", "left", verify.NO_TIME)
            return
        images, labels = fast_training.made_up(1024 if self.cuda else 8)
        tiny, batch = (fast_training.TINY, 2) if self.quick else ({}, None)
        losses = {}
        for backend in ("triton" if self.cuda else "auto", "factored"):
            recipe = fast_training.recipe_of("cifar10-s")
            trainer = fast_training.Trainer(
                recipe, images, labels, self.device, batch, backend=backend, **tiny
            )
            torch.manual_seed(0)  # for crops and flips
            for i in range(2):
                trainer.step(torch.arange(trainer.batch, device=self.device) + i, recipe["optimizer"]["lr"])
                losses.setdefault(backend, []).append(trainer.sums[0].item() / trainer.batch)
        ours, other = losses.values()
        difference = max(abs(a - b) / abs(b) for a, b in zip(ours, other, strict=True))
        good = all(map(math.isfinite, ours)) and difference < 1e-3
        self.verdict(
            "two steps of cifar10-s",
            "pass" if good else "FAIL",
            f"losses {ours}, factored {other}, apart {difference:.1e}",
        )
        trainer = fast_training.Trainer(fast_training.recipe_of(), images, labels, self.device, batch, **tiny)
        indices = [torch.randint(len(labels), (trainer.batch,), device=self.device) for _ in range(3)]
        why = trainer.capture(indices, 1e-3)
        us, _ = self._us(
            lambda index: trainer.step(index, 1e-3), [(index,) for index in indices], captured=False
        )
        self.found["step_of_cifar10_s_fast_us"] = round(us, 1)
        finite = bool(torch.isfinite(trainer.sums).all())
        detail = f"{us / 1e3:.2f} ms at batch {trainer.batch}" + f"; not captured: {why}" * bool(why)
        self.verdict(
            "step of cifar10-s-fast", "pass" if finite and not (self.cuda and why) else "FAIL", detail
        )

    def _us(self, function, inputs, captured=True):
        """(median microseconds, "graph" or what else was timed). ``captured``: in CUDA graphs, possibly those
        that the function replays itself.
        """
        if not self.cuda:
            function(*inputs[0])
            begun = time.perf_counter()
            function(*inputs[0])
            return 1e6 * (time.perf_counter() - begun), "calls"
        if captured:
            return measure.device_us(function, inputs)
        runner = measure.Runner(inputs, function, captures_itself=True)
        found = measure.in_turn({"it": runner}, self.device, 0.3)["it"]
        if found.missing:
            raise RuntimeError(found.missing)
        return measure.quantiles(found.device_us)[1], found.timed


def by_kernel(function, inputs):
    """{kernel: [microseconds, launches]} of one call, from the profiler."""
    function(*inputs[0])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for arguments in (inputs * 3)[:3]:
            function(*arguments)
        torch.cuda.synchronize()
    found = {}
    for event in profile.key_averages():
        if event.self_device_time_total:
            found[event.key[:90]] = [round(event.self_device_time_total / 3, 1), event.count / 3]
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


STAGES = ("ceilings", "compile", "tests", "ratios", "training")


def main(argv=None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=results.FOLDER / "report" / "smoke",
        help="folder, made if it is not there",
    )
    parser.add_argument("--minutes", type=float, default=2.5)
    parser.add_argument("--pack", type=Path, help="folder for an archive of the results, one file")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="one small part of each stage")
    parser.add_argument(
        "--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile and test"
    )
    options = parser.parse_args(argv)
    for name in ("minutes", "jobs"):
        if (value := getattr(options, name)) <= 0:
            parser.error(f"--{name}: expected a positive number, got {value}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu-smoke: needs a CUDA device, torch sees none; --device cpu --quick rehearses it",
            file=sys.stderr,
        )
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = options.device == "cuda"
    finish, packed = start + 60 * options.minutes - 3, options.pack and options.pack.resolve()
    smoke = Smoke(options.output.resolve(), options.device, finish, options.quick, options.jobs, packed)
    good = smoke.run(options.stages)
    others = [
        name for name, verdict in smoke.found["verdicts"].items() if verdict["result"] in ("FAIL", "left")
    ]
    print("all pass" if good else f"not passed: {', '.join(others)}")
    print(f"{time.monotonic() - start:.0f} s; {options.output / 'smoke.json'}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
