"""Where the cells of feature maps lie: compared with gradients, which show what a cell sees, and with the
published architectures; the spreading of maps, and the records of files.
"""

import copy
import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from coda_fast.placement import PIXELS, Placement, placement_of


class Call(nn.Module):
    """A module that calls a function with its modules and the picture."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, images):
        return self.function(*self.parts, images)


def conv(kernel, stride=1, padding=0, dilation=1, inputs=2, **options):
    return nn.Conv2d(inputs, 2, kernel, stride, padding, dilation, **options)


def first_of_timm(name, index, **options):
    """The features of one stage of a model of timm, [N, C, H, W]."""
    model = timm.create_model(name, pretrained=False, features_only=True, out_indices=(index,), **options)
    channels = model.feature_info.channels()[0]

    def features(model, images):
        found = model(images)[0]
        return found if found.shape[1] == channels else found.permute(0, 3, 1, 2)

    return Call(features, model), model.feature_info.reduction()[0]


def positive(module):
    """A float64 copy that has the same receptive fields, in which every path counts: positive weights, no
    bias, means instead of maxima, no gates.
    """
    found = copy.deepcopy(module).double().eval()
    for parent in list(found.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MaxPool2d):
                mean = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(parent, name, mean)
            elif type(child).__name__ == "SqueezeExcite":
                setattr(parent, name, nn.Identity())
    for name, parameter in found.named_parameters():
        nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.uniform_(parameter, 0.1, 1.0)
    return found


def fields_seen(module, height, width, channels=2):
    """(top, bottom, left, right) of the pixels that change the cell in the middle and the next one on the
    diagonal, and (row, column) of the first of the two.
    """
    images = torch.rand(1, channels, height, width, dtype=torch.float64, requires_grad=True)
    features = module(images)
    row, column = (side // 2 - 1 for side in features.shape[2:])
    weights = torch.rand(features.shape[1], dtype=torch.float64)
    boxes = []
    for step in (0, 1):
        cell = (features[0, :, row + step, column + step] * weights).sum()
        seen = torch.autograd.grad(cell, images, retain_graph=True)[0][0].abs().sum(0).nonzero()
        (top, left), (bottom, right) = seen.amin(0).tolist(), seen.amax(0).tolist()
        inside = min(top, left, height - 1 - bottom, width - 1 - right) > 0
        assert inside, "the picture is too small for this test"
        boxes.append((top, bottom, left, right))
    return boxes, (row, column)


def measured(module, height, width, channels=2):
    (here, there), (row, column) = fields_seen(module, height, width, channels)
    stride = (there[0] - here[0], there[2] - here[2])
    first = ((here[0] + here[1]) / 2 - row * stride[0], (here[2] + here[3]) / 2 - column * stride[1])
    return Placement(stride, first, (here[1] - here[0] + 1, here[3] - here[2] + 1), False)


def residual(body, shortcut, images):
    return body(images) + shortcut(images)


def channels_last(convolution, norm, linear, images):
    features = convolution(images).permute(0, 2, 3, 1)
    return linear(norm(features)).permute(0, 3, 1, 2).contiguous()


def focus(convolution, images):
    images = images[:, :, :40]
    parts = [images[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return convolution(torch.cat(parts, 1))


def split(convolution, images):
    first, second = images.chunk(2, 1)
    return torch.cat([first, convolution(second)], 1)


def shuffled(convolution, images):
    features = convolution(images)
    groups = features.view(1, 2, 1, *features.shape[2:]).transpose(1, 2)
    return groups.reshape(features.shape)


HAND_BUILT = {
    "3x3": conv(3),
    "3x3, padding 1": conv(3, 1, 1),
    "4x4, stride 2, padding 1": conv(4, 2, 1),
    "even kernel, no padding": conv(2, 2),
    "stride 3": conv(5, 3, 2),
    "sides differ": conv((3, 6), (2, 3), (1, 0)),
    "dilation 2": nn.Sequential(conv(3, 2, 2, dilation=2), conv(3, 1, 2, dilation=2)),
    "three": nn.Sequential(conv(7, 2, 3), nn.ReLU(inplace=True), conv(3, 2), conv(2, 1, 1)),
    "padding same": nn.Sequential(conv(4, padding="same"), conv(3, padding="same", dilation=2)),
    "reflected": conv(3, 2, 1, padding_mode="reflect"),
    "replicated": conv(3, 2, 1, padding_mode="replicate"),
    "above and to the left": nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), conv(3, 2)),
    "to the left": Call(lambda f, x: f(F.pad(x, (3, 0))), conv(3, 2)),
    "cropped": nn.Sequential(nn.ZeroPad2d((-2, -1, -3, 0)), conv(3, 2)),
    "reflected unevenly": nn.Sequential(nn.ReflectionPad2d((2, 0, 1, 0)), conv(3)),
    "replicated unevenly": nn.Sequential(nn.ReplicationPad2d((0, 1, 1, 3)), conv(3)),
    "max pool": nn.Sequential(conv(7, 2, 3), nn.MaxPool2d(3, 2, 1)),
    "ceil mode": nn.Sequential(conv(3), nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2, 2, 0, True)),
    "average pool": nn.Sequential(nn.AvgPool2d((2, 3), (1, 2), (1, 1)), conv(3)),
    "batch norm": nn.Sequential(conv(3, 2, 1), nn.BatchNorm2d(2), nn.SiLU(), nn.Hardswish(), nn.CELU()),
    "residual": Call(residual, nn.Sequential(conv(3, 2, 1), conv(3, 1, 1)), conv(1, 2)),
    "residual, uneven": Call(residual, conv(4, 2, 1), conv(2, 2)),
    "channels last": Call(channels_last, conv(4, 4), nn.LayerNorm(2), nn.Linear(2, 2)),
    "focus": Call(focus, conv(3, 1, 1, inputs=8)),
    "split": Call(split, conv(3, 1, 1, inputs=1)),
    "shuffled": Call(shuffled, conv(3, 2, 1)),
    "rows are dropped": Call(lambda f, x: f(x)[:, :1, 3:-1, 1::2], conv(3, 2, 1)),
    "from the end": Call(lambda f, x: f(x[:, :, -17:, -20:]), conv(3, 2, 1)),
    "one picture": Call(lambda f, x: f(x.squeeze(0)).unsqueeze(0), conv(3, 2, 1)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", HAND_BUILT)
def test_placement_equals_what_gradients_show(name):
    module = HAND_BUILT[name]
    # with positive weights alone, the mean that a layer norm subtracts would leave nothing
    exact = copy.deepcopy(module).double() if name == "channels last" else positive(module)
    assert placement_of(module, 2, 41, 44) == measured(exact, 41, 44)


@pytest.mark.parametrize(
    ("name", "index", "size"),
    [
        ("resnet18", 1, 72),
        ("convnext_atto", 0, 96),
        ("efficientnet_b0", 1, 48),
        ("tf_efficientnet_b0", 1, 47),
    ],
)
def test_stages_of_timm_equal_what_gradients_show(name, index, size):
    module, reduction = first_of_timm(name, index)
    found = placement_of(module, 3, size, size + 8)
    # the layer norms of convnext subtract a mean, which positive weights alone would make zero
    exact = module.double().eval() if name.startswith("convnext") else positive(module)
    assert found == measured(exact, size, size + 8, channels=3)
    assert found.stride == (reduction, reduction)


@pytest.mark.parametrize(
    ("name", "index", "size", "first", "field"),
    [
        # 7x7 stride 2, pool 3x3 stride 2; two blocks of two 3x3
        ("resnet18", 1, 64, 0.0, 7 + 2 * 2 + 4 * 2 * 4),
        # 4x4 stride 4; two blocks of one 7x7; 2x2 stride 2; two blocks of one 7x7
        ("convnext_atto", 1, 64, 3.5, 4 + 2 * 6 * 4 + 4 + 2 * 6 * 8),
        # its blocks have GELU and linear layers between permutations
        ("convnext_tiny", 0, 64, 1.5, 4 + 3 * 6 * 4),
        # 3x3 stride 2; 3x3; 3x3 stride 2; 3x3, gates apart
        ("efficientnet_b0", 1, 64, 0.0, 3 + 2 * 2 + 2 * 2 + 2 * 4),
        # the same, with the padding of TensorFlow, below and to the right where the stride is 2
        ("tf_efficientnet_b0", 1, 64, 1.0 + 2 * 1.0, 19),
        ("regnety_002", 0, 64, 0.0, 3),
        # the gates of efficient channel attention are expanded to the size of the features
        ("eca_resnet33ts", 0, 64, 0.0, None),
    ],
)
def test_stages_of_timm_equal_the_published_architecture(name, index, size, first, field):
    module, reduction = first_of_timm(name, index)
    found = placement_of(module, 3, size, size)
    assert found.stride == (reduction, reduction)
    assert found.first == (first, first)
    assert field is None or found.field == (field, field)
    assert not found.assumed


@pytest.mark.parametrize(
    ("name", "index", "size"),
    [("vit_tiny_patch16_224", 1, (64, 64)), ("swin_tiny_patch4_window7_224", 1, (112, 112))],
)
def test_cells_of_attention_divide_the_picture(name, index, size):
    module, reduction = first_of_timm(name, index, img_size=size)
    middle = (reduction - 1) / 2
    expected = Placement((reduction, reduction), (middle, middle), None, True)
    assert placement_of(module, 3, *size) == expected


def test_patches_are_not_assumed():
    assert placement_of(conv(16, 16), 2, 64, 48) == Placement((16, 16), (7.5, 7.5), (16, 16), False)
    assert placement_of(nn.Identity(), 3, 5, 7) == PIXELS


def circular(convolution, images):
    return convolution(F.pad(images, (1, 1, 1, 1), mode="circular"))


def written_in_parts(convolution, images):
    found = torch.empty_like(images)
    found[:, :1], found[:, 1:] = images[:, :1], convolution(images)[:, 1:]
    return found + images


def written_into_a_view(convolution, images):
    found = images * 2
    found[:, :1] += convolution(images)[:, :1]
    return found


def written_into_a_row(convolution, images):
    found = images * 2
    found[:, :, 0] = convolution(images)[:, :, 1]
    return found


def attends(images):
    tokens = images.flatten(2)
    return images + (tokens @ (tokens.transpose(1, 2) @ tokens).softmax(-1)).view(images.shape)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(conv(3, 2, 1), nn.ConvTranspose2d(2, 2, 2, 2)),
        nn.ConvTranspose2d(2, 2, 3, 1, 1),
        nn.Sequential(conv(3, 4, 1), nn.Upsample(scale_factor=2)),
        nn.Linear(8, 8),
        conv(1, 1, 4),  # the outermost cells see nothing of the picture
        Call(attends),
        Call(circular, conv(3)),
        Call(written_in_parts, conv(3, 1, 1)),
        Call(written_into_a_view, conv(3, 1, 1)),
        Call(written_into_a_row, conv(3, 1, 1)),
        Call(lambda x: x + x.flip(3)),
        Call(lambda x: x + x.transpose(2, 3)),
        Call(lambda x: x * x.mean(3, keepdim=True)),
        Call(lambda x: x + x[:, :, :, :1]),
        Call(lambda x: x[:, :, :1, :1] + x.mean((2, 3), keepdim=True)),
        Call(lambda x: x.permute(0, 2, 3, 1).sort(1)[0].permute(0, 3, 1, 2)),
        Call(lambda x: torch.stack([x] * 8, 3)[:, :, 0]),
        Call(lambda x: x.roll(1, 2)),
        Call(lambda x: torch.cat([x[:, :, :4], x[:, :, 4:]], 2)),
        Call(lambda x: x.flatten(2).view(x.shape)),
        Call(lambda x: torch.ones_like(x)),
        Call(lambda x: x.mean((2, 3), keepdim=True)),
    ],
)
def test_a_lost_geometry_is_assumed(module):
    found = placement_of(module, 2, 8, 8)
    with torch.no_grad():
        stride = 8 / module(torch.rand(1, 2, 8, 8)).shape[2]
    assert found == Placement((stride, stride), ((stride - 1) / 2,) * 2, None, True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
        lambda x: x * F.adaptive_avg_pool2d(x, 1).expand_as(x),
        lambda x: x * F.avg_pool2d(x, 8),
        lambda x: x * x.mean((2, 3))[:, :, None, None],
        lambda x: x / x.norm(dim=(2, 3), keepdim=True),
        lambda x: x * x.amax(1, keepdim=True) + x.mean(1, keepdim=True),
        lambda x: F.group_norm(F.instance_norm(x), 1),
        lambda x: F.layer_norm(x, x.shape[1:]) + F.normalize(x, dim=1),
        lambda x: torch.stack([x, -x], 1).sum(1).softmax(1),
        lambda x: torch.where(x > 0, x, 0.0).clamp(max=1).half().float(),
        lambda x: torch.zeros_like(x).copy_(x).relu_().mul_(2),
        lambda x: F.leaky_relu(F.hardswish(F.elu(F.mish(x, True), 1.0, True)), inplace=True),
    ],
)
def test_operations_that_move_nothing(function):
    found = placement_of(Call(lambda f, x: function(f(x)), conv(3, 2, 1)), 2, 16, 16)
    assert found == Placement((2, 2), (0, 0), (3, 3), False)


def test_maxima_over_dilated_windows():
    found = placement_of(nn.MaxPool2d(3, 2, 1, dilation=2), 1, 32, 32)
    assert found == PIXELS.then((3, 3), (2, 2), (1, 1), (2, 2)) == Placement((2, 2), (1, 1), (5, 5), False)


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_modules_stay_as_they_are(device, context):
    module = nn.Sequential(conv(3, 2, 1), nn.BatchNorm2d(2), nn.Dropout(), conv(3, 2, 1)).to(device).half()
    module[1].eval()
    module[3].weight.requires_grad_(False)
    flags = [each.training for each in module.modules()]
    before = {name: (tensor, tensor._version) for name, tensor in module.state_dict(keep_vars=True).items()}
    with context():
        assert placement_of(module, 2, 64, 32) == Placement((4, 4), (0, 0), (7, 7), False)
    assert [each.training for each in module.modules()] == flags
    for name, tensor in module.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert tensor._version == before[name][1]
        assert type(tensor) in (torch.Tensor, nn.Parameter)


def test_flags_are_restored_after_an_error():
    module = nn.Sequential(nn.Dropout(), conv(3, inputs=5)).train()
    with pytest.raises(RuntimeError, match="channels"):
        placement_of(module, 2, 8, 8)
    assert all(each.training for each in module.modules())


def test_no_numbers_are_computed():
    module = nn.Conv2d(3, 1 << 20, 512, 512, device="meta")  # three terabytes of weights
    assert placement_of(module, 3, 1 << 15, 1 << 15).stride == (512, 512)


def test_autocast_moves_nothing():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert placement_of(nn.Sequential(conv(3, 2, 1), conv(3)), 2, 32, 32).field == (7, 7)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda x: [x], "got list"),
        (lambda x: x[0], r"got shape \[2, 8, 8\]"),
        (lambda x: torch.cat([x, x]), r"got shape \[2, 2, 8, 8\]"),
        (lambda x: x[:, :, :0], r"got shape \[1, 2, 0, 8\]"),
        (lambda x: x.permute(0, 2, 3, 1), r"got rows and columns in dimensions \[1, 2\]"),
    ],
)
def test_features_must_be_maps(function, got):
    with pytest.raises(ValueError, match=rf"^stem: expected features \[N, C, H, W\], {got}"):
        placement_of(Call(function), 2, 8, 8)


def test_then_equals_one_trace_of_all():
    stem, layer = conv(7, 2, 3), dict(kernel_size=(3, 4), stride=(2, 1), padding=(1, 0), dilation=(2, 1))
    both = placement_of(nn.Sequential(stem, nn.Conv2d(2, 2, **layer)), 2, 64, 64)
    after = placement_of(stem, 2, 64, 64).then(*layer.values())
    assert after == both
    assert both.field == (7 + 4 * 2, 7 + 3 * 2)
    assumed = Placement((16, 16), (7.5, 7.5), None, True).then((3, 3), (2, 2), (1, 1), (1, 1))
    assert assumed == Placement((32, 32), (7.5, 7.5), None, True)
    with pytest.raises(ValueError, match="stride: expected at least 1"):
        PIXELS.then((3, 3), (0, 1), (1, 1), (1, 1))


def at(stride, first, field=None):
    return Placement((stride, stride), (first, first), field, field is None)


@pytest.mark.parametrize(
    ("placement", "cells", "size"),
    [
        (at(4, 0), (5, 3), (17, 12)),
        (at(4, 1.5), (4, 4), (16, 16)),
        (at(2.5, 0.75), (4, 1), (10, 3)),
        (at(0.4, -0.3), (7, 9), (3, 4)),  # several cells in a pixel
        (at(1 / 3, -1 / 3), (9, 12), (3, 4)),
        (at(16, 7.5), (1, 1), (1, 1)),
        (at(8, -20), (3, 9), (13, 7)),  # most centres lie outside of the picture
        (at(32, 500), (2, 2), (11, 11)),
        (at(1e-30, 0), (3, 3), (3, 3)),
    ],
)
def test_spread_keeps_the_sum_of_every_cell(placement, cells, size):
    each = torch.eye(math.prod(cells), dtype=torch.float64).view(-1, *cells)
    spread = placement.spread(each, size)
    assert spread.shape == (len(each), *size)
    assert spread.min() >= 0
    torch.testing.assert_close(
        spread.sum((1, 2)), torch.ones(len(each), dtype=torch.float64), rtol=0, atol=1e-14
    )
    maps = torch.randn(2, 3, *cells, dtype=torch.float64)
    expected = (maps.reshape(2, 3, -1) @ spread.flatten(1)).view(2, 3, *size)
    torch.testing.assert_close(placement.spread(maps, size), expected, rtol=1e-13, atol=1e-14)


def centre_of_mass(maps):
    rows, columns = (torch.arange(side, dtype=maps.dtype) for side in maps.shape)
    total = maps.sum()
    return ((maps.sum(1) * rows).sum() / total).item(), ((maps.sum(0) * columns).sum() / total).item()


@pytest.mark.parametrize(("stride", "first"), [(4, 0), (4, 1.5), (3, -1.25), (8, 9)])
def test_spread_keeps_the_place_of_a_cell(stride, first):
    maps = torch.zeros(8, 8, dtype=torch.float64)
    maps[3, 4] = -2.0
    found = centre_of_mass(at(stride, first).spread(maps, (8 * stride, 9 * stride)))
    assert found == pytest.approx((first + 3 * stride, first + 4 * stride), abs=1e-12)


def test_spread_of_one_cell_is_a_hat():
    maps = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    found = Placement((1, 4), (0, 1.5), None, True).spread(maps, (1, 12))[0]
    hat = torch.tensor([0, 0, 1, 3, 5, 7, 7, 5, 3, 1, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(found, hat / 32, rtol=1e-15, atol=0)


def test_spread_of_a_constant_is_constant_inside():
    found = at(4, 1.5).spread(torch.ones(6, 6, dtype=torch.float64), (24, 24))
    torch.testing.assert_close(found[6:18, 6:18], torch.full((12, 12), 1 / 16, dtype=torch.float64))


def test_cells_without_pixels_go_to_the_nearest():
    found = Placement((1, 0.25), (0, -0.5), None, True).spread(
        torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]), (1, 2)
    )
    # centres -0.5, -0.25, 0, 0.25 and 0.5; 0.5 is as near to both
    assert found[0].tolist() in ([31.0, 0.0], [15.0, 16.0])


def test_spread_is_linear_and_differentiable():
    placement = at(3, 1)
    maps = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: placement.spread(m, (10, 11)), (maps,))
    placement.spread(maps, (10, 11)).sum().backward()
    torch.testing.assert_close(maps.grad, torch.ones_like(maps), rtol=1e-14, atol=0)


def test_spread_keeps_the_dtype():
    maps = torch.rand(1, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = at(4, 0).spread(maps, (20, 20))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), at(4, 0).spread(maps.double(), (20, 20)), rtol=1e-6, atol=1e-8)
    assert at(4, 0).spread(torch.rand(3, 5, 5, device="meta"), (20, 20)).shape == (3, 20, 20)


@pytest.mark.parametrize(
    ("maps", "size", "error", "message"),
    [
        (torch.ones(3, 3).int(), (4, 4), TypeError, "maps: expected floating point, got torch.int32"),
        (torch.ones(3), (4, 4), ValueError, r"maps: expected \[..., h, w\] with cells, got shape \[3\]"),
        (torch.ones(0, 3), (4, 4), ValueError, r"maps: expected \[..., h, w\] .* got shape \[0, 3\]"),
        (torch.ones(3, 3), (0, 4), ValueError, "size: expected at least 1"),
        (torch.ones(3, 3), (4, 4.5), TypeError, "size: expected an int or a pair of ints"),
    ],
)
def test_spread_refuses(maps, size, error, message):
    with pytest.raises(error, match=message):
        at(4, 0).spread(maps, size)


def stem_of_ones():
    stem = nn.Sequential(
        nn.Conv2d(1, 2, 7, 2, 3, bias=False), nn.AvgPool2d(3, 2, 1), nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(2, 3, 4, 1, 1, bias=False),
    ).double()  # fmt: skip
    for parameter in stem.parameters():
        nn.init.ones_(parameter)
    return stem


def farthest(placement, stem):
    """The largest distance, in rows or columns, between a bright pixel and the middle of the spread map."""
    distances = []
    for row, column in [(24, 24), (25, 30), (31, 27), (38, 33), (30, 39)]:
        images = torch.zeros(1, 1, 64, 72, dtype=torch.float64)
        images[0, 0, row, column] = 1.0
        found = centre_of_mass(placement.spread(stem(images)[0].sum(0), (64, 72)))
        distances += [abs(found[0] - row), abs(found[1] - column)]
    return max(distances)


@torch.no_grad()
def test_a_bright_pixel_comes_back_at_its_place():
    stem = stem_of_ones()
    placement = placement_of(stem, 1, 64, 72)
    assert placement == Placement((4, 4), (2, 2), (23, 23), False)
    assert farthest(placement, stem) <= 2.0
    for shift in (-4, -2.5, 2.5, 4):
        wrong = Placement(placement.stride, (2, 2 + shift), placement.field, False)
        assert farthest(wrong, stem) > 2.0, shift
    evenly = Placement((4, 4), (0, 0), None, True)
    assert farthest(evenly, stem) > farthest(placement, stem)


@pytest.mark.parametrize("name", ["three", "sides differ", "above and to the left", "residual, uneven"])
def test_box_is_what_a_cell_sees(name):
    module = HAND_BUILT[name]
    placement = placement_of(module, 2, 41, 44)
    (here, there), (row, column) = fields_seen(positive(module), 41, 44)
    for step, (top, bottom, left, right) in enumerate((here, there)):
        box = placement.box(row + step, column + step, (41, 44))
        assert box == (top, left, bottom + 1, right + 1)


def test_box_is_clipped_to_the_picture():
    placement = at(4, 0, field=(7, 7))
    assert placement.box(0, 2, (10, 10)) == (0, 5, 4, 10)
    assert placement.box(9, -5, (10, 10)) == (9, 0, 10, 1)
    assert placement.box(1 << 40, 0, (1, 1)) == (0, 0, 1, 1)


def test_box_of_an_unknown_field_is_as_large_as_the_stride():
    assert at(16, 7.5).box(1, 2, (64, 64)) == (16, 32, 32, 48)
    assert at(0.1, -0.45).box(7, 0, (5, 5)) == (0, 0, 1, 1)
    for cells in range(1, 30):
        for pixels in range(cells, 60):
            placement = at(pixels / cells, (pixels / cells - 1) / 2)
            for row in range(cells):
                expected = row * pixels // cells, -(-(row + 1) * pixels // cells)
                assert placement.box(row, 0, (pixels, pixels))[::2] == expected


@pytest.mark.parametrize("placement", [PIXELS, at(4, -1.5, field=(7, 9)), at(32 / 3, 29 / 6)])
def test_records_are_json_and_come_back(placement):
    assert Placement.of(json.loads(json.dumps(placement.config()))) == placement


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": [0, 1]}, "placement.stride: expected two positive numbers"),
        ({"stride": [1, -2]}, "placement.stride: expected two positive numbers"),
        ({"stride": [1, 2, 3]}, "placement.stride: expected two numbers"),
        ({"stride": "12"}, "placement.stride: expected two numbers"),
        ({"stride": [1, math.nan]}, "placement.stride: expected a finite number"),
        ({"first": [0, math.inf]}, "placement.first: expected a finite number"),
        ({"first": [0, 10**400]}, "placement.first: expected a finite number"),
        ({"first": [0, True]}, "placement.first: expected a number"),
        ({"first": None}, "placement.first: expected two numbers"),
        ({"field": [3, 0]}, "placement.field: expected a positive int"),
        ({"field": [3, 2.5]}, "placement.field: expected a positive int"),
        ({"field": [3, 10**400]}, "placement.field: expected a positive int"),
        ({"field": {"rows": 3, "columns": 3}}, "placement.field: expected two numbers"),
        ({"assumed": 1}, "placement.assumed: expected true or false"),
        ({"extra": 1}, "placement: expected assumed, field, first, stride, got"),
    ],
)
def test_records_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as error:
        Placement.of({"stride": [4, 4], "first": [0, 0], "field": [7, 7], "assumed": False} | change)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("value", [None, [], 3, {}, {"stride": [1, 1]}, "stride" * 1000])
def test_other_values_are_no_records(value):
    with pytest.raises(ValueError, match="^placement: expected assumed, field, first, stride, got"):
        Placement.of(value)


def test_interpolation_keeps_a_constant_map_constant():
    """Also at the border, where cells stand for fewer or more pixels than elsewhere."""
    placement = Placement((8.0, 8.0), (0.0, 0.0), (31, 31), False)
    found = placement.interpolate(torch.full((2, 4, 4), 3.0, dtype=torch.float64), (32, 32))
    assert torch.allclose(found, torch.full_like(found, 3 * 16 / 32**2))
    # inside, both share a cell among the same pixels
    maps = torch.zeros(8, 8, dtype=torch.float64)
    maps[3, 4] = 2.0
    found = placement.interpolate(maps, (64, 64))
    assert torch.allclose(found, placement.spread(maps, (64, 64)))
    assert found.argmax() == 64 * 24 + 32
    # at a corner, the maximum is at its place, too, but the sum is not that of the cell
    maps = torch.zeros(8, 8, dtype=torch.float64)
    maps[0, 0] = 2.0
    assert placement.interpolate(maps, (64, 64)).argmax() == 0
    assert placement.interpolate(maps, (64, 64)).sum() < 1 < placement.spread(maps, (64, 64)).sum()
