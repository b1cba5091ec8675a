"""Networks as files that run without PyTorch (ONNX) or without Python (a package of AOTInductor), with their
exact explanation.

``torch.onnx.export(model, ..., dynamo=True)`` alone also gives a file of standard operators. These functions
add the explanation as part of the program, names of inputs and outputs, any image size and metadata, and
leave either a whole file or none.
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

# bytes of weights: protobuf limits a file to 2 GiB, of which the graph takes some
ONNX_LIMIT = 2**31 - 2**24


class ExportError(RuntimeError):
    """The file cannot be made on this machine; the message names what is missing."""


class Explainer(nn.Module):
    """A network that returns its explanation too: ``forward(images, target)`` gives the logits and the
    contribution map of one class for each image.

    It needs no automatic differentiation: a vector that is one for the class is sent back through the
    transposed layers, whose weights are those that the image generates, and multiplied by the encoded image.
    So it can be exported like any other module, and is itself differentiable. The map is the one of
    ``model.explain(images, target)``: ``contribution_map.sum((1, 2)) + logit_bias`` is the logit, up to
    rounding.

    Args:
        model: a CoDANet with a classifier (also of timm, or in a wrapper: ``coda_fast.unwrap``); shared, not
            copied. Dropout, which some networks of timm have before the classifier, is not applied, not even
            in training mode.

    Shapes: images [N, C, H, W] in [0, 1], target [N] of integers; logits [N, classes], contribution map [N,
    H, W], in logits (float32, or float64 for a network in float64).

    Raises:
        TypeError: not a CoDANet, or a target that is not of integers. ValueError: a network without a
            classifier, shapes that do not fit, classes that do not exist. An exported program cannot raise;
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
        network.config()  # raises for a network of timm without a classifier, which has no logits to explain
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
        # 1 / T is applied last, in float32: a number as small as 1e-5 has two digits in float16
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

    Input ``images`` [N, C, H, W] in [0, 1], unnormalised, any N, float32 (as everything inside, whatever the
    dtype of the model); output ``logits`` [N, classes]. With ``explain`` also the input ``target`` [N],
    int64, and the output ``contribution_map`` [N, H, W]: see ``Explainer``. The file's metadata hold
    ``class_names`` (JSON), ``image_size`` (where the model names them), ``preprocessing`` (JSON: how a
    picture becomes an input, see ``coda_fast.data.Preprocessing``), ``image_channels``, ``logit_bias``,
    ``temperature``, ``coda_fast_version`` and ``torch_version``. The model is not changed.

    Args:
        model: a CoDANet with a classifier, or a wrapper of one.
        path: ends in ``.onnx``; missing folders are made.
        explain: whether the program also computes the explanation.
        size: H and W, for a file that takes images of this size only; None: any size.

    Raises:
        ImportError: onnx or onnxscript is not installed. TypeError, ValueError: not a CoDANet with a
            classifier, a name or size that does not fit, more than 2 GiB of weights. OSError: the file cannot
            be written; an older file of this name is then still there.
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
        # The exporter warns that images and target share their first axis, which is meant, and older releases
        # warn about a function that they call themselves.
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
    """Compile ``model`` ahead of time by AOTInductor into one package, for the kind of device that it is on.

    ``torch._inductor.aoti_load_package(path)`` gives a function of (images) or, with ``explain``, (images,
    target); it needs PyTorch but neither coda_fast nor a compiler, and C++ can load it without Python.
    Inputs, outputs, metadata (its ``get_metadata()``) and arguments are those of ``export_onnx``; ``path``
    ends in ``.pt2``. Compilation takes half a minute to some minutes. The package checks the shapes and
    dtypes of its inputs only where the environment sets ``AOTI_RUNTIME_CHECK_INPUTS=1``.

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
        # torch.export takes 2 for the least length of a dynamic axis, but a network takes 1 as well.
        "aot_inductor.check_lowerbound": False,
        # What depends on the weights alone is computed once, not at every call.
        "aot_inductor.use_runtime_constant_folding": True,
    }
    with torch.no_grad():
        program = torch.export.export(module, arguments, dynamic_shapes=tuple(axes.values()))
        program = program.run_decompositions(torch.export.default_decompositions() | decompositions())
        package = io.BytesIO()  # written to a file, the folders inside would have the temporary file's name
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
    """A float32 copy to be exported, example arguments, and for each input the axes that may have any length,
    as ``dynamic_shapes`` of torch.export.
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
    # A batch of 2, because torch.export takes lengths of 0 and 1 for constants.
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
    """A size with which no layer's output has a height or width of 1, which torch.export would take for a
    constant. Height and width differ, because it would take equal ones for the same variable.
    """
    for side in (32, 64, 128, 256, 512, 1024, 2048):
        try:
            if min(_check_size(model, (side, side + 8))) > 1:
                return side, side + 8
        except ValueError:
            continue
    raise ValueError(
        "model: expected a network for images of at most 2048 x 2056 pixels; name the size of the images"
    )


def _check_size(model, size):
    """The least height and width of the image and all layers' outputs. ValueError: a kernel does not fit."""
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
    if model.image_size is not None:
        found["image_size"] = str(model.image_size)
    if model.class_names is not None:
        found["class_names"] = json.dumps(model.class_names)
    return found


def _strip(model):
    """Take away the notes of the exporter on every node: lines of source code with paths of this machine,
    which are larger than the graph.
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
