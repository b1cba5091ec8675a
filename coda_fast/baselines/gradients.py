"""Methods that need one or a few backward passes for each class."""

from __future__ import annotations

import contextlib
import copy

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from coda_fast.baselines._attribution import Attribution
from coda_fast.baselines._registry import Setting, baseline, captum
from coda_fast.models import CoDANet
from coda_fast.network import Network

BATCH_SIZE = Setting(64, most=2**14)  # pairs of an image and a class at once


@baseline("GCam", each_class=True, takes_layer=True, batch_size=BATCH_SIZE)
def grad_cam(method: Attribution, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Grad-CAM at the last layer (``layer=``: another), a map for each class, its positive part enlarged."""
    layer = method.layer or _last_layer(method.model, x)
    attr = captum()
    found = attr.LayerGradCam(method.model, layer).attribute(x, target=target, relu_attributions=True)
    return attr.LayerAttribution.interpolate(found, tuple(x.shape[2:]), "nearest")[:, 0]


@baseline("Grad", each_class=True, batch_size=BATCH_SIZE)
def gradient(method: Attribution, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The gradient of the logit."""
    return captum().Saliency(method.model).attribute(x, target=target, abs=False).sum(1)


@baseline("IxG", each_class=True, batch_size=BATCH_SIZE)
def input_x_gradient(method: Attribution, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Input x Gradient."""
    return captum().InputXGradient(method.model).attribute(x, target=target).sum(1)


@baseline("IntGrad", each_class=True, n_steps=Setting(20, most=10**4), batch_size=BATCH_SIZE)
def integrated_gradients(method: Attribution, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Integrated Gradients from the black image."""
    steps, most = method.settings["n_steps"], max(len(x), method.settings["batch_size"])
    integrated = captum().IntegratedGradients(method.model)
    options = {"baselines": 0, "n_steps": steps, "internal_batch_size": most}
    return integrated.attribute(x, target=target, **options).sum(1)


@baseline("GB", each_class=True, twin="Grad", batch_size=BATCH_SIZE)
def guided_backprop(method: Attribution, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Guided backpropagation."""
    return captum().GuidedBackprop(_separate_activations(method.model)).attribute(x, target=target).sum(1)


@baseline("DeepLIFT", each_class=True, twin="IxG", batch_size=BATCH_SIZE)
def deep_lift(method: Attribution, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """DeepLIFT from the black image, by the rescale rule."""
    deep_lift = captum().DeepLift(_separate_activations(method.model))
    try:
        return deep_lift.attribute(x, baselines=0, target=target).sum(1)
    except (AssertionError, RuntimeError) as error:
        if "more than once" not in str(error):  # another cause, such as out of memory
            raise
        raise ValueError(
            "DeepLIFT: expected a model that calls each of its activation modules once, and captum says: "
            f"{error}"
        ) from error


_RELU = (torch.relu, torch.relu_, F.relu, F.relu_)


def _separate_activations(model):
    """A copy of ``model`` in its present state, in which every call of a ReLU is a module of its own and not
    in place.

    captum attaches its rules to modules: it misses functions and in-place activations, and DeepLIFT needs a
    separate module for each call. If torch.fx cannot trace the model, the copy only has no in-place
    activations, and captum decides whether it can explain that.
    """
    if isinstance(model, CoDANet) and model.stem_name is None:
        return model  # it has no activations
    copied = copy.deepcopy(model)
    with contextlib.suppress(Exception):  # tracing runs the model's own code: anything can be raised
        traced = torch.fx.symbolic_trace(copied)
        seen = set()
        for node in list(traced.graph.nodes):
            function = node.op == "call_function" and node.target in _RELU
            if function or (node.op == "call_method" and node.target in ("relu", "relu_")):
                module, node.op, node.args, node.kwargs = (
                    nn.ReLU(),
                    "call_module",
                    (node.args or (node.kwargs["input"],))[:1],
                    {},
                )
            elif node.op == "call_module" and node.target in seen:
                module = copy.deepcopy(traced.get_submodule(node.target))
            else:
                seen.add(node.target if node.op == "call_module" else None)
                continue
            name = f"separate_{node.name}"
            traced.add_submodule(name, module)
            node.target = name
        traced.recompile()
        copied = traced
    for module in copied.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return copied.eval()


def _last_layer(model, x):
    """The last layer of a CoDA-Net, the layer that another ``Network`` names as its classifier, or the last
    convolution that a forward pass calls. ValueError if there is none.
    """
    if isinstance(model, Network) and model.classifier:
        return model.get_submodule(model.classifier)
    called = []
    hooks = [
        m.register_forward_hook(lambda module, *_: called.append(module))
        for m in model.modules()
        if isinstance(m, nn.modules.conv._ConvNd)
    ]
    try:
        with torch.no_grad():
            model(x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise ValueError(
            f"GCam: expected a model with a convolution, or layer=, got a {type(model).__name__}"
        )
    return called[-1]
