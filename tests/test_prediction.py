"""Prediction over videos: windows, views, and the command `vsod predict` as a user meets it."""

import ctypes
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

av = pytest.importorskip("av")
cv2 = pytest.importorskip("cv2")
pytest.importorskip("typer")
pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")

from av.video.reformatter import ColorRange, Colorspace, VideoReformatter  # noqa: E402
from checks import exact_float32  # noqa: E402
from clips import decode, make_video, picture, sound_packets, turn  # noqa: E402

from vsod_models import cli, zoo  # noqa: E402
from vsod_models.cli.predict import parse_colour, parse_size  # noqa: E402
from vsod_models.data import open_dataset  # noqa: E402
from vsod_models.errors import InputError  # noqa: E402
from vsod_models.media.planes import planes_of  # noqa: E402
from vsod_models.media.reading import open_source  # noqa: E402
from vsod_models.media.views import TINT, VIEWS, overlay_on  # noqa: E402
from vsod_models.media.writing import Video  # noqa: E402
from vsod_models.networks.contract import SaliencyModel  # noqa: E402
from vsod_models.networks.inference import bfloat16_pays, for_inference  # noqa: E402
from vsod_models.networks.mssa import MSSA  # noqa: E402
from vsod_models.prediction import (  # noqa: E402
    VideoPredictor,
    fitted,
    outputs,
    predict_dataset,
    predict_file,
)
from vsod_models.prior.cache import make_priors  # noqa: E402
from vsod_models.prior.flow import FlowMagnitude, frame_prior  # noqa: E402

SIZE = (12, 16)


class Windowed(SaliencyModel):
    """Bright is salient, less so the farther the frame is from the mean of its window."""

    clip_length, image_size, outputs, needs_prior = 5, SIZE, "all", False

    def __init__(self):
        super().__init__()
        self.encoded = 0

    def encode(self, frames):
        self.encoded += frames.shape[0] * frames.shape[1]
        return [frames.mean(2, keepdim=True), frames[:, :, :1, ::2, ::2]]

    def decode(self, maps, size):
        assert maps[0].shape[2:] == (1, *size) and maps[1].shape[:2] == maps[0].shape[:2]
        bright = maps[0]
        return 6 * bright - 3 - 2 * (bright - bright.mean(1, keepdim=True)).abs()


class LastOnly(Windowed):
    clip_length, outputs, needs_prior = 4, "last", True

    def encode(self, frames, prior):
        self.encoded += frames.shape[0] * frames.shape[1]
        return [frames.mean(2, keepdim=True), prior]

    def decode(self, maps, size):
        assert maps[0].shape[1] == self.clip_length
        weights = torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None, None, None]
        return (maps[0] * weights).sum(1) / 5 + maps[1][:, -1]


def clip(count, size=SIZE):
    generator = np.random.default_rng(count)
    return [generator.integers(0, 255, (*size, 3), np.uint8) for _ in range(count)]


def as_input(frames):
    return torch.from_numpy(np.stack(frames)).movedim(-1, 1)[None].float() / 255


# ---- windows


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("overlap", [0, 1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 7, 8, 11, 23])
def test_windows_are_averaged_and_each_frame_is_encoded_once(count, overlap, batch):
    frames, model = clip(count), Windowed()
    predictor = VideoPredictor(model, "cpu", overlap=overlap, batch=batch)
    made = predictor.predict_clip(frames)
    assert predictor.model.encoded == count and model.encoded == 0, "it runs a copy"

    length, stride = min(5, count), 5 - overlap
    starts = list(range(0, count - length + 1, stride))
    inputs = as_input(frames)
    total, weight = torch.zeros(count, *SIZE), torch.zeros(count)
    windows = [(start, 0) for start in starts]
    if starts[-1] + length < count:  # the last one reaches back, over frames that are given away
        windows.append((count - length, starts[-1] + stride))
    for start, first in windows:
        window = inputs[:, start : start + length]
        probability = model.decode(model.encode(window), SIZE).sigmoid()[0, :, 0]
        for t in range(length):
            if start + t >= first:
                share = min(t + 1, length - t)
                total[start + t] += share * probability[t]
                weight[start + t] += share
    expected = (total / weight[:, None, None]).numpy()
    np.testing.assert_allclose(np.stack(made), expected, rtol=0, atol=1e-6)


