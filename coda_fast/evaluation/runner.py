"""Evaluations that can be interrupted: the numbers of every method are stored in pieces, from which JSON, CSV
and figures are written at the end.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from coda_fast import __version__
from coda_fast._classes import one_each
from coda_fast._files import atomic_path
from coda_fast.baselines import REVISION
from coda_fast.dynamic_linear import DynamicLinear, network_in
from coda_fast.evaluation import _common as common
from coda_fast.evaluation.completeness import completeness_error
from coda_fast.evaluation.data import Images, Survey
from coda_fast.evaluation.localisation import Localisation, confident_images, draw_grids, score_grids
from coda_fast.evaluation.removal import Removal, pixel_removal
from coda_fast.safety import open_file

METRICS = ("localisation", "removal")
ACCURACY = "accuracy"  # a metric of the model alone, without any attribution method
FILES = ("evaluation.json", "results.json", "results.csv")  # beside figures and pieces


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a metric. ``side``, ``grids``, ``protocol`` and ``seed`` belong to localisation;
    ``order``, ``insert``, ``fraction`` and ``points`` to removal.
    """

    metric: str = "localisation"
    side: int = 3
    grids: int = 500
    protocol: str = "plain"
    seed: int = 42
    order: str = "least"
    insert: bool = False
    fraction: float = 0.25
    points: int = 129
    piece: int = 16  # grids or images that are explained at once and stored together

    def __post_init__(self) -> None:
        common.check_choice("metric", self.metric, METRICS)
        common.check_choice("protocol", self.protocol, common.PROTOCOLS)
        common.check_positive(side=self.side, grids=self.grids, points=self.points, piece=self.piece)


def outputs(folder: Path, metric: str) -> list[Path]:
    """The files that an evaluation writes into its folder; the folder ``pieces`` holds more."""
    return [Path(folder) / name for name in (*FILES, f"{metric}.png", f"{metric}.svg")]


