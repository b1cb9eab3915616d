"""Initial weights of the networks for images."""

from torch import nn


def he_normal(net: nn.Module) -> None:
    """He et al.'s normal weights, fan out, in every convolution; biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def torch_defaults(net: nn.Module) -> None:
    """PyTorch's own: uniform within 1 / sqrt(fan in), biases too.

    On 3 x 3 convolutions of equal widths their standard deviation is 1 / sqrt(6) of He's.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
