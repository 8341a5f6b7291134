"""ConvLSTM: stacked convolutional LSTM layers, and converters for weights from elsewhere."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from . import op
from .function import State, conv_lstm

PEEPHOLES = (None, "channel", "full")


class ConvLSTM(nn.Module):
    """Convolutional LSTM over a sequence of feature maps (Shi et al. 2015).

    Parameters are named as in ``torch.nn.LSTM``: ``weight_ih_l0`` (4M, C, k, k), ``weight_hh_l0``,
    ``bias_l0``, ``weight_peephole_l0``, ``_l1`` for the next layer, ``_reverse`` for the other
    direction.  Gate order i, f, g, o.  Weights start uniform within 1 / sqrt(M k k), biases at
    zero but 1 for the forget gate, peepholes at zero.

    Args:
        input_channels: channels C of x.
        hidden_channels: channels M of h and c, in each direction.
        kernel_size: odd; of both convolutions.
        num_layers: layers on top of one another; each reads the outputs of the one below.
        peephole: None, "channel" for one weight a channel and gate, or "full" for one a pixel
            too, as in the paper, which needs `size`.
        dilation: of both convolutions.
        bidirectional: a second LSTM reads the sequence backwards; outputs are concatenated.
        batch_first: x and out are (B, T, ...), else (T, B, ...).  The state is the same for both.
        bias: biases of the gates.
        size: (H, W), for ``peephole="full"`` only; otherwise any H and W go at run time.
        recompute, backend: as in :func:`vsod_ops.conv_lstm`.

    Shape:
        x (B, T, C, H, W), state (h, c), each (num_layers * directions, B, M, H, W), or None for
        zeros -> out (B, T, directions * M, H, W) and the state after the last step.  Layers come
        in order, and the reverse direction after the forward one of its layer.

    Example:
        >>> lstm = ConvLSTM(3, 8, kernel_size=3, num_layers=2)
        >>> out, (h, c) = lstm(torch.randn(1, 4, 3, 16, 16))
        >>> out.shape, c.shape
        (torch.Size([1, 4, 8, 16, 16]), torch.Size([2, 1, 8, 16, 16]))
    """

    def __init__(
        self,
        input_channels: int,
        hidden_channels: int,
        kernel_size: int,
        num_layers: int = 1,
        peephole: str | None = None,
        dilation: int = 1,
        bidirectional: bool = False,
        batch_first: bool = True,
        *,
        bias: bool = True,
        size: tuple[int, int] | None = None,
        recompute: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        for name, value in (
            ("input_channels", input_channels),
            ("hidden_channels", hidden_channels),
            ("kernel_size", kernel_size),
            ("num_layers", num_layers),
            ("dilation", dilation),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if peephole not in PEEPHOLES:
            raise ValueError(f"peephole must be one of {PEEPHOLES}, got {peephole!r}")
        if (peephole == "full") != (size is not None):
            raise ValueError('size=(H, W) goes with peephole="full", and only with it')
        self.input_channels, self.hidden_channels = input_channels, hidden_channels
        self.kernel_size, self.num_layers = kernel_size, num_layers
        self.peephole, self.dilation = peephole, dilation
        self.bidirectional, self.batch_first = bidirectional, batch_first
        self.size, self.recompute, self.backend = size, recompute, backend

        for i, suffix in enumerate(self._suffixes()):
            layer, m, k = i // self.directions, hidden_channels, kernel_size
            channels = input_channels if layer == 0 else m * self.directions
            shapes = {
                "weight_ih": (4 * m, channels, k, k),
                "weight_hh": (4 * m, m, k, k),
                "bias": (4 * m,) if bias else None,
                "weight_peephole": {None: None, "channel": (3, m), "full": (3, m, *(size or ()))}[
                    peephole
                ],
            }
            for name, shape in shapes.items():
                parameter = None if shape is None else nn.Parameter(torch.empty(shape))
                self.register_parameter(name + suffix, parameter)
        self.reset_parameters()

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _suffixes(self) -> list[str]:
        """Name endings of the parameters of each layer and direction, in the state's order."""
        ends = ("", "_reverse")[: self.directions]
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def _parameters_of(self, suffix: str) -> list:
        names = ("weight_ih", "weight_hh", "bias", "weight_peephole")
        return [getattr(self, name + suffix) for name in names]

    def reset_parameters(self) -> None:
        bound = (self.hidden_channels * self.kernel_size**2) ** -0.5
        for suffix in self._suffixes():
            weight_ih, weight_hh, bias, peephole = self._parameters_of(suffix)
            nn.init.uniform_(weight_ih, -bound, bound)
            nn.init.uniform_(weight_hh, -bound, bound)
            if bias is not None:
                nn.init.zeros_(bias)
                with torch.no_grad():
                    bias[self.hidden_channels : 2 * self.hidden_channels] = 1
            if peephole is not None:
                nn.init.zeros_(peephole)

    def chosen_backends(self, device_type: str, dtype: torch.dtype) -> set[str]:
        """The backends that run this network's layers on tensors of such a device and dtype."""
        above = [self.hidden_channels * self.directions] * (self.num_layers > 1)
        return {
            op.choose(self.backend, device_type, dtype, channels, self.hidden_channels)
            for channels in (self.input_channels, *above)
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        form = "(B, T, C, H, W)" if self.batch_first else "(T, B, C, H, W)"
        if x.dim() != 5 or x.shape[2] != self.input_channels:
            raise ValueError(
                f"x must be {form} with C = {self.input_channels}, got shape {tuple(x.shape)}"
            )
        if self.size is not None and tuple(x.shape[3:]) != tuple(self.size):
            raise ValueError(f"x is {tuple(x.shape[3:])} but the peepholes are {self.size}")
        if not self.batch_first:
            x = x.transpose(0, 1)
        suffixes = self._suffixes()
        if state is not None:
            shape = (len(suffixes), x.shape[0], self.hidden_channels, *x.shape[3:])
            if not isinstance(state, (tuple, list)) or len(state) != 2:
                raise TypeError("state must be None or a pair (h, c) of tensors")
            for name, part in zip(("h", "c"), state, strict=True):
                if tuple(part.shape) != shape:
                    raise ValueError(f"state {name} must be {shape}, got {tuple(part.shape)}")
        h_last, c_last = [], []
        for first in range(0, len(suffixes), self.directions):
            outs = []
            for i in range(first, first + self.directions):
                reverse = i > first
                out, (h, c) = conv_lstm(
                    x.flip(1) if reverse else x,
                    None if state is None else (state[0][i], state[1][i]),
                    *self._parameters_of(suffixes[i]),
                    dilation=self.dilation,
                    recompute=self.recompute,
                    backend=self.backend,
                )
                outs.append(out.flip(1) if reverse else out)
                h_last.append(h)
                c_last.append(c)
            x = torch.cat(outs, 2) if self.bidirectional else outs[0]
        out = x if self.batch_first else x.transpose(0, 1)
        return out, (torch.stack(h_last), torch.stack(c_last))

    def extra_repr(self) -> str:
        parts = [f"{self.input_channels}, {self.hidden_channels}, kernel_size={self.kernel_size}"]
        for name, default in (
            ("num_layers", 1), ("peephole", None), ("dilation", 1), ("bidirectional", False),
            ("batch_first", True), ("size", None),
        ):  # fmt: skip
            if (value := getattr(self, name)) != default:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)