@dataclasses.dataclass
class Evaluation:
    """A model, labelled images, settings and a folder. Attribution methods are measured one by one; pieces
    that the folder already holds are not computed again.

    Attributes:
        model: a classifier.
        images: [N, C, H, W]; ``coda_fast.evaluation.data.Images`` are decoded when they are indexed.
        labels: their classes, [N] or [N, 1].
        settings: of the metric.
        folder: for pieces and results.
        description: facts about model and data that are stored with the results.
        batch_size: the number of masked images that are classified at once.
        confident: the result of ``confident_images``, if it is known.
    """

    model: nn.Module
    images: torch.Tensor | Images
    labels: torch.Tensor
    settings: Settings
    folder: Path
    description: dict = dataclasses.field(default_factory=dict)
    batch_size: int = 256
    confident: dict[int, list[int]] | None = None

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        given = isinstance(self.images, torch.Tensor)
        self.labels = (
            common.labelled(self.images, self.labels)
            if given
            else one_each(self.labels, len(self.images), "labels")
        )
        self.model = network_in(self.model)
        self._work: torch.Tensor | None = None

    # -- pieces ----

    def work(self) -> torch.Tensor:
        """The grids [G, n] or images [N] to explain, as indices of ``images``."""
        if self._work is None:
            if self.settings.metric == "removal":
                if (last := int(self.settings.fraction * self._pixels())) < 1:
                    raise ValueError(f"fraction: expected at least one pixel of {self._pixels()}, got {last}")
                self._work = torch.arange(len(self.images))
            else:
                s = self.settings
                if self.confident is None:
                    self.confident = confident_images(
                        common.logits_of(self.model, self.images, self.batch_size), self.labels
                    )
                self._work = torch.from_numpy(
                    draw_grids(self.confident, s.side**2, s.grids, s.seed, s.protocol)
                )
        return self._work

    def measure(
        self,
        name: str,
        attribution: common.Attribution | common.AttributionMethod | None,
        method_settings: dict,
        progress: Callable[[Iterable, str], Iterable] | None = None,
    ) -> Localisation | Removal:
        """Measure one attribution method, or continue a measurement that was interrupted.

        Args:
            name: of the method, for the files.
            attribution: as for ``coda_fast.evaluation.localisation``.
            method_settings: of the method; pieces that were measured with others are not used.
            progress: a wrapper like tqdm, ``progress(iterable, label)``.

        Raises:
            ValueError: the settings do not fit the images, or the folder holds another evaluation.
        """
        self.work()  # raises before the folder is written to
        _claim(self.folder, self.model, self.description, dataclasses.asdict(self.settings))
        attribute = common.attribution_of(self.model, attribution)
        store = self.folder / "pieces" / f"{name}-{self._digest(method_settings)}"
        store.mkdir(parents=True, exist_ok=True)
        pieces = list(enumerate(self.work().split(self.settings.piece)))
        found = []
        for i, piece in progress(pieces, name) if progress else pieces:
            path = store / f"{i:05d}.npy"
            if (values := self._stored(path, len(piece))) is None:
                with common.evaluated(self.model):
                    values = self._values(piece, attribute).double().numpy()
                with atomic_path(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, values, allow_pickle=False)
            found.append(torch.from_numpy(values))
        values = torch.cat(found)
        if self.settings.metric == "localisation":
            return Localisation(values, self.work(), self.labels.cpu()[self.work()])
        counts = torch.linspace(
            0, int(self.settings.fraction * self._pixels()), self.settings.points, dtype=torch.float64
        ).round()
        return Removal(counts / self._pixels(), values)

    def _stored(self, path, count):
        """The numbers of a piece, or None if the file is missing or damaged."""
        columns = self.settings.side**2 if self.settings.metric == "localisation" else self.settings.points
        try:
            with open_file(path) as file:
                # A larger file is damaged; it is not read into memory.
                if os.fstat(file.fileno()).st_size > 8 * count * columns + 4096:
                    return None
                values = np.load(io.BytesIO(file.read()), allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError):
            return None
        return values if values.shape == (count, columns) and values.dtype == np.float64 else None

    def _values(self, piece, attribute):
        s = self.settings
        if s.metric == "localisation":
            return score_grids(self.images, self.labels, piece, attribute, s.protocol)
        images, labels = self.images[piece], self.labels[piece]
        options = dict(
            order=s.order, fraction=s.fraction, points=s.points, insert=s.insert, batch_size=self.batch_size
        )
        return pixel_removal(self.model, images, labels, attribute, **options).probabilities

    def _pixels(self):
        return self.images.shape[2] * self.images.shape[3]

    @staticmethod
    def _digest(settings):
        return hashlib.sha256(json.dumps([REVISION, settings], sort_keys=True).encode()).hexdigest()[:12]

    # -- results ----

    def write(
        self, results: dict[str, Localisation | Removal], method_settings: dict[str, dict]
    ) -> list[Path]:
        """Write results.json (summaries), results.csv (all numbers) and the figure as PNG and SVG; returns
        their paths.
        """
        from coda_fast.evaluation import figures

        document = {
            "settings": dataclasses.asdict(self.settings),
            **self.description,
            **self._completeness(),
            "methods": {
                name: {**summary(found), "settings": method_settings[name]} for name, found in results.items()
            },
            "coda_fast": __version__,
            "torch": torch.__version__,
        }
        paths = [self.folder / name for name in ("results.json", "results.csv")]
        with atomic_path(paths[0]) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        with atomic_path(paths[1]) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(_table(results))
        return [*paths, *figures.save(results, self.folder, self.settings.metric, self.settings.order)]

    def _completeness(self, most: int = 256):
        """The completeness error of the first images that were evaluated, for their own classes; empty unless
        the model explains itself.
        """
        if not isinstance(self.model, DynamicLinear):
            return {}
        used = self.work().flatten().unique()[:most]
        parts = used.split(self.settings.piece)  # as many images at once as in the measurement
        error = torch.cat(
            [completeness_error(self.model, self.images[part], self.labels[part]) for part in parts]
        )
        return {
            "completeness_error": {
                "worst": float(error.max()),
                "mean": float(error.mean()),
                "images": len(used),
            }
        }