def test_maps_reach_the_windows_in_their_own_layout():
    class ChannelsLast(Windowed):
        def encode(self, frames):
            bright, red = super().encode(frames)
            last = torch.cat([bright, bright], 2).movedim(2, -1).contiguous().movedim(-1, 2)
            return [bright, red, last]

        def decode(self, maps, size):
            *maps, last = maps
            assert last[0].is_contiguous(memory_format=torch.channels_last)
            assert maps[0].is_contiguous() and torch.equal(last, maps[0].expand_as(last))
            return super().decode(maps, size)

    made = VideoPredictor(ChannelsLast(), "cpu").predict_clip(clip(7))
    np.testing.assert_array_equal(made, VideoPredictor(Windowed(), "cpu").predict_clip(clip(7)))


@pytest.mark.parametrize("foreign", [False, True])
def test_the_two_halves_of_a_model_run_in_threads_of_their_own(foreign):
    class Noting(Windowed):
        source = "somewhere:else" if foreign else ""  # which may not bear it

        def encode(self, frames):
            self.encoder = threading.current_thread().name
            return super().encode(frames)

        def decode(self, maps, size):
            self.decoder = threading.current_thread().name
            return super().decode(maps, size)

    predictor = VideoPredictor(Noting(), "cpu")
    expected = VideoPredictor(Windowed(), "cpu").predict_clip(clip(9))
    np.testing.assert_array_equal(predictor.predict_clip(clip(9)), expected)
    assert predictor.model.decoder == threading.current_thread().name
    assert (predictor.model.encoder == predictor.model.decoder) is foreign


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_a_model_of_the_last_frame(count, batch):
    frames, model, seen = clip(count), LastOnly(), []

    def prior(frame, neighbour):
        seen.append((frame, neighbour))
        return frame[:, :, 0].astype(np.float32) / 255

    predictor = VideoPredictor(model, "cpu", batch=batch, prior=prior)
    made = predictor.predict_clip(frames)
    assert predictor.model.encoded == count
    for index, (frame, neighbour) in enumerate(seen):
        other = index + 1 if index + 1 < count else max(0, index - 1)
        assert frame is frames[index] and neighbour is frames[other]
    for index in range(count):
        window = [frames[max(0, index - back)] for back in (3, 2, 1, 0)]
        prior_input = as_input(window)[:, :, :1]
        logits = model.decode(model.encode(as_input(window), prior_input), SIZE)
        expected = logits.sigmoid()[0, 0].numpy()
        np.testing.assert_allclose(made[index], expected, rtol=0, atol=1e-6)


class KeepsAspect(Windowed):
    image_size, side_multiple = (16, 16), 4

    def encode(self, frames):
        self.sizes = [*getattr(self, "sizes", []), tuple(frames.shape[-2:])]
        return super().encode(frames)


def test_frames_keep_their_aspect_ratio_and_each_size_is_a_clip_of_its_own():
    predictor = VideoPredictor(KeepsAspect(), "cpu", batch=1)
    frames = [*clip(6, (90, 160)), *clip(2, (50, 50)), *clip(1, (160, 90))]
    made = predictor.predict_clip(frames)
    assert [m.shape for m in made] == [f.shape[:2] for f in frames]
    assert sorted(set(predictor.model.sizes)) == [(12, 20), (16, 16), (20, 12)]
    for first, last in ((0, 6), (6, 8), (8, 9)):
        alone = VideoPredictor(KeepsAspect(), "cpu", batch=1).predict_clip(frames[first:last])
        np.testing.assert_array_equal(np.concatenate(made[first:last]), np.concatenate(alone))
    squeezed = VideoPredictor(KeepsAspect(), "cpu", size=(8, 12))
    squeezed.predict_clip(frames)
    assert set(squeezed.model.sizes) == {(8, 12)}, "a size that is asked for is taken"


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((720, 1280), (192, 352)),
        ((1280, 720), (352, 192)),
        ((512, 512), (256, 256)),
        ((480, 640), (224, 288)),
        ((100, 5000), (96, 736)),  # as 8:1
        ((3, 1), (448, 160)),
    ],
)
def test_sizes_of_about_as_many_pixels(shape, expected):
    assert fitted(shape, 256 * 256, 32) == expected


