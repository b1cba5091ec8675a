"""Exporting networks with their exact explanation, to files that run without PyTorch (ONNX) or without Python
(an AOTInductor package).

``torch.onnx.export(model, ..., dynamo=True)`` alone also gives a file of standard operators. These functions
add the explanation to the program, name inputs and outputs, allow any image size, add metadata, and write a
whole file or none.
"""

from __future__ import annotations

import copy
import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from coda_fast import _decompositions
from coda_fast._autocast import wide
from coda_fast._files import atomic_path
from coda_fast._geometry import pair
from coda_fast._version import __version__
from coda_fast.dynamic_linear import DynamicLinear, need_network
from coda_fast.hybrid import CAMNet
from coda_fast.models import CoDANet

# the most bytes of weights: protobuf limits a file to 2 GiB, and the graph needs some of it
ONNX_LIMIT = 2**31 - 2**24


class ExportError(RuntimeError):
    """The file cannot be made on this machine; the message names what is missing."""


class Explainer(nn.Module):
    """A network that returns its explanation too: ``forward(images, target)`` gives the logits and the
    contribution map of one class for each image.

    It needs no automatic differentiation: it multiplies the one-hot vector of the class by the transposed
    layers, with the weights that the image generates, and the result by the encoded image. So it can be
    exported like any other module, and is itself differentiable. The map is that of
    ``model.explain(images, target)``, of a network with a stem at the resolution of the joint:
    ``contribution_map.sum((1, 2)) + logit_bias`` is the logit, up to rounding.

    Args:
        model: a CoDANet with a classifier, from timm too, or a wrapper of one (``coda_fast.unwrap``). It is
            shared, not copied. Dropout, which some timm networks have before the classifier, is not applied,
            not even in training mode.

    Shapes: images [N, C, H, W] in [0, 1], integer target [N]; logits [N, classes], contribution map [N, H, W]
    (with a stem [N, h, w]) in logits (float32, or float64 for a network in float64).

    Raises:
        TypeError: the model is no ``Network``, or the target does not hold integers. ValueError: the network
            has no classifier, shapes do not fit, or classes do not exist. An exported program cannot raise;
            there, a class that does not exist has a map of zeros.

    >>> import torch, coda_fast
    >>> explainer = coda_fast.Explainer(coda_fast.create_model("coda_xs_digits"))
    >>> logits, contribution_map = explainer(torch.rand(2, 1, 8, 8), torch.tensor([3, 7]))
    >>> contribution_map.shape
    torch.Size([2, 8, 8])
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        network = need_network(model)
        network.config()  # raises for a timm network without a classifier, which has no logits to explain
        self.model = network

    def forward(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, classes] and the contribution maps [N, H, W] of the classes ``target`` [N]."""
        model = self.model
        model.check_images(images)
        _check_target(target, images, model.num_classes)
        encoded = model.encoder(images)
        evidence, pull_back = model.linearise(encoded)
        classes = torch.arange(model.num_classes, device=target.device)
        chosen = (target.unsqueeze(1) == classes).to(evidence.dtype)
        value = pull_back(chosen[:, :, None, None].expand_as(evidence))  # the head sums over pixels
        # 1 / T is applied last, in float32, because float16 holds a number like 1e-5 to two digits only
        return model.head(evidence), (wide(value) * wide(encoded)).sum(1) / model.temperature