def _claim(folder, model, description, settings):
    """Write into the folder which evaluation it holds: model, data (by content, not by path), settings and
    versions. ValueError if it holds another one.
    """
    parameter = next(model.parameters(), torch.empty(0))
    versions = {
        "coda_fast": __version__,
        "torch": torch.__version__,
        "dtype": str(parameter.dtype),
        "device": parameter.device.type,
    }
    description = {key: value for key, value in description.items() if key not in ("data", "accuracy")}
    mine = json.loads(json.dumps({"settings": settings, **versions, **description}))
    path = folder / "evaluation.json"
    if path.exists():
        try:
            with open_file(path) as file:
                other = json.loads(file.read(1 << 20))
                if not isinstance(other, dict):
                    raise ValueError
        except (ValueError, RecursionError):
            raise ValueError(
                f"output: {path}: expected the description of an evaluation, got another file; move it away"
            ) from None
        if other != mine:
            differing = sorted(k for k in mine.keys() | other.keys() if mine.get(k) != other.get(k))
            raise ValueError(
                f"output: {folder} holds another evaluation (other {', '.join(differing)}); choose another "
                "folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")


def write_accuracy(model: nn.Module, found: Survey, description: dict, folder: Path) -> list[Path]:
    """Write results.json (accuracy) and results.csv (a row for each picture that could be read); returns
    their paths. ValueError: the folder holds another evaluation.
    """
    settings = {"metric": ACCURACY}
    _claim(folder, model, description, settings)
    paths = [folder / name for name in FILES[1:]]
    document = {"settings": settings, **description, "coda_fast": __version__, "torch": torch.__version__}
    with atomic_path(paths[0]) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    with (
        atomic_path(paths[1]) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["picture", "class", "predicted", "logit of class"])
        columns = found.names, found.labels.tolist(), found.predictions.tolist(), found.own.tolist()
        writer.writerows(
            [name, label, predicted, f"{own:.9g}"]
            for name, label, predicted, own in zip(*columns, strict=True)
        )
    return paths


def summary(found: Localisation | Removal) -> dict[str, float]:
    """The summary of one method: for localisation ``Localisation.summary``, for removal the mean and
    quartiles of the area, and the ends of the mean curve.
    """
    if isinstance(found, Localisation):
        return found.summary()
    area, curve = found.area(), found.curve()
    low, middle, high = torch.quantile(area, torch.tensor([0.25, 0.5, 0.75], dtype=area.dtype)).tolist()
    return {
        "mean": float(area.mean()), "q25": low, "median": middle, "q75": high, "images": len(area),
        "start": float(curve[0]), "end": float(curve[-1]),
    }  # fmt: skip


def markdown(results: dict[str, Localisation | Removal]) -> str:
    """A table of all methods in Markdown, the best mean first."""
    lines = ["| method | mean | 25 % | median | 75 % |", "|---|---|---|---|---|"]
    rows = sorted(
        ((name, summary(found)) for name, found in results.items()), key=lambda row: -row[1]["mean"]
    )
    return "\n".join(
        lines
        + [
            f"| {name} | {s['mean']:.4f} | {s['q25']:.4f} | {s['median']:.4f} | {s['q75']:.4f} |"
            for name, s in rows
        ]
    )


def _table(results):
    first = next(iter(results.values()))
    if isinstance(first, Localisation):
        yield ["method", "grid", "cell", "image", "class", "score"]
        for name, found in results.items():
            for g, (scores, images, targets) in enumerate(
                zip(found.scores, found.images, found.targets, strict=True)
            ):
                for j in range(len(scores)):
                    yield [name, g, j, int(images[j]), int(targets[j]), f"{float(scores[j]):.9g}"]
        return
    yield ["method", "image", *(f"{float(f):.6g}" for f in first.fractions)]
    for name, found in results.items():
        for i, row in enumerate(found.probabilities):
            yield [name, i, *(f"{float(p):.9g}" for p in row)]
