"""Models as files that run without this package.

ONNX files run in onnxruntime, without torch; packages of AOTInductor (.pt2) in torch, from Python
or from C++, with our operators' compiled module.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vsod_ops
from vsod_ops.conv_lstm import reference

from .errors import InputError, one_line
from .files import whole_file
from .networks.contract import MOTION_CHANNELS, MOTION_STRIDE, SaliencyModel
from .networks.exported import metadata_of
from .networks.inference import for_inference
from .networks.package import package_metadata

OPSET = 23  # the first with Attention
ATTENTION = (
    torch.ops.vsod_ops.shunted_attention.default,
    torch.ops.vsod_ops.shunted_attention.unnamed,
)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of packages
_AXES = ("batch", "time", "channels", "height", "width")


CAN_CHECK = hasattr(torch.ops.vsod_ops, "checked_input")  # it is in the compiled module
if CAN_CHECK:

    @torch.library.register_fake("vsod_ops::checked_input")
    def _(x: Tensor, name: str, sizes: Sequence[Any], least: Sequence[int]) -> Tensor:
        return x.new_empty(sizes)


class Window(nn.Module):
    """A model as one function of a window: what is exported.

    dtype: of the autocast that it runs under.
    checked: inputs are checked when the program runs, by an op of the compiled module.
    """

    model: SaliencyModel

    def __init__(
        self, model: SaliencyModel, dtype: torch.dtype = torch.float32, *, checked: bool = False
    ):
        super().__init__()
        self.dtype, self.checked = dtype, checked
        self.model = for_inference(model, dtype, fold=not model.source)

    def forward(self, frames: Tensor, *beside: Tensor) -> Tensor:
        if self.checked:
            frames, *others = self._checked(frames, *beside)
            beside = tuple(others)
        if self.dtype == torch.float32:
            return self._logits(frames, *beside)
        with torch.autocast("cpu", self.dtype):
            return self._logits(frames, *beside)

    def _checked(self, *inputs: Tensor) -> list[Tensor]:
        batch, length, _, height, width = inputs[0].shape
        sizes = [[batch, length, 3, height, width]]
        if self.model.needs_prior:
            sizes.append([batch, length, 1, height, width])
        if self.model.needs_motion:
            maps = [-(-height // MOTION_STRIDE), -(-width // MOTION_STRIDE)]
            sizes.append([batch, length, MOTION_CHANNELS, *maps])
        names = _input_names(self.model)
        return [
            torch.ops.vsod_ops.checked_input(x, name, size, [1] * 5)
            for x, name, size in zip(inputs, names, sizes, strict=True)
        ]

    def _logits(self, frames: Tensor, *beside: Tensor) -> Tensor:
        return self.model.decode(self.model.encode(frames, *beside), frames.shape[-2:]).float()


def export_onnx(
    model: SaliencyModel, output: str | Path, *, name: str | None = None, overwrite: bool = False
) -> dict[str, tuple[str | int, ...]]:
    """Writes a model as one ONNX file, which says of itself what prediction needs to know.

    Inputs: `frames` (B, T, 3, H, W) RGB in [0, 1] float32 and, for a model that needs it, `prior`
    (B, T, 1, H, W) in [0, 1] or `motion` (B, T, 4, H / 4, W / 4).  Output: `logits`
    (B, T, 1, H, W), or (B, 1, H, W) for a model of the last frame.  B, H and W are free as far as
    the network takes any; T is free unless a ConvLSTM runs over it or only the last frame gets a
    mask, when it is `clip_length`.

    Args:
        name: of the model, for errors.
        overwrite: replace what lies at `output`.

    Returns:
        The shape of each input; a free size is the name of its axis.

    Raises:
        InputError: `output` exists or is no .onnx name, a library is missing, a layer cannot be
            exported, which is named, the model gives NaN, or onnxruntime other numbers.
    """
    output = _checked_output(output, ".onnx", overwrite)
    try:
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise InputError(f"export needs {error.name}: pip install -e '.[models,onnx]'") from None
    name = name or type(model).__name__
    window = Window(model)
    program = _traced(window, name)
    inputs, expected = _example(window, name)
    # The plain loop over T; without gradients nothing else is asked of the op.
    program = program.run_decompositions(
        {
            torch.ops.vsod_ops.conv_lstm.default: lambda *inputs: reference.forward(*inputs[:-1]),
            torch.ops.vsod_ops.conv_lstm.unnamed: reference.forward,
        }
    )
    _check_unused_lse(program, name)
    try:
        made = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=_input_names(model),
            output_names=["logits"],
            custom_translation_table=dict.fromkeys(ATTENTION, _attention(onnxscript.opset23)),
        )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(
            f"model {name} cannot be exported to ONNX: {_untranslated(program, error)}"
        ) from None
    assert made is not None
    made.model.metadata_props.update(metadata_of(model))
    with whole_file(output) as part:
        made.save(part, external_data=False)

        def run() -> Tensor:
            session = onnxruntime.InferenceSession(str(part))
            names = [value.name for value in session.get_inputs()]
            feed = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
            return torch.from_numpy(session.run(None, feed)[0])

        _check(run, "onnxruntime", expected, window.dtype, name)
    return {str(value.name): _named(value.shape or ()) for value in made.model.graph.inputs}


def export_package(
    model: SaliencyModel,
    output: str | Path,
    *,
    name: str | None = None,
    overwrite: bool = False,
    precision: str = "float32",
) -> dict[str, tuple[str | int, ...]]:
    """Writes a model as one package of AOTInductor, compiled for this machine's CPU.

    Inputs, output and what it says of itself are those of :func:`export_onnx`.  It runs by
    `torch._inductor.aoti_load_package` after `import vsod_ops`, or in C++ (examples/cpp).

    Args:
        name, overwrite: as of `export_onnx`.
        precision: "float32", or "bfloat16" for autocast inside; inputs and logits stay float32.

    Returns:
        As `export_onnx`.

    Raises:
        InputError: as `export_onnx`, or there is no compiler.
    """
    output = _checked_output(output, ".pt2", overwrite)
    if precision not in PRECISIONS:
        raise InputError(f"precision must be {' or '.join(PRECISIONS)}, got {precision}")
    name = name or type(model).__name__
    if not CAN_CHECK:
        raise InputError(
            "a package needs vsod_ops._cpu, which was not built, or from other sources"
        )
    window = Window(model, PRECISIONS[precision], checked=True)
    program = _traced(window, name)
    inputs, expected = _example(window, name)
    _set_least_sizes(program)
    nodes = [
        node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
    ]
    shapes = {
        n: _named(x.meta["val"].shape) for n, x in zip(_input_names(model), nodes, strict=True)
    }
    with whole_file(output) as part:
        try:
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(part),
                inductor_configs={
                    "aot_inductor.metadata": metadata_of(model) | package_metadata(shapes),
                    "cpp.dynamic_threads": True,  # not the number that there are here
                },
            )
        except Exception as error:  # of any part of the compiler
            raise InputError(f"model {name} cannot be compiled: {one_line(error)}") from error
        _check(
            lambda: torch._inductor.aoti_load_package(str(part))(*inputs),
            "the package",
            expected,
            window.dtype,
            name,
        )
    return shapes


def _checked_output(output: str | Path, suffix: str, overwrite: bool) -> Path:
    output = Path(output)
    if output.suffix != suffix:
        raise InputError(f"{output}: the name of an exported file has to end in {suffix}")
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists already; give another name or overwrite=True")
    return output


def _set_least_sizes(program: torch.export.ExportedProgram) -> None:
    """Tells the checks of inputs what the trace found: sides that the network has no maps for."""

    def least(size: Any) -> int:
        known = None if isinstance(size, int) else program.range_constraints.get(size.node.expr)
        # From 2 on means any size: a trace takes 1 for a constant.
        return 1 if known is None or known.lower <= 2 else int(known.lower)

    for node in program.graph.nodes:
        if node.target is torch.ops.vsod_ops.checked_input.default:
            x, name, sizes, _ = node.args
            node.args = (x, name, sizes, [least(size) for size in x.meta["val"].shape])


def _input_names(model: SaliencyModel) -> list[str]:
    return ["frames"] + ["prior"] * model.needs_prior + ["motion"] * model.needs_motion


def _named(shape: Sequence[Any]) -> tuple[str | int, ...]:
    """A shape with the names of its axes in place of free sizes."""
    return tuple(n if isinstance(n, int) else axis for n, axis in zip(shape, _AXES, strict=True))


def _fixed_length(model: SaliencyModel) -> bool:
    loops = any(isinstance(module, vsod_ops.ConvLSTM) for module in model.modules())
    return model.outputs == "last" or loops


def example_inputs(
    model: SaliencyModel, batch: int, length: int, size: Sequence[int]
) -> list[Tensor]:
    """Random inputs of an exported file, in its order."""
    inputs = [torch.rand(batch, length, 3, *size)]
    if model.needs_prior:
        inputs.append(torch.rand(batch, length, 1, *size))
    if model.needs_motion:
        maps = [-(-n // MOTION_STRIDE) for n in size]
        inputs.append(torch.rand(batch, length, MOTION_CHANNELS, *maps))
    return inputs


def _traced(window: Window, name: str) -> torch.export.ExportedProgram:
    # Twice the size and length: an axis that has become 1 on the way would be a constant.  A
    # network of one size fails there, and is traced at that one.
    with contextlib.suppress(InputError):
        return _traced_at(window, name, 2, (3, 4))
    return _traced_at(window, name, 1, ())


def _traced_at(
    window: Window, name: str, scale: int, free: Sequence[int]
) -> torch.export.ExportedProgram:
    model = window.model
    length, free = model.clip_length, (0, *free)
    if not _fixed_length(model):
        length, free = max(4, 2 * length), (1, *free)
    frames, *beside = example_inputs(model, 2, length, [scale * side for side in model.image_size])
    axes = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
    shapes = {"frames": axes} | ({"beside": (axes,)} if beside else {})
    with torch.no_grad(), _running(model) as running:
        try:
            return torch.export.export(window, (frames, *beside), dynamic_shapes=shapes)
        except Exception as error:  # of any layer
            layer = running[-1] if running and running[-1] else type(model).__name__
            raise InputError(
                f"model {name} cannot be exported: layer {layer}: {one_line(error)}"
            ) from error


def _example(window: Window, name: str) -> tuple[list[Tensor], Tensor]:
    """Random inputs, of another size than is traced, and the logits of the model for them.

    Raises:
        InputError: they are not finite.
    """
    model = window.model
    inputs = example_inputs(model, 1, model.clip_length, model.image_size)
    with torch.no_grad():
        expected = window(*inputs)
    if not expected.isfinite().all():
        bad = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
        why = f", and so does its weight {bad[0]}" if bad else ""
        raise InputError(f"model {name} cannot be exported: its logits hold NaN or infinity{why}")
    return inputs, expected


def _check(
    run: Callable[[], Tensor], where: str, expected: Tensor, dtype: torch.dtype, name: str
) -> None:
    """InputError where a file gives other numbers than the model."""
    with torch.no_grad():
        try:
            got = run()
        except Exception as error:  # each runtime raises kinds of its own
            raise InputError(
                f"model {name} cannot be exported: {where}: {one_line(error)}"
            ) from error
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    if got.shape != expected.shape or not torch.allclose(
        got, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item())
    ):
        raise InputError(
            f"model {name} cannot be exported: in {where} it gives other numbers "
            f"({tuple(got.shape)}, for {tuple(expected.shape)} of torch)"
        )


@contextlib.contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """The names of the layers that run, the innermost last; an error leaves them there."""
    running: list[str] = []
    hooks: list[Any] = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: running.__delitem__(-1)))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


def _attention(opset: Any) -> Any:
    """`shunted_attention` as ONNX: an Attention node for each group of heads."""

    def translated(
        q: Any, keys: Sequence[Any], values: Sequence[Any], scale: float, backend: str | None = None
    ) -> Any:
        outs, first = [], 0
        for k, v in zip(keys, values, strict=True):
            own = opset.Slice(q, [first], [first + k.shape[1]], [1])
            outs.append(opset.Attention(own, k, v, scale=scale)[0])
            first += k.shape[1]
        return opset.Concat(*outs, axis=1), opset.Identity(
            q
        )  # in place of lse: see _check_unused_lse

    return translated


def _untranslated(program: torch.export.ExportedProgram, error: Exception) -> str:
    """Which layer has no translation, and why, of an error of torch.onnx."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if found := re.search(r"translating node %(\w+)", str(error)):
        for node in program.graph.nodes:  # torch.onnx may have dropped its namespace
            if f"_{node.name}".endswith(f"_{found[1]}"):
                return f"layer {_layer(node)}: {one_line(cause)}"
    return one_line(cause)


def _check_unused_lse(program: torch.export.ExportedProgram, name: str) -> None:
    for node in program.graph.nodes:
        if node.target in ATTENTION and any(
            user.args[1] == 1 and user.users for user in node.users
        ):
            raise InputError(
                f"model {name} cannot be exported to ONNX: layer {_layer(node)}: the "
                "log-sum-exp of shunted_attention has no translation"
            )


def _layer(node: torch.fx.Node) -> str:
    """The name of the layer that a node comes from."""
    stack = node.meta.get("nn_module_stack") or {"": ("model.", "")}
    return list(stack.values())[-1][0].removeprefix("model.")
