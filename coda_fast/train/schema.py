"""The keys of a recipe: their types, their bounds, and the keys that they depend on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from coda_fast.data.preprocessing import INTERPOLATIONS
from coda_fast.functional import NORMS
from coda_fast.train.errors import need

need("pydantic")
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator  # noqa: E402

# Bounds, so that absurd values are refused before anything is allocated.
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Batch = Annotated[int, Field(ge=1, le=2**20)]
Side = Annotated[int, Field(ge=1, le=2**14)]  # pixels
Layers = Annotated[list[Positive], Field(min_length=1, max_length=256)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1, max_length=4096)]
# one name needs no brackets
Names = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=200)]],
    Field(max_length=256),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(_Section):
    """The network: a name in ``coda_fast.list_models()``, and arguments of ``coda_fast.create_model`` that
    replace those of the named network (null: not replaced).

    With ``weights`` the network is that of the file instead, its stem included, with a new last layer if the
    data has another number of classes; ``temperature`` and ``frozen`` replace the stored values, and
    arguments that ask for other layers are refused.
    """

    name: str
    weights: Name | None = None  # a file of coda_fast.save, such as a run's model.safetensors
    # layers that are not trained: names, or patterns such as layers.[0-3]
    freeze: Names = []
    temperature: Rate | None = None
    rank: Positive | None = None
    norm: Literal[NORMS] | None = None  # type: ignore[valid-type]
    logit_bias: float | None = None
    backend: str | None = None
    out_channels: Layers | None = None
    ranks: Layers | None = None
    kernel_sizes: Layers | None = None
    strides: Layers | None = None
    image_size: Side | None = None
    image_channels: Literal[1, 3] | None = None
    # the conventional stem of a hybrid network: its name, the stage after which it is cut, whether it is not
    # trained, and its weights: pretrained (timm's), or a file of coda_fast.save
    stem: Name | None = None
    at: Annotated[int, Field(ge=-64, le=64)] | Name | None = None
    frozen: bool | None = None
    stem_weights: Name | None = None
    stem_options: dict[Name, Any] | None = None

    def arguments(self) -> dict:
        """The arguments that are given, for ``create_model``."""
        given = self.model_dump(exclude={"name", "weights", "freeze"})
        return {key: value for key, value in given.items() if value is not None}


class RandAugment(_Section):
    """timm's RandAugment: ``n`` operations, all of which are applied, with strength ``m`` on the scale of
    arXiv:1909.13719, which ends at 30.
    """

    n: Annotated[int, Field(ge=1, le=100)] = 2
    m: Annotated[float, Field(ge=0, le=30)] = 10


class Data(_Section):
    """The images and their augmentation; docs/training.md describes the layouts."""

    kind: Literal["digits", "npz", "cifar10", "folder", "webdataset"]
    path: str | None = None  # a file, a folder, or (webdataset) a pattern of shards
    val_path: str | None = None  # of the validation images; null: beside the training images
    # webdataset: the number of classes; folder: the most classes, the first in the order of names; null: all
    classes: Annotated[int, Field(ge=1, le=10**7)] | None = None
    flip: bool = False  # flip half of the images left to right
    pad: Annotated[int, Field(ge=0, le=256)] = 0  # pixels of padding before a random crop, as for CIFAR
    resize: Side | None = None  # the shorter side before the crop
    size: Side | None = None  # the side of the square crop; null: all images have one size already
    # one of Pillow's filters, antialiased
    interpolation: Literal[INTERPOLATIONS] = "bilinear"  # type: ignore[valid-type]
    # the smallest and largest share of the area that a random crop covers (as for Inception); null: a crop of
    # ``size`` pixels from a picture resized to ``resize``
    scale: tuple[Share, float] | None = None
    randaugment: RandAugment | None = None
    # a folder for the features of a frozen stem, which are then computed once, not in every epoch
    cache: Name | None = None
    in_memory: bool = False  # folder: decode all images once and store them on the device
    workers: Annotated[int, Field(ge=0, le=256)] = 4  # decoding processes of each training process
    max_corrupt: Count = 100  # the most unreadable images that are skipped; one more ends the run
    train_samples: Positive | None = None  # webdataset: the number of images of an epoch
    shuffle: Annotated[int, Field(ge=1, le=10**6)] = 5000  # webdataset: samples in the shuffle buffer


class Loss(_Section):
    """Binary cross-entropy, averaged over batch and classes, plus ``matrix_weight`` times the matrix
    regulariser (coda_fast.losses).
    """

    label_smoothing: Share = 0.0
    matrix_weight: Weight = 0.0
    matrix_classes: Positive = 2
    matrix_norm: Literal["l1", "l2"] = "l1"


class Optimizer(_Section):
    """A timm optimiser. The learning rate at ``batch_size`` B is ``lr`` (rule "none"), ``lr B /
    reference_batch`` ("linear") or ``lr sqrt(B / reference_batch)`` ("sqrt").
    """

    name: str = "adam"
    lr: Rate
    rule: Literal["none", "linear", "sqrt"] = "none"
    reference_batch: Positive | None = None
    weight_decay: Weight = 0.0
    # null: the defaults of the optimiser
    betas: Annotated[list[Share], Field(min_length=2, max_length=3)] | None = None
    eps: Rate | None = None  # at high T gradients are so small that Adam's default 1e-8 would dominate
    clip: Rate | None = None  # the largest norm of the gradient; larger ones are scaled down


class Schedule(_Section):
    """The learning rate over time. "constant"; "step": divided by ``divisor`` every ``every`` epochs;
    "cosine": updated every step, with a warm-up from 0 over ``warmup`` epochs, decaying to ``last`` times the
    rate; "pieces": linear pieces ``[first epoch, epochs, rate at the first, rate at the last]``, scaled by
    the optimiser's rule, the first of which begins with ``optimizer.lr``.
    """

    kind: Literal["constant", "step", "cosine", "pieces"] = "constant"
    every: Positive | None = None
    divisor: Rate | None = None
    warmup: Weight = 0.0
    last: Share = 0.0
    pieces: list[tuple[Count, Positive, Rate, Rate]] | None = None

    @model_validator(mode="after")
    def _whole(self):
        if self.kind == "step" and (self.every is None or self.divisor is None):
            raise ValueError("expected every and divisor for a schedule of steps")
        if self.kind == "pieces":
            ends = [0]
            for first, epochs, _, _ in self.pieces or ():
                if first != ends[-1]:
                    raise ValueError(f"pieces: expected one that begins at epoch {ends[-1]}, got {first}")
                ends.append(first + epochs)
            if len(ends) == 1:
                raise ValueError("expected pieces for a schedule of pieces")
        return self


class Ema(_Section):
    """The moving average of the weights, timm's ModelEmaV3; decay 0: none."""

    decay: Share = 0.0
    warmup: bool = False


