"""Forward and backward of the op: how tensors are packed, scratch memory, launches."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import triton_tuning as tuning
from .backward import (
    conv_lstm_bwd_input_kernel,
    conv_lstm_bwd_kernel,
    conv_lstm_bwd_sums_kernel,
    conv_lstm_bwd_weight_kernel,
)
from .forward import conv_lstm_fwd_kernel, conv_lstm_pack_kernel
from .plan import (
    INTERPRETER_TILES,
    PACK_TILE,
    PAD,
    POINTWISE_TILE,
    SUMS_TILE,
    Tile,
    admitted_tiles,
    cdiv,
    padded,
)
from .tiles import At, Sizes, Strided

timings = tuning.Timings()

# A tensor (or None) that holds several steps, and which of them a launch is about.
Step = tuple[Tensor | None, At]


def forward(x, h, c, weight_ih, weight_hh, bias, weight_peephole, dilation, save):
    """Return out, c_last, cells, gates."""
    call = Call(x, weight_hh, weight_peephole, dilation)
    batch, steps, hidden, mp = call.batch, call.steps, call.hidden, call.mp
    plane = (hidden, call.height, call.width)
    state = torch.float32
    out = x.new_empty((batch, steps, *plane))
    c_last = x.new_empty((batch, *plane), dtype=state)
    cells = x.new_empty((batch, steps - 1, *plane) if save else (0,), dtype=state)
    gates = x.new_empty((batch, steps, 4 * hidden, *plane[1:]) if save == 2 else (0,))
    with tuning.current(x.device):
        x_rows = as_rows(x)
        h_rows = None if h is None else as_rows(h.unsqueeze(1))
        weight = _forward_weights(weight_ih, weight_hh)
        spare = None if save or steps == 1 else torch.empty_like(c_last)
        spare_rows = [x.new_empty((batch, 1, call.area, mp)) for _ in range(min(steps - 1, 2))]
        before = (c, At(1, 0))
        for t in range(steps):
            if t == steps - 1:
                after = (c_last, At(1, 0))
            elif save:
                after = (cells, At(steps - 1, t))
            else:  # c_last and spare in turn, so that the last step writes c_last
                after = ((spare, c_last)[(steps - t) % 2], At(1, 0))
            new_rows = spare_rows[t % 2] if t < steps - 1 else None
            call.step(
                t,
                x_rows,
                h=(h_rows, At(1, 0)),
                c=before,
                weight=weight,
                bias=bias,
                weight_peephole=weight_peephole,
                out=out,
                h_new=new_rows,
                c_new=after,
                gates=(gates if save == 2 else None, At(steps, t)),
            )
            h_rows, before = new_rows, after
    return out, c_last, cells, gates


def backward(
    grad_out, grad_c, x, h, c, weight_ih, weight_hh, bias, weight_peephole,
    out, c_last, cells, gates, dilation, needs,
):  # fmt: skip
    """Return dx, dh, dc, dweight_ih, dweight_hh, dbias, dweight_peephole."""
    tensors = (x, h, c, weight_ih, weight_hh, bias, weight_peephole)
    grads = [
        t.new_empty(t.shape) if need else x.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    ]
    if not any(needs):
        return tuple(grads)
    call = Call(x, weight_hh, weight_peephole, dilation)
    batch, steps, hidden, area, mp = call.batch, call.steps, call.hidden, call.area, call.mp
    recompute = gates.dim() == 1
    with tuning.current(x.device):
        x_rows = as_rows(x) if recompute or needs[3] else None
        h_rows = call.h_rows(h, out) if recompute or needs[4] else None
        weight = _forward_weights(weight_ih, weight_hh) if recompute else None
        weight_back = _backward_weights(weight_hh, hidden) if steps > 1 or needs[1] else None
        if recompute:
            gates = x.new_empty((batch, 1, 4 * hidden, call.height, call.width))
        dsums = x.new_empty((batch, steps, area, 4 * mp))
        dc = grads[2] if needs[2] else torch.empty_like(c_last)
        spare = torch.empty_like(c_last) if steps > 1 else None
        dc_after = grad_c
        for t in reversed(range(steps)):
            before = (cells, At(steps - 1, t - 1)) if t else (c, At(1, 0))
            last = t == steps - 1
            after = (c_last, At(1, 0)) if last else (cells, At(steps - 1, t))
            gates_t = (gates, At(1, 0) if recompute else At(steps, t))
            if recompute:
                call.step(
                    t,
                    x_rows,
                    h=(h_rows, At(steps, t)) if t or h is not None else (None, At(1, 0)),
                    c=before,
                    weight=weight,
                    bias=bias,
                    weight_peephole=weight_peephole,
                    out=None,
                    h_new=None,
                    c_new=after,
                    gates=gates_t,
                )
            dc_before = (dc, spare)[t % 2]
            call.launch(
                "backward",
                conv_lstm_bwd_kernel,
                frames=batch,
                channels=hidden,
                tile=POINTWISE_TILE if last else None,
                p_dsums=dsums,
                p_weight=None if last else weight_back,
                grad=_strided(grad_out),
                p_gates=gates,
                p_c=before[0],
                p_c_new=after[0],
                p_dc=dc_after,
                p_dc_new=dc_before,
                p_peephole=weight_peephole,
                size=call.size,
                n_frames=batch,
                **_steps(now=At(steps, t), c=before[1], c_new=after[1], gates=gates_t[1]),
                FULL=call.full,
            )
            dc_after = dc_before
        if needs[0]:
            weight_ih_back = _backward_weights(weight_ih, hidden)
            call.input_gradient(dsums, weight_ih_back, grads[0], batch * steps, call.channels, 1)
        if needs[1]:
            call.input_gradient(dsums, weight_back, grads[1], batch, hidden, steps)
        if needs[3] or needs[4]:
            sums = call.weights(dsums, x_rows if needs[3] else None, h_rows if needs[4] else None)
            for index, total in zip((3, 4), sums, strict=True):
                if needs[index]:
                    grads[index].view_as(total).copy_(total)
        if needs[5] or needs[6]:
            dbias, dpeephole = call.sums(dsums, c, cells, c_last, needs[6])
            if needs[5]:
                grads[5].view(4, hidden).copy_(dbias)
            if needs[6]:
                grads[6].copy_(dpeephole)
    return tuple(grads)


def _strided(x: Tensor | None) -> Strided:
    return Strided(None, 0, 0, 0, 0, 0) if x is None else Strided(x, *x.stride())


def _steps(**places: At) -> dict[str, int]:
    """The arguments that say where tensors of several steps are read and written."""
    return {
        f"{name}_{field}": number
        for name, at in places.items()
        for field, number in at._asdict().items()
    }


def _options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def pack(planes: Tensor, rows: Tensor) -> None:
    """planes (B, T, C, H, W), any strides, into rows (B, T, H * W, CP)."""
    batch, steps, channels, height, width = planes.shape
    depth = rows.shape[3]
    pixel_tile, channel_tile = PACK_TILE
    tiles = cdiv(height * width, pixel_tile)
    conv_lstm_pack_kernel[(batch * steps * tiles, cdiv(depth, channel_tile))](
        planes=_strided(planes),
        p_rows=rows,
        n_channels=channels,
        depth=depth,
        width=width,
        area=height * width,
        steps=steps,
        s_row_b=rows.stride(0) // depth,
        s_row_t=rows.stride(1) // depth,
        BP=pixel_tile,
        BC=channel_tile,
    )


def as_rows(x: Tensor) -> Tensor:
    """x (B, T, C, H, W) as (B, T, H * W, CP): itself, if it lies so, or a copy."""
    batch, steps, channels, height, width = x.shape
    flat = x.permute(0, 1, 3, 4, 2)
    if channels % PAD == 0 and flat.is_contiguous() and x.data_ptr() % 16 == 0:
        return flat.view(batch, steps, height * width, channels)
    rows = x.new_empty((batch, steps, height * width, padded(channels)))
    pack(x, rows)
    return rows


def _gates_apart(weight: Tensor, hidden: int, depth: int) -> Tensor:
    """(4M, C, k, k) as (4, MP, depth, k * k), padded with zeros."""
    weight = weight.view(4, hidden, weight.shape[1], -1)
    padding = (0, 0, 0, depth - weight.shape[2], 0, padded(hidden) - hidden)
    return F.pad(weight, padding) if any(padding) else weight


def _forward_weights(weight_ih: Tensor, weight_hh: Tensor) -> Tensor:
    """(MP / 8, 4, 8, K * K * CP + K * K * MP): the gates alternate every 8 channels."""
    hidden, taps = weight_hh.shape[1], weight_hh.shape[2] ** 2
    cp, mp = padded(weight_ih.shape[1]), padded(hidden)
    packed = weight_ih.new_empty((mp // 8, 4, 8, taps * (cp + mp)))
    parts = packed.split([taps * cp, taps * mp], 3)
    for part, weight, depth in zip(parts, (weight_ih, weight_hh), (cp, mp), strict=True):
        weight = _gates_apart(weight, hidden, depth).unflatten(1, (mp // 8, 8))
        part.unflatten(3, (taps, depth)).copy_(weight.permute(1, 0, 2, 4, 3))
    return packed


def _backward_weights(weight: Tensor, hidden: int) -> Tensor:
    """(C, K * K, 4, MP), for the transposed convolution."""
    return _gates_apart(weight, hidden, weight.shape[1]).permute(2, 3, 0, 1).contiguous()


class Call:
    """What the launches of one forward or backward share."""

    def __init__(self, x: Tensor, weight_hh: Tensor, weight_peephole: Tensor | None, dilation: int):
        self.x = x
        self.batch, self.steps, self.channels, self.height, self.width = x.shape
        self.hidden, self.kernel = weight_hh.shape[1:3]
        self.area = self.height * self.width
        self.cp, self.mp = padded(self.channels), padded(self.hidden)
        self.pixels = self.batch * self.steps * self.area
        if self.pixels >= 2**31 - 2**10:  # pixels are counted in 32 bits, elements in 64
            raise ValueError(
                f"x has {self.pixels} pixels but backend 'triton' takes fewer than 2^31: feed the "
                "sequence in chunks and carry the state"
            )
        self.size = Sizes(
            hidden=self.hidden,
            height=self.height,
            width=self.width,
            area=self.area,
            # From here on all taps but the middle one are outside, and larger numbers could wrap.
            dilation=min(dilation, max(self.height, self.width)),
            CP=self.cp,
            MP=self.mp,
        )
        self.precision = tuning.precision(x.dtype)
        self.constants = {
            "K": self.kernel,
            "PRECISION": self.precision,
            "INTERPRET": tuning.INTERPRET,
        }
        self.full = weight_peephole is not None and weight_peephole.dim() == 4
        self.device = tuning.describe(x.device.index)
        self.workers = self.device.workers
        self.tiles: dict[tuple, Tile] = {}

    def launch(self, kind, kernel, *, frames, channels, tile=None, **arguments) -> None:
        """Launch a kernel whose programs are tiles of pixels by tiles of channels."""

        def grid(tile: Tile) -> tuple[int, int]:
            return cdiv(frames * self.area, tile.pixels), cdiv(channels, tile.channels)

        def launch(tile: Tile) -> None:
            kernel[grid(tile)](
                **arguments,
                **self.constants,
                BP=tile.pixels,
                BM=tile.channels,
                BK=tile.depth,
                **_options(tile),
            )

        def span(tile: Tile) -> int:
            return cdiv(math.prod(grid(tile)), self.workers)

        if tile is None:
            tile = self.tiles.get((kernel, frames, channels))
            if tile is None:
                key = (kernel, channels, self.cp, self.mp, self.kernel, self.area.bit_length())
                tile = self.choose_tile(kind, key, span, launch)
                self.tiles[kernel, frames, channels] = tile
        launch(tile)

    def choose_tile(self, kind, key, span, launch) -> Tile:
        """The tile for a launch, timing all of them if its shape class is new."""
        if tuning.INTERPRET:
            return INTERPRETER_TILES[kind]
        dtype, aligned = self.x.dtype, self.area % 16 == 0
        tiles = admitted_tiles(kind, self.device, dtype, self.precision, aligned)
        shape_class = (kind, self.x.device.index, dtype, self.precision, aligned, *key)
        return timings.fastest(shape_class, tiles, span, launch, lambda: tiles[0])

    def step(
        self,
        step: int,
        x: Tensor,
        *,
        h: Step,
        c: Step,
        weight: Tensor,
        bias: Tensor | None,
        weight_peephole: Tensor | None,
        out: Tensor | None,
        h_new: Tensor | None,
        c_new: Step,
        gates: Step,
    ) -> None:
        """One step forward."""
        self.launch(
            "forward",
            conv_lstm_fwd_kernel,
            frames=self.batch,
            channels=self.hidden,
            p_x=x,
            p_h=h[0],
            p_c=c[0],
            p_weight=weight,
            p_bias=bias,
            p_peephole=weight_peephole,
            p_out=out,
            p_h_new=h_new,
            p_c_new=c_new[0],
            p_gates=gates[0],
            size=self.size,
            n_frames=self.batch,
            **_steps(now=At(self.steps, step), h=h[1], c=c[1], c_new=c_new[1], gates=gates[1]),
            FULL=self.full,
        )

    def h_rows(self, h: Tensor | None, out: Tensor) -> Tensor:
        """h_0 .. h_{T-1} as rows."""
        rows = self.x.new_empty((self.batch, self.steps, self.area, self.mp))
        if self.steps > 1:
            pack(out[:, :-1], rows[:, 1:])
        if h is None:
            rows[:, 0].zero_()
        else:
            pack(h.unsqueeze(1), rows[:, :1])
        return rows

    def input_gradient(
        self,
        dsums: Tensor,
        weight: Tensor | None,
        grad: Tensor,
        frames: int,
        channels: int,
        steps: int,
    ) -> None:
        """The gradient of x or h, from the first of every `steps` steps of dsums."""
        self.launch(
            "backward",
            conv_lstm_bwd_input_kernel,
            frames=frames,
            channels=channels,
            p_dsums=dsums,
            p_weight=weight,
            p_grad=grad,
            n_frames=frames,
            n_channels=channels,
            size=self.size,
            steps=steps,
        )

    def weights(self, dsums: Tensor, x: Tensor | None, h: Tensor | None) -> list[Tensor]:
        """Gradients of weight_ih and weight_hh, float32; (0,) where x or h is None."""
        taps = self.kernel**2
        widths = [0 if x is None else taps * self.cp, 0 if h is None else taps * self.mp]
        rows = 4 * self.mp

        def grid(tile: Tile) -> tuple[int, int]:
            columns = sum(cdiv(width, tile.depth) for width in widths)
            tiles = columns * cdiv(rows, tile.channels)
            most = cdiv(self.pixels, 2 * tile.pixels)
            return tiles, min(cdiv(2 * self.workers, tiles), most)

        def launch(tile: Tile) -> Tensor:
            partial = dsums.new_empty((grid(tile)[1], rows, sum(widths)), dtype=torch.float32)
            conv_lstm_bwd_weight_kernel[grid(tile)](
                p_dsums=dsums,
                p_x=dsums if x is None else x,
                p_h=dsums if h is None else h,
                p_partial=partial,
                n_pixels=self.pixels,
                size=self.size,
                width_ih=widths[0],
                width_hh=widths[1],
                **self.constants,
                BM=tile.channels,
                BN=tile.depth,
                BP=tile.pixels,
                **_options(tile),
            )
            return partial

        def span(tile: Tile) -> int:
            tiles, splits = grid(tile)
            blocks = cdiv(self.pixels, tile.pixels * splits)
            return cdiv(tiles * splits, self.workers) * blocks

        key = (self.cp, self.mp, self.kernel, *map(bool, widths))
        tile = self.choose_tile("weight", key, span, launch)
        total = launch(tile).sum(0).view(4, self.mp, -1)[:, : self.hidden].split(widths, 2)
        return [
            part.unflatten(2, (taps, -1))[..., :depth].transpose(2, 3) if width else part
            for part, width, depth in zip(total, widths, (self.channels, self.hidden), strict=True)
        ]

    def sums(self, dsums, c, cells, c_last, peephole: bool) -> tuple[Tensor, Tensor]:
        """Gradients of bias (4, M) and peepholes, float32."""
        frames = self.batch * self.steps
        pixel_tile, channel_tile = SUMS_TILE
        tiles = cdiv(self.area, pixel_tile), cdiv(self.mp, channel_tile)
        splits = min(cdiv(2 * self.workers, math.prod(tiles)), frames)
        partial = c_last.new_empty((splits, tiles[0], 7, self.mp))
        grid = (*tiles, splits)
        full = None
        if self.full and peephole:
            full = c_last.new_empty((splits, 3, self.hidden, self.height, self.width))
        conv_lstm_bwd_sums_kernel[grid](
            p_dsums=dsums,
            p_c=c,
            p_cells=cells,
            p_c_last=c_last,
            p_sums=partial,
            p_full=full,
            n_frames=frames,
            size=self.size,
            steps=self.steps,
            PEEPHOLE=peephole,
            BP=pixel_tile,
            BM=channel_tile,
        )
        total = partial[:, :, : 7 if peephole else 4].sum((0, 1))[:, : self.hidden]
        return total[:4], total[4:] if full is None else full.sum(0)