@pytest.mark.parametrize("backbone", ["vgg11_bn", "mobilenet_v2"])
def test_batch_norm_is_folded_away(backbone):
    model = MSSA(backbone, levels=(8, 16), skips=(4,), num_heads=(2, 4), dim=16, depth=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.weight)
    model.train()
    quick = for_inference(model)
    assert model.training and not quick.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in quick.modules())
    frames = torch.rand(1, 2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(quick(frames), model.eval()(frames), rtol=1e-3, atol=1e-3)


def quick_and_plain(precision):
    model = MSSA("mobilenet_v2", levels=(16, 32), skips=(4,), num_heads=(2, 4), dim=16, depth=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    predictor = VideoPredictor(model, "cpu", precision=precision)
    return predictor.model, for_inference(model, getattr(torch, precision))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_run_with_their_convolutions(precision):
    quick, plain = quick_and_plain(precision)
    kinds = [sum(isinstance(m, nn.ReLU6) for m in model.modules()) for model in (plain, quick)]
    pays = precision == "float32" or bfloat16_pays()
    fused = torch.backends.mkldnn.is_available() and pays
    assert kinds[0] > 30 and (kinds[1] == 0) is fused
    assert list(quick.state_dict()) == list(plain.state_dict())
    frames = torch.rand(1, 2, 3, 64, 96)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.no_grad(), autocast:
        bound = dict(rtol=1e-4, atol=1e-4) if precision == "float32" else dict(rtol=0.02, atol=0.02)
        torch.testing.assert_close(quick(frames), plain(frames), **bound)


def test_a_vgg_in_float32_is_the_same_frame_by_frame_and_with_other_products():
    model = MSSA(
        "vgg16_bn", {"width": 0.125}, num_heads=(2, 4), dim=16, depth=1, feed_forward=20
    ).eval()
    quick, plain = VideoPredictor(model, "cpu").model, for_inference(model)
    fused = torch.backends.mkldnn.is_available()
    linear = [m for m in quick.modules() if isinstance(m, nn.Linear)]
    assert len(linear) > 10 and all((type(m) is not nn.Linear) is fused for m in linear)
    assert quick.backbone.at_once == (1 if fused else None) and plain.backbone.at_once is None
    assert list(quick.state_dict()) == list(plain.state_dict())
    frames = torch.rand(1, 3, 3, 64, 96)
    seen = []
    quick.backbone.body.register_forward_pre_hook(lambda body, images: seen.append(len(images[0])))
    with torch.inference_mode():
        torch.testing.assert_close(quick(frames), plain(frames), rtol=1e-4, atol=1e-4)
    assert seen == ([1, 1, 1] if fused else [3])
    layer = linear[0]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, layer.in_features)).dtype == torch.bfloat16


def test_linear_layers_go_with_the_last_name_of_their_predictor():
    """Without waiting for Python's collection of cycles: the next model needs the memory."""
    model = MSSA("vgg16_bn", {"width": 0.125}, num_heads=(2, 4), dim=16, depth=1, feed_forward=20)
    predictor = VideoPredictor(model, "cpu", precision="float32")
    weights = [weakref.ref(m.weight) for m in predictor.model.modules() if isinstance(m, nn.Linear)]
    gc.disable()
    try:
        del predictor
        assert weights and not [weight for weight in weights if weight() is not None]
    finally:
        gc.enable()


def test_a_frame_goes_to_another_process_without_what_the_decoder_holds(tmp_path):
    frame = next(iter(open_source(make_video(tmp_path / "a.mp4", frames=2))))
    there = pickle.loads(pickle.dumps(frame))
    assert frame.decoded is not None and there.decoded is None
    assert (there.picture == frame.picture).all() and there.time == frame.time


def test_an_overlay_is_drawn_where_something_is_salient():
    frame = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    saliency = np.zeros((40, 60), np.float32)
    assert (VIEWS["overlay"](frame, saliency, (0, 0, 0)) == frame).all()
    saliency[10:20, 30:50] = np.linspace(0, 0.4, 20, dtype=np.float32)
    expected = frame * (1 - saliency[..., None] / 2) + np.array(TINT) * saliency[..., None] / 2
    made = VIEWS["overlay"](frame, saliency, (0, 0, 0))
    assert np.abs(made - expected).max() <= 1


def test_the_contour_is_where_it_would_be_drawn_pixel_by_pixel():
    noise = np.random.default_rng(0).random((90, 160)).astype(np.float32)
    saliency = cv2.resize(cv2.GaussianBlur(noise, (0, 0), 6) * 8 - 3.5, (480, 270)).clip(0, 1)
    frame = np.full((270, 480, 3), 90, np.uint8)
    inside = (saliency >= 0.5).astype(np.uint8)
    every, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    assert 2 < len(every) < 60
    made = VIEWS["overlay"](frame, saliency, (0, 0, 0)).astype(int)
    without = frame + (np.array(TINT) - frame) * saliency[..., None] / 2
    expected = cv2.drawContours(without.astype(np.uint8), every, -1, TINT, 1, cv2.LINE_AA)
    # The softened edge of the line alone differs.
    changed = np.abs(made - expected).max(2) > np.abs(np.array(TINT) - frame).max() / 2
    assert changed.mean() < 0.001


