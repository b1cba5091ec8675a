"""Wrapped networks are saved, explained, measured and trained like the networks inside, or refused."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import coda_fast
from coda_fast import baselines, checkpoints, create_model, evaluation, report
from coda_fast.compile import record_launches
from coda_fast.explain import explain
from coda_fast.interop import CoDAAttribution, quantus_explain_func
from coda_fast.losses import DynamicMatrixLoss, matrix_penalty


def compiled(module):
    return torch.compile(module, backend="eager")


def averaged(module):
    return AveragedModel(module)


def timm_average(version):
    def wrap(module):
        return getattr(pytest.importorskip("timm.utils"), f"ModelEma{version}")(module)

    return wrap


def fabric(module):
    wrappers = pytest.importorskip("lightning.fabric.wrappers")
    strategies = pytest.importorskip("lightning.fabric.strategies")
    return wrappers._FabricModule(module, strategies.SingleDeviceStrategy())


def distributed(module):
    return nn.parallel.DistributedDataParallel(module)


WRAPPERS = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "AveragedModel": averaged,
    "ModelEma": timm_average(""),
    "ModelEmaV2": timm_average("V2"),
    "ModelEmaV3": timm_average("V3"),
    "Fabric": fabric,
    "DDP": distributed,
    "compile(DataParallel(compile))": lambda module: compiled(nn.DataParallel(compiled(module))),
    "AveragedModel(DDP)": lambda module: averaged(distributed(module)),
    "compile(ModelEmaV3(compile))": lambda module: compiled(timm_average("V3")(compiled(module))),
}


@pytest.fixture
def group(tmp_path):
    """A process group with a world size of one."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    if "DDP" in request.param:
        request.getfixturevalue("group")
    return WRAPPERS[request.param]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return create_model("coda_xs_digits").eval()


IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_saved_as_the_network_inside(net, wrap, tmp_path):
    coda_fast.save(wrap(net), tmp_path / "net.safetensors")
    assert torch.equal(coda_fast.load(tmp_path / "net.safetensors")(IMAGES), net(IMAGES))
    published = checkpoints.to_published(wrap(net))
    assert all(torch.equal(tensor, published[name]) for name, tensor in checkpoints.to_published(net).items())


def test_explained_as_the_network_inside(net, wrap):
    expected = net.explain(IMAGES, 3)
    for found in (explain(wrap(net), IMAGES, 3), coda_fast.unwrap(wrap(net)).explain(IMAGES, 3)):
        assert torch.equal(found.contribution_map, expected.contribution_map)
    attribution = CoDAAttribution(wrap(net)).attribute(IMAGES, 3)
    assert torch.equal(attribution, CoDAAttribution(net).attribute(IMAGES, 3))
    maps = quantus_explain_func(wrap(net), IMAGES.numpy(), torch.full((6, 1), 3, dtype=torch.uint8).numpy())
    assert torch.equal(torch.from_numpy(maps), expected.contribution_map)


def test_measured_as_the_network_inside(net, wrap):
    """The rules of a CoDA-Net apply (sigmoid, encoded pixels), and not those of a softmax classifier."""
    images, labels = torch.cat([IMAGES] * 2), net(torch.cat([IMAGES] * 2)).argmax(1)
    bare = evaluation.pixel_removal(net, images, labels, points=5)
    assert torch.equal(
        evaluation.pixel_removal(wrap(net), images, labels, points=5).probabilities, bare.probabilities
    )
    assert torch.equal(
        evaluation.completeness_error(wrap(net), images, labels),
        evaluation.completeness_error(net, images, labels),
    )
    own = lambda model: evaluation.localisation(model, images, labels, side=1, grids=50, threshold=0.1)
    assert torch.equal(own(wrap(net)).images, own(net).images)
    assert torch.equal(own(wrap(net)).scores, own(net).scores)
    options = dict(masks=50, cells=3)
    rise = baselines.attribute("RISE", net, IMAGES, torch.tensor([1] * 6), **options)
    assert torch.equal(baselines.attribute("RISE", wrap(net), IMAGES, torch.tensor([1] * 6), **options), rise)
    grad = baselines.create("GCam", wrap(net)).attribute(IMAGES, torch.tensor([1] * 6))
    assert torch.equal(grad, baselines.create("GCam", net).attribute(IMAGES, torch.tensor([1] * 6)))
    assert torch.equal(
        baselines.attribute("Ours", wrap(net), IMAGES, torch.tensor([1] * 6)),
        net.explain(IMAGES, 1).contribution_map[:, 0],
    )


def test_the_numbers_would_be_others(net):
    """A softmax of the logits and masked pixels give other numbers, so that the tests above can fail."""
    labels = net(IMAGES).argmax(1)
    bare = evaluation.pixel_removal(net, IMAGES, labels, lambda x, c: x, points=5)
    blind = nn.Sequential(*net.children())  # contains no CoDANet
    blind.forward = net.forward
    assert not torch.allclose(
        evaluation.pixel_removal(blind, IMAGES, labels, lambda x, c: x, points=5).probabilities,
        bare.probabilities,
    )


def test_evaluations_of_the_command_line(net, wrap, tmp_path):
    from coda_fast.evaluation.runner import Evaluation, Settings

    labels = net(IMAGES).argmax(1)
    found = []
    for name, model in (("bare", net), ("wrapped", wrap(net))):
        run = Evaluation(
            model, IMAGES, labels[:, None].to(torch.uint8), Settings("removal", points=3), tmp_path / name
        )
        found.append(run.measure("Ours", None, {}).probabilities)
        assert "completeness_error" in run._completeness()
    assert torch.equal(*found)