def _check_target(target, images, classes):
    if (
        not isinstance(target, torch.Tensor)
        or target.dtype.is_floating_point
        or target.dtype.is_complex
        or target.dtype == torch.bool
    ):
        raise TypeError(
            f"target: expected a tensor of integers, got {getattr(target, 'dtype', type(target).__name__)}"
        )
    if target.dim() != 1 or target.shape[0] != images.shape[0]:
        raise ValueError(
            f"target: expected shape [{images.shape[0]}], a class for each image, got {list(target.shape)}"
        )
    if (
        not torch.compiler.is_compiling()
        and target.numel()
        and not (target.min() >= 0 and target.max() < classes)
    ):
        raise ValueError(
            f"target: expected classes from 0 to {classes - 1}, got {int(target.min())} to "
            f"{int(target.max())}"
        )


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """Each operator of coda_fast in terms of PyTorch's own, for ``ExportedProgram.run_decompositions`` of
    ``torch.export``.

    >>> import torch, coda_fast.export
    >>> program = torch.export.export(coda_fast.create_model("coda_xs_digits"), (torch.rand(1, 1, 8, 8),))
    >>> table = torch.export.default_decompositions() | coda_fast.export.decompositions()
    >>> program = program.run_decompositions(table)
    >>> any("coda_fast" in str(node.target) for node in program.graph.nodes)
    False
    """
    return _decompositions.table()


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    explain: bool = False,
    size: int | tuple[int, int] | None = None,
) -> None:
    """Write ``model`` as one ONNX file of standard operators, for onnxruntime and other runtimes.

    The input ``images`` is [N, C, H, W] in [0, 1], not normalised, with any N, in float32 (as all numbers in
    the file are, whatever the dtype of the model); the output ``logits`` is [N, classes]. With ``explain``
    there are also the input ``target`` [N], int64, and the output ``contribution_map`` [N, H, W]: see
    ``Explainer``. The file's metadata hold ``class_names`` (JSON) and ``image_size`` if the model has them,
    ``preprocessing`` (JSON: how a picture becomes an input, see ``coda_fast.data.Preprocessing``),
    ``image_channels``, ``logit_bias``, ``temperature``, ``coda_fast_version`` and ``torch_version``; with a
    stem also ``stem`` and ``placement`` (JSON: where the entries of the map lie in the image, see
    ``coda_fast.placement.Placement``). The model is not changed.

    Args:
        model: a CoDANet with a classifier, or a wrapper of one.
        path: must end in ``.onnx``; missing folders are made.
        explain: whether the program also computes the explanation.
        size: H and W, for a file that takes images of this size only; None: any size.

    Raises:
        ImportError: onnx or onnxscript is not installed. TypeError, ValueError: the model is no ``Network``
            with a classifier, the path or size does not fit, or there are more than 2 GiB of weights.
            OSError: the file cannot be written; an older file of this name then stays as it was.
    """
    target, network = _path(path, ".onnx"), need_network(model)
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"export to ONNX needs {error.name}: pip install 'coda-fast[onnx]'") from None
    module, arguments, axes = _prepare(network, explain, size, "cpu", ("height", "width"))
    weights = 4 * sum(parameter.numel() for parameter in module.parameters())
    if weights > ONNX_LIMIT:
        raise ValueError(
            f"model: expected at most {ONNX_LIMIT} bytes of weights, what one ONNX file holds, got "
            f"{weights}; export to pt2"
        )
    with torch.no_grad(), warnings.catch_warnings():
        # The exporter warns that images and target share their first axis, which is intended, and older
        # releases warn about a function that they call themselves.
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used", UserWarning)
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            dynamic_shapes=tuple(axes.values()),
            input_names=list(axes),
            output_names=["logits", "contribution_map"][: 1 + explain],
            verbose=False,
        )
    _strip(program.model)
    program.model.metadata_props.update(_metadata(network))
    _write(target, lambda temporary: program.save(temporary, external_data=False))


def export_pt2(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    explain: bool = False,
    size: int | tuple[int, int] | None = None,
) -> None:
    """Compile ``model`` ahead of time with AOTInductor into one package, for the type of device it is on.

    ``torch._inductor.aoti_load_package(path)`` gives a function of (images) or, with ``explain``, (images,
    target); it needs PyTorch but neither coda_fast nor a compiler, and C++ can load it without Python.
    Inputs, outputs, metadata (its ``get_metadata()``) and arguments are those of ``export_onnx``; ``path``
    must end in ``.pt2``. Compilation takes half a minute to a few minutes. The package checks the shapes and
    dtypes of its inputs only if the environment sets ``AOTI_RUNTIME_CHECK_INPUTS=1``.

    Raises:
        ExportError: there is no C++ compiler. TypeError, ValueError, OSError: as ``export_onnx``.
    """
    target, network = _path(path, ".pt2"), need_network(model)
    from torch._inductor import aoti_compile_and_package, cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise ExportError(
            "export to pt2 needs a C++ compiler: install g++, or name one in the environment variable CXX"
        ) from None
    dynamic = torch.export.Dim.DYNAMIC
    module, arguments, axes = _prepare(network, explain, size, None, (dynamic, dynamic))
    options = {
        "aot_inductor.metadata": _metadata(network),
        # torch.export assumes that a dynamic axis has a length of at least 2, but a network accepts 1.
        "aot_inductor.check_lowerbound": False,
        # What depends on the weights alone is computed once, not at every call.
        "aot_inductor.use_runtime_constant_folding": True,
    }
    with torch.no_grad():
        program = torch.export.export(module, arguments, dynamic_shapes=tuple(axes.values()))
        program = program.run_decompositions(torch.export.default_decompositions() | decompositions())
        package = io.BytesIO()  # in memory: folders inside it would get the name of a temporary file
        aoti_compile_and_package(program, package_path=package, inductor_configs=options)
    _write(target, lambda temporary: temporary.write_bytes(package.getbuffer()))