@pytest.mark.parametrize("size", [(480, 270), (1280, 720), (98, 66)])
def test_an_overlay_on_planes_is_what_the_way_through_rgb_gives(size):
    width, height = size
    colours = Colorspace.ITU709 if height >= 720 else Colorspace.SMPTE170M
    y, x = np.mgrid[:height, :width]
    slope = np.stack([x * 200 / width, y * 200 / height, np.full_like(x, 90)], -1).astype(np.uint8)
    to = dict(format="yuv420p", dst_colorspace=colours, dst_color_range=ColorRange.MPEG)
    convert = VideoReformatter()
    decoded = convert.reformat(av.VideoFrame.from_ndarray(slope, format="rgb24"), **to)
    before = decoded.to_ndarray()
    saliency = np.zeros((height, width), np.float32)
    cv2.ellipse(saliency, (width // 3, height // 2), (width // 5, height // 4), 20, 0, 360, 1, -1)
    saliency[-9:, -7:] = 0.8  # a corner, to which the line is cut
    saliency = cv2.GaussianBlur(saliency, (0, 0), height / 90)

    planes = planes_of(decoded, colours)
    overlay_on(planes, saliency)
    made = planes.frame.to_ndarray().astype(int)
    picture = convert.reformat(decoded, format="rgb24").to_ndarray()
    shown = VIEWS["overlay"](picture, saliency, (0, 0, 0))
    shown = av.VideoFrame.from_ndarray(shown, format="rgb24")
    expected = convert.reformat(shown, **to).to_ndarray().astype(int)
    error = np.abs(made - expected)
    assert error[:height].max() <= 4, "brightness: rounded once, not three times"
    # swscale mixes the colours of neighbouring rows where it halves them: at the line's edges.
    assert error[height:].mean() < 0.5 and (error[height:] > 4).mean() < 0.02
    assert np.abs(made - before).mean() > 2 and (decoded.to_ndarray() == before).all()
    overlay_on(planes, np.zeros_like(saliency))
    assert (planes.frame.to_ndarray() == made).all()


def test_planes_are_those_of_frames_that_are_coded_as_they_are():
    def frame(width=64, height=48, form="yuv420p", space=1, range=1):
        made = av.VideoFrame(width, height, form)
        made.colorspace, made.color_range = space, range
        return made

    assert planes_of(frame(), Colorspace.ITU709).size == (64, 48)
    assert planes_of(frame(space=2, range=0), Colorspace.SMPTE170M) is not None
    assert planes_of(None, Colorspace.ITU709) is None
    for other in (
        frame(width=63), frame(height=47), frame(form="yuv444p"), frame(form="yuv420p10le"),
        frame(space=2), frame(space=9), frame(range=2),
    ):  # fmt: skip
        assert planes_of(other, Colorspace.ITU709) is None


@pytest.mark.parametrize("turned", [False, True])
def test_an_overlay_is_coded_from_the_planes_of_upright_frames(tmp_path, monkeypatch, turned):
    path = make_video(tmp_path / "in.mp4", frames=6)
    if turned:
        turn(path, 0, 1, -1, 0)
    predictor = VideoPredictor(Windowed(), "cpu")
    source = open_source(path)
    drawn = []
    monkeypatch.setattr(outputs, "overlay_on", lambda *on: drawn.append(on) or overlay_on(*on))
    predict_file(predictor, source, tmp_path / "planes.mp4")
    assert len(drawn) == (0 if turned else 6)
    monkeypatch.setattr(Video, "planes", lambda self, frame: None)
    predict_file(predictor, source, tmp_path / "pictures.mp4")
    (made, times), (expected, wanted) = (
        decode(tmp_path / f"{n}.mp4") for n in ("planes", "pictures")
    )
    assert times == wanted and made[0].shape == ((64, 48, 3) if turned else (48, 64, 3))
    assert np.abs(np.array(made, int) - np.array(expected, int)).mean() < 2


def test_results_have_the_size_and_time_of_their_frames(tmp_path):
    path = make_video(tmp_path / "a.mp4", frames=7, size=(64, 48))
    results = list(VideoPredictor(Windowed(), "cpu").stream(path))
    assert [r.index for r in results] == list(range(7))
    assert [r.time for r in results] == pytest.approx([i / 25 for i in range(7)])
    for result in results:
        assert result.frame.shape == (48, 64, 3) and result.frame.dtype == np.uint8
        assert result.saliency.shape == (48, 64) and result.saliency.dtype == np.float32
        assert 0 <= result.saliency.min() < 0.1 < 0.3 < result.saliency.max() <= 1
    mixed = VideoPredictor(Windowed(), "cpu").predict_clip([*clip(3), *clip(2, (31, 17))])
    assert [s.shape for s in mixed] == [SIZE] * 3 + [(31, 17)] * 2


def test_short_windows_share_no_frames_unless_told_to():
    class Short(Windowed):
        clip_length = 3

    strides = {VideoPredictor(m, "cpu").stride for m in (Windowed(), Short())}
    assert strides == {3} and VideoPredictor(Short(), "cpu", overlap=1).stride == 2


def test_no_frames():
    assert VideoPredictor(Windowed(), "cpu").predict_clip([]) == []


def small_mssa():
    from vsod_models.networks.mssa import MSSA

    torch.manual_seed(0)
    return MSSA(
        backbone="resnet18", levels=(16, 32), skips=(8,), num_heads=(2, 2), dim=16, depth=1,
        feed_forward=16, decoder_dim=8, image_size=(64, 96),
    ).eval()  # fmt: skip


def test_mssa_in_one_window_is_the_model_itself():
    model = small_mssa()
    frames = clip(5, (64, 96))
    predictor = VideoPredictor(model, "cpu", name="small")
    with torch.inference_mode():
        expected = model(as_input(frames)).sigmoid()[0, :, 0].numpy()
    np.testing.assert_allclose(
        np.stack(predictor.predict_clip(frames)), expected, rtol=0, atol=1e-5
    )
    assert re.fullmatch(
        r"device cpu \(\d+ threads\), model small, float32, "
        r"shunted_attention on backend (cpu|reference)",
        predictor.describe(),
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("crf", (None, "dss"))
def test_on_a_gpu_as_on_a_cpu(crf, device="cuda"):
    frames = clip(9, (70, 90))
    expected = VideoPredictor(small_mssa(), "cpu", crf=crf).predict_clip(frames)
    with exact_float32():
        predictor = VideoPredictor(small_mssa(), device, crf=crf)
        actual = predictor.predict_clip(frames)
    assert predictor.describe().startswith(f"device {device}")
    off = np.abs(np.stack(actual) - np.stack(expected))
    assert off.max() < (1e-4 if crf is None else 1e-2) and off.mean() < 1e-4


def test_crf_follows_the_edges_of_the_frame():
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[8:40, 20:52] = 255
    plain, refined = (
        VideoPredictor(Windowed(), "cpu", size=(6, 8), crf=crf).predict_clip([frame])[0]
        for crf in (None, "dss")
    )
    truth = frame[:, :, 0] / 255
    assert np.abs(refined - truth).mean() < 0.5 * np.abs(plain - truth).mean()


def test_precision():
    frames = clip(6)
    exact = np.stack(VideoPredictor(Windowed(), "cpu").predict_clip(frames))
    rough = np.stack(VideoPredictor(Windowed(), "cpu", precision="bfloat16").predict_clip(frames))
    np.testing.assert_allclose(rough, exact, atol=0.02)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(overlap=5), "overlap must be 0 to 4"),
        (dict(batch=0), "batch must be at least 1"),
        (dict(precision="int8"), "precision must be one of"),
        (dict(size=(0, 4)), "size must be at least 1x1"),
        (dict(device="gpu"), "device must be auto, cpu or cuda"),
        (dict(device="cuda:99"), "device cuda:99: "),
    ],
)
def test_arguments_that_cannot_be(arguments, words):
    with pytest.raises(InputError, match=words):
        VideoPredictor(Windowed(), **arguments)


