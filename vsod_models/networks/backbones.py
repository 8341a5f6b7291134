"""Backbones: torchvision's classification networks as encoders that give one map per stride."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, one_line
from . import light_torchvision as torchvision
from .light_torchvision import create_feature_extractor, vgg
from .saved import check_finite

# torchvision's ImageNet statistics, RGB in [0, 1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A torchvision network cut after the last layer of each of the wanted strides.

    For VGG16 these are the stages before their pools (stride 8: conv4_3, stride 16: conv5_3), for
    MobileNetV2 the last block of each stride, for ResNet its layers.  Parameters keep the names
    that torchvision gives them.

    Args:
        name: a name of `torchvision.models.list_models()`, such as "vgg16_bn" or "mobilenet_v2".
        strides: which maps to give, ascending, such as (2, 4, 8, 16).
        tap: "last" takes the last map of each stride, "first" the first one (for VGG: what the
            pools give, so that strides (16, 32) are pool4 and pool5).
        width: factor on the channels of VGG networks (MobileNetV2 has ``width_mult``).
        **options: passed to torchvision's builder.

    Shape:
        images (N, 3, H, W) RGB in [0, 1], H and W any -> one (N, channels[i], ~H / strides[i],
        ~W / strides[i]) for each stride.  Images smaller than the largest stride are padded by
        repetition.

    Raises:
        InputError: unknown name or option, or a stride that the network does not have.
    """

    channels: list[int]
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        strides: Sequence[int],
        *,
        tap: str = "last",
        width: float = 1.0,
        **options: Any,
    ):
        super().__init__()
        if tap not in ("first", "last"):
            raise InputError(f'tap must be "first" or "last", got {tap!r}')
        network = build_network(name, width, options)
        maps = find_maps(network, tap)
        missing = [stride for stride in strides if stride not in maps]
        if missing:
            raise InputError(f"backbone {name} has maps at strides {sorted(maps)}, not {missing}")
        self.name, self.strides = name, tuple(strides)
        # Depth-wise convolutions are twice as fast in this layout, and so is their training.
        self.channels_last = name.startswith("mobilenet")
        # Images in a row, where their maps are so large that memory for them is cleared each time.
        self.at_once: int | None = None
        self.channels = [maps[stride][1] for stride in strides]
        self.body = create_feature_extractor(network, {maps[s][0]: str(s) for s in strides})
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        least = self.strides[-1]
        if height < least or width < least:
            images = F.pad(
                images, (0, max(0, least - width), 0, max(0, least - height)), mode="replicate"
            )
        images = (images - self.mean) / self.std
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.at_once is None or len(images) <= self.at_once:
            maps = self.body(images)
            return [maps[str(stride)] for stride in self.strides]
        parts = [self.body(part) for part in images.split(self.at_once)]
        return [torch.cat([part[str(stride)] for part in parts]) for stride in self.strides]

    def load_weights(self, weights: str | Path) -> None:
        """Loads ImageNet weights.

        Args:
            weights: the name of torchvision weights, such as "IMAGENET1K_V1" or "DEFAULT" (taken
                from torchvision's cache, or downloaded), or a .pth or .safetensors file with
                torchvision's key names; a classifier in it is ignored.

        Raises:
            InputError: unknown name, no connection, or a file that does not fit the network.
        """
        state, source = find_weights(self.name, weights)
        load_fitting(self.body, state, f"{source}: not weights of this {self.name}")