def test_losses_of_the_network_inside(net, wrap, request):
    labels = torch.tensor([1, 2, 3, 4, 5, 6])
    expected = matrix_penalty(net, IMAGES, labels[:, None])
    if "DDP" in request.node.name:
        with pytest.raises(
            TypeError,
            match="model: expected a CoDANet, got DistributedDataParallel, which shares the gradients of its "
            "own",
        ):
            matrix_penalty(wrap(net), IMAGES, labels[:, None])
        with torch.no_grad():
            assert torch.equal(matrix_penalty(wrap(net), IMAGES, labels[:, None]), expected)
        return
    assert torch.equal(matrix_penalty(wrap(net), IMAGES, labels[:, None]), expected)
    loss = DynamicMatrixLoss(0.1, classes=1)
    assert torch.equal(loss(wrap(net), IMAGES, labels).total, loss(net, IMAGES, labels).total)


def test_pages_exports_and_kernels(net):
    wrapped = compiled(nn.DataParallel(net))
    pytest.importorskip("jinja2")
    assert report.render(wrapped, list(IMAGES[:1]), ["a"], methods=()) == report.render(
        net, list(IMAGES[:1]), ["a"], methods=()
    )
    explainer, target = coda_fast.Explainer(wrapped), torch.tensor([1] * 6)
    assert torch.equal(explainer(IMAGES, target)[1], coda_fast.Explainer(net)(IMAGES, target)[1])
    launches = record_launches(net, (1, 1, 8, 8), passes=["inference"])["inference"]
    assert len(record_launches(wrapped, (1, 1, 8, 8), passes=["inference"])["inference"]) == len(launches) > 0


def test_compiled_in_place(net, tmp_path):
    expected = net.explain(IMAGES).contribution_map, net(IMAGES)
    net.compile(backend="eager")
    coda_fast.save(net, tmp_path / "net.safetensors")
    assert torch.equal(coda_fast.load(tmp_path / "net.safetensors")(IMAGES), expected[1])
    assert torch.equal(net.explain(IMAGES).contribution_map, expected[0])


def test_compiled_and_checkpointed_layers(net, tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    expected, images = net.explain(IMAGES, layer=net.layers[1]), net(IMAGES)
    config = net.config()
    net.layers[0], net.layers[1] = compiled(net.layers[0]), checkpoint_wrapper(net.layers[1])
    assert net.config() == config
    coda_fast.save(net, tmp_path / "net.safetensors")
    assert torch.equal(coda_fast.load(tmp_path / "net.safetensors")(IMAGES), images)
    assert torch.equal(net.explain(IMAGES, layer=net.layers[1]).contributions, expected.contributions)


@pytest.mark.parametrize("layers", [True, False])
def test_sharded(net, group, tmp_path, layers):
    """FSDP2 changes the class in place and shards the parameters. They are gathered, also before any forward
    pass, and the network continues to train.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    logits, expected = net(IMAGES).detach(), net.explain(IMAGES, 3)
    labels = logits.argmax(1)
    removal = evaluation.pixel_removal(net, IMAGES, labels, points=3)
    mesh = init_device_mesh("cpu", (1,))
    for layer in net.layers if layers else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    assert hasattr(net.layers[0].weight, "full_tensor")
    assert torch.equal(net.explain(IMAGES, 3).contribution_map, expected.contribution_map)
    assert torch.equal(net.explain(IMAGES, 3, layer=net.layers[1]).logits, logits)
    assert torch.equal(
        evaluation.pixel_removal(net, IMAGES, labels, points=3).probabilities, removal.probabilities
    )
    coda_fast.save(net, tmp_path / "net.safetensors")
    assert torch.equal(coda_fast.load(tmp_path / "net.safetensors")(IMAGES), logits)
    assert torch.equal(net(IMAGES), logits)
    net(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_network_inside_an_unknown_module_is_refused(net):
    """It is unknown by which rules such a module should be judged."""

    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, images):
            return self.inner(images) * 2

    around, labels = Around(net), torch.zeros(6, dtype=torch.long)
    message = (
        "model: expected a CoDANet, alone or in a wrapper .*; got a Around around the CoDANet 'inner': give "
        "that"
    )
    for measure in (evaluation.localisation, evaluation.pixel_removal, evaluation.completeness_error):
        with pytest.raises(ValueError, match=message):
            measure(around, IMAGES, labels)
    with pytest.raises(ValueError, match=message):
        baselines.create("RISE", around)
    for refuse in (
        lambda: coda_fast.save(around, "x"),
        lambda: explain(around, IMAGES),
        lambda: matrix_penalty(around, IMAGES, labels),
    ):
        with pytest.raises(TypeError, match="model: expected a coda_fast.Network, got a Around"):
            refuse()


def test_other_models_stay_in_their_wrappers():
    """A wrapper may be what makes another model fast."""
    from coda_fast.dynamic_linear import network_in

    wrapped = nn.DataParallel(nn.Flatten())
    assert network_in(wrapped) is wrapped
    assert coda_fast.unwrap(wrapped) is wrapped.module
    assert coda_fast.unwrap(3) == 3

    class AveragedModel(nn.Module):  # of somebody else, who may compute anything
        module = nn.Identity()

    assert isinstance(coda_fast.unwrap(AveragedModel()), AveragedModel)


def test_wrappers_are_not_imported():
    """Importing torch._dynamo takes seconds, and timm and lightning may not be installed."""
    program = (
        "import sys, torch; before = 'torch._dynamo' in sys.modules; import coda_fast; "
        "coda_fast.unwrap(torch.nn.Identity())\n"
    )
    program += (
        "print([n for n in ('timm', 'lightning') if n in sys.modules], before or 'torch._dynamo' not in "
        "sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[] True\n", done.stderr
