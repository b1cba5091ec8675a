"""Stems: the first stages of conventional networks, whose features a hybrid CoDA-Net classifies and explains.

A stem is a timm model by name, a module registered by ``register_stem``, or any module that turns images into
feature maps.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from coda_fast import _arguments
from coda_fast._files import CheckpointError, one_line, opened, regular_file, some
from coda_fast.data.preprocessing import Preprocessing
from coda_fast.placement import Placement, placement_of

PRETRAINED = "pretrained"
PREFIX = "encoder.stem.network."  # of the tensors of a stem in the files of networks
_STEMS: dict[str, Callable[..., nn.Sequential]] = {}


def register_stem(name: str, make: Callable[..., nn.Sequential]) -> None:
    """Make a network known as a stem, so that files can name it. Call this in the module that defines it.

    Args:
        name: of the stem; it hides a model of timm that has the same name.
        make: called with the image channels and with the options of the stem (``stem_options``), returns an
            ``nn.Sequential``: its entries are the stages, after each of which it can be cut.

    Raises:
        ValueError: the name is taken, or contains what names of files use. TypeError: ``make`` is no
        function.
    """
    if not isinstance(name, str) or not name.isidentifier() or _STEMS.get(name, make) is not make:
        raise ValueError(f"name: expected an identifier that no other stem has, got {name!r}")
    if not callable(make):
        raise TypeError(f"make: expected a function that makes an nn.Sequential, got {make!r}")
    _STEMS[name] = make


def stem_names() -> list[str]:
    """The names of the registered stems."""
    return list(_STEMS)


def convolutions(
    channels: int, widths: Sequence[int] = (24, 48, 96, 192), strides: Sequence[int] = (1, 2, 2, 2)
) -> nn.Sequential:
    """A small conventional network, the stem ``convolutions``: for each entry of ``widths`` a stage of two
    3 x 3 convolutions, each followed by batch normalisation and ReLU; ``strides`` are those of the first.
    """
    widths, strides = list(widths), list(strides)
    if len(widths) != len(strides) or not widths or min(*widths, *strides) < 1:
        raise ValueError(
            f"widths, strides: expected as many positive ints in both, got {widths} and {strides}"
        )
    stages: list[nn.Module] = []
    for width, stride in zip(widths, strides, strict=True):
        layers: list[nn.Module] = []
        for step in (stride, 1):
            layers += [
                nn.Conv2d(channels, width, 3, step, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        stages.append(nn.Sequential(*layers))
    return nn.Sequential(*stages)


register_stem("convolutions", convolutions)


def checksum(state: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of the names, dtypes, shapes and numbers of tensors, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Stem(nn.Module):
    """The first stages of a conventional network: images in [0, 1] -> features [N, C, h, w].

    The network's own normalisation by mean and standard deviation is applied inside. A frozen stem is always
    in evaluation mode and its parameters are not trained.

    Args:
        network: the name of a timm model ("resnet18.a1_in1k"; timm must be installed), the name of a
            registered stem, or a module. Files can only hold stems that have names.
        at: the stage after which the network is cut: its index (0 is the first, -1 the last), or its name as
            in timm's ``feature_info`` ("layer2") or in the ``nn.Sequential``; of other modules -1 only.
        frozen: whether the stem is not trained.
        weights: "pretrained": those of timm, which are downloaded if they are not cached; a file: of
            ``coda_fast.save`` with a network that has such a stem, cut at the same stage or a later one, or
            of timm with the whole model (.safetensors, .pth, .bin); None: fresh ones, or those of the module.
        image_channels: 3 for colour, 1 for grey images.
        options: arguments of ``timm.create_model``, or of the function that makes the registered stem.
        mean, std: for each image channel; None: those of timm's configuration, else 0 and 1.
        signed: whether features have both signs; None: they do, unless a ReLU is the last that is done to
            them.
        device, dtype: of the parameters; of a module None keeps its own.

    Attributes:
        channels: the number of channels of the features.
        name: of the network; None for a module.
        stages: the names of all stages of the network.
        preprocessing: how timm prepares images for the network; None if timm does not say.

    Raises:
        ValueError: the name, the stage or the weights are not known, the options do not fit, or the module's
            output is not [N, C, h, w]. TypeError: ``network`` is neither a name nor a module. ImportError:
            timm is not installed. CheckpointError: the file of the weights is not usable. OSError: it cannot
            be read, or the weights cannot be downloaded.
    """

    def __init__(
        self,
        network: str | nn.Module,
        at: int | str = -1,
        *,
        frozen: bool = True,
        weights: str | os.PathLike | None = None,
        image_channels: int = 3,
        options: Mapping[str, Any] | None = None,
        mean: Any = None,
        std: Any = None,
        signed: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.image_channels = _arguments.positive_integer(image_channels, "image_channels")
        if not isinstance(options, Mapping | None):
            raise TypeError(f"stem_options: expected names and values, got {_arguments.short(options)}")
        self.options = dict(options or {})
        self.frozen = _flag(frozen, "frozen")
        self.name = network if isinstance(network, str) else None
        self.preprocessing: Preprocessing | None = None
        self._size = (64, 64)  # of the images with which the shape of the features is found
        configured: Mapping[str, Any] = {}
        if not isinstance(network, str | nn.Module):
            raise TypeError(f"stem: expected the name of a network or a module, got {type(network).__name__}")
        if isinstance(network, nn.Module):
            self.stages, made = _cut(network, at)
        elif network in _STEMS:
            self.stages, made = _registered(network, at, image_channels, self.options, device)
        else:
            of_timm = weights == PRETRAINED or (weights is not None and not _is_ours(weights))
            self.stages, made, configured = _timm(
                network, at, image_channels, self.options, device, weights if of_timm else None
            )
            weights = None if of_timm else weights
            self._size = _native_size(configured, self.options)
            self.preprocessing = _preprocessing(configured, self._size, image_channels)
        self.at = _stage(at, self.stages)
        self.network = made if device is None and dtype is None else made.to(device, dtype)
        like = next(self.network.parameters(), torch.empty(0, device=device, dtype=dtype))
        self._normalisation = {}
        for name, value, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            numbers = _per_channel(configured.get(name, default) if value is None else value, name, self)
            self._normalisation[name] = numbers
            self.register_buffer(name, torch.tensor(numbers, dtype=like.dtype, device=like.device))
        if weights == PRETRAINED:
            raise ValueError(
                f"stem_weights: expected a file for {self.name or type(network).__name__}, which is no timm "
                f"model, got {PRETRAINED!r}"
            )
        if weights is not None:
            self.load(weights)
        self.requires_grad_(not self.frozen)
        # in a tuple, so that it is no part of the network
        self._skeleton = (_skeleton(self.network),)
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}
        self._placements: dict[tuple[int, int], Placement] = {}
        self.channels = self._probe()
        if signed is None:
            signed = not _ends_with_relu(self._skeleton[0], image_channels, *self._size)
        self.signed = _flag(signed, "signed")
        self.register_load_state_dict_post_hook(_complete)
        self.train()

    def train(self, mode: bool = True) -> Stem:
        """As ``nn.Module.train``; the network of a frozen stem stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.network.train(False)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, C, h, w] of images [N, image_channels, H, W] in [0, 1]."""
        shape = (1, -1, 1, 1)
        return _features(self.network((images - self.mean.view(shape)) / self.std.view(shape)))

    def random(self) -> list[str]:
        """The modules that, in their present mode, make features depend on other images of the batch or on
        chance: batch normalisation without running statistics, and in training mode; dropout in training
        mode.
        """
        found = []
        for name, module in self.network.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                varies = module.training or module.running_mean is None
            else:
                kinds = (nn.modules.dropout._DropoutNd, nn.RReLU)
                varies = module.training and (
                    isinstance(module, kinds) or type(module).__name__ == "DropPath"
                )
            if varies:
                found.append(name)
        return found

    def in_words(self) -> str:
        """The name and the stage, such as "resnet18.a1_in1k, layer2"."""
        name, stage = self.name or type(self.network).__name__, self.stages[self.at]
        return ", ".join(dict.fromkeys([name, f"stage {stage}" if stage.isdigit() else stage]))

    def placement(self, height: int, width: int) -> Placement:
        """Where features lie in an image of ``height x width`` pixels."""
        if (found := self._placements.get((height, width))) is None:
            found = placement_of(self._skeleton[0], self.image_channels, height, width)
            self._placements[height, width] = found
        return found

    def stride(self) -> int:
        """Pixels from one feature to the next one, the larger of rows and columns."""
        return round(max(self.placement(*self._size).stride))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the features of an image of ``height x width`` pixels; nothing is computed.

        Raises:
            ValueError: the network does not take images of this size.
        """
        if (found := self._sizes.get((height, width))) is None:
            found = self._sizes[height, width] = self._shape(1, height, width)[2:]
        return found

    def config(self) -> dict:
        """The arguments as JSON values, without weights, device and dtype.

        Raises:
            ValueError: the stem is a module without a name.
        """
        if self.name is None:
            raise ValueError(
                f"stem: expected a stem with a name, which files can hold, got a "
                f"{type(self.network).__name__}: make it known with coda_fast.register_stem"
            )
        return {
            "stem": self.name,
            "at": self.at,
            "frozen": self.frozen,
            "stem_options": self.options,
            **self._normalisation,
            "signed": self.signed,
        }

    def load(self, path: str | os.PathLike) -> None:
        """Read weights from a file of ``coda_fast.save``, as described for ``weights`` above."""
        own = self.network.state_dict()
        with opened(path) as file:
            names = list(file.keys())
            if missing := [name for name in own if PREFIX + name not in names]:
                raise CheckpointError(
                    f"{path}: expected the weights of a stem {self.name!r} cut at {self.stages[self.at]}, "
                    f"found no {some(missing)}"
                )
            found = {name: file.get_tensor(PREFIX + name) for name in own}
        if wrong := [name for name in own if found[name].shape != own[name].shape]:
            raise CheckpointError(
                f"{path}: {wrong[0]}: expected {list(own[wrong[0]].shape)}, got {list(found[wrong[0]].shape)}"
            )
        if not self.mean.is_meta:
            self.network.load_state_dict(found)

    def extra_repr(self) -> str:
        """The name, the stage and whether it is frozen."""
        return f"{self.name!r}, at={self.stages[self.at]!r}, frozen={self.frozen}"

    def _probe(self):
        """The number of channels; ValueError unless the features of two images are those of one, twice."""
        one, two = (self._shape(count, *self._size) for count in (1, 2))
        if two != (2, *one[1:]):
            raise ValueError(
                f"stem: expected features whose shape does not depend on the batch, got {list(one)} for one "
                f"image and {list(two)} for two"
            )
        return one[1]

    def _shape(self, count, height, width):
        try:
            with torch.no_grad():
                images = torch.empty(count, self.image_channels, height, width, device="meta")
                return tuple(self._skeleton[0](images).shape)
        except Exception as error:  # the network may raise anything
            raise ValueError(
                f"stem: expected a network of images [N, {self.image_channels}, {height}, {width}], got "
                f"{one_line(error).removeprefix('stem: ')}"
            ) from None


