"""What a network must offer so that it can be explained, penalised, saved and registered, whatever its shape.

A network is dynamic linear if its class evidence is ``W(x) x``: for a given image a linear map of the encoded
image, whose weights the image itself generates. Networks made of DAU layers, sums, concatenations, and linear
operations without a bias are, however these are connected. ``DynamicLinear`` finds all it needs through the
calls that ``evidence`` makes; ``coda_fast.network.Network`` adds what tools want to know of a classifier.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import nn

from coda_fast import _arguments, registry
from coda_fast._autocast import autocasting, wide
from coda_fast._modes import calls_replaced, explanation_mode
from coda_fast._wrappers import plain_name, unwrap, whole
from coda_fast.nn import AddInverse, DAUConv2d, SumPool2d


class NoCut(ValueError):
    """A DAU layer that does not cut a network: logits are not a sum of contributions of its input alone."""


class DynamicLinear(nn.Module):
    """A classifier of images ``logits = sum_pixels(evidence(encoder(images))) / temperature + logit_bias``.

    A subclass writes ``evidence`` and says its ``num_classes``. What ``evidence`` does must depend on its
    input and on parameters alone (no dropout), call its DAU layers as modules, and be linear but for them.

    Args:
        image_channels: C of the images: 3 for colour, 1 for grey.
        temperature: T, a positive number.
        logit_bias: added to every logit.

    Attributes:
        encoder: ``[x, 1 - x]``: images [N, C, H, W] -> encoded images [N, 2 C, H, W].
        num_classes: how many logits there are.
        class_names: one for each class, or None.

    Raises:
        ValueError: arguments that are no such numbers.

    >>> import torch
    >>> class Residual(DynamicLinear):
    ...     num_classes = 4
    ...     def __init__(self):
    ...         super().__init__(image_channels=1, temperature=10.0)
    ...         self.first = DAUConv2d(2, 4, 3, padding=1, rank=4)
    ...         self.second = DAUConv2d(4, 4, 3, padding=1, rank=4)
    ...     def evidence(self, encoded):
    ...         features = self.first(encoded)
    ...         return features + self.second(features)
    >>> Residual()(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 4])
    """

    num_classes: int
    class_names: list[str] | None = None

    def __init__(self, *, image_channels: int, temperature: float, logit_bias: float = 0.0):
        super().__init__()
        self.image_channels = _arguments.positive_integer(image_channels, "image_channels")
        self.temperature = _arguments.temperature(temperature)
        self.logit_bias = _arguments.number(logit_bias, "logit_bias")
        self.encoder, self.pool = AddInverse(), SumPool2d()

    def evidence(self, encoded: torch.Tensor) -> torch.Tensor:
        """Class evidence maps [N, classes, H', W'] of encoded images [N, 2 C, H, W]: dynamic linear, for each
        image by itself.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a method evidence, got none")

    def head(self, activations: torch.Tensor) -> torch.Tensor:
        """Class evidence maps [N, classes, H, W] -> logits [N, classes], summed and divided by T in float32
        at least.

        They have the dtype of the maps (sums of a network with a large T leave float16, logits do not), but
        are float32 under autocast: beside the bias, bfloat16 would tell hardly any two logits apart.
        """
        if activations.dim() != 4 or activations.shape[1] != self.num_classes:
            raise ValueError(
                f"evidence: expected maps [N, {self.num_classes}, H, W], got shape {list(activations.shape)}"
            )
        logits = self.pool(wide(activations)) / self.temperature + self.logit_bias
        return _as_maps(logits, activations)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [N, classes] of images [N, image_channels, H, W] in [0, 1], unnormalised."""
        self.check_images(images)
        return self.head(self.evidence(self.encoder(images)))

    def check_images(self, images: torch.Tensor) -> None:
        """TypeError or ValueError unless ``images`` is a floating-point [N, image_channels, H, W]."""
        if isinstance(images, torch.fx.Proxy):
            return  # traced: nothing is known of it
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
        if not images.dtype.is_floating_point:
            raise TypeError(f"images: expected floating point in [0, 1], got {images.dtype}")
        if images.dim() != 4 or images.shape[1] != self.image_channels:
            raise ValueError(
                f"images: expected [N, {self.image_channels}, H, W], got shape {list(images.shape)}"
            )

    def dau_layers(self) -> dict[str, DAUConv2d]:
        """The DAU layers by name, in the order in which they were made, without what wraps them."""
        return {
            plain_name(name): module for name, module in self.named_modules() if isinstance(module, DAUConv2d)
        }

    def find_layer(self, layer: str | DAUConv2d | int | None) -> tuple[int | str, DAUConv2d | None]:
        """What an explanation calls a DAU layer, and the layer: its name and itself, or (0, None) for None or
        0, the encoded image.

        Raises:
            ValueError: no layer of this network. TypeError: neither a name nor a layer.
        """
        layers, layer = self.dau_layers(), unwrap(layer)
        if layer is None or (isinstance(layer, int) and not isinstance(layer, bool) and layer == 0):
            return 0, None
        if isinstance(layer, DAUConv2d):
            if (name := next((name for name, other in layers.items() if other is layer), None)) is None:
                raise ValueError("layer: expected a DAU layer of this model, got one of another")
            return name, layer
        if not isinstance(layer, str):
            raise TypeError(
                f"layer: expected the name of a DAU layer, a DAUConv2d of the model or None, got {layer!r}"
            )
        if layer not in layers:
            raise ValueError(f"layer: expected one of {', '.join(layers)}, got {layer!r}")
        return layer, layers[layer]

    def cut(self, encoded: torch.Tensor, layer: DAUConv2d | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(what enters ``layer``, the evidence), computed from there on in explanation mode: the gradient of
        evidence with respect to what enters is a row of the linear map between them. None: the encoded image.

        Raises:
            NoCut: a layer that does not cut the network: evidence also comes by ways that do not lead through
                its input, whose contributions are then not all; or one that is not called once.
        """
        encoded = encoded.detach().requires_grad_()
        with torch.enable_grad(), explanation_mode(self):
            if layer is None:
                return encoded, self.evidence(encoded)
            entered = []

            def enter(called, input):
                if called is layer:
                    entered.append(input.detach().requires_grad_())
                    input = entered[-1]
                return called.forward(input)

            with calls_replaced(enter):
                evidence = self.evidence(encoded)
            name = self.find_layer(layer)[0]
            if len(entered) != 1:
                raise NoCut(f"layer: expected one that is called once, got {name!r}: {len(entered)} calls")
            ones = torch.ones_like(evidence)
            if torch.autograd.grad(evidence, encoded, ones, retain_graph=True, allow_unused=True)[0] is None:
                return entered[0], evidence
            raise NoCut(
                f"layer: expected one that all ways from the image to the logits lead through, got {name!r}, "
                "which some lead around"
            )

    def linearise(self, encoded: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """(evidence, pull_back) of encoded images: ``pull_back(v) = W(x)^T v``, for v in the shape of the
        evidence, has the shape of the encoded image.

        Both are differentiable in parameters and image in full: ``pull_back`` also through the activations
        that the weights of a layer are generated from, which explanation mode cuts off. Costs ``evidence``
        twice, the second time without its layers. A chain does better by ``DAUConv2d.adjoint``, and can be
        exported then: see ``CoDANet``.
        """
        calls = []

        def recording(layer, input):
            output = layer.forward(input)
            calls.append((layer, input, output.detach()))
            return output

        with calls_replaced(recording):
            evidence = self.evidence(encoded)
        autocast = _autocast_state(encoded.device.type)

        def linear(applied):
            """The network once more, as the linear map that it is for this image: nothing is computed in the
            layers, whose outputs are known.
            """
            rest = iter(calls)

            def stand_in(layer, applied):
                known, input, output = next(rest)
                if known is not layer:
                    raise RuntimeError("evidence: expected the same calls of layers twice, got others")
                return _Apply.apply(applied, input, output, layer, autocast)

            with calls_replaced(stand_in):
                return self.evidence(applied)

        _, transposed = torch.func.vjp(linear, encoded.detach())
        return evidence, lambda value: transposed(value)[0]

    def layer_sizes(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """(units, rows, columns) of what leaves each DAU layer, of an image of ``height x width``; those of
        the last call where there are several. Nothing is computed.

        Raises:
            ValueError: a kernel does not fit.
        """
        from torch._subclasses.fake_tensor import FakeTensorMode

        found, names = {}, {layer: name for name, layer in self.dau_layers().items()}
        parameter = next(self.parameters())

        def stand_in(layer, input):
            size = layer.out_channels, *layer.geometry.output_size(*input.shape[2:])
            found[names[layer]] = size
            return input.new_empty(len(input), *size)

        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), calls_replaced(stand_in):
            shape = (1, self.image_channels, height, width)
            images = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
            self.evidence(self.encoder(images))
        return found


class _Apply(torch.autograd.Function):
    """A DAU layer whose weights are those that ``input`` generates, applied to something else; its output is
    known, because that has the same values.
    """

    @staticmethod
    def forward(applied, input, output, layer, autocast):
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, input, _, ctx.layer, ctx.autocast = inputs
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx, value):
        (input,) = ctx.saved_tensors
        with ctx.autocast():
            return ctx.layer.adjoint(input, value.to(input.dtype)), None, None, None, None


