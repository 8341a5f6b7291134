"""The fully convolutional networks of MSST's streams: VGG16 as DeepLab-LargeFOV, MobileNetV2.

Both trade the strides of their last stages for dilation, and give two maps of the same size: one
from the middle (VGG's pool4) and the last.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from .backbones import build_network, find_weights, load_fitting

VGG_NAMES = ("vgg16", "vgg16_bn")
NAMES = (*VGG_NAMES, "mobilenet_v2")


class FCN(nn.Module):
    """What the two networks share: `channels` of their two maps, and loading weights.

    Shape:
        x (N, in_channels, H, W), normalised as torchvision does -> middle (N, channels[0], h, w)
        and last (N, channels[1], h, w), h = ceil(H / output_stride), w = ceil(W / output_stride).
        Map pixel i lies over image pixel i * output_stride.
    """

    name: str
    first_weight: str  # key of the first convolution's weight
    channels: tuple[int, int]
    output_stride: int

    def load_weights(self, weights: str | Path, *, keep_rgb: bool = True) -> None:
        """Loads ImageNet weights.

        A first convolution with a fourth channel takes the RGB filters and keeps what it has for
        the fourth channel; with `keep_rgb=False` it keeps all that it has.

        Args:
            weights: a name of torchvision's weights such as "IMAGENET1K_V1", or a .pth or
                .safetensors file with torchvision's key names.

        Raises:
            InputError: unknown name, no connection, or a file that does not fit the network.
        """
        state, source = find_weights(self.name, weights)
        taken = self.from_torchvision(state)
        first, own = taken.get(self.first_weight), self.get_parameter(self.first_weight).detach()
        if first is not None and own.shape[1] == 4 and first.shape[1] == 3:
            taken[self.first_weight] = torch.cat([first, own[:, 3:]], 1) if keep_rgb else own
        complaint = f"{source}: not weights of this {self.name}"
        load_fitting(self, taken, complaint, may_lack=("fc6.", "fc7."))

    def from_torchvision(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's state dict, with more entries under the names of this network."""
        return dict(state)