def _complete(stem, _):
    """Give a stem that was made on the meta device the buffers that are no part of its state dict, such as
    tables of relative positions, once its weights are loaded.
    """
    own, device = stem.network.state_dict(), stem.mean.device
    missing = [name for name, b in stem.network.named_buffers() if b.is_meta and name not in own]
    if not missing or stem.mean.is_meta:
        return
    with torch.random.fork_rng(devices=[]):
        whole = Stem(stem.name, stem.at, image_channels=stem.image_channels, options=stem.options)
    for name in missing:
        owner, _, key = name.rpartition(".")
        buffer = whole.network.get_buffer(name)
        dtype = stem.mean.dtype if buffer.is_floating_point() else buffer.dtype
        setattr(stem.network.get_submodule(owner), key, buffer.to(device, dtype))


def _skeleton(network):
    """A copy in evaluation mode and float32 without numbers, which computes shapes in no time. It is used in
    place of the network, whose mode other threads may rely on.
    """
    memo = {}
    for tensor in (*network.parameters(), *network.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, device="meta", dtype=dtype)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=False)
        memo[id(tensor)] = empty
    return nn.Sequential(copy.deepcopy(network, memo), _Last()).eval()


class _LastOperation(TorchDispatchMode):
    """Records the name of the last operation that wrote to each storage."""

    def __init__(self):
        super().__init__()
        self.names, self.kept = {}, []  # storages are kept, so that none is in the place of an earlier one

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.kept.append(found)
            self.names[found.untyped_storage()._cdata] = func.name()
        return found


