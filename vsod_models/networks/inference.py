"""Models made ready for prediction: the same function, with less work."""

from __future__ import annotations

import copy
import itertools
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .backbones import Backbone

Model = TypeVar("Model", bound=nn.Module)


def for_inference(model: Model, dtype: torch.dtype = torch.float32, *, fold: bool = True) -> Model:
    """A copy in evaluation mode, with batch norm folded into the convolutions before it.

    dtype: of the autocast that it will run under.  Weights of convolutions and linear layers are
    stored in it, which autocast would otherwise do again for each window.
    fold: False for a model whose parts may be called in another order than they stand in.
    """
    training = model.training
    made = copy.deepcopy(model.eval()).requires_grad_(False)
    model.train(training)
    for module in made.modules():
        module.training = False  # which the copy of a traced network forgets
    for before, after in _neighbours(made) if fold else ():
        convolution, norm = before.module, after.module
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            before.module = fuse_conv_bn_eval(convolution, norm)
            after.module = nn.Identity()
    for module in made.modules():
        if isinstance(module, Backbone):
            module.channels_last = True
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        if dtype != torch.float32 and isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            module.to(dtype)
    return made


def bfloat16_pays() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32 (AVX-512 BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def with_fused_activations(model: nn.Module, dtype: torch.dtype) -> None:
    """Runs each ReLU or ReLU6 in the same call of oneDNN as the convolution before it, on a CPU.

    Linear layers of float32 go through oneDNN, too: MKL takes up to twice as long on AMD's CPUs.

    model: of `for_inference` with the same dtype; it is changed, where oneDNN has the dtype.
    """
    has = dtype == torch.float32 or (dtype == torch.bfloat16 and bfloat16_pays())
    if not (has and torch.backends.mkldnn.is_available()):
        return
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for name, part in list(module._modules.items()):
                if isinstance(part, nn.Identity):  # where batch norm was
                    del module._modules[name]
        if isinstance(module, Backbone) and module.name.startswith("vgg"):
            module.at_once = 1
        if type(module) is nn.Linear and dtype == torch.float32:
            module.__class__ = _Linear
    for before, after in _neighbours(model):
        convolution, activation = before.module, after.module
        if (
            isinstance(convolution, nn.Conv2d)
            and isinstance(convolution.padding, tuple)
            and convolution.padding_mode == "zeros"
            and isinstance(activation, (nn.ReLU, nn.ReLU6))
        ):
            before.module = _Rectified(convolution, isinstance(activation, nn.ReLU6))
            after.module = nn.Identity()


class _Linear(nn.Linear):
    """A linear layer of float32 by oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")


class _Rectified(nn.Conv2d):
    """A convolution with ReLU or ReLU6 after it."""

    def __init__(self, convolution: nn.Conv2d, six: bool):
        c = convolution
        super().__init__(
            c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, c.dilation, c.groups,
            c.bias is not None, device="meta",
        )  # fmt: skip
        self.weight, self.bias = c.weight, c.bias
        self.activation = ("hardtanh", [0, 6]) if six else ("relu", [])
        self.training = c.training

    def forward(self, x: Tensor) -> Tensor:
        where = self.padding, self.stride, self.dilation, self.groups
        x = x.to(self.weight.dtype)
        return torch.ops.mkldnn._convolution_pointwise.default(
            x, self.weight, self.bias, *where, *self.activation, ""
        )


class _Place:
    """Where a module hangs in its parent."""

    def __init__(self, parent: nn.Module, name: str):
        self.parent, self.name = parent, name

    @property
    def module(self) -> nn.Module | None:
        return self.parent._modules[self.name]

    @module.setter
    def module(self, module: nn.Module) -> None:
        self.parent._modules[self.name] = module


def _neighbours(model: nn.Module) -> list[tuple[_Place, _Place]]:
    """Modules that feed one other module alone: in sequences, and in traced graphs."""
    found: list[tuple[_Place, _Place]] = []
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            places = [_Place(module, name) for name in module._modules]
            found += itertools.pairwise(places)
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                inputs = node.all_input_nodes
                if node.op == "call_module" and len(inputs) == 1:
                    (source,) = inputs
                    if source.op == "call_module" and len(source.users) == 1:
                        found.append((_place(module, source.target), _place(module, node.target)))
    return found


def _place(root: nn.Module, path: str) -> _Place:
    parent, _, name = path.rpartition(".")
    return _Place(root.get_submodule(parent), name)
