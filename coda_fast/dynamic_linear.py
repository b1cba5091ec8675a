"""The base class of networks of any structure that can be explained, penalised, saved and registered.

A network is dynamic linear if its class evidence is ``W(x) x``: for a given image, a linear map of the
encoded image, whose weights the image itself generates. A network of DAU layers, sums, concatenations and
linear operations without a bias is dynamic linear, however these are connected. ``DynamicLinear`` finds all
it needs through the calls of DAU layers that ``evidence`` makes; ``coda_fast.network.Network`` adds what
tools need to know about a classifier.
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
from coda_fast.placement import Placement


class NoCut(ValueError):
    """A DAU layer does not cut the network: logits are not a sum of contributions of its input alone."""


class DynamicLinear(nn.Module):
    """A classifier of images ``logits = sum_pixels(evidence(encoder(images))) / temperature + logit_bias``.

    A subclass defines ``evidence`` and ``num_classes``. ``evidence`` must depend on its input and parameters
    alone (no dropout), call its DAU layers as modules, and be linear apart from them.

    Args:
        image_channels: C of the images: 3 for colour, 1 for grey.
        temperature: T, a positive number.
        logit_bias: added to every logit.
        encoder: turns images into the input of ``evidence``; None: ``AddInverse``. A subclass with another
            one overrides ``encoded_channels`` and ``encoded_size``. Explanations are exact from the encoded
            image to the logits, whatever the encoder computes.

    Attributes:
        encoder: images [N, C, H, W] -> encoded images [N, C', H', W'], by default ``[x, 1 - x]``.
        value_range: the smallest and largest number that an image should hold; None: any.
        num_classes: the number of logits.
        class_names: one for each class, or None.

    Raises:
        ValueError: an argument is not such a number.

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
    value_range: tuple[float, float] | None = (0.0, 1.0)

    def __init__(
        self,
        *,
        image_channels: int,
        temperature: float,
        logit_bias: float = 0.0,
        encoder: nn.Module | None = None,
    ):
        super().__init__()
        self.image_channels = _arguments.positive_integer(image_channels, "image_channels")
        self.temperature = _arguments.temperature(temperature)
        self.logit_bias = _arguments.number(logit_bias, "logit_bias")
        self.encoder = AddInverse() if encoder is None else encoder
        self.pool = SumPool2d()

    @property
    def encoded_channels(self) -> int:
        """The number of channels of an encoded image."""
        return 2 * self.image_channels

    @property
    def signed(self) -> bool:
        """Whether an encoded image has two halves, so that channel c of the image or of the features is
        encoded in channels c and C + c.
        """
        return True

    def encoded_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of an encoded image of ``height x width`` pixels. Nothing is computed."""
        return height, width

    def placement(self, layer: int | str, height: int, width: int) -> Placement | None:
        """Where the entries of the input of a layer (a result of ``find_layer``) lie in an image of ``height
        x width`` pixels; None: each at the pixel with its own indices, or it is not known.
        """
        return None

    @property
    def stem_name(self) -> str | None:
        """The conventional network through which the encoded image is computed, in words; None: there is
        none, and contributions are those of pixels.
        """
        return None

    def check_mode(self) -> None:
        """Raise a ValueError if the network is in a mode in which its logits depend on other images of the
        batch, or on chance, so that they have no explanation.
        """

    def evidence(self, encoded: torch.Tensor) -> torch.Tensor:
        """Class evidence maps [N, classes, H', W'] of encoded images [N, C', H, W], dynamic linear in each
        image independently of the others.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a method evidence, got none")

    def head(self, activations: torch.Tensor) -> torch.Tensor:
        """Class evidence maps [N, classes, H, W] -> logits [N, classes], summed and divided by T in float32
        or wider.

        The logits have the dtype of the maps (with a large T the sums leave the range of float16, but the
        logits do not). Under autocast they are float32, because next to the bias, bfloat16 could hardly tell
        two logits apart.
        """
        traced = isinstance(activations, torch.fx.Proxy)
        if not traced and (activations.dim() != 4 or activations.shape[1] != self.num_classes):
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
        """Raise TypeError or ValueError unless ``images`` is a floating-point [N, image_channels, H, W]."""
        if isinstance(images, torch.fx.Proxy):
            return  # traced by torch.fx: its shape and dtype are not known
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
        if not images.dtype.is_floating_point:
            raise TypeError(f"images: expected floating point in [0, 1], got {images.dtype}")
        if images.dim() != 4 or images.shape[1] != self.image_channels:
            raise ValueError(
                f"images: expected [N, {self.image_channels}, H, W], got shape {list(images.shape)}"
            )

    def dau_layers(self) -> dict[str, DAUConv2d]:
        """The DAU layers by name, without wrappers, in the order in which they were made."""
        return {
            plain_name(name): module for name, module in self.named_modules() if isinstance(module, DAUConv2d)
        }

    def find_layer(self, layer: str | DAUConv2d | int | None) -> tuple[int | str, DAUConv2d | None]:
        """(name, DAU layer) from either of the two; (0, None) for None or 0, which mean the encoded image.

        Raises:
            ValueError: not a layer of this network. TypeError: neither a name nor a layer.
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
        """(input of ``layer``, evidence) in explanation mode: the gradient of an entry of the evidence with
        respect to that input is a row of the linear map between them. ``layer=None``: the encoded image.

        Raises:
            NoCut: the layer does not cut the network, because some paths from the image to the evidence
                bypass it, so that its input does not make up all contributions; or it is not called exactly
                once.
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
                "which some bypass"
            )

    def linearise(self, encoded: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """(evidence, pull_back) of encoded images: ``pull_back(v) = W(x)^T v``, for v in the shape of the
        evidence, has the shape of the encoded image.

        Both are fully differentiable in parameters and image: ``pull_back`` also through the activations
        from which a layer generates its weights, where explanation mode stops gradients. ``evidence`` runs
        twice, the second time without its layers. A chain of layers is faster with ``DAUConv2d.adjoint``, and
        can then be exported: see ``CoDANet``.
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
            """The network once more, as the linear map that it is for this image. The layers compute nothing,
            because their outputs are known.
            """
            rest = iter(calls)

            def stand_in(layer, applied):
                known, input, output = next(rest)
                if known is not layer:
                    raise RuntimeError("evidence: expected the same calls of layers in both runs, got others")
                return _Apply.apply(applied, input, output, layer, autocast)

            with calls_replaced(stand_in):
                return self.evidence(applied)

        _, transposed = torch.func.vjp(linear, encoded.detach())
        return evidence, lambda value: transposed(value)[0]

    def layer_sizes(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """(units, rows, columns) of the output of each DAU layer for an image of ``height x width``; of the
        last call if a layer is called several times. Nothing is computed.

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
            shape = (1, self.encoded_channels, *self.encoded_size(height, width))
            self.evidence(torch.empty(shape, dtype=parameter.dtype, device=parameter.device))
        return found


class _Apply(torch.autograd.Function):
    """A DAU layer with the weights that ``input`` generates, applied to ``applied``. Its output is known,
    because ``applied`` has the same values as ``input``.
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
    """A context that restores the present autocast state in a backward pass, which may run in any thread."""
    if not autocasting(kind):
        return contextlib.nullcontext
    return functools.partial(torch.autocast, kind, torch.get_autocast_dtype(kind))


def _as_maps(logits, maps):
    return logits if autocasting(maps.device.type) else logits.to(maps.dtype)


# torch.fx does not know dtypes while it traces, so it must not trace into functions that ask for one.
torch.fx.wrap("wide")
torch.fx.wrap("_as_maps")


# -- the network inside what a user passes


def need_network(
    model: nn.Module, name: str = "model", kind: type[DynamicLinear] = DynamicLinear
) -> DynamicLinear:
    """The network that ``model`` is or wraps; TypeError if it is not of class ``kind``."""
    inner: nn.Module = unwrap(model)
    if not isinstance(inner, kind):
        wrong = f"expected a {kind.__name__}, got a {type(inner).__name__}"
        raise TypeError(f"{name}: {not_a_network(inner) if kind is DynamicLinear else wrong}")
    return inner


def not_a_network(model: nn.Module) -> str:
    """The text of an error about a model that cannot explain itself."""
    layers = sum(isinstance(module, DAUConv2d) for module in model.modules())
    hint = f" with {layers} DAU layers: make a coda_fast.Network of them (docs/replace.md)" if layers else ""
    return f"expected a coda_fast.Network, got a {type(model).__name__}{hint}"


def network_in(model: nn.Module) -> nn.Module:
    """The network that ``model`` is or wraps, which is then evaluated by its own rules (sigmoid, encoded
    pixels); otherwise ``model`` itself. A sharded network is gathered.

    Raises:
        ValueError: the model contains a network as a part, so it is not known whose rules apply.
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
    """A network whose layers can be called one by one: ``model`` itself, or, if FSDP2 shards its weights, a
    copy with whole weights, which every process must make.

    FSDP2 gives a layer its whole weights only during a forward pass of the whole network.
    """
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return model
    twin = registry.class_of(model)(**model.config(), device="meta")
    state = {plain_name(name): whole(tensor.detach()) for name, tensor in model.state_dict().items()}
    twin.load_state_dict(state, assign=True)
    for name, layer in model.dau_layers().items():
        twin.dau_layers()[name].backend = layer.backend
    return twin.requires_grad_(False).train(model.training)