class LargeFOV(FCN):
    """VGG16 as DeepLab-LargeFOV (Chen et al. 2015): no pool5, dilated conv5, fc6 and fc7.

    Pools are 3x3 with padding 1, so that 8k + 1 pixels become k + 1; fc6 is a 3x3 convolution to
    1024 channels with dilation 12 and fc7 a 1x1.  At `output_stride` 8 pool4 has stride 1 and conv5
    dilation 2; at 16 both dilations halve, so that each layer sees as many image pixels.
    Maps: pool4 and fc7.

    Args:
        name: "vgg16" or "vgg16_bn".
        in_channels: 3, or 4 with a motion prior.
        output_stride: 8 or 16.
        width: factor on all channels; ImageNet weights need 1.
        dropout: after fc6 and fc7, in training.
    """

    first_weight = "features.0.weight"

    def __init__(
        self,
        name: str = "vgg16",
        in_channels: int = 3,
        *,
        output_stride: int = 8,
        width: float = 1.0,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.name, self.output_stride = name, output_stride
        network = build_network(name, width, {"init_weights": False})  # done below
        features = network.features[:-1]  # type: ignore[union-attr,index]
        assert isinstance(features, nn.Sequential)
        dilation, pools = 16 // output_stride, 0
        for i, layer in enumerate(features):
            if isinstance(layer, nn.MaxPool2d):
                pools += 1
                stride = 2 if pools < 4 or output_stride == 16 else 1
                features[i] = nn.MaxPool2d(3, stride, padding=1)
                if pools == 4:
                    self.middle = i + 1
            elif isinstance(layer, nn.Conv2d) and pools == 4:
                layer.dilation = layer.padding = (dilation, dilation)
        self.features = features
        wide, fully = _last_channels(features), max(1, round(1024 * width))
        self.fc6 = nn.Conv2d(wide, fully, 3, padding=6 * dilation, dilation=6 * dilation)
        self.fc7 = nn.Conv2d(fully, fully, 1)
        self.dropout = nn.Dropout(dropout)
        self.channels = (_last_channels(features[: self.middle]), fully)
        first = features[0]
        assert isinstance(first, nn.Conv2d)
        features[0] = nn.Conv2d(in_channels, first.out_channels, 3, padding=1)
        for module in self.modules():  # 15 layers without normalisation need their variance kept
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.features[: self.middle](x)
        last = self.features[self.middle :](middle)
        last = self.dropout(self.fc6(last).relu())
        return middle, self.dropout(self.fc7(last).relu())

    def from_torchvision(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The convolutions as they are; fc6 and fc7 thinned out of the classifier, if there is one.

        Every 4th of 4096 channels and every 3rd of 7x7 taps, as in SSD (Liu et al. 2016).
        """
        own = super().from_torchvision(state)
        if "classifier.0.weight" in state and self.fc6.out_channels == 1024:
            own["fc6.weight"] = state["classifier.0.weight"].view(-1, 512, 7, 7)[::4, :, ::3, ::3]
            own["fc6.bias"] = state["classifier.0.bias"][::4]
            own["fc7.weight"] = state["classifier.3.weight"][::4, ::4, None, None]
            own["fc7.bias"] = state["classifier.3.bias"][::4]
        return own


class DilatedMobileNetV2(FCN):
    """MobileNetV2 without its last 1x1 convolution and classifier, dilated: small and fast on CPUs.

    Maps: the last block with 96 channels and the last block of all (320).

    Args:
        in_channels: 3, or 4 with a motion prior.
        output_stride: 8 or 16.
        width: torchvision's `width_mult`; ImageNet weights need 1.
    """

    name = "mobilenet_v2"
    first_weight = "features.0.0.weight"
    middle = 14  # blocks up to the last one with 96 channels

    def __init__(self, in_channels: int = 3, *, output_stride: int = 16, width: float = 1.0):
        super().__init__()
        self.output_stride = output_stride
        network = build_network(self.name, 1.0, {"width_mult": width})
        features = network.features[:-1]  # type: ignore[union-attr,index]
        assert isinstance(features, nn.Sequential)
        stride, dilation = 2, 1
        for block in features[1:]:
            depthwise = next(
                m for m in block.modules() if isinstance(m, nn.Conv2d) and m.groups > 1
            )
            depthwise.dilation = depthwise.padding = (dilation, dilation)
            if depthwise.stride == (2, 2) and stride == output_stride:
                depthwise.stride = (1, 1)
                dilation *= 2  # of the blocks after this one, whose input is now twice as dense
            elif depthwise.stride == (2, 2):
                stride *= 2
        self.features = features
        if in_channels != 3:
            stem = features[0]
            assert isinstance(stem, nn.Sequential) and isinstance(stem[0], nn.Conv2d)
            out = stem[0].out_channels
            stem[0] = nn.Conv2d(in_channels, out, 3, stride=2, padding=1, bias=False)
            nn.init.kaiming_normal_(stem[0].weight, nonlinearity="relu")
        self.channels = (
            _last_channels(features[: self.middle]),
            _last_channels(features),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.features[: self.middle](x)
        return middle, self.features[self.middle :](middle)


def _last_channels(layers: nn.Module) -> int:
    return [m for m in layers.modules() if isinstance(m, nn.Conv2d)][-1].out_channels


def build_fcn(
    name: str, in_channels: int, *, output_stride: int | None = None, width: float = 1.0
) -> FCN:
    """The network called `name`; `output_stride` None is 8 for VGG16 and 16 for MobileNetV2.

    Raises:
        InputError: unknown name, or an output stride other than 8 and 16.
    """
    if name not in NAMES:
        raise InputError(f"backbone {name!r} is not one of {', '.join(NAMES)}")
    if output_stride not in (None, 8, 16):
        raise InputError(f"output_stride is {output_stride}, it has to be 8 or 16")
    if name in VGG_NAMES:
        return LargeFOV(name, in_channels, output_stride=output_stride or 8, width=width)
    return DilatedMobileNetV2(in_channels, output_stride=output_stride or 16, width=width)