# ---- weights from elsewhere: each returns the parameters of one layer and direction, named
# weight_ih, weight_hh, bias and weight_peephole; load_layer puts them into a ConvLSTM.


def load_layer(
    lstm: ConvLSTM, parameters: Mapping[str, Tensor], layer: int = 0, reverse: bool = False
) -> None:
    """Copy what a converter returned into one layer and direction of `lstm`."""
    suffix = f"_l{layer}" + "_reverse" * reverse
    if suffix not in lstm._suffixes():
        raise ValueError(f"the ConvLSTM has no layer {layer}{' reversed' * reverse}")
    own = {
        name: parameter
        for name in ("weight_ih", "weight_hh", "bias", "weight_peephole")
        if (parameter := getattr(lstm, name + suffix)) is not None
    }
    if missing := own.keys() ^ parameters.keys():
        raise ValueError(f"{sorted(missing)} is in only one of the ConvLSTM and the parameters")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != parameters[name].shape:
                raise ValueError(
                    f"{name} is {tuple(parameters[name].shape)} but the ConvLSTM has "
                    f"{tuple(parameter.shape)}"
                )
            parameter.copy_(parameters[name])


def from_fused(
    weight: Tensor, bias: Tensor | None, input_channels: int, order: str = "ifog"
) -> dict[str, Tensor]:
    """From one convolution over cat(x, h), its 4M outputs in gate order i, f, o, g.

    Args:
        weight: (4M, C + M, k, k).
        bias: (4M,) or None.
        input_channels: C.
        order: of the gates in the 4M outputs, g the candidate.
    """
    hidden = weight.shape[1] - input_channels
    if weight.dim() != 4 or hidden < 1 or weight.shape[0] != 4 * hidden:
        raise ValueError(
            f"weight must be (4M, {input_channels} + M, k, k), got shape {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (4 * hidden,):
        raise ValueError(f"bias must be (4M,) = ({4 * hidden},), got shape {tuple(bias.shape)}")
    weight = _reorder(weight, order)
    parameters = {
        "weight_ih": weight[:, :input_channels].contiguous(),
        "weight_hh": weight[:, input_channels:].contiguous(),
    }
    if bias is not None:
        parameters["bias"] = _reorder(bias, order)
    return parameters


def from_separate(
    input_weights: Mapping[str, Tensor],
    hidden_weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor] | None = None,
    peepholes: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """From eight convolutions, one from x and one from h for each gate.

    Args:
        input_weights: gate "i", "f", "g", "o" (g the candidate) -> (M, C, k, k).
        hidden_weights: gate -> (M, M, k, k).
        biases: gate -> (M,).
        peepholes: gate "i", "f", "o" -> (M,), (1, M, 1, 1), (1, M, H, W) or (M, H, W).
    """
    parameters = {
        "weight_ih": torch.cat([input_weights[gate] for gate in "ifgo"]),
        "weight_hh": torch.cat([hidden_weights[gate] for gate in "ifgo"]),
    }
    if biases is not None:
        parameters["bias"] = torch.cat([biases[gate] for gate in "ifgo"])
    if peepholes is not None:
        rows = torch.stack([peepholes[gate] for gate in "ifo"])
        if rows.dim() == 5:
            rows = rows.squeeze(1)
        if rows.dim() == 4 and rows.shape[2:] == (1, 1):
            rows = rows[:, :, 0, 0]
        parameters["weight_peephole"] = rows
    return parameters


def from_keras(weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """From ``ConvLSTM2D.get_weights()``: gate order i, f, c, o, channels last.

    The Keras layer must have ``recurrent_activation="sigmoid"`` and ``padding="same"``.

    Args:
        weights: kernel (k, k, C, 4M), recurrent kernel (k, k, M, 4M) and, with biases, (4M,).
    """
    if len(weights) not in (2, 3):
        raise ValueError(f"weights must hold 2 or 3 tensors, got {len(weights)}")
    tensors = [torch.as_tensor(w) for w in weights]
    parameters = {
        name: kernel.permute(3, 2, 0, 1).contiguous()
        for name, kernel in zip(("weight_ih", "weight_hh"), tensors, strict=False)
    }
    if len(tensors) == 3:
        parameters["bias"] = tensors[2]
    return parameters


def _reorder(x: Tensor, order: str) -> Tensor:
    if sorted(order) != sorted("ifgo"):
        raise ValueError(f"order must be an order of the letters i, f, g, o, got {order!r}")
    gates = dict(zip(order, x.chunk(4), strict=True))
    return torch.cat([gates[gate] for gate in "ifgo"])
