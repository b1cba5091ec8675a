"""Train the recipe cifar10-s-fast within so many minutes on one GPU, then judge the result: accuracy,
localisation, removal.

    python -m experiments.fast_training --data cifar10.npz --output FOLDER --minutes 3.5
        training.json and the weights
    python -m experiments.fast_training --device cpu --quick --output FOLDER
        rehearses it, on made-up images

The whole step (images drawn and augmented on the device, network, loss, gradient, optimiser, moving average)
is one CUDA graph: launched one by one, its kernels would wait for the host. Where it cannot be captured, the
reason is printed and steps run one by one. How many steps fit is measured after the first ones, and the
learning rate follows a cosine over just as many. ``coda-fast train`` is the program for all other training;
this one needs torch, NumPy, Pillow, PyYAML and safetensors only, and can neither stop nor go on.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import coda_fast
from bench import measure, results
from coda_fast import evaluation

# Of a rehearsal: the published network takes seconds a step on a CPU
TINY = dict(out_channels=[8, 8, 10], ranks=[4, 4, 4], kernel_sizes=[3, 3, 1], strides=[2, 2, 1])
WEIGHTS = "cifar10_s_fast.safetensors"
JUDGEMENT = 40.0  # seconds that are left for it
MARGIN = 0.98  # of the time that is left, at each estimate of how many steps fit: evaluations take some of it


class TrainingProblem(Exception):
    """What keeps this from training; the message says what was expected and what was found."""


# -- images
# ------------------------------------------------------------------------------------------------------------


def read(path: Path, split: str, limit: int | None = None, threads: int = min(16, os.cpu_count() or 1)):
    """(images uint8 [N, 3, H, W], labels [N]) of ``split``: JPEGs end to end, some replaced by pixels
    without loss.
    """
    from coda_fast.data import decode

    try:
        with np.load(path, allow_pickle=False) as file:
            raw, offsets, labels = (
                file[f"{split}_jpeg"].tobytes(),
                file[f"{split}_offset"],
                file[f"{split}_label"][:limit],
            )
            lossless = (
                (file[f"{split}_lossless_idx"], file[f"{split}_lossless_rgb"])
                if f"{split}_lossless_idx" in file.files
                else None
            )

        def some(indices):
            return [np.asarray(decode(raw[offsets[i] : offsets[i + 1]])) for i in indices]

        # Pillow decodes without the interpreter's lock
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            parts = list(
                pool.map(some, np.array_split(np.arange(len(labels)), max(1, min(4 * threads, len(labels)))))
            )
        images = np.stack([image for part in parts for image in part])
        if lossless is not None:
            inside = lossless[0] < len(labels)
            images[lossless[0][inside]] = lossless[1][inside]
    except Exception as error:  # zipfile, NumPy and Pillow raise whatever the damage leads them to
        expected = f"an .npz file with {split}_jpeg, {split}_offset and {split}_label that fit"
        raise TrainingProblem(f"--data: {path}: expected {expected}: {error}") from None
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype(np.int64))


def made_up(count: int, classes: int = 10):
    """Images that nobody photographed, for rehearsals."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8), torch.arange(
        count
    ) % classes


# -- training
# ------------------------------------------------------------------------------------------------------------


