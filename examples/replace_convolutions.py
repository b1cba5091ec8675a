"""Replace the convolutions of a ResNet by DAU layers: ``python examples/replace_convolutions.py``.

torchvision's ResNet-18 is converted twice. With batch normalisation and ReLU it trains as before. Without
them every part is linear or a DAU layer, so the network is a dynamic linear map and its logits are exact sums
over pixels, also through the residual branches.
"""

import torch
from torch import nn
from torchvision.models import resnet18

import coda_fast


def train_one_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The loss before one step of Adam; the optimiser is made after the conversion, of the new weights."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def dynamic_linear_resnet(classes: int) -> nn.Module:
    """A ResNet-18 of DAU layers without any other non-linearity and without biases between the layers."""
    model = resnet18(num_classes=classes, norm_layer=lambda channels: nn.Identity())
    model.maxpool = nn.AvgPool2d(3, 2, 1)
    for module in list(model.modules()):
        if hasattr(module, "relu"):
            module.relu = nn.Identity()
    model.fc = nn.Linear(512, classes, bias=False)
    coda_fast.convert_conv2d(model, rank=4)
    return model


def main() -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(2, 3, 64, 64), torch.tensor([3, 1])

    model = resnet18(num_classes=10)
    print(coda_fast.convert_conv2d(model, rank=4))
    print(f"loss of a training step: {train_one_step(model, images, labels):.3f}")

    model = dynamic_linear_resnet(classes=10).double().eval()
    images = images.double().requires_grad_()
    with coda_fast.explanation_mode(model):  # the weight that a layer computes counts as a constant
        logits = model(images)[range(2), labels]
        (row_of_the_linear_map,) = torch.autograd.grad(logits.sum(), images)
    contributions = (row_of_the_linear_map * images).sum(1)  # [N, H, W]
    error = ((contributions.sum((1, 2)) - logits) / logits).abs().max()
    print(f"the contributions of the pixels add up to the logits, relative error {float(error):.0e}")


if __name__ == "__main__":
    main()