def _autocast_state(kind):
    """A context of the autocast that is on now; a backward pass may run in a thread that does not know it."""
    if not autocasting(kind):
        return contextlib.nullcontext
    return functools.partial(torch.autocast, kind, torch.get_autocast_dtype(kind))


def _as_maps(logits, maps):
    return logits if autocasting(maps.device.type) else logits.to(maps.dtype)


# What asks about a dtype is one call in a graph of torch.fx, where it is not known yet.
torch.fx.wrap("wide")
torch.fx.wrap("_as_maps")


# -- the network inside of what a user gives


def need_network(
    model: nn.Module, name: str = "model", kind: type[DynamicLinear] = DynamicLinear
) -> DynamicLinear:
    """The network that ``model`` is or wraps; TypeError where there is none of this kind."""
    inner: nn.Module = unwrap(model)
    if not isinstance(inner, kind):
        wrong = f"expected a {kind.__name__}, got a {type(inner).__name__}"
        raise TypeError(f"{name}: {not_a_network(inner) if kind is DynamicLinear else wrong}")
    return inner


def not_a_network(model: nn.Module) -> str:
    """What an error says of a model that cannot explain itself."""
    layers = sum(isinstance(module, DAUConv2d) for module in model.modules())
    hint = f" with {layers} DAU layers: make a coda_fast.Network of them (docs/replace.md)" if layers else ""
    return f"expected a coda_fast.Network, got a {type(model).__name__}{hint}"


