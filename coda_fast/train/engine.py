"""The loop: Lightning Fabric runs the processes, this runs the steps, and can stop and go on at any of them.

A step is one optimiser update over ``recipe.batch_size`` images: each process takes its slice, in
micro-batches of equal size, so that the mean over processes and micro-batches is the mean over the global
batch. Processes talk at the gradient, and every ``log.every`` steps (or every ``HEARTBEAT`` seconds, where
steps are slow) in one sum of metrics, which also carries what they must agree on: a signal to stop, the clock
of checkpoints, images that could not be read.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import signal
import time
from pathlib import Path

import torch
from torch import distributed

from coda_fast import checkpoints, safety
from coda_fast.compile import compile_for
from coda_fast.data import sources
from coda_fast.data.decode import RULES
from coda_fast.data.errors import DataError
from coda_fast.data.shards import Shards
from coda_fast.data.sources import Batch, Place, seeded
from coda_fast.models import create_model
from coda_fast.train import processes
from coda_fast.train import state as files
from coda_fast.train.augmentation import augment
from coda_fast.train.data import open_data
from coda_fast.train.errors import FILES, MODELS, SIGNALS, Stopped, TrainingError, need
from coda_fast.train.objective import Objective
from coda_fast.train.optimization import make_optimizer, make_schedule, set_rate
from coda_fast.train.recipes import Recipe, make_recipe
from coda_fast.train.watch import STEP_FIELDS, Watch

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}  # of the weights
HEARTBEAT = 2.0  # seconds, about: a scheduler that sends a signal does not wait for log.every slow steps


def run(recipe: Recipe, output: str | os.PathLike, resume: str | None = None, progress: bool = True) -> dict:
    """Train by ``recipe`` into the folder ``output``, in this process or as one of many (torchrun, SLURM).

    Args:
        resume: None: a new run; "auto": from the newest readable checkpoint of the folder, or new if there is
            none; or a file.
        progress: show a bar and messages (of the first process).

    Returns:
        The last row of the history: losses, accuracies, images/s.

    Raises:
        TrainingError: anything that keeps the run from starting or going on. Stopped: a signal; the run
            stands in a checkpoint.
        ImportError: packages of the extra "train" are missing.
    """
    found, held = None, contextlib.ExitStack()
    try:
        found = Run(recipe, Path(output), resume, progress, held)
        row = found.train()
        found.fabric.barrier()
        return row
    except Stopped:
        raise
    except DataError as error:  # met on the way
        processes.report(problem := TrainingError(str(error)))
        raise problem from None
    except Exception as error:
        if (reason := processes.lost_touch(error)) is None:
            processes.report(error)
            raise
        known = "" if found is None else f"; {files.named(found.last_good)}"
        if not distributed.is_initialized():
            raise TrainingError(f"processes: cannot begin to talk to each other: {reason}{known}") from None
        raise TrainingError(
            f"processes: lost touch; if another one of this run ended, its message says why ({reason}){known}"
        ) from None
    finally:
        held.close()
        if distributed.is_available() and distributed.is_initialized():
            # what sharded modules hold of the process groups goes first: at the end of the process, their
            # threads abort it
            found = None
            gc.collect()
            distributed.destroy_process_group()


class Run:
    """One run, set up: ``train`` does the rest."""

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        resume: str | None,
        progress: bool,
        held: contextlib.ExitStack | None = None,
    ):
        self.recipe, self.output, self.folder = recipe, output, output / "checkpoints"
        self.fabric = processes.fabric(recipe)
        self.fabric.launch()
        self.place = Place(self.fabric.global_rank, self.fabric.world_size)
        self.main = self.place.rank == 0
        self.watch = Watch(recipe, output, progress and self.main, self.main)
        self.local, self.micro = _split(recipe, self.place)
        self.dtype, self.device = DTYPES[recipe.precision], self.fabric.device
        self.wide = torch.float32 if self.device.type == "mps" else torch.float64  # of sums of metrics
        self.last_good: Path | None = None
        # everything that can be refused is refused before the folder is written to
        self.held, self.lock = held or contextlib.ExitStack(), None
        self._first(lambda: _check_folder(recipe, output))
        start = self._start(resume)
        model, self.source = self._model_and_data()
        self.facts = self.source.facts()
        gathered = self._gather(self.facts)
        self._first(lambda: self._alike(gathered))
        if isinstance(self.source.train, Shards):
            self.source.train.need_enough(self.place)
        self.steps = len(self.source.train) // recipe.batch_size
        if not self.steps:
            raise TrainingError(
                f"batch_size: expected at most {len(self.source.train)}, the training images, got "
                f"{recipe.batch_size}"
            )
        if recipe.loss.matrix_weight and recipe.loss.matrix_classes > (most := self.source.num_classes):
            raise TrainingError(
                f"loss.matrix_classes: expected at most the {most} classes, got {recipe.loss.matrix_classes}"
            )
        self.watch.say(f"data: {self._amounts()}")
        if recipe.micro_batch and 2 * self.micro < min(recipe.micro_batch, self.local):
            self.watch.say(
                f"micro_batch: {recipe.micro_batch} does not divide the {self.local} images of a process, "
                f"{self.micro} does"
            )
        self._build(model)
        # for models that draw from the global generators: each process its own
        files.seed_all(seeded(recipe.seed, 1, self.place.rank))
        self.epoch = self.step = self.updates = 0
        self.history, self.best, self.bad = [], None, dict(self.source.failures)
        if start is not None:
            self._restore(*start)
        self._first(self._open)
        self._check_failures([])

    # -- set-up
    # --------------------------------------------------------------------------------------------------------

    def _start(self, resume):
        """The checkpoint to go on from, (path, state), or None."""
        found = self._first(lambda: self._choose(resume))
        if found is None:
            return None
        state = self.chosen if self.main else files.read(found)
        self.chosen = None  # as large as optimiser and model: not for the whole run
        return Path(found), state

    def _choose(self, resume):
        """The path of that checkpoint; its state stays in ``chosen``."""
        if (
            resume is None
            and (models := [name for name in MODELS if (self.output / name).exists()])
            and not self.folder.exists()
        ):
            raise TrainingError(
                f"{self.output} holds the model of another run, {models[0]}; choose another folder, or move "
                "it away"
            )
        if self.output.exists():
            self._hold()
        there = files.listed(self.folder)
        if resume is None:
            if there := there or [path for path in [self.folder / "best.pt"] if path.exists()]:
                raise TrainingError(
                    f"{self.output} holds a run already, up to {there[0].name}; --resume auto goes on with it"
                )
            return None
        if resume == "auto":
            found = files.newest(self.folder, self.watch.say)
            if found is None:
                return None
            path, self.chosen = found
            return str(path)
        path, self.chosen = Path(resume), files.read(resume)
        if there and path.resolve().parent != self.folder.resolve():
            raise TrainingError(
                f"{self.output} holds another run, up to {there[0].name}; choose an empty folder to go on "
                f"from {path}"
            )
        here = self.chosen["epoch"], self.chosen["step"]
        later = [p.name for p in there if files.position(p) > here]
        best = self.folder / "best.pt"
        if (
            best.exists()
            and not best.samefile(path)
            and (epoch := files.epoch_of(best)) is not None
            and (epoch, 0) > here
        ):
            later.append(best.name)
        if later:
            raise TrainingError(
                f"{self.output} holds checkpoints after {path.name}, up to {later[0]}, which would be lost; "
                "move them away, or go on "
                f"from {path} in an empty folder (--output)"
            )
        return str(path)

    def _hold(self):
        """Nobody else trains in this folder until this run ends."""
        if self.lock is None:
            try:
                self.output.mkdir(parents=True, exist_ok=True)
                self.lock = self.held.enter_context(files.locked(self.output, self.watch.say))
            except OSError as error:
                raise TrainingError(
                    f"{self.output}: expected a folder that can be written to (--output): {error.strerror}"
                ) from None

    def _open(self):
        self._hold()
        if self.last_good is None and files.listed(self.folder):
            raise TrainingError(
                f"{self.output} holds a run that began meanwhile; --resume auto goes on with it"
            )
        self._name_best()
        with checkpoints.atomic_path(self.output / "recipe.yaml") as temporary:
            temporary.write_text(self.recipe.to_yaml(), encoding="utf-8")

    def _name_best(self):
        """best.pt is this run's best epoch: not yet, where a run ended between a checkpoint and this name
        of it, or goes on elsewhere.
        """
        best = self.folder / "best.pt"
        if self.best is None or self._best_epoch(best):
            return
        for path in (self.last_good, self.last_good.parent / "best.pt"):
            if self._best_epoch(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                files.link_best(path, best)
                return

    def _best_epoch(self, path):
        """The checkpoint, if it is of the epoch with the best score of this run's history, else None."""
        try:
            state = files.read(path)
        except TrainingError:
            return None
        first = next(i for i, row in enumerate(self.history) if _score(row) == self.best)
        return None if state["step"] or state["history"] != self.history[: first + 1] else state

    def _model_and_data(self):
        recipe = self.recipe
        probe = self._model(recipe.model.arguments(), device="meta")  # nothing is allocated
        source = open_data(recipe.data, probe.image_channels, self.device, self.watch.reading)
        torch.manual_seed(seeded(recipe.seed))  # the same weights in every process
        options = {"num_classes": source.num_classes, "class_names": source.class_names, "dtype": self.dtype}
        options |= {"preprocessing": source.preprocessing}
        if source.preprocessing.crop is not None:
            options["image_size"] = source.preprocessing.crop
        # a network of its own layers: the last of them is the classes
        if recipe.model.out_channels is not None:
            options.pop("num_classes")
            if recipe.model.out_channels[-1] != source.num_classes:
                raise TrainingError(
                    f"model.out_channels: expected {source.num_classes} classes at the end, got "
                    f"{recipe.model.out_channels}"
                )
        options |= recipe.model.arguments()
        self._check_memory(self._model(options, device="meta"), source)
        return self._model(options), source

    def _model(self, options, **more):
        try:
            return create_model(self.recipe.model.name, **options, **more)
        except (ValueError, TypeError) as error:
            raise TrainingError(f"model: {str(error).removeprefix('model: ')}") from None
        # torch, of sizes that 64 bits do not hold
        except (RuntimeError, OverflowError, MemoryError) as error:
            raise TrainingError(
                f"model: expected layers that this machine can hold, got {' '.join(str(error).split())[:200]}"
            ) from None

    def _check_memory(self, model, source):
        """TrainingError where weights, images or activations of a step take more than there is, whatever
        else they take.
        """
        recipe = self.recipe
        weights = sum(p.numel() for p in model.parameters()) * self.dtype.itemsize
        try:
            safety.need_memory("model: weights, their gradients and a copy", 3 * weights, self.device)
            arrays = isinstance(source.train, sources.Arrays)
            height, width = source.train.images.shape[2:] if arrays else (recipe.data.size or 1,) * 2
            pixels = height * width * model.image_channels
            if not arrays:
                batches = 1 + 4 * recipe.data.workers  # that the loader keeps ready
                safety.need_memory(
                    "batch_size, data.workers, data.size: images", batches * self.local * pixels
                )
            activations = 0
            for layer in model.layers if arrays or recipe.data.size else ():
                height, width = layer.geometry.output_size(height, width)
                activations += layer.out_channels * height * width
            # of two bytes under autocast
            safety.need_memory(
                "batch_size, micro_batch: activations",
                2 * self.micro * (activations + 2 * pixels),
                self.device,
            )
        except ValueError as error:
            raise TrainingError(str(error)) from None

    def _amounts(self):
        """In words, as "1347 images to train with, 450 images to validate with, 10 classes"."""
        uses = {"train": "train", "val": "validate"}
        parts = [
            (*key.split("_"), count)
            for key, count in self.facts.items()
            if key.endswith(("_images", "_shards"))
        ]
        return ", ".join(
            [f"{count} {unit} to {uses[split]} with" for split, unit, count in parts]
            + [f"{self.source.num_classes} classes"]
        )

    def _alike(self, gathered):
        """Processes with other data would take other steps, and wait for each other for ever."""
        for rank, facts in enumerate(gathered):
            if changed := _changes(gathered[0], facts, "process 0", f"process {rank}"):
                raise TrainingError(f"data: expected the same images in every process, got {changed}")

    def _build(self, model):
        """Objective, moving average, optimiser and schedule, on the device and shared over the processes."""
        recipe, fabric = self.recipe, self.fabric
        if recipe.channels_last and not processes.sharded(fabric):  # FSDP2 takes contiguous weights only
            model = model.to(memory_format=torch.channels_last)
        objective = Objective(model.to(self.device), recipe)
        # whole, for maps and files
        self.plain = copy.deepcopy(objective.model).requires_grad_(False) if self.main else None
        self.ema, self.compiled = None, False
        if recipe.ema.decay:
            need("timm")
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(
                objective,
                decay=recipe.ema.decay,
                use_warmup=recipe.ema.warmup,
                foreach=not processes.sharded(fabric),
            )
            if processes.sharded(fabric):
                processes.shard(self.ema.module, fabric.strategy.device_mesh)
        if recipe.compile:
            objective.compile()
        self.module = fabric.setup_module(objective)
        self.objective = objective
        optimizer = make_optimizer(recipe, self.module.parameters())
        self.schedule = make_schedule(recipe, optimizer, self.steps)
        self.optimizer = fabric.setup_optimizers(optimizer)

    # -- the loop
    # --------------------------------------------------------------------------------------------------------

    def train(self) -> dict:
        """All epochs that are left, then the files of the result."""
        recipe = self.recipe
        try:
            with _Signals() as self.signals, self.watch.open(self.history, self.updates, self.steps):
                self.clock = time.monotonic()
                if self.history and not self.step:
                    self._first(lambda: self._is_shown() or self._show())
                while self.epoch < recipe.epochs:
                    self._train_epoch()
                    row = self.row | (self.evaluate() if self._evaluates() else {})
                    row["unreadable"] = len(self.bad)  # with those of validation
                    self.epoch, self.step = self.epoch + 1, 0
                    self.history.append(row)
                    better = _score(row) is not None and (self.best is None or _score(row) > self.best)
                    self.best = _score(row) if better else self.best
                    self.save(best=better)
                    self._first(self._show)
                    if self._agree(self.signals.asked) and self.epoch < recipe.epochs:
                        raise Stopped(self.last_good)
                self._first(self._finish)
        except KeyboardInterrupt:
            self.watch.say(f"interrupted; {files.named(self.last_good)}")
            raise
        # of the files beside the checkpoints (curves, pictures), and processes that decode
        except OSError as error:
            raise TrainingError(f"{error}; {files.named(self.last_good)}") from None
        return self.history[-1]

    def _evaluates(self):
        """Whether the present epoch ends with an evaluation."""
        return (self.epoch + 1) % self.recipe.evaluation.every == 0 or self.epoch + 1 == self.recipe.epochs

    def _train_epoch(self):
        recipe = self.recipe
        self.module.train()
        if self.step == 0:
            self.sums = torch.zeros(3, dtype=torch.float64)  # of the epoch: loss x images, correct, images
            self.seconds = 0.0
        # of the last update, where none is left
        self.lr = set_rate(self.schedule, self.epoch, self.updates - (self.step > 0))
        if self.step < self.steps:
            batches = self.source.train.training(
                recipe.seed, self.epoch, self.step, recipe.batch_size, self.place
            )
            with contextlib.closing(batches):
                self._train_steps(batches)
        loss, correct, seen = self.sums.tolist()
        if not seen:
            raise TrainingError(
                f"data: expected training images, could read none of them; {files.named(self.last_good)}"
            )
        self.row = {
            "epoch": self.epoch + 1,
            "updates": self.updates,
            "learning_rate": self.lr,
            "train_loss": loss / seen,
            "train_accuracy": correct / seen,
            "images_per_second": self.steps * recipe.batch_size / max(self.seconds, 1e-9),
            "unreadable": len(self.bad),
        }

    def _train_steps(self, batches):
        """Steps up to the end of the epoch, and what processes say to each other between them."""
        recipe = self.recipe
        window = torch.zeros(5, dtype=self.wide, device=self.device)
        failures, begun = [], time.perf_counter()
        # steps from one message to the next, those since the last one, and when that was
        beat, passed, beaten = 1, 0, begun
        for batch in batches:
            self.lr = set_rate(self.schedule, self.epoch, self.updates)
            window += self._step(batch)
            failures += batch.failures
            self.step, self.updates = self.step + 1, self.updates + 1
            last = self.step == self.steps
            every = recipe.checkpoint.every_steps
            save = bool(every) and self.updates % every == 0
            row_is_due = last or save or self.step % recipe.log.every == 0
            passed += 1
            if passed < beat and not row_is_due:
                continue
            # losses, correct, seen, penalties, updates; failures, signal, clock of checkpoints, clock of
            # messages: one message
            votes = [
                len(failures),
                self.signals.asked,
                self.main and self._due(last),
                self.main and time.perf_counter() - beaten,
            ]
            total = torch.cat([window, window.new_tensor([float(v) for v in votes])])
            total = self.fabric.all_reduce(total, reduce_op="sum").tolist()
            losses, correct, seen, penalties, ranks_steps, failed, asked, due, waited = total
            steps = round(ranks_steps / self.place.world)
            beat, passed, beaten = max(1, int(HEARTBEAT * passed / max(waited, 1e-9))), 0, time.perf_counter()
            if failed:
                self._check_failures(failures)
                failures = []
            if not (row_is_due or asked or due):
                continue
            loss = losses / max(1, seen) + penalties / max(1, ranks_steps)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"loss: expected a finite number, got {loss} in epoch {self.epoch + 1} between steps "
                    f"{self.step - steps} and "
                    f"{self.step} (learning rate {self.lr:.3g}; try a lower one, or optimizer.clip=1; "
                    f"{self._weights_told()}); "
                    f"{files.named(self.last_good)}"
                )
            window.zero_()
            now = time.perf_counter()
            elapsed, begun = now - begun, now
            self.sums += torch.tensor([loss * seen, correct, seen], dtype=torch.float64)
            self.seconds += elapsed
            if self.main:
                rate = steps * recipe.batch_size / max(elapsed, 1e-9)
                found = (self.epoch + 1, self.step, self.updates, loss, correct / max(1, seen), self.lr, rate)
                self.watch.step(dict(zip(STEP_FIELDS, found, strict=True)))
            if asked or due or (save and not last):
                self.save()
                if asked:
                    raise Stopped(self.last_good)

    def _weights_told(self):
        """Whether the weights are finite, and how large: images are in [0, 1], so what makes |w|^2 leave
        float32 are they.
        """
        sizes = {
            name: float(p.detach().abs().max())
            for name, p in self.objective.model.named_parameters()
            if p.numel()
        }
        if broken := [name for name, size in sizes.items() if not math.isfinite(size)]:
            return f"not finite: {len(broken)} of {len(sizes)} weights, first {broken[0]}"
        largest = max(sizes, key=sizes.get)
        return f"the largest weight is {sizes[largest]:.1e}, in {largest}"

    def _step(self, batch: Batch):
        """One update; sums of losses, correct answers, images that could be read, penalties, and 1, as a
        tensor on the device.
        """
        recipe, place = self.recipe, self.place
        batch = batch.to(self.device)
        generator = torch.Generator().manual_seed(seeded(recipe.seed, self.epoch, self.step))
        images = augment(batch.images, recipe.data, generator, place)
        images = sources.to_float(images, self.dtype, recipe.channels_last)
        if not self.compiled:
            self._compile(images)
        rows = self._rows(batch.labels, generator) if self.objective.matrix is not None else None
        parts, measured = self.local // self.micro, 0
        for part in range(parts):
            some = slice(part * self.micro, (part + 1) * self.micro)
            labels, valid = batch.labels[some], None if batch.valid is None else batch.valid[some]
            with self.fabric.no_backward_sync(self.module, enabled=part < parts - 1):
                logits, losses, penalty = self.module(
                    images[some], labels, None if rows is None else rows[some], valid
                )
                # what could not be read is black, and weighs nothing
                losses = losses if valid is None else losses * valid
                self.fabric.backward((losses.mean() + penalty) / parts)
            right = logits.detach().argmax(1) == labels
            right, seen = (right, torch.ones_like(right)) if valid is None else (right & valid, valid)
            found = (losses.detach().sum(), right.sum(), seen.sum(), penalty.detach() / parts)
            measured = measured + torch.stack([x.to(self.wide) for x in found])
        if recipe.optimizer.clip:
            self.fabric.clip_gradients(
                self.module, self.optimizer, max_norm=recipe.optimizer.clip, error_if_nonfinite=False
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.objective, self.updates)
        return torch.cat([measured, measured.new_ones(1)])

    def _compile(self, images):
        """The fused kernels of the network, in parallel, before the first step would compile them one
        after the other: once a host.
        """
        self.compiled = True
        # of a sharded network each process has a part
        if self.device.type != "cuda" or processes.sharded(self.fabric):
            return
        if self.fabric.local_rank == 0:
            begun = time.perf_counter()
            dtype = torch.bfloat16 if self.objective.autocast else self.dtype
            try:
                if count := compile_for(self.objective.model, images, dtype, ("training", "inference")):
                    self.watch.say(f"{count} fused kernels compiled in {time.perf_counter() - begun:.0f} s")
            except RuntimeError as error:  # a step may do without: a layer takes its next smaller tile
                self.watch.say(f"not compiled ahead: {error}")
        self.fabric.barrier()

    def _rows(self, labels, generator):
        """The regulariser's classes: drawn for the global batch."""
        total, classes = self.local * self.place.world, self.source.num_classes
        scores = torch.rand(total, classes, generator=generator)[self.place.slice(total)].to(labels.device)
        scores.scatter_(1, labels[:, None], 2.0)
        return scores.argsort(1, descending=True)[:, : self.objective.matrix.classes]

    # -- evaluation and maps
    # --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Loss and accuracy on the validation images, each counted once; of the moving average too."""
        self.module.eval()
        modules = {"": self.objective} | ({"ema_": self.ema.module} if self.ema is not None else {})
        batches = self.source.val.evaluation(self.recipe.evaluation.batch_size, self.place)
        with contextlib.closing(batches):
            sums, failures = self._judge(batches, modules.values())
        total = torch.cat([sums.flatten(), torch.tensor([float(len(failures))])]).to(self.device, self.wide)
        total = self.fabric.all_reduce(total, reduce_op="sum")
        if float(total[-1]):
            self._check_failures(failures)
        row = {}
        for name, (loss, first, five, count) in zip(
            modules, total[:-1].reshape(sums.shape).tolist(), strict=True
        ):
            row |= {f"{name}val_loss": loss / max(1, count), f"{name}val_accuracy": first / max(1, count)}
            if self.source.num_classes >= 100:
                row[f"{name}val_top5"] = five / max(1, count)
        if not count:
            raise TrainingError(
                f"data: expected validation images, could read none of them; {files.named(self.last_good)}"
            )
        return row | {"val_images": int(count)}

    def _judge(self, batches, modules):
        """Sums over the images of this process, for each module: loss, correct, correct among five,
        images. And what could not be read.
        """
        sums = torch.zeros(len(modules), 4, dtype=torch.float64)
        failures = []
        while True:
            batch = next(batches, None)
            left, asked = self._sum(batch is not None, self.signals.asked)
            if asked:  # what is evaluated can be evaluated again
                self.save()
                raise Stopped(self.last_good)
            if not left:
                break
            # who is done keeps the others company, also where forward passes are collective
            if batch is None:
                if not processes.sharded(self.fabric):
                    continue
                batch = self._nothing()
            batch = batch.to(self.device)
            failures += batch.failures
            images = sources.to_float(batch.images, self.dtype, self.recipe.channels_last)
            keep = torch.ones_like(batch.labels, dtype=torch.bool) if batch.valid is None else batch.valid
            for row, module in enumerate(modules):
                logits, losses, _ = module(images, batch.labels)
                losses, top = (
                    losses[keep],
                    logits[keep].topk(min(5, logits.shape[1])).indices == batch.labels[keep, None],
                )
                sums[row] += torch.stack(
                    [
                        losses.double().sum(),
                        top[:, :1].sum().double(),
                        top.sum().double(),
                        keep.sum().double(),
                    ]
                ).cpu()
        return sums, failures

    def _nothing(self):
        side = self.recipe.data.size or 32
        images = torch.zeros(
            1, self.objective.model.image_channels, side, side, dtype=torch.uint8, device=self.device
        )
        return Batch(
            images,
            torch.zeros(1, dtype=torch.int64, device=self.device),
            torch.zeros(1, dtype=torch.bool, device=self.device),
        )

    def _maps_are_due(self):
        log = self.recipe.log
        return bool(log.maps) and (self.epoch % log.maps_every == 0 or self.epoch == self.recipe.epochs)

    def _is_shown(self):
        """Whether the epoch that this run goes on from was: it may have ended between the checkpoint and
        this.
        """
        return self.watch.shows(self.epoch, self._maps_are_due())

    def _show(self):
        """The epoch that has ended, and maps of fixed validation images by the whole model of the last
        checkpoint.
        """
        self.watch.epoch(self.history)
        if self._maps_are_due():
            sample = self.source.val.sample(self.recipe.log.maps).to(self.device)
            self.watch.maps(
                self.plain,
                sources.to_float(sample.images, self.dtype),
                sample.labels,
                self.epoch,
                self.updates,
            )

    # -- checkpoints
    # --------------------------------------------------------------------------------------------------------

    def save(self, best: bool = False) -> None:
        """Write where the run stands. All processes take part; the first one writes."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
        )

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model = get_model_state_dict(self.objective, options=whole)
        ema = get_model_state_dict(self.ema.module, options=whole) if self.ema is not None else None
        optimizer = get_optimizer_state_dict(self.objective, self.optimizer.optimizer, options=whole)
        rng, sums = self._gather(files.rng_state()), self.sums if self.step else None

        def write():
            if broken := next((name for name, t in model.items() if not torch.isfinite(t).all()), None):
                raise TrainingError(
                    f"weights: expected finite numbers, got others in {broken}; {files.named(self.last_good)}"
                )
            path = files.path_for(self.folder, self.epoch, self.step)
            state = {
                "recipe": self.recipe.model_dump(mode="json"),
                "data": self.facts,
                "world": self.place.world,
                "epoch": self.epoch,
                "step": self.step,
                "updates": self.updates,
                "model": model,
                "ema": ema,
                "optimizer": optimizer,
                "schedule": self.schedule.state_dict(),
                "rng": rng,
                "history": self.history,
                "best": self.best,
                "sums": sums,
                "seconds": self.seconds,
                "bad": dict(self.bad),
            }
            files.write(path, state, self.last_good)
            self.last_good = path
            if best:
                files.link_best(path, self.folder / "best.pt")
            files.prune(path, self.recipe.checkpoint.keep)
            self._whole(ema or model)
            return str(path)

        self.last_good = Path(self._first(write))
        self.clock = time.monotonic()

    def _whole(self, state):
        """Load a gathered state into the plain model."""
        self.plain.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
        return self.plain

    def _restore(self, path, state):
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        stored = make_recipe(state["recipe"], str(path))
        if changed := self.recipe.differences(stored):
            values = ", ".join(
                f"{key} (was {_value(stored, key)!r}, now {_value(self.recipe, key)!r})" for key in changed
            )
            raise TrainingError(
                f"{path}: the run that stands here had other values of {values}; a changed run needs a "
                "folder of its own"
            )
        for key in (key for key in self.facts if key.endswith("_rules")):
            if (rules := state["data"].get(key, 1)) != RULES:
                raise TrainingError(
                    f"{path}: the run that stands here began with pictures that were decoded by other rules "
                    f"(version {rules}, now {RULES}: "
                    "orientation, transparency and 16 bits are read as docs/data.md says); finish it with "
                    "the release that began it, or "
                    f"begin anew in another folder"
                )
        if changed := _changes(state["data"], self.facts, "was", "now"):
            raise TrainingError(f"{path}: the run that stands here had other data: {changed}")
        if self.recipe.epochs < (least := state["epoch"] + (state["step"] > 0)):
            raise TrainingError(
                f"{path}: epochs: expected at least {least}, where the run stands, got {self.recipe.epochs}"
            )
        was, now = (
            (n, max(1, r.data.workers))
            for n, r in ((state["world"], stored), (self.place.world, self.recipe))
        )
        if state["step"] and self.recipe.data.kind == "webdataset" and was != now:
            self.watch.say(
                f"shards: (processes, workers) were {was}, now {now}: in the rest of this epoch some images "
                "come twice, some not at all"
            )
        whole = StateDictOptions(full_state_dict=True)
        try:  # sharded modules put their shards into the dict that they are given
            # the optimiser first: to have a state to load into, torch takes a step, which moves the weights
            # of some
            set_optimizer_state_dict(
                self.objective, self.optimizer.optimizer, state["optimizer"], options=whole
            )
            set_model_state_dict(self.objective, dict(state["model"]), options=whole)
            if self.ema is not None:
                set_model_state_dict(self.ema.module, dict(state["ema"]), options=whole)
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise TrainingError(f"{path}: weights that do not fit this model: {reason}") from None
        if unknown := state["schedule"].keys() ^ self.schedule.state_dict().keys():
            raise TrainingError(
                f"{path}: a schedule that does not fit this recipe's: {sorted(map(str, unknown))[:3]}"
            )
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.step, self.updates = state["epoch"], state["step"], state["updates"]
        self.history, self.best, self.last_good = list(state["history"]), state["best"], path
        self.sums, self.seconds, self.bad = state["sums"], state["seconds"], state["bad"] | self.bad
        if self.main:
            self._whole(state["ema"] or state["model"])
        # another number of processes: nothing that a step draws depends on these
        if state["world"] == self.place.world:
            try:
                files.set_rng_state(state["rng"][self.place.rank])
            except (LookupError, TypeError, ValueError, RuntimeError) as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise TrainingError(f"{path}: random states that cannot be: {reason}") from None
        self.watch.say(f"going on from {path}: epoch {self.epoch + 1}, step {self.step}")

    def _finish(self):
        """Model files of the last epoch, and of the best one."""
        written = []
        last, best = files.read(self.last_good), self.folder / "best.pt"
        for name in ("model", "ema"):
            if last[name] is not None:
                written.append(self._export(last, name, MODELS[0] if name == "model" else MODELS[1]))
        if self.best is not None and (state := self._best_epoch(best)):
            written.append(self._export(state, "model" if state["ema"] is None else "ema", MODELS[2]))
        elif self.best is not None:
            self.watch.say(
                f"no model_best.safetensors: {best} is not the best epoch, of accuracy {self.best:.2%}"
            )
        self.watch.finish(self.history, written)

    def _export(self, state, name, file):
        """One set of weights of a checkpoint as a model file, with its recipe and its row of the history."""
        metadata = {"recipe": self.recipe.model_dump(mode="json"), **state["history"][-1], "weights": name}
        checkpoints.save(self._whole(state[name]), self.output / file, metadata)
        return self.output / file

    # -- agreement
    # --------------------------------------------------------------------------------------------------------

    def _first(self, work):
        """What the first process does, and its result in all of them; where it fails, all end with its
        message.
        """
        found = problem = None
        if self.main:
            try:
                found = work()
            except (TrainingError, DataError) as error:
                problem = str(error)
            except OSError as error:
                problem = f"{error}; {files.named(self.last_good)}"
        found, problem = self.fabric.broadcast((found, problem))
        if problem is not None:
            raise TrainingError(problem)
        return found

    def _sum(self, *numbers: float) -> list[float]:
        """Each, added over the processes."""
        return self.fabric.all_reduce(
            torch.tensor([float(n) for n in numbers], device=self.device), reduce_op="sum"
        ).tolist()

    def _agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self._sum(flag)[0] > 0

    def _gather(self, value) -> list:
        """One value of each process, in the first one."""
        if self.place.world == 1:
            return [value]
        gathered = [None] * self.place.world if self.main else None
        distributed.gather_object(value, gathered)
        return gathered

    def _check_failures(self, failures):
        """Add what could not be read; too much of it stops every process."""
        if self.place.world > 1 and failures is not None:
            gathered = [None] * self.place.world
            distributed.all_gather_object(gathered, failures)
            failures = [failure for some in gathered for failure in some]
        for name, reason in failures:
            if name not in self.bad:
                self.bad[name] = reason
                self.watch.say(f"skipped {name}: {reason}")
        if len(self.bad) > (limit := self.recipe.data.max_corrupt):
            some = "; ".join(f"{name}: {reason}" for name, reason in list(self.bad.items())[-3:])
            raise TrainingError(
                f"data: expected at most {limit} images that cannot be read (data.max_corrupt), got "
                f"{len(self.bad)}: {some}; "
                f"{files.named(self.last_good)}"
            )

    def _due(self, last):
        """Whether it is time for a checkpoint: by the recipe, and before an evaluation if the last one is
        a minute old.
        """
        minutes = self.recipe.checkpoint.every_minutes
        passed = time.monotonic() - self.clock
        return passed > 60 * minutes > 0 or (last and passed > 60 and self._evaluates())


# -- pieces
# ------------------------------------------------------------------------------------------------------------


def _split(recipe, place):
    """Images of a step for each process, and of a micro-batch: the largest equal part that ``micro_batch``
    allows.
    """
    if recipe.batch_size % place.world:
        raise TrainingError(
            f"batch_size: expected a multiple of {place.world}, the number of processes, got "
            f"{recipe.batch_size}"
        )
    local = recipe.batch_size // place.world
    most = min(local, recipe.micro_batch or local)
    return local, next(size for size in range(most, 0, -1) if local % size == 0)


def _check_folder(recipe, output):
    """TrainingError where the run would write into its data."""
    data = recipe.data
    read = [path for path in (data.path, data.val_path) if path is not None]
    classes = []
    if data.kind == "folder" and data.path is not None:
        classes = [os.path.join(data.path, "train"), data.val_path or os.path.join(data.path, "val")]
    try:
        safety.check_output_folder(output, classes)
        safety.check_outputs([output / name for name in FILES], read)
    except ValueError as error:
        raise TrainingError(str(error)) from None


def _changes(before, after, first, second):
    """What differs in facts about data, in words."""
    return ", ".join(
        f"{key} ({first} {before.get(key)!r}, {second} {after[key]!r})"
        for key in after
        if after[key] != before.get(key)
    )


def _score(row):
    return row.get("ema_val_accuracy", row.get("val_accuracy"))


def _value(recipe, key):
    value = recipe
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


class _Signals:
    """Notes SIGTERM and SIGUSR1 instead of dying of them; the loop asks at its next metrics."""

    def __enter__(self):
        self.asked = False
        self.before = {}
        for name in SIGNALS:
            with contextlib.suppress(ValueError):  # not in the main thread: whoever owns that decides
                self.before[name] = signal.signal(name, self._note)
        return self

    def _note(self, number, frame):
        self.asked = True

    def __exit__(self, *error):
        for name, handler in self.before.items():
            signal.signal(name, handler)