class Checkpoint(_Section):
    """Checkpoints are written after every epoch, and more often if these keys say so. The newest ``keep`` and
    the best one are not deleted.
    """

    every_steps: Count = 0
    every_minutes: Weight = 0.0
    keep: Positive = 3


class Log(_Section):
    """Metrics are written, and checked for NaN, every ``every`` steps. ``maps`` is the number of validation
    images that are explained.
    """

    every: Positive = 50
    maps: Annotated[int, Field(ge=0, le=64)] = 4
    maps_every: Positive = 1  # epochs
    tensorboard: bool = True


class Evaluation(_Section):
    """Loss and accuracy on the validation images, every ``every`` epochs and after the last one."""

    every: Positive = 1  # epochs
    batch_size: Batch = 256  # of each process


class Recipe(_Section):
    """All that a run depends on. ``batch_size`` is the number of images of an optimiser step, over all
    processes; ``micro_batch`` is the most images that a process computes at once.
    """

    name: str
    about: str = ""
    model: Model
    data: Data
    epochs: Annotated[int, Field(ge=1, le=10**6)]
    batch_size: Batch
    micro_batch: Batch | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    loss: Loss = Loss()
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    ema: Ema = Ema()
    # bfloat16 means autocast; weights stay float32
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    channels_last: bool = False
    compile: bool = False
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    # the number of processes on this node, unless torchrun or SLURM gives it
    devices: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _fits(self):
        if self.optimizer.rule != "none" and self.optimizer.reference_batch is None:
            raise ValueError(
                "optimizer.reference_batch: expected the batch size for which lr is given, as the rule "
                f"{self.optimizer.rule!r} needs it, got none"
            )
        if self.schedule.kind == "pieces" and (end := sum(self.schedule.pieces[-1][:2])) < self.epochs:
            raise ValueError(f"schedule.pieces: expected learning rates for {self.epochs} epochs, got {end}")
        if self.schedule.kind == "pieces" and self.optimizer.lr != (first := self.schedule.pieces[0][2]):
            raise ValueError(
                f"optimizer.lr: expected {first:g}, with which schedule.pieces begin, got "
                f"{self.optimizer.lr:g}; change both"
            )
        if self.data.scale is not None and not 0 < self.data.scale[0] <= self.data.scale[1] <= 1:
            raise ValueError(f"data.scale: expected 0 < least <= most <= 1, got {list(self.data.scale)}")
        if self.data.resize is not None and (self.data.size is None or self.data.size > self.data.resize):
            raise ValueError(
                f"data.size: expected a crop of at most data.resize, {self.data.resize} pixels, got "
                f"{self.data.size}"
            )
        if self.loss.matrix_weight and self.loss.label_smoothing:
            raise ValueError(
                "loss.label_smoothing: expected 0 beside the matrix regulariser, which takes classes"
            )
        return self

    def learning_rate(self) -> float:
        """The learning rate at the recipe's batch size, by the optimiser's rule."""
        return self.optimizer.lr * self.scale()

    def scale(self) -> float:
        """The factor by which ``optimizer.rule`` scales learning rates."""
        optimizer = self.optimizer
        if optimizer.rule == "none" or optimizer.reference_batch is None:
            return 1.0
        ratio = self.batch_size / optimizer.reference_batch
        return ratio**0.5 if optimizer.rule == "sqrt" else ratio

    def unused(self) -> dict[str, str]:
        """The keys that have no effect together with the other values, each with what it needs for one."""
        kinds = {"step": ("every", "divisor"), "cosine": ("warmup", "last"), "pieces": ("pieces",)}
        found = {
            f"schedule.{key}": f"schedule.kind={kind}"
            for kind, keys in kinds.items()
            if kind != self.schedule.kind
            for key in keys
        }
        for key, users in _DATA_OF.items():
            if self.data.kind not in users:
                found[f"data.{key}"] = " or ".join(f"data.kind={kind}" for kind in users)
        if self.data.size is None:
            found.setdefault("data.interpolation", "data.size")
        if self.optimizer.rule == "none":
            found["optimizer.reference_batch"] = "optimizer.rule=linear or optimizer.rule=sqrt"
        if not self.loss.matrix_weight:
            found |= dict.fromkeys(("loss.matrix_classes", "loss.matrix_norm"), "loss.matrix_weight above 0")
        if not self.ema.decay:
            found["ema.warmup"] = "ema.decay above 0"
        if not self.log.maps:
            found["log.maps_every"] = "log.maps above 0"
        return found

    def differences(self, other: Recipe) -> list[str]:
        """The keys that differ from ``other`` and change what is computed. A run cannot be resumed with
        different values of these.
        """
        mine, theirs = dict(_flat(self.model_dump())), dict(_flat(other.model_dump()))
        free = _FREE if self.schedule.kind == "cosine" else (*_FREE, "epochs")
        return sorted(
            key
            for key in mine.keys() | theirs.keys()
            if mine.get(key) != theirs.get(key) and not key.startswith(free)
        )

    def to_yaml(self) -> str:
        """The recipe as YAML, with the values of all keys."""
        return need("yaml").safe_dump(self.model_dump(mode="json"), sort_keys=False)


_DATA_OF = {
    "path": ("npz", "cifar10", "folder", "webdataset"),
    "val_path": ("folder", "webdataset"),
    "classes": ("folder", "webdataset"),
    "in_memory": ("folder",),
    "interpolation": ("folder", "webdataset"),
    "workers": ("folder", "webdataset"),
    "max_corrupt": ("npz", "cifar10", "folder", "webdataset"),
    "train_samples": ("webdataset",),
    "shuffle": ("webdataset",),
}

# Keys that a resumed run may change, because they do not change what is computed, only where and how.
_FREE = (
    "name",
    "about",
    "data.path",
    "data.val_path",
    "data.workers",
    "data.cache",
    "data.max_corrupt",
    "accelerator",
    "devices",
    "strategy",
    "micro_batch",
    "compile",
    "channels_last",
    "checkpoint.",
    "log.",
    "evaluation.batch_size",
)


def keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a recipe."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from keys(part, f"{prefix}{name}.")


def _flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value
