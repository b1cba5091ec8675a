"""One training step that runs entirely on the device, so that it can be a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

import coda_fast
from bench import measure

# The network of a rehearsal, because a step of the published network takes seconds on a CPU
TINY = dict(out_channels=[8, 8, 10], ranks=[4, 4, 4], kernel_sizes=[3, 3, 1], strides=[2, 2, 1])


class Trainer:
    """Network, optimiser, moving average and images on a device, and one training step.

    ``step(index, rate)`` uses the images with these indices. ``capture`` makes a CUDA graph of it.
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
        # smaller in the first steps, as timm's moving average with warm-up
        self.keep.fill_(1 - min(self.decay, (1 + self.done) / (10 + self.done)))
        self._step() if self.graph is None else self.graph.replay()
        self.done += 1

    def _step(self):
        images, labels = self._augmented(self.images[self.index]), self.labels[self.index]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half and self.cuda):
            logits = self.model(images.to(torch.float32, memory_format=self.layout).div_(255))
        logits = logits.float()
        loss = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).float())
        # gradients are copied and not accumulated, because autograd chooses the stream for accumulation
        # before the capture
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
        """Random crops of padded uint8 images, and flips, drawn on their device."""
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
        """Run a few steps on another stream, then capture the graph of one step. Returns why not, if that
        fails.
        """
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
            torch.cuda.synchronize()  # raises if the device is lost, and not only the capture
            return measure.reason(error)
        return None

    def averaged(self, dtype: torch.dtype) -> coda_fast.CoDANet:
        """The network with the moving averages as weights."""
        model = coda_fast.CoDANet(**self.model.config(), backend="auto", device="meta")
        state = {
            name: value.detach().to("cpu", dtype)
            for (name, _), value in zip(self.model.named_parameters(), self.ema, strict=True)
        }
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False)


def rate_of(recipe: dict, batch: int, step: int, steps: int, warmup: int) -> float:
    """The learning rate of a step: a linear warm-up to the recipe's rate for this batch size, then a cosine
    to its last rate.
    """
    spec = recipe["optimizer"]
    scale = batch / spec["reference_batch"] if spec.get("rule", "none") != "none" else 1.0
    peak = spec["lr"] * (math.sqrt(scale) if spec.get("rule") == "sqrt" else scale)
    if step < warmup:
        return peak * (step + 1) / warmup
    least = peak * recipe["schedule"].get("last", 0.0)
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * share))


def batches_of(count: int, batch: int, seed: int) -> Iterator[tuple[int, torch.Tensor]]:
    """An endless iterator over (epoch, indices of the images of a step): permutations without the incomplete
    last batch.
    """
    epoch = 0
    while True:
        order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count))
        for start in range(0, count - batch + 1, batch):
            yield epoch, order[start : start + batch]
        epoch += 1
