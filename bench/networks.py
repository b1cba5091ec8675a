"""The modes of a network, whatever its layers: a training step, inference, explanations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.cases import EVERY_CLASS, EXPLANATION, INFERENCE, STEP, Network
from bench.layers import rotation
from coda_fast import create_model


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network as its users run it: with float32 weights, and under autocast where ``dtype`` is lower.

    Attributes:
        logits: images [N, C, H, W] -> [N, classes].
        explained: the same in explanation mode.
        batched: whether an explanation of every class propagates all classes back at once.
    """

    logits: Callable
    explained: Callable
    parameters: list[torch.nn.Parameter]
    classes: int
    dtype: torch.dtype
    device: torch.device
    batched: bool = False

    def setup(self, case: Network, mode: str) -> tuple[list, Callable]:
        """Sets of (images, labels), to be used in rotation, and the function of a mode, which takes one of
        them.
        """
        if mode == STEP:
            return self.inputs(case), self.training_step()
        modes = {
            INFERENCE: self.inference,
            EXPLANATION: self.explanation,
            EVERY_CLASS: self.explanation_of_every_class,
        }
        return self.inputs(case), modes[mode]

    def inputs(self, case: Network) -> list[tuple]:
        generator = torch.Generator(self.device).manual_seed(0)
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        shape, options = (case.batch, 3, case.size, case.size), dict(generator=generator, device=self.device)
        found = []
        for _ in range(rotation(4 * math.prod(shape), self.device)):
            images = torch.rand(shape, **options).contiguous(memory_format=layout)
            found.append((images, torch.randint(self.classes, (case.batch,), **options)))
        return found

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def inference(self, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad(), self.autocast():
            return [self.logits(images)]

    def explanation(self, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        images = images.detach().requires_grad_()
        with self.autocast():
            outputs = self.explained(images)
        chosen = outputs.gather(1, labels[:, None]).sum()
        return [outputs, *torch.autograd.grad(chosen, [images])]

    def explanation_of_every_class(self, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        images = images.detach().requires_grad_()
        with self.autocast():
            outputs = self.explained(images)
        one_hot = torch.eye(self.classes, device=outputs.device, dtype=outputs.dtype)
        upstream = one_hot.unsqueeze(1).expand(-1, len(images), -1)
        send_back = lambda one: torch.autograd.grad(outputs, images, one, retain_graph=True)[0]
        if self.batched:
            return [outputs, torch.func.vmap(send_back)(upstream)]
        return [outputs, torch.stack([send_back(one) for one in upstream])]

    def training_step(self) -> Callable:
        """A step with Adam and binary cross-entropy. Its learning rate is zero, so that every step works on
        the same weights and the time does not depend on the number of steps.
        """
        gpu = self.device.type == "cuda"
        optimiser = torch.optim.Adam(self.parameters, lr=0.0, fused=gpu, capturable=gpu)
        for parameter in self.parameters:  # the moments are allocated before the measurement
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

        def step(images, labels):
            with self.autocast():
                outputs = self.logits(images)
            wanted = F.one_hot(labels, self.classes).float()
            F.binary_cross_entropy_with_logits(outputs.float(), wanted).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)  # at the end, so that gradients count as memory of the step
            return [outputs.detach()]

        return step


def setup(
    layer: Callable,
    case: Network,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    compile: Callable[[Callable], Callable] = lambda function: function,
    batched: bool = False,
) -> tuple[list, Callable]:
    """Inputs and function of a CoDA-Net whose layers are computed by ``layer`` and whose forward pass is
    changed by ``compile``.
    """
    torch.manual_seed(0)
    # without the bias of the logits, next to which the outputs of the layers would vanish in a low-precision
    # dtype
    model = create_model(case.name, logit_bias=0.0).to(
        device, torch.float64 if dtype == torch.float64 else torch.float32
    )
    model.requires_grad_(mode == STEP)  # a compiled backward computes all gradients that are possible

    def logits(images, detach=False):
        x = model.encoder(images)
        # every provider casts once per layer: under autocast alone, the peers would keep float32 activations
        for m in model.layers:
            tensors = (t.to(dtype) for t in (x, m.reduction_weight, m.weight, m.bias))
            x = layer(*tensors, m.stride, m.padding, detach)
        return model.head(x)

    run = compile(logits)
    explained = lambda images: run(images, True)
    parameters = list(model.parameters())
    network = Classifier(run, explained, parameters, model.num_classes, torch.float32, device, batched)
    return network.setup(case, mode)