def test_what_is_not_a_frame():
    with pytest.raises(InputError, match="needs a motion prior"):
        VideoPredictor(LastOnly(), "cpu")
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(InputError, match=r"frame 1 must be \(H, W, 3\) uint8"):
            VideoPredictor(Windowed(), "cpu").predict_clip([clip(1)[0], bad])


# ---- views


def test_views():
    frame = np.full((40, 60, 3), 100, np.uint8)
    saliency = np.zeros((40, 60), np.float32)
    saliency[10:30, 20:40] = 1
    shown = {name: view(frame, saliency, (0, 255, 0)) for name, view in VIEWS.items()}
    assert all(made.dtype == np.uint8 for made in shown.values())
    np.testing.assert_array_equal(shown["mask"], saliency * 255)
    np.testing.assert_array_equal(shown["matte"], np.dstack([frame, shown["mask"]]))
    np.testing.assert_array_equal(shown["cutout"][0, 0], (0, 255, 0))
    np.testing.assert_array_equal(shown["cutout"][20, 30], (100, 100, 100))
    np.testing.assert_array_equal(shown["overlay"][0, 0], (100, 100, 100))
    np.testing.assert_allclose(shown["overlay"][20, 30], (177.5, 82, 82), atol=0.5)
    contour = shown["overlay"][10, 30].astype(int)  # drawn with soft edges
    assert np.abs(contour - (255, 64, 64)).max() < 20
    np.testing.assert_array_equal(shown["side-by-side"][:, :60], frame)
    np.testing.assert_array_equal(shown["side-by-side"][:, 60:, 0], shown["mask"])