class Trainer:
    """Network, optimiser, moving average and images on a device, and one step of them.

    ``step(index, rate)`` takes the images of these numbers; ``capture`` makes a CUDA graph of it.
    """

    def __init__(
        self,
        recipe: dict,
        images: torch.Tensor,
        labels: torch.Tensor,
        device,
        batch: int | None = None,
        **model_options,
    ):
        torch.manual_seed(recipe.get("seed", 0))
        self.device, self.batch = torch.device(device), batch or recipe["batch_size"]
        self.cuda = self.device.type == "cuda"
        self.images, self.labels = images.to(device), labels.to(device)
        self.spec, options = (
            recipe["data"],
            {key: value for key, value in recipe["model"].items() if key != "name"},
        )
        options = {"backend": "triton" if self.cuda else "auto", **options, **model_options}
        self.model = coda_fast.create_model(recipe["model"]["name"], **options).to(device)
        self.half = recipe.get("precision") == "bfloat16"
        self.layout = torch.channels_last if recipe.get("channels_last") else torch.contiguous_format
        self.parameters, self.clip = list(self.model.parameters()), recipe["optimizer"].get("clip")
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.rate = torch.zeros((), device=device)
        betas = tuple(recipe["optimizer"].get("betas", (0.9, 0.999)))
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=self.rate, betas=betas, fused=self.cuda, capturable=self.cuda
        )
        self.ema = [parameter.detach().clone() for parameter in self.parameters]
        self.decay, self.keep = recipe.get("ema", {}).get("decay", 0.0), torch.zeros((), device=device)
        self.index = torch.zeros(self.batch, dtype=torch.int64, device=device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images
        self.done, self.graph = 0, None

    def step(self, index: torch.Tensor, rate: float) -> None:
        self.index.copy_(index)
        self.rate.fill_(rate)
        # while there are few, as timm's with warm-up
        self.keep.fill_(1 - min(self.decay, (1 + self.done) / (10 + self.done)))
        self._step() if self.graph is None else self.graph.replay()
        self.done += 1

    def _step(self):
        images, labels = self._augmented(self.images[self.index]), self.labels[self.index]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half and self.cuda):
            logits = self.model(images.to(torch.float32, memory_format=self.layout).div_(255))
        logits = logits.float()
        loss = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).float())
        # copied, not accumulated: which stream autograd would accumulate on is decided before the capture
        torch._foreach_copy_(
            [parameter.grad for parameter in self.parameters], torch.autograd.grad(loss, self.parameters)
        )
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            change = torch._foreach_sub(self.parameters, self.ema)
            torch._foreach_mul_(change, self.keep)
            torch._foreach_add_(self.ema, change)
            correct = (logits.argmax(1) == labels).sum()
            self.sums += torch.stack(
                [loss.detach() * len(labels), correct, torch.full_like(correct, len(labels))]
            ).double()

    def _augmented(self, images):
        """Padded random crops and flips of uint8 images, drawn on their device."""
        count, channels, height, width = images.shape
        if pad := self.spec.get("pad"):
            offsets = torch.randint(2 * pad + 1, (2, count, 1), device=self.device)
            rows = offsets[0] + torch.arange(height, device=self.device)  # [N, H]
            columns = offsets[1] + torch.arange(width, device=self.device)
            n, c = torch.arange(count, device=self.device), torch.arange(channels, device=self.device)
            padded = F.pad(images, [pad] * 4)
            images = padded[
                n[:, None, None, None],
                c[None, :, None, None],
                rows[:, None, :, None],
                columns[:, None, None, :],
            ]
        if self.spec.get("flip"):
            flipped = torch.rand(count, 1, 1, 1, device=self.device) < 0.5
            images = torch.where(flipped, images.flip(3), images)
        return images

    def capture(self, batches, rate: float) -> str | None:
        """A few steps of their own stream, then the graph of one; why not, where that fails."""
        if not self.cuda:
            return "a CPU has no CUDA graphs"
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for index in batches:
                    self.step(index, rate)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.graph = graph
        except Exception as error:
            torch.cuda.synchronize()  # raises where the device is lost, and not only the capture
            return measure.reason(error)
        return None

    def averaged(self, dtype: torch.dtype) -> coda_fast.CoDANet:
        """The network with the moving averages for weights."""
        model = coda_fast.CoDANet(**self.model.config(), backend="auto", device="meta")
        state = {
            name: value.detach().to("cpu", dtype)
            for (name, _), value in zip(self.model.named_parameters(), self.ema, strict=True)
        }
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False)