def network_in(model: nn.Module) -> nn.Module:
    """The network that ``model`` is or wraps, whose own rules (sigmoid, encoded pixels) then count; else
    ``model`` as it is. A sharded one is gathered.

    Raises:
        ValueError: a module that holds a network as a part: by which rules it is to be judged cannot be
            known.
    """
    inner = unwrap(model)
    if isinstance(inner, DynamicLinear):
        return gathered(inner)
    if isinstance(inner, nn.Module):
        for name, module in inner.named_modules():
            if isinstance(module, DynamicLinear):
                kind = registry.name_of(type(module), "network")
                raise ValueError(
                    f"model: expected a {kind}, alone or in a wrapper that unwrap knows, or a model "
                    f"without one; got a {type(inner).__name__} around the {kind} {name!r}: give that"
                )
    return model


def gathered(model: DynamicLinear) -> DynamicLinear:
    """A network whose layers can be called one by one: ``model`` itself, or, where FSDP2 has its weights, a
    copy with all of them, which every process must make.

    (FSDP2 lends a layer its weights in a forward pass
    of the whole network alone.)
    """
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return model
    twin = registry.class_of(model)(**model.config(), device="meta")
    state = {plain_name(name): whole(tensor.detach()) for name, tensor in model.state_dict().items()}
    twin.load_state_dict(state, assign=True)
    for name, layer in model.dau_layers().items():
        twin.dau_layers()[name].backend = layer.backend
    return twin.requires_grad_(False).train(model.training)
