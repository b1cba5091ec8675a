"""Files: whole or not at all, nothing unpickled, every problem named."""

import json
import os
import pickle
import stat
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import GOLDEN, Golden
from torch import nn
from torch.nn.utils import prune

import coda_fast
from coda_fast import CheckpointError, CoDANet, DAUConv2d, checkpoints, create_model


@pytest.fixture
def model():
    return CoDANet(
        [4, 3], [2, 5], [3, 1], [2, 1], temperature=7.0, norm="l2", class_names=["a", "b", "c"], image_size=9
    )


def test_round_trip(model, tmp_path):
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path, {"accuracy": 0.5})
    twin = coda_fast.load(path)
    assert twin.config() == model.config()
    images = torch.rand(2, 3, 9, 9)
    assert torch.equal(twin(images), model(images))
    assert checkpoints.read_metadata(path) == {"accuracy": 0.5}
    assert coda_fast.load(path, temperature=1.0, backend="reference").temperature == 1.0
    assert os.listdir(tmp_path) == ["net.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444


def test_a_network_is_its_own(model, tmp_path):
    """Not a window on its file, which others may write to, nor numbers that lie in memory otherwise than
    those of a fresh network: libraries round differently there.
    """
    path, images = tmp_path / "net.safetensors", torch.rand(2, 3, 9, 9)
    coda_fast.save(model, path)
    twin = coda_fast.load(path)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in twin.parameters())
    with open(path, "r+b") as file:
        file.write(bytes([1]) * path.stat().st_size)
    assert torch.equal(twin(images), model(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_is_kept(tmp_path, dtype):
    model = create_model("coda_xs_digits", dtype=dtype)
    coda_fast.save(model, tmp_path / "net.safetensors")
    assert next(coda_fast.load(tmp_path / "net.safetensors").parameters()).dtype == dtype


def test_files_of_the_first_release_load_as_before():
    """checkpoint_0 was written by the code of 2026-11-27: weights from stated numbers, and the logits that
    it gave in float64.
    """
    net = coda_fast.load(GOLDEN / "checkpoint_0.safetensors")
    for k, parameter in enumerate(net.parameters()):
        assert torch.equal(
            parameter,
            (torch.arange(parameter.numel(), dtype=torch.float32) * (0.7 + k)).sin().view_as(parameter),
        )
    assert net.config() == {
        "out_channels": [4, 3],
        "ranks": [2, 5],
        "kernel_sizes": [[3, 1], 2],
        "strides": [2, [1, 2]],
        "paddings": ["valid", 1],
        "temperature": 2.5,
        "logit_bias": -1.25,
        "norm": "l2",
        "eps": 1e-3,
        "bias": False,
        "image_channels": 1,
        "image_size": 9,
        "class_names": ["a", "b", "c"],
        # implied, by the size
        "preprocessing": {"resize": 9, "crop": 9, "interpolation": "bilinear", "value_range": [0.0, 1.0]},
    }
    assert checkpoints.read_metadata(GOLDEN / "checkpoint_0.safetensors") == {"accuracy": 0.5}
    logits = net.double()(torch.linspace(0, 1, 162, dtype=torch.float32).view(2, 1, 9, 9).double())
    expected = [
        [-1.3229814997841136, -0.7302787089452933, -0.3512620561748532],
        [-1.5117577149961785, -0.7785054876824571, -0.22584644581762592],
    ]
    assert torch.allclose(logits, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


def _mixed():
    torch.manual_seed(0)
    return CoDANet([4, 5, 3], [2, 5, 3], [3, 3, 1], [1, 1, 1], temperature=2.0, class_names=["a", "b", "c"])


def _third(**options):
    """The layer in the middle, with other options."""
    return DAUConv2d(4, 5, 3, **({"padding": 1, "rank": 5} | options))


@pytest.mark.parametrize(
    ("layer", "entry"),
    [
        (dict(padding=2, dilation=2), ("dilations", [1, 2, 1])),
        (dict(padding=(1, 3), dilation=(1, 3)), ("dilations", [1, [1, 3], 1])),
        (dict(norm="l2"), ("norm", ["squash", "l2", "squash"])),
        (dict(norm="l2", eps=0.5), ("eps", [1e-6, 0.5, 1e-6])),
        (dict(bias=False), ("bias", [True, False, True])),
        (dict(padding="same"), ("paddings", [1, "same", 0])),
    ],
    ids=str,
)
def test_every_layer_keeps_its_own_options(tmp_path, layer, entry):
    net, images = _mixed(), torch.rand(2, 3, 9, 9)
    plain = net(images)
    net.layers[1] = _third(**layer)
    coda_fast.save(net, tmp_path / "net.safetensors")
    twin = coda_fast.load(tmp_path / "net.safetensors")
    assert torch.equal(twin(images), net(images))
    assert not torch.equal(twin(images), plain)
    assert twin.config() == net.config()
    assert net.config()[entry[0]] == entry[1]
    assert str(twin) == str(net)


class _Doubled(DAUConv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class _Halved(CoDANet):
    def head(self, activations):
        return super().head(activations) / 2


def _halved():
    return _Halved([4, 5, 3], [2, 5, 3], [3, 3, 1], [1, 1, 1], temperature=2.0)


def _pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def _sparse(layer):
    return nn.Parameter(layer.weight.detach().to_sparse())


def _changed(change):
    net = _mixed()
    return change(net) or net


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda n: n.layers.__setitem__(1, nn.Conv2d(4, 5, 3)),
            "layers.1: expected DAUConv2d, got Conv2d, which no configuration",
        ),
        (
            lambda n: n.layers.__setitem__(1, _Doubled(4, 5, 3, rank=5)),
            "layers.1: .* got _Doubled with a forward of its own",
        ),
        (
            lambda n: n.layers.__setitem__(1, nn.Sequential(_third())),
            "layers.1: expected DAUConv2d, got Sequential",
        ),
        (
            lambda n: n.layers[1].double() and None,
            "layers.1.reduction_weight: expected torch.float32, as in layers.0, got torch.float64",
        ),
        (
            lambda n: n.to(torch.float8_e4m3fn),
            "layers.0.reduction_weight: expected torch.float32 or .*, got torch.float8_e4m3fn",
        ),
        (
            lambda n: n.to("meta"),
            "layers.0.reduction_weight: expected numbers, got a tensor on the meta device",
        ),
        (lambda n: _pruned(n.layers[1]), r"layers.1: .*has \['weight_mask', 'weight_orig'\].*prune.remove"),
        (
            lambda n: nn.utils.parametrizations.weight_norm(n.layers[1]) and None,
            "layers.1: .*parametrizations.weight.original0.*remove",
        ),
        (
            lambda n: nn.utils.weight_norm(n.layers[1]) and None,
            r"layers.1: .*has \['weight_g', 'weight_v'\].*remove_weight_norm",
        ),
        (
            lambda n: nn.utils.parametrizations.spectral_norm(n.layers[0], "reduction_weight") and None,
            "layers.0: .*parametrizations.reduc",
        ),
        (
            lambda n: n.layers[2].register_buffer("mean", torch.zeros(3)),
            r"layers.2: .*has \['mean'\] besides",
        ),
        (
            lambda n: n.layers[2].add_module("batch", nn.BatchNorm2d(3)),
            r"layers.2: .*has \['batch.bias', .*\] besides",
        ),
        (lambda n: n.register_buffer("mean", torch.zeros(3)), r"model: .*has \['mean'\] besides"),
        (lambda n: n.layers[1].register_parameter("weight", None), r"layers.1: .*lacks \['weight'\]"),
        (
            lambda n: setattr(n, "class_names", ["a"]),
            "class_names: expected 3 names, one for each class, got 1",
        ),
        (
            lambda n: n.layers.__setitem__(2, DAUConv2d(5, 7, 1, rank=3)),
            "class_names: expected 7 names, one for each class, got 3",
        ),
        (
            lambda n: n.layers.__setitem__(1, DAUConv2d(4, 6, 3, rank=5)),
            r"layers.2.reduction_weight: expected shape \[3, 6, 1, 1\]",
        ),
        (
            lambda n: setattr(n.layers[1], "rank", 4),
            r"layers.1.reduction_weight: expected shape \[4, 4, 3, 3\], as configured, got \[5, 4",
        ),
        (lambda n: setattr(n.layers[1], "norm", "max"), "norm: expected one of 'squash', 'l2', got 'max'"),
        (lambda n: setattr(n, "temperature", float("nan")), "temperature: expected a finite number"),
        (lambda n: setattr(n, "encoder", nn.Identity()), "encoder: expected AddInverse, got Identity"),
        (lambda n: setattr(n, "pool", nn.Flatten()), "pool: expected SumPool2d, got Flatten"),
        (lambda n: _halved(), "model: expected CoDANet, got _Halved with a head of its own"),
        (
            lambda n: setattr(n.layers[1], "weight", _sparse(n.layers[1])),
            "layers.1.weight: expected a dense tensor, got torch.sparse_coo",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_refuses_to_save_what_load_would_misread(tmp_path, change, message):
    """One line that names the layer and what it has, before a byte is written."""
    net = _changed(change)
    with pytest.raises(ValueError, match=message) as caught:
        coda_fast.save(net, tmp_path / "net.safetensors")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        checkpoints.to_published(net)


def test_saves_what_computes_the_same(tmp_path):
    """A subclass that computes nothing anew, one weight in two layers, weights in another memory format,
    layers that are compiled.
    """

    class Named(DAUConv2d):
        """With nothing of its own."""

    net, images = _mixed(), torch.rand(2, 3, 9, 9)
    net.layers[1] = Named(4, 4, 3, padding=1, rank=5)
    net.layers.insert(1, DAUConv2d(4, 4, 3, padding=1, rank=5))
    net.layers[2].weight = net.layers[1].weight
    net.layers[3] = torch.compile(DAUConv2d(4, 3, 1, rank=3), backend="eager")
    for _ in range(2):
        coda_fast.save(net, tmp_path / "net.safetensors")
        assert torch.allclose(coda_fast.load(tmp_path / "net.safetensors")(images), net(images), rtol=1e-6)
        net.to(memory_format=torch.channels_last)


def test_save_refuses_others(model, tmp_path):
    with pytest.raises(TypeError, match="model: expected a CoDANet, got Linear"):
        coda_fast.save(nn.Linear(2, 2), tmp_path / "net.safetensors")
    nested = []
    nested.append(nested)
    for metadata in ({"model": model}, {"a": nested}, [3]):
        with pytest.raises(TypeError, match="metadata: expected a dict that JSON can hold"):
            coda_fast.save(model, tmp_path / "net.safetensors", metadata)
    os.mkfifo(tmp_path / "pipe")
    for place, what in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe"), ("/dev/null", "a device")):
        with pytest.raises(OSError, match=f"expected a file or nothing, got {what}"):
            coda_fast.save(model, place)
    assert os.listdir(tmp_path) == ["pipe"]


def test_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        coda_fast.save(create_model("coda_xs_digits"), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.safetensors"]


def test_bad_files(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors: no such checkpoint"):
        coda_fast.load(tmp_path / "nothing.safetensors")
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path)
    whole = path.read_bytes()
    for damaged in (b"", b"hello world", whole[:20], whole[:-50]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="net.safetensors: "):
            coda_fast.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of coda_fast .*found None"):
        coda_fast.load(path)


def test_weights_that_do_not_fit(model, tmp_path):
    path = tmp_path / "net.safetensors"
    tensors = dict(model.state_dict())
    tensors["layers.0.weight"] = torch.zeros(1, 2, 3)
    tensors["extra"] = tensors.pop("layers.1.bias").contiguous()
    header = {"format": "coda_fast.CoDANet", "config": json.dumps(model.config()), "metadata": "{}"}
    save_file(tensors, path, header)
    with pytest.raises(
        CheckpointError,
        match=r"unknown key 'extra'; missing key 'layers.1.bias'; "
        r"'layers.0.weight': expected .* got \[1, 2, 3\]",
    ):
        coda_fast.load(path)


def _header(model, **changes):
    return {"format": "coda_fast.CoDANet", "config": json.dumps(model.config()), "metadata": "{}"} | changes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config is missing"),
        ("{", "config is missing or not JSON"),
        ("[]", "config: expected a JSON object, got list"),
        ({"widths": 3}, r"unknown entries \['widths'\]"),
        ({"device": "cuda"}, r"unknown entries \['device'\]"),
        ({"out_channels": None}, "does not give a network"),
        ({"strides": None}, "does not give a network"),
        ({"temperature": "hot"}, "temperature: expected a number, got 'hot'"),
        ({"logit_bias": "x"}, "logit_bias: expected a number"),
        ({"image_size": -8}, "image_size: expected a positive int"),
        ({"class_names": [1, 2, 3]}, "class_names: expected a list of strings"),
        ({"ranks": [10**13, 5]}, r"'layers.0.weight': expected \[4, 10000000000000, 6, 3, 3\]"),
        ({"image_size": 10**9}, "image_size: expected a positive int, at most 65536, got 1000000000"),
        ({"image_size": 2**70}, r"image_size: expected a positive int, at most 65536, got about 2\*\*70"),
        ({"image_size": 1e9}, "image_size: expected a positive int"),
        ({"image_size": True}, "image_size: expected a positive int"),
        ({"image_channels": "3"}, "image_channels: expected a positive int, got '3'"),
        ({"image_channels": [3]}, "image_channels: expected a positive int"),
        ({"out_channels": "abc"}, "out_channels: expected a list with an entry for each layer, got 'abc'"),
        ({"out_channels": {"4": 1, "3": 2}}, "out_channels: expected a list"),
        ({"out_channels": [[4], 3]}, r"out_channels\[0\]: expected a positive int, got \[4\]"),
        ({"out_channels": [-4, 3]}, r"out_channels\[0\]: expected a positive int, got -4"),
        ({"out_channels": [4] * 10**6}, "expected at least 2 tensors for each of 1000000 layers, got 6"),
        (
            {"out_channels": [2**70, 3]},
            r"weights: expected less than 2\*\*63 bytes for a layer, got about 2\*\*7",
        ),
        (
            {"ranks": [2**62, 2**62]},
            r"weights: expected less than 2\*\*63 bytes for a layer, got about 2\*\*7",
        ),
        ({"kernel_sizes": [2**70, 1]}, r"kernel_sizes\[0\]: expected at most 65536, got about 2\*\*70"),
        ({"kernel_sizes": [[3, 3, 3], 1]}, r"kernel_sizes\[0\]: expected an int or a pair of ints"),
        ({"strides": [10**6, 1]}, r"strides\[0\]: expected at most 65536"),
        ({"paddings": [0, 10**6]}, r"paddings\[1\]: expected at most 65536"),
        ({"paddings": ["reflect", 0]}, 'padding: expected "same", "valid"'),
        ({"dilations": [0, 1]}, r"dilations\[0\]: expected at least 1"),
        ({"dilations": [1]}, "dilations: expected 2 entries"),
        ({"temperature": 10**4000}, "temperature: expected a finite number"),
        ({"temperature": float("nan")}, "temperature: expected a finite number"),
        ({"temperature": float("inf")}, "temperature: expected a finite number"),
        ({"temperature": 1e-300}, "temperature: expected a positive number, at least 1.2e-38"),
        ({"temperature": "7"}, "temperature: expected a number, got '7'"),
        ({"temperature": [7]}, "temperature: expected a number"),
        ({"logit_bias": 1e300}, "logit_bias: expected a finite number"),
        ({"norm": ["l2"]}, "norm: expected 2 entries"),
        ({"norm": ["l2", "l3"]}, "norm: expected one of 'squash', 'l2', got 'l3'"),
        ({"eps": [1e-6, float("inf")]}, "eps: expected a finite number"),
        ({"eps": "small"}, "eps: expected a number"),
        ({"bias": "no"}, "bias: expected True or False, got 'no'"),
        ({"bias": [True, None]}, "bias: expected True or False, got None"),
        ({"class_names": "abc"}, "class_names: expected a list of strings, got 'abc'"),
        ({"class_names": ["a"] * 10**6}, "class_names: expected 3 names, one for each class, got 1000000"),
        ({"save_contraction": "x"}, "unknown entries"),
        ({"x" * 10**6: 1}, "unknown entries"),
        ('{"temperature": 1, "temperature": 2}', "a key comes twice"),
        ('{"a":' + "[" * 100_000, "config is missing or not JSON .RecursionError"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "config is missing or not JSON .RecursionError"),
        ('{"image_size": ' + "9" * 5000 + "}", "config is missing or not JSON .ValueError"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_configurations(model, tmp_path, config, message):
    path = tmp_path / "net.safetensors"
    header = _header(model)
    if isinstance(config, dict):
        header["config"] = json.dumps(model.config() | config)
    elif config is None:
        del header["config"]
    else:
        header["config"] = config
    save_file(dict(model.state_dict()), path, header)
    with pytest.raises(CheckpointError, match=message) as caught:
        coda_fast.load(path)
    assert "net.safetensors: " in str(caught.value)
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


def test_bad_tensors(model, tmp_path):
    path = tmp_path / "net.safetensors"
    for tensors in (
        {k: v.to(torch.int8) for k, v in model.state_dict().items()},
        {**model.state_dict(), "layers.0.bias": torch.zeros(1).double()},
    ):
        save_file(tensors, path, _header(model))
        with pytest.raises(CheckpointError, match="expected tensors of one dtype"):
            coda_fast.load(path)


def test_nothing_is_read_before_configuration_and_tensors_agree(model, tmp_path, monkeypatch):
    """Nor where they agree on what the machine cannot hold."""
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path)
    read = []

    class Watched:
        def __init__(self, *args, **options):
            self.file = safe_open(*args, **options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr("safetensors.safe_open", Watched)
    coda_fast.load(path)
    assert len(read) == 6
    read.clear()
    with pytest.raises(CheckpointError, match=r"'layers.0.weight': expected \[4, 9, 6, 3, 3\]"):
        coda_fast.load(path, ranks=[9, 5])
    monkeypatch.setattr("coda_fast.safety.machine_memory", lambda device="cpu": 1000)
    with pytest.raises(ValueError, match=r"weights: expected what fits into the .* of this machine"):
        coda_fast.load(path)
    assert not read


def test_headers_that_lie(model, tmp_path):
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path)
    whole = path.read_bytes()
    for damaged in (
        whole.replace(b'"shape":[4,2,6', b'"shape":[9,2,6'),
        whole.replace(b'"shape":[4,2,6', b'"shape":[-4,2,6'),
        whole.replace(b'"data_offsets":[0,', b'"data_offsets":[8,'),
        struct.pack("<Q", 2**63) + whole[8:],
        struct.pack("<Q", 100_000) + b'{"a":' + b"[" * 99_995,
    ):
        assert damaged != whole
        path.write_bytes(damaged)
        for read in (coda_fast.load, checkpoints.read_metadata):
            with pytest.raises(
                CheckpointError, match="net.safetensors: not a safetensors file: Error"
            ) as caught:
                read(path)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [coda_fast.load, checkpoints.read_metadata, checkpoints.read_state_dict])
def test_what_is_no_file(read, tmp_path):
    """A pipe would wait for a writer, a device may never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path, what in (
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "a pipe"),
        (tmp_path / "link", "a pipe"),
        (Path("/dev/zero"), "a device"),
    ):
        with pytest.raises(CheckpointError, match=f"{path.name}: expected a file, got {what}"):
            read(path)
    with pytest.raises(CheckpointError, match="expected the name of a file"):
        read("a\0b")
    for path in (tmp_path / "nothing", tmp_path / "nothing" / "there"):
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            read(path)


def test_a_file_that_may_not_be_read(model, tmp_path):
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path)
    path.chmod(0)
    user = os.geteuid()
    try:
        if not user:  # root may read everything
            os.seteuid(65534)
        for read in (coda_fast.load, checkpoints.read_metadata, checkpoints.read_state_dict):
            with pytest.raises(PermissionError):
                read(path)
    finally:
        os.seteuid(user)


def test_the_command_line_says_it_in_one_line(model, tmp_path, capsys):
    from coda_fast.cli import main

    path = tmp_path / "net.safetensors"
    save_file(
        dict(model.state_dict()),
        path,
        _header(model, config=json.dumps(model.config() | {"image_size": 2**70})),
    )
    os.mkfifo(tmp_path / "pipe")
    for checkpoint, message in (
        (path, "image_size: expected a positive int"),
        (tmp_path / "pipe", "expected a file, got a pipe"),
    ):
        for command in (["explain", "x.png"], ["evaluate", "--data", "digits"], ["report", "x.png"]):
            with pytest.raises(SystemExit) as ended:
                main([*command, "--checkpoint", str(checkpoint), "--output", str(tmp_path / "output")])
            error = capsys.readouterr().err
            assert ended.value.code == 2
            assert error.startswith("coda-fast: ")
            assert message in error
            assert error.count("\n") == 1
    assert not (tmp_path / "output").exists()


# -- the published format
# ------------------------------------------------------------------------------------------------------------

OPTIONS = dict(strides=[1, 2, 1, 1], paddings=[1, 1, 1, 0], temperature=20, logit_bias=-2.2)


def _state():
    golden = Golden("net_small")
    return {key.removeprefix("param/"): golden[key] for key in golden.keys("param/")}


A1, BIAS1 = "1.weight_mod.weighting_f.1.weight", "1.weight_mod.weighting_f.1.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"fc.weight": torch.zeros(1)}, "unknown key 'fc.weight'"),
        (lambda s: {k: v for k, v in s.items() if k != A1}, f"missing key '{A1}'"),
        (
            lambda s: s | {A1: s[A1][:, :3]},
            rf"'{A1}': expected \[72 \* units, 8, 1, 1\], got \[576, 3, 1, 1\]",
        ),
        (
            lambda s: s | {A1: s[A1][:100]},
            rf"'{A1}': expected \[72 \* units, 8, 1, 1\], got \[100, 8, 1, 1\]",
        ),
        (
            lambda s: s | {BIAS1: torch.zeros(5, dtype=torch.float64)},
            rf"'{BIAS1}': expected \[576\], got \[5\]",
        ),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("1.")}, "no keys for layer 1"),
        (lambda s: s | {"module." + A1: s[A1]}, r"keys with different prefixes \['', 'module.'\]"),
        (lambda s: {}, "no layers"),
        (
            lambda s: s | {A1: torch.tensor(1.0, dtype=torch.float64)},
            rf"'{A1}': expected \[72 \* units, 8, 1, 1\], got \[\]",
        ),
        (lambda s: s | {A1: None}, f"'{A1}': expected a floating-point tensor .* got NoneType"),
        (lambda s: s | {A1: s[A1].long()}, f"'{A1}': expected a floating-point tensor .* got torch.int64"),
        (lambda s: s | {A1: s[A1].float()}, "tensors of different dtypes"),
        (lambda s: {k: v for k, v in s.items() if k != BIAS1}, f"missing key '{BIAS1}'"),
        (lambda s: s | {"01." + A1[2:]: s[A1]}, "a second tensor for layer 1"),
        (lambda s: {("9" * 9 + k[1:]) if k[0] == "1" else k: v for k, v in s.items()}, "no keys for layer 1"),
        (lambda s: s | {"9" * 5000 + A1[1:]: s[A1]}, "unknown key '9999"),
        (lambda s: s | {f"x{i}": s[A1] for i in range(10**5)}, "unknown key 'x9'; and 99990 more"),
        (lambda s: s | {A1: s[A1].to_sparse()}, f"'{A1}': expected a floating-point tensor"),
        (
            lambda s: s | {A1: torch.zeros(1, dtype=torch.float64).expand(72 * 10**12, 8, 1, 1)},
            "weights: expected what fits into the",
        ),
        (lambda s: list(s.items()), "state dict: expected names to tensors, got list"),
    ],
)
def test_from_published_names_the_problem(change, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.from_published(change(_state()), **OPTIONS)


def test_from_published_names_all_problems():
    state = _state()
    del state[A1]
    state["x"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.from_published(state, **OPTIONS)
    assert "unknown key 'x'" in str(caught.value)
    assert f"missing key '{A1}'" in str(caught.value)


def test_from_published_checks_geometry():
    with pytest.raises(
        CheckpointError, match="strides: expected 4 entries, one for each layer of the state dict, got 2"
    ):
        checkpoints.from_published(_state(), **(OPTIONS | dict(strides=[1, 1])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(strides=3), "strides: expected 4 entries, one for each layer of the state dict, got 3"),
        (dict(strides=[1, 1, 1, 2**70]), r"does not give a network: strides\[3\]: expected at most 65536"),
        (dict(paddings=[1, 1, 1, "x"]), "does not give a network: padding: expected"),
        (dict(temperature=float("nan")), "does not give a network: temperature: expected a finite number"),
        (dict(norm="l3"), "does not give a network: norm: expected one of"),
    ],
    ids=str,
)
def test_from_published_refuses_options(options, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.from_published(_state(), **(OPTIONS | options))


def test_published_form_has_no_place_for_some_options():
    for layer, message in (
        (
            dict(dilation=2),
            r"dilations: the published form has none of its own for each layer, got \[1, 2, 1\]",
        ),
        (
            dict(bias=False),
            r"bias: the published form has none of its own for each layer, got \[True, False, True\]",
        ),
    ):
        net = _mixed()
        net.layers[1] = _third(**layer)
        with pytest.raises(ValueError, match=message):
            checkpoints.to_published(net)
    net = _mixed()
    net.layers[1] = _third(norm="l2", eps=0.5)
    options = dict(strides=[1] * 3, paddings=[1, 1, 0], temperature=2.0, logit_bias=net.logit_bias)
    twin = checkpoints.from_published(
        checkpoints.to_published(net), norm=["squash", "l2", "squash"], eps=[1e-6, 0.5, 1e-6], **options
    )
    images = torch.rand(1, 3, 9, 9)
    assert torch.equal(twin(images), net(images))


def test_published_round_trip_without_bias():
    model = CoDANet([4, 3], [2, 5], [3, 1], [2, 1], temperature=7.0, bias=False)
    state = checkpoints.to_published(model)
    assert len(state) == 4
    twin = checkpoints.from_published(
        state, strides=[2, 1], paddings=[1, 0], temperature=7.0, logit_bias=model.logit_bias
    )
    assert twin.config() == model.config()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_ten_layers_come_in_numerical_order():
    model = CoDANet([2] * 11, [1] * 11, [1] * 11, [1] * 11, temperature=1.0)
    state = checkpoints.to_published(model)
    shuffled = dict(sorted(state.items()))  # '10.' sorts before '2.'
    twin = checkpoints.from_published(
        shuffled, strides=[1] * 11, paddings=[0] * 11, temperature=1.0, logit_bias=0.0
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_nothing_is_unpickled_freely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pkl"
    state = _state()
    torch.save(state, path)
    assert all(torch.equal(tensor, state[key]) for key, tensor in checkpoints.read_state_dict(path).items())
    torch.save({"state": _Evil()}, path)
    with pytest.raises(CheckpointError, match="tensors only"):
        checkpoints.read_state_dict(path)
    path.write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError, match="net.pkl"):
        checkpoints.read_state_dict(path)
    assert not (tmp_path / "evil-was-here").exists()
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="expected a state dict"):
        checkpoints.read_state_dict(path)
    with pytest.raises(FileNotFoundError):
        checkpoints.read_state_dict(tmp_path / "missing.pkl")
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="net.pkl"):
        checkpoints.read_state_dict(path)


def test_a_packed_file_is_not_unpacked_beyond_memory(tmp_path, monkeypatch):
    path = tmp_path / "net.pkl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    assert path.stat().st_size < 10**5
    monkeypatch.setattr("coda_fast.safety.machine_memory", lambda device="cpu": 10**6)
    with pytest.raises(CheckpointError, match="tensors: expected what fits into the .* of this machine"):
        checkpoints.read_state_dict(path)