def test_parsing():
    assert parse_size("640x360") == (360, 640)
    assert parse_colour("#0f0") == (0, 255, 0)
    with pytest.raises(InputError, match="--size must be WIDTHxHEIGHT"):
        parse_size("640")
    with pytest.raises(InputError, match="--background must be a colour"):
        parse_colour("greenish")


# ---- the command


@pytest.fixture
def vsod(monkeypatch, capsys):
    """Runs the command with a stub for every model: (exit code, stdout, stderr)."""

    def run(*arguments, model=None):
        monkeypatch.setattr(zoo, "load_model", lambda name, **_: model or Windowed())
        with pytest.raises(SystemExit) as exit:
            cli.main(["predict", *map(str, arguments)])
        return exit.value.code, *capsys.readouterr()

    return run


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_video_out_of_a_video(tmp_path, vsod):
    path = make_video(tmp_path / "in.mp4", frames=30, sound="aac")
    code, out, _ = vsod(path, "-o", tmp_path / "out.mp4", "--device", "cpu")
    assert code == 0
    assert re.match(r"device cpu \(\d+ threads\), model vsod-mobile, (b?float)(16|32)\n", out)
    assert out.endswith("out.mp4: 30 frames, overlay\n")
    pictures, times = decode(tmp_path / "out.mp4")
    assert [p.shape for p in pictures] == [(48, 64, 3)] * 30
    assert times == decode(path)[1]
    assert sound_packets(tmp_path / "out.mp4") == sound_packets(path)
    assert files(tmp_path) == ["in.mp4", "out.mp4"]


@pytest.mark.parametrize(
    "name, view, channels",
    [("out.mov", "matte", 4), ("out.webm", "matte", 4), ("out.gif", "overlay", 3)],
)
def test_the_ending_says_what_is_shown(tmp_path, vsod, name, view, channels):
    path = make_video(tmp_path / "in.mp4", frames=6)
    code, out, _ = vsod(path, "-o", tmp_path / name)
    assert code == 0 and out.endswith(f"{name}: 6 frames, {view}\n")
    pictures, _ = decode(tmp_path / name, "rgba")
    assert len(pictures) == 6
    assert (pictures[0][:, :, 3].min() < 250) == (channels == 4)


def test_masks_of_a_folder_are_what_the_evaluation_reads(tmp_path, vsod):
    (tmp_path / "frames").mkdir()
    for index in range(7):
        Image.fromarray(picture(index)).save(tmp_path / "frames" / f"f{index}.jpg")
    assert vsod(tmp_path / "frames", "-o", tmp_path / "maps" / "sequence")[0] == 0
    made = Image.open(tmp_path / "maps" / "sequence" / "f3.png")
    assert made.mode == "L" and made.size == (64, 48)
    assert len(files(tmp_path / "maps" / "sequence")) == 7
    # A glob that the shell has expanded, a folder that exists and is empty.
    (tmp_path / "again").mkdir()
    frames = sorted((tmp_path / "frames").iterdir())
    assert vsod(*frames, "-o", tmp_path / "again")[0] == 0
    for name in files(tmp_path / "again"):
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (tmp_path / "maps" / "sequence" / name).read_bytes()