def build_network(name: str, width: float, options: Mapping[str, Any]) -> nn.Module:
    """torchvision's network without weights; VGG with its channels multiplied by `width`."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise InputError(
            f"backbone {name!r} is not a classification network of torchvision "
            "(such as vgg16_bn, vgg16, mobilenet_v2, resnet18)"
        )
    try:
        if width != 1.0:
            depth, batch_norm = name.removesuffix("_bn"), name.endswith("_bn")
            plans = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
            if depth not in plans:
                raise InputError(f"width is for VGG backbones, {name} has its own options")
            plan = [
                item if isinstance(item, str) else max(1, round(item * width))
                for item in vgg.cfgs[plans[depth]]
            ]
            features = vgg.make_layers(cast(list[int | str], plan), batch_norm=batch_norm)
            return nn.Sequential(OrderedDict(features=features))
        return torchvision.models.get_model(name, weights=None, **options)
    except TypeError as error:
        raise InputError(f"backbone {name}: {error}") from None


def find_maps(network: nn.Module, tap: str) -> dict[int, tuple[str, int]]:
    """Stride -> (name, channels) of the first or last module with it, two levels deep at most."""
    side = 96
    maps: dict[int, tuple[str, int]] = {}
    hooks = []

    def note(name: str):
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and side % output.shape[-1] == 0:
                stride = side // output.shape[-1]
                if stride in (1, 2, 4, 8, 16, 32) and (tap == "last" or stride not in maps):
                    maps[stride] = name, output.shape[1]

        return hook

    for name, module in network.named_modules():
        if name and name.count(".") <= 1:
            hooks.append(module.register_forward_hook(note(name)))
    # Batch norm changes no shape, and on the meta device it imports torch's compiler: a second.
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.forward = nn.Identity().forward  # type: ignore[method-assign]
    training = network.training
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, side, side))
    network.train(training)
    for norm in norms:
        del norm.forward
    for hook in hooks:
        hook.remove()
    return maps


def find_weights(name: str, weights: str | Path) -> tuple[dict[str, Tensor], str]:
    """The state dict of a file or of torchvision's weights, and its name for messages."""
    path = Path(weights)
    if path.suffix in (".pth", ".pt", ".safetensors"):
        state = read_weights(path)
        check_finite(state, str(path))
        return state, str(path)
    return fetch_weights(name, str(weights)), f"{name} {weights}"


def load_fitting(
    module: nn.Module,
    state: Mapping[str, Tensor],
    complaint: str,
    may_lack: tuple[str, ...] = (),
) -> None:
    """Loads what `module` has from `state`, and ignores the rest of it.

    Raises:
        InputError: `complaint`, and how many parameters are missing (except those that begin with
            one of `may_lack`) or have another shape.
    """
    wanted = module.state_dict()
    optional = (*may_lack, *(key for key in wanted if key.endswith("num_batches_tracked")))
    missing = [key for key in wanted if key not in state and not key.startswith(optional)]
    unfit = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or unfit:
        raise InputError(
            f"{complaint}: {len(missing)} of {len(wanted)} parameters are missing and "
            f"{len(unfit)} have another shape (first: {(missing + unfit)[0]})"
        )
    module.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a .pth or .safetensors file."""
    if not path.is_file():
        state = "a folder, not a file of weights" if path.is_dir() else "no such file of weights"
        raise InputError(f"{path}: {state}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each library raises its own kinds
        raise InputError(f"{path}: not readable as weights ({type(error).__name__})") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: holds no state dict (names -> tensors)")
    return state


def fetch_weights(name: str, weights: str) -> dict[str, Tensor]:
    """torchvision's weights by name, from its cache or the network."""
    try:
        entry = torchvision.models.get_model_weights(name)[weights]
    except KeyError:
        known = [entry.name for entry in torchvision.models.get_model_weights(name)]
        raise InputError(
            f"{weights!r} is neither a .pth or .safetensors file nor torchvision weights of "
            f"{name} ({', '.join(known)})"
        ) from None
    try:
        return dict(entry.get_state_dict(progress=True, check_hash=True))
    except (OSError, RuntimeError) as error:  # no connection; a download that was cut off
        raise InputError(
            f"weights {weights} of {name} could not be downloaded ({one_line(error)}); "
            f"`curl -O {entry.url}` gets a file that can be given in place of the name"
        ) from None