def rate_of(recipe: dict, batch: int, step: int, steps: int, warmup: int) -> float:
    """A cosine from the recipe's rate at this batch to its last one, after a linear warm-up."""
    spec = recipe["optimizer"]
    scale = batch / spec["reference_batch"] if spec.get("rule", "none") != "none" else 1.0
    peak = spec["lr"] * (math.sqrt(scale) if spec.get("rule") == "sqrt" else scale)
    if step < warmup:
        return peak * (step + 1) / warmup
    least = peak * recipe["schedule"].get("last", 0.0)
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * share))


def batches_of(count: int, batch: int, seed: int):
    """(epoch, numbers of the images of a step) for ever: permutations, of which the incomplete last batch
    is left out.
    """
    epoch = 0
    while True:
        order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count))
        for start in range(0, count - batch + 1, batch):
            yield epoch, order[start : start + batch]
        epoch += 1


def train(
    trainer: Trainer, recipe: dict, finish: float, *, steps: int | None, test, keep, every: float, say=print
) -> dict:
    """Steps until ``finish`` (time.monotonic), or exactly ``steps``. ``keep(trainer, row)`` is called
    every ``every`` seconds.
    """
    count, batch = len(trainer.images), trainer.batch
    if count < batch:
        raise TrainingProblem(f"--data: expected at least {batch} training images, a batch, got {count}")
    batches = batches_of(count, batch, recipe.get("seed", 0))
    drawn = lambda: next(batches)[1].to(trainer.device, non_blocking=True)
    epoch_steps = count // batch
    warmup = round(recipe["schedule"].get("warmup", 0) * epoch_steps)
    begun = time.monotonic()
    reason = trainer.capture(
        [drawn() for _ in range(3)] if trainer.cuda else [],
        rate_of(recipe, batch, 0, 1 << 30, max(1, warmup)),
    )
    say(
        f"step captured in a CUDA graph ({time.monotonic() - begun:.1f} s)"
        if reason is None
        else f"steps one by one: {reason}"
    )
    planned, first = steps or 1 << 40, trainer.done
    history, waiting, cut = [], collections.deque(), False
    probe, clock = 0, time.monotonic()
    last = clock
    while trainer.done < planned:
        trainer.step(drawn(), rate_of(recipe, batch, trainer.done, planned, min(warmup, planned // 10)))
        if trainer.cuda:  # the host stays two steps ahead and no more, so that it knows the time
            waiting.append(torch.cuda.Event())
            waiting[-1].record()
            if len(waiting) > 2:
                waiting.popleft().synchronize()
        passed = trainer.done - first
        now = time.monotonic()
        if passed == 5:  # the first ones compile and allocate
            probe, clock = passed, now
        if steps is None and passed >= 25 and passed % 25 == 0:
            planned = trainer.done + max(
                0, int(MARGIN * (finish - now) * (passed - probe) / max(now - clock, 1e-9))
            )
        if steps is None and now >= finish:
            cut = True
            break
        if now - last >= every:
            history.append(_row(trainer, epoch_steps, now - begun, test))
            keep(trainer, history[-1])
            say(json.dumps(history[-1]))
            last = time.monotonic()
            clock += last - now  # how long a step takes is not how long this took
            if not math.isfinite(history[-1]["train_loss"]):
                raise TrainingProblem(
                    f"loss: expected a finite number, got {history[-1]['train_loss']} before step "
                    f"{trainer.done}"
                )
    if trainer.cuda:
        torch.cuda.synchronize()
    seconds = (time.monotonic() - clock) / max(1, trainer.done - first - probe)
    if not history or history[-1]["step"] != trainer.done:
        history.append(_row(trainer, epoch_steps, time.monotonic() - begun, test))
        say(json.dumps(history[-1]))
    return {
        "steps": trainer.done,
        "batch": batch,
        "images": count,
        "epochs": round(trainer.done / epoch_steps, 2),
        "step_ms": 1e3 * seconds,
        "captured": reason is None,
        "why_not_captured": reason,
        "cut_off": cut,
        "parameters": sum(p.numel() for p in trainer.parameters),
        "history": history,
    }


def _row(trainer, epoch_steps, seconds, test):
    loss, correct, seen = trainer.sums.tolist()
    trainer.sums.zero_()
    row = {"seconds": round(seconds, 1), "step": trainer.done, "epoch": round(trainer.done / epoch_steps, 2)}
    row |= {"train_loss": loss / max(1, seen), "train_accuracy": correct / max(1, seen)}
    return row | {
        "test_accuracy": accuracy(trainer.averaged(torch.float32), *test, trainer.device, trainer.half)
    }


# -- judgement
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(
    model, images: torch.Tensor, labels: torch.Tensor, device, half: bool, batch: int = 1000
) -> float:
    """Share of uint8 images that are classified as they are labelled; ``half``: as in training, under
    autocast.
    """
    model, correct = _on(model, device), 0
    for some, classes in zip(images.split(batch), labels.split(batch), strict=True):
        with torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=half and torch.device(device).type == "cuda"
        ):
            logits = model(some.to(device).float().div_(255))
        correct += int((logits.argmax(1).cpu() == classes.cpu()).sum())
    return correct / max(1, len(labels))


def _on(model, device):
    if torch.device(device).type == "cuda":
        for layer in model.layers:
            layer.backend = "triton"
    return model.to(device)


def judge(
    path: Path, images, labels, device, finish: float, keep, *, half: bool, quick: bool = False, say=print
) -> dict:
    """What the weights in the file are worth, in float32 if not said otherwise. ``keep(found)`` after each
    part, so that what is cut off loses one; what has no time left covers fewer images or grids, and says how
    many.
    """
    model = _on(coda_fast.load(path).float(), device)
    found, pixels, labels = {}, images.to(device).float().div_(255), labels.to(device)
    removed, grids = (2, 2) if quick else (1024, 500)
    # nothing would be sure after a few steps of a rehearsal
    logits = F.one_hot(labels, model.num_classes).float() if quick else None

    def until(share):
        deadline = time.monotonic() + share * max(0.0, finish - time.monotonic())

        def progress(things, label):
            for i, thing in enumerate(things):
                if i and time.monotonic() > deadline:
                    return
                yield thing

        return progress

    def localisation():
        options = dict(side=3, grids=grids, logits=logits, batch_size=1 if quick else 10, progress=until(0.6))
        return evaluation.localisation(model, pixels, labels, **options).summary()

    def removal(order):
        options = dict(
            order=order,
            points=3 if quick else 129,
            batch_size=1024,
            attribution_batch=128,
            progress=until(0.6),
        )
        removal = evaluation.pixel_removal(model, pixels[:removed], labels[:removed], **options)
        return {
            "images": len(removal.probabilities),
            "area": float(removal.area().mean()),
            "end": float(removal.curve()[-1]),
        }

    parts = {
        "accuracy": lambda: accuracy(model, images, labels, device, False),
        "accuracy_autocast": lambda: accuracy(model, images, labels, device, half),
        "completeness_error": lambda: float(
            evaluation.completeness_error(model, pixels[: 4 * removed], labels[: 4 * removed]).max()
        ),
        "localisation_3x3": localisation,
        "removal_least_first": lambda: removal("least"),
        "removal_most_first": lambda: removal("most"),
    }
    for name, part in parts.items():
        begun = time.monotonic()
        try:
            if begun > finish:
                raise TimeoutError("no time left")
            found[name] = part()
        except Exception as error:  # the others may still say something
            found[name] = {"missing": measure.reason(error)}
        found.setdefault("seconds", {})[name] = round(time.monotonic() - begun, 2)
        say(f"{name}: {json.dumps(found[name])} ({found['seconds'][name]} s)")
        keep(found)
    return found


# -- the tool
# ------------------------------------------------------------------------------------------------------------


def recipe_of(name: str = "cifar10-s-fast") -> dict:
    """The recipe as plain values; what it says about epochs is for runs that are not measured in minutes."""
    import yaml

    return yaml.safe_load(
        (results.ROOT / "coda_fast" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    )


def main(argv=None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        help=".npz file of CIFAR-10 as JPEGs (train_jpeg, train_offset, train_label; test_ likewise)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for training.json and the weights, made if it is not there",
    )
    parser.add_argument(
        "--minutes", type=float, default=3.5, help="for everything, of which 40 seconds are for the judgement"
    )
    parser.add_argument("--steps", type=int, help="exactly so many, however long they take")
    parser.add_argument("--batch", type=int, help="instead of the recipe's")
    parser.add_argument("--temperature", type=float, help="instead of the recipe's")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a rehearsal: a tiny network, few images, made-up ones without --data",
    )
    options = parser.parse_args(argv)
    for name in ("minutes", "steps", "batch", "temperature"):
        if (value := getattr(options, name)) is not None and value <= 0:
            parser.error(f"--{name}: expected a positive number, got {value}")
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise TrainingProblem("needs a CUDA device, torch sees none; --device cpu --quick rehearses it")
        if options.data is None and not options.quick:
            raise TrainingProblem("--data: expected the file of the images, got none")
        if options.data is not None and not options.data.is_file():
            raise TrainingProblem(f"--data: no such file: {options.data}")
        return _main(options, start)
    except TrainingProblem as problem:
        print(f"fast_training: {problem}", file=sys.stderr)
        return 2


def _main(options, start):
    quick, device = options.quick, options.device
    finish = start + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of()
    if options.temperature:
        recipe["model"]["temperature"] = options.temperature
    found = {
        "data": "made-up images" if options.data is None else "CIFAR-10 (JPEG)",
        "recipe": recipe,
        "quick": quick,
    }
    found["of"] = results.environment(torch.device(device))
    weights = options.output / WEIGHTS

    def write():
        scratch = options.output / ".training.json"
        scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, options.output / "training.json")

    say = lambda text: print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)
    limit = 32 if quick else None
    splits = [
        made_up(32) if options.data is None else read(options.data, split, limit)
        for split in ("train", "test")
    ]
    (images, labels), test = splits
    say(f"{len(labels)} images to train with, {len(test[1])} to test with")
    trainer = Trainer(
        recipe,
        images,
        labels,
        device,
        batch=options.batch or (4 if quick else None),
        **(TINY if quick else {}),
    )
    test = (test[0].to(device), test[1])

    def checkpoint(trainer, row):
        found.setdefault("checkpoints", []).append(row)
        coda_fast.save(
            trainer.averaged(torch.float16),
            weights,
            {"recipe": recipe, **row, "weights": "moving average, float16"},
        )
        write()

    steps = options.steps or (3 if quick else None)
    training = finish - (0.2 * 60 * options.minutes if options.minutes < 2 else JUDGEMENT)
    found |= train(
        trainer, recipe, training, steps=steps, test=test, keep=checkpoint, every=0 if quick else 30, say=say
    )
    checkpoint(trainer, found["history"][-1])
    found.pop("checkpoints")
    del trainer.graph  # its memory is for the maps
    if device == "cuda":
        measure.empty(torch.device(device))
    judge(
        weights,
        *test,
        device,
        finish,
        lambda part: (found.update(judged=part), write()),
        half=trainer.half,
        quick=quick,
        say=say,
    )
    found["seconds"] = round(time.monotonic() - start, 1)
    write()
    say(f"{found['steps']} steps of {found['step_ms']:.1f} ms; {options.output / 'training.json'}, {weights}")
    missing = [
        name for name, value in found["judged"].items() if isinstance(value, dict) and "missing" in value
    ]
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