def test_one_picture_side_by_side(tmp_path, vsod):
    Image.fromarray(picture(0)).save(tmp_path / "in.png")
    code, _, _ = vsod(tmp_path / "in.png", "-o", tmp_path / "out.png", "--as", "side-by-side")
    assert code == 0 and Image.open(tmp_path / "out.png").size == (128, 48)


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, vsod):
    path = make_video(tmp_path / "in.mp4", frames=60)
    cut = tmp_path / "cut.webm"
    make_video(cut, frames=60, codec="libvpx-vp9")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    there = tmp_path / "there.mp4"
    there.write_bytes(b"")
    before = files(tmp_path)
    out = tmp_path / "out.mp4"
    for arguments, words in [
        ((tmp_path / "gone.mp4", "-o", out), "gone.mp4: no such file"),
        ((path, "-o", path, "--overwrite"), "in.mp4: is an input"),
        ((path, "-o", out, "--as", "sketch"), "--as must be one of mask, overlay"),
        ((path, "-o", out, "--as", "matte"), "out.mp4: .mp4 has no alpha; .* take --as cutout"),
        ((path, "-o", there), "there.mp4: exists already; .* or --overwrite"),
        ((path, "-o", out, "--device", "cuda:77"), "device cuda:77: "),
        ((path, "-o", out, "--size", "big"), "--size must be WIDTHxHEIGHT"),
        ((path, "-o", out, "--background", "x"), "--background must be a colour"),
        ((path, "-o", tmp_path / "out.xyz"), "out.xyz: cannot write .xyz"),
        ((path, "-o", tmp_path / "in.mp4" / "out.mp4"), "out.mp4: cannot be written"),
        ((cut, "-o", out), r"cut.webm: cut off after frame \d+ \("),
        ((cut, "-o", tmp_path / "folder"), "cut.webm: cut off after frame"),
    ]:
        code, _, err = vsod(*arguments)
        assert code == 2, arguments
        assert re.search(words, err) and err.startswith("vsod: ") and err.count("\n") == 1, err
        assert files(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_an_error(tmp_path, vsod):
    path = make_video(tmp_path / "in.mp4", frames=2)
    code, _, err = vsod(path, "-o", tmp_path / "out.mp4", "--device", "cuda")
    assert code == 2 and err.startswith("vsod: device cuda: ") and files(tmp_path) == ["in.mp4"]


def test_a_model_that_fails_leaves_nothing(tmp_path, monkeypatch):
    class Failing(Windowed):
        def decode(self, maps, size):
            if self.encoded > 12:
                raise RuntimeError("broken")
            return super().decode(maps, size)

    source = open_source(make_video(tmp_path / "in.mp4", frames=40))
    for name in ("out.mp4", "out.gif", "out"):
        with pytest.raises(RuntimeError, match="broken"):
            predict_file(VideoPredictor(Failing(), "cpu"), source, tmp_path / name)
        assert files(tmp_path) == ["in.mp4"]


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.mov", "out.gif", "out"])
def test_an_interrupt_keeps_what_is_done(tmp_path, vsod, name):
    class Interrupted(Windowed):
        decoded = 0

        def decode(self, maps, size):
            self.decoded += 1
            if self.decoded > 5:
                raise KeyboardInterrupt
            return super().decode(maps, size)

    path = make_video(tmp_path / "in.mp4", frames=40, sound="aac")
    code, _, err = vsod(path, "-o", tmp_path / name, model=Interrupted())
    assert code == 130
    frames = int(re.search(r"stopped: .* has the (\d+) frames", err).group(1))
    assert 10 <= frames < 20
    if name == "out":
        assert len(files(tmp_path / name)) == frames
    else:
        assert len(decode(tmp_path / name)[0]) == frames
    assert files(tmp_path) == sorted(["in.mp4", name])


def test_an_interrupt_before_the_first_frame_leaves_nothing(tmp_path, vsod):
    class Interrupted(Windowed):
        def encode(self, frames):
            raise KeyboardInterrupt

    path = make_video(tmp_path / "in.mp4")
    code, _, err = vsod(path, "-o", tmp_path / "out.mp4", model=Interrupted())
    assert code == 130 and "nothing was written" in err
    assert files(tmp_path) == ["in.mp4"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    path = make_video(tmp_path / "in.mp4", frames=500)
    code = textwrap.dedent(
        f"""
        import signal, sys, time
        # A shell starts what it runs in the background with Ctrl-C ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_prediction import Windowed
        from vsod_models import cli, zoo
        class Slow(Windowed):
            def encode(self, frames):
                time.sleep(0.05)
                made = super().encode(frames)
                if self.encoded == 60:  # those that wait are fewer
                    print("under way", flush=True)
                return made
        zoo.load_model = lambda name, **_: Slow()
        cli.main(["predict", *sys.argv[1:]])
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), "-o", str(tmp_path / "out.mp4")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("device ")
    assert process.stdout.readline() == "under way\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    pictures, _ = decode(tmp_path / "out.mp4")
    assert err == f"stopped: {tmp_path / 'out.mp4'} has the {len(pictures)} frames before that\n"
    assert 3 <= len(pictures) < 400
    assert files(tmp_path) == ["in.mp4", "out.mp4"]


def test_a_dataset_for_evaluation(vsod, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    with pytest.raises(SystemExit):
        options = "--clips 1 --val-clips 2 --frames 3 --height 32 --width 40"
        cli.main(["data", "synthetic", str(data), *options.split()])
    arguments = ("--dataset", "davis16", "--data", data, "-o", out)
    code, printed, _ = vsod(*arguments)
    assert code == 0 and "6 frames of 2 sequences, mask" in printed
    masks = sorted(path.relative_to(out) for path in out.rglob("*.png"))
    assert len(masks) == 6 and masks[0].name == "00000.png"
    with pytest.raises(SystemExit) as exit:
        cli.main(["eval", "--pred", str(out), "--data", str(data), "--dataset", "davis16"])
    assert exit.value.code == 0
    for path in (out / masks[0]).parent.iterdir():
        path.unlink()
    (out / masks[0]).parent.rmdir()
    assert "3 frames of" in vsod(*arguments)[1]  # the other sequence is kept
    code, _, error = vsod("in.mp4", *arguments)
    assert code == 2 and "or --dataset" in error
    before = sorted(p for p in data.rglob("*"))
    for own in ("JPEGImages", "Annotations"):
        code, _, error = vsod(*arguments[:4], "-o", data / own / "480p", "--overwrite")
        assert code == 2 and "is a folder of the dataset itself" in error
    assert sorted(p for p in data.rglob("*")) == before
    code, _, error = vsod("-o", out)
    assert code == 2 and "give an input" in error


def test_priors_of_a_dataset_are_not_made_again(tmp_path):
    def refuse(frame, neighbour):
        raise AssertionError("made again")

    data = tmp_path / "data"
    with pytest.raises(SystemExit):
        options = "--clips 1 --val-clips 1 --frames 3 --height 32 --width 40"
        cli.main(["data", "synthetic", str(data), *options.split()])
    source = FlowMagnitude()
    records = make_priors(open_dataset("davis16", data, "val"), source, tmp_path / "priors")
    shown = {}
    for name, these, prior in (
        ("kept", records, refuse),
        ("made", open_dataset("davis16", data, "val"), partial(frame_prior, source)),
    ):
        predict_dataset(VideoPredictor(LastOnly(), "cpu", prior=prior), these, tmp_path / name)
        shown[name] = [np.array(Image.open(p)) for p in sorted((tmp_path / name).rglob("*.png"))]
    assert len(shown["kept"]) == 3
    for kept, made in zip(shown["kept"], shown["made"], strict=True):
        np.testing.assert_allclose(kept.astype(int), made, atol=1)  # kept in 8 bits


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_length(tmp_path):
    torch.set_num_threads(1)
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)  # glibc has it
    frames, fast = 10_000, Fraction(1, 250)
    path = make_video(tmp_path / "in.mp4", frames, (48, 32), time_base=fast, sound="aac")
    memory = {}

    def progress(done):
        if done % 1000 == 0:
            give_back(0)  # what is free, and only kept as threads happened to take turns
            resident = int(Path("/proc/self/statm").read_text().split()[1])
            memory[done] = resident * os.sysconf("SC_PAGESIZE") / 2**20

    predictor = VideoPredictor(Windowed(), "cpu", batch=16)
    written = predict_file(predictor, open_source(path), tmp_path / "out.mp4", progress=progress)
    assert written.frames == frames
    # 8000 frames of 4.5 kB are 35 MiB; the index of an MP4 takes 0.1 kB a frame.
    assert memory[frames] - memory[2000] < 8, memory


@pytest.mark.skipif("VSOD_DATA" not in os.environ, reason="VSOD_DATA is not set")
@pytest.mark.parametrize("name", ["sam2_dog", "sam2_juggle", "tokenflow_wolf", "imageio_realshort"])
def test_real_clips(tmp_path, name):
    path = Path(os.environ["VSOD_DATA"]) / "videos" / f"{name}.mp4"
    source = open_source(path)
    written = predict_file(VideoPredictor(Windowed(), "cpu"), source, tmp_path / "out.mp4")
    pictures, times = decode(tmp_path / "out.mp4")
    expected, expected_times = decode(path)
    assert len(pictures) == written.frames == source.frames
    assert pictures[0].shape == expected[0].shape and times == expected_times


def test_the_model_in_the_package():
    """mssa-tiny finds objects on clips that it has not seen, and is small enough to ship."""
    from vsod_models.data.synthetic import synthetic_clip

    folder = zoo.SHIPPED / "mssa-tiny"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    predictor = VideoPredictor(zoo.load_model("mssa-tiny"), "cpu")
    inside, outside = [], []
    for index in range(6):
        images, masks = synthetic_clip(0, index, 3, (160, 160), split="val")
        for saliency, mask in zip(predictor.predict_clip(list(images)), masks, strict=True):
            inside.append(saliency[mask == 1].mean())
            outside.append(saliency[mask == 0].mean())
    assert np.mean(inside) > 2 * np.mean(outside), (np.mean(inside), np.mean(outside))