def _ends_with_relu(skeleton, channels, height, width):
    """Whether the last operation on the features of a network on the meta device is a ReLU."""
    with torch.no_grad(), _LastOperation() as last:
        features = skeleton(torch.empty(1, channels, height, width, device="meta"))
    return last.names.get(features.untyped_storage()._cdata) in ("aten::relu", "aten::relu_")


class _Last(nn.Module):
    def forward(self, found):
        return _features(found)


def _features(found):
    """The features that a network returned, alone or as the last of a list."""
    if isinstance(found, list | tuple) and found:
        found = found[-1]
    if isinstance(found, torch.fx.Proxy):
        return found  # traced by torch.fx: its shape is not known
    if not isinstance(found, torch.Tensor) or found.dim() != 4:
        got = f"shape {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"stem: expected features [N, C, H, W], got {got}")
    return found


def _cut(network, at):
    """The names of the stages of a module, and the module up to the stage ``at``."""
    if not isinstance(network, nn.Sequential) or type(network).forward is not nn.Sequential.forward:
        if at != -1:
            raise ValueError(
                f"at: expected -1, the whole of a {type(network).__name__}, or an nn.Sequential of stages, "
                f"got {at!r}"
            )
        return [type(network).__name__], network
    children = list(network.named_children())
    if not children:
        raise ValueError("stem: expected an nn.Sequential of stages, got an empty one")
    stages = [name for name, _ in children]
    last = _stage(at, stages) + 1
    return stages, network if last == len(children) else nn.Sequential(OrderedDict(children[:last]))