def _path(path, ending):
    path = Path(path)
    if path.suffix != ending:
        raise ValueError(f"path: expected a name that ends in {ending}, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file, got a folder")
    return path


def _prepare(model, explain, size, device, any_size):
    """A float32 copy to export, example arguments, and for each input the axes that may have any length, in
    the form of torch.export's ``dynamic_shapes``.
    """
    explainer = Explainer(model)
    if explain and type(model).linearise is DynamicLinear.linearise:
        raise ValueError(
            f"explain: expected a CoDANet, or a network that writes linearise without automatic "
            f"differentiation, got {type(model).__name__}: export it without its explanation"
        )
    sizes = _example_size(model) if size is None else pair(size, "size")
    _check_size(model, sizes)
    explainer = copy.deepcopy(explainer).float().eval().to(device)
    for layer in explainer.model.dau_layers().values():
        layer.backend = "auto"  # this backend calls the operators, for which there are decompositions
    device = next(explainer.parameters()).device
    # A batch of 2, because torch.export treats lengths of 0 and 1 as constants.
    images = torch.empty(2, model.image_channels, *sizes, device=device)
    batch = torch.export.Dim("batch")
    axes = {0: batch} | (dict(zip((2, 3), any_size, strict=True)) if size is None else {})
    if not explain:
        return explainer.model, (images,), {"images": axes}
    return (
        explainer,
        (images, torch.zeros(2, dtype=torch.int64, device=device)),
        {"images": axes, "target": {0: batch}},
    )


def _example_size(model):
    """A size at which no layer's output has a height or width of 1, which torch.export would treat as a
    constant. Height and width differ, because it would treat equal ones as the same variable.
    """
    for side in (32, 64, 128, 256, 512, 1024, 2048):
        try:
            if min(_check_size(model, (side, side + 8))) > 1:
                return side, side + 8
        except ValueError:
            continue
    raise ValueError(
        "model: expected a network for images of at most 2048 x 2056 pixels; pass the size of the images"
    )


def _check_size(model, size):
    """The smallest height and width among the image and all layers' outputs; ValueError if a kernel does not
    fit.
    """
    sizes = [rows_columns for _, *rows_columns in model.layer_sizes(*size).values()]
    return tuple(min(size[i], *(each[i] for each in sizes)) for i in (0, 1))


def _metadata(model):
    """The metadata of a file, all of them strings."""
    found = {
        "coda_fast_version": __version__,
        "torch_version": str(torch.__version__),
        "image_channels": str(model.image_channels),
        "logit_bias": repr(float(model.logit_bias)),
        "temperature": repr(float(model.temperature)),
    }
    found["preprocessing"] = json.dumps(model.transform.config() | {"channels": model.image_channels})
    if isinstance(model, CoDANet | CAMNet) and model.stem_name is not None:
        size = _example_size(model) if model.image_size is None else (model.image_size,) * 2
        found["stem"] = model.stem_name
        found["placement"] = json.dumps(model.placement(0, *size).config())
    if model.image_size is not None:
        found["image_size"] = str(model.image_size)
    if model.class_names is not None:
        found["class_names"] = json.dumps(model.class_names)
    return found


def _strip(model):
    """Remove the exporter's notes from every node: they hold source code and paths of this machine, and are
    larger than the graph.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _write(path, write):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        write(temporary)