def _registered(name, at, channels, options, device):
    _check_options(options)
    try:
        with torch.device("cpu" if device is None else device):
            whole = _STEMS[name](channels, **options)
    except Exception as error:  # the function may raise anything
        raise ValueError(
            f"stem_options: expected those of {name!r}, got {options}: {one_line(error)}"
        ) from None
    if not isinstance(whole, nn.Sequential):
        raise ValueError(f"stem: expected {name!r} to be an nn.Sequential, got a {type(whole).__name__}")
    return _cut(whole, at)


def _timm(name, at, channels, options, device, weights):
    """The stages of a timm model, the model up to the stage ``at``, and timm's configuration of it.
    ``weights``: "pretrained", or a file with the state dict of the whole model; None: fresh ones.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"the stem {name!r} needs timm: pip install 'coda-fast[timm]' ({error})") from None
    base, _, tag = name.partition(".")
    # a name such as hf-hub:user/model would be fetched, and a file must not make anything be fetched
    if not timm.is_model(base):
        known = [*_STEMS, *timm.list_models(f"*{base}*")[:3]]
        raise ValueError(
            f"stem: expected a model of timm or a registered stem ({', '.join(known)}, ...), got {name!r}"
        )
    if tag and name not in (tags := timm.list_pretrained(f"{base}.*")):
        raise ValueError(f"stem: expected weights of {base} that timm has ({', '.join(tags)}), got {name!r}")
    _check_options(options)
    options = {"features_only": True, "in_chans": channels, **options}
    try:
        with torch.device("meta"):
            whole = timm.create_model(name, pretrained=False, **options)
        stages = [info["module"] for info in whole.feature_info.info]
        options["out_indices"] = (_stage(at, stages),)
        made = None
        if weights is None or str(device) == "meta":
            with torch.device("cpu" if device is None else device):
                made = timm.create_model(name, pretrained=False, **options)
    except Exception as error:  # timm's models raise errors of any class for arguments that do not fit
        if isinstance(error, ValueError) and str(error).startswith("at: "):
            raise
        raise ValueError(
            f"stem: timm makes no feature extractor of {name!r} with {options}: {one_line(error)}"
        ) from None
    if made is None:
        made = _with_weights(name, options, weights, device)
    configured = timm.models.get_pretrained_cfg(name)
    fmt = getattr(made, "output_fmt", None)
    if str(getattr(fmt, "value", fmt)) == "NHWC":
        made = nn.Sequential(made, ChannelsFirst())
    return stages, made, {} if configured is None else configured.to_dict()


def _with_weights(name, options, weights, device):
    """A timm model with pretrained weights, or with those of a file of timm."""
    import timm

    overlay = None if weights == PRETRAINED else {"file": os.fspath(weights), "hf_hub_id": None}
    try:
        with torch.device("cpu" if device is None else device):
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # of the network connection, or of a file that is not as expected
        text = f"stem_weights: cannot get weights of {name}: {one_line(error)}"
        if weights == PRETRAINED:
            raise OSError(f"{text}; give a file of weights, or None for fresh ones") from None
        raise CheckpointError(f"{weights}: {text}") from None


def _is_ours(path):
    """Whether a file holds a network of this package with a stem."""
    with regular_file(path) as file:
        if Path(path).suffix != ".safetensors" and file.read(9)[8:] != b"{":  # as safetensors files begin
            return False
    with opened(path) as file:
        return any(name.startswith(PREFIX) for name in file.keys())  # noqa: SIM118


def _native_size(configured, options):
    """Height and width of the images that a timm model is made for, at least 64 if it takes any."""
    size = options.get("img_size") or (configured.get("input_size") or (3, 64, 64))[1:]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return max(64, height), max(64, width)


class ChannelsFirst(nn.Module):
    """[N, H, W, C] -> [N, C, H, W]; a list of such features has one entry."""

    def forward(self, features: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """[N, H, W, C] -> [N, C, H, W]."""
        if not isinstance(features, torch.Tensor):
            features = features[-1]
        return features.permute(0, 3, 1, 2)


# arguments of timm.create_model that read files or networks, or that the stem decides
_REFUSED = {
    "cache_dir",
    "checkpoint_path",
    "device",
    "dtype",
    "features_only",
    "in_chans",
    "num_classes",
    "out_indices",
}
# a file that asks for larger numbers or longer lists is damaged or hostile
_MOST, _MOST_LAYERS = 1 << 13, 512


def _check_options(options):
    """Raise a ValueError unless options are plain values that only describe layers."""
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        if name in _REFUSED or name.startswith("pretrained"):
            raise ValueError(f"stem_options: expected arguments that describe layers, got {name!r}")
        plain = all(isinstance(each, bool | int | float | str | None) for each in values)
        large = any(each > _MOST for each in values if isinstance(each, int))
        layers = name in ("depth", "depths", "layers") and sum(v for v in values if isinstance(v, int))
        if not plain or len(values) > 64 or large or layers > _MOST_LAYERS:
            raise ValueError(
                f"stem_options: {name}: expected a number up to {_MOST}, a text, or at most 64 of these, got "
                f"{_arguments.short(value)}"
            )


def _preprocessing(configured, size, channels):
    """The preprocessing that timm's configuration describes; None if it describes none that fits."""
    share = configured.get("crop_pct") or 1.0
    if not configured.get("input_size") or size[0] != size[1]:
        return None
    try:
        interpolation = configured.get("interpolation") or "bicubic"
        return Preprocessing(channels, int(size[0] / share), size[0], interpolation)
    except ValueError:
        return None


def _stage(at, stages):
    """The index of a stage; ValueError if there is none."""
    if isinstance(at, str) and at in stages:
        return stages.index(at)
    if isinstance(at, int) and not isinstance(at, bool) and -len(stages) <= at < len(stages):
        return at % len(stages)
    raise ValueError(
        f"at: expected a stage, 0 to {len(stages) - 1} or one of {', '.join(stages)}, got "
        f"{_arguments.short(at)}"
    )


def _flag(value, name):
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {_arguments.short(value)}")
    return value


def _per_channel(value, name, stem):
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    numbers = [_arguments.number(number, name) for number in numbers]
    if len(numbers) == 3 and stem.image_channels == 1:
        numbers = [sum(numbers) / 3]  # timm sums the weights of the first convolution over colours
    if len(numbers) == 1:
        numbers *= stem.image_channels
    if len(numbers) != stem.image_channels or (name == "std" and min(numbers) <= 0):
        raise ValueError(
            f"{name}: expected {stem.image_channels} numbers{' above 0' * (name == 'std')}, got "
            f"{_arguments.short(value)}"
        )
    return numbers
