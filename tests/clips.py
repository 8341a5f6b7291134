"""Tiny videos made on the spot, for the tests of reading, writing and prediction."""

import struct
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter

UNITY = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)


def picture(index, size=(64, 48)):
    """(H, W, 3) uint8: a bright square that moves right over a dim slope."""
    width, height = size
    made = np.zeros((height, width, 3), np.uint8)
    made[:] = np.linspace(20, 90, width, dtype=np.uint8)[None, :, None]
    left = (3 * index) % max(1, width - width // 4)
    made[height // 4 : height // 2, left : left + width // 4] = (220, 60, 40)
    return made


def make_video(
    path, frames=12, size=(64, 48), *, codec="libx264", pts=None, time_base=Fraction(1, 25),
    shift=0, sound=None, seconds=None, gop=None,
):  # fmt: skip
    """A video of `picture`s, at the times `pts` + `shift`.

    sound: the codec of a 440 Hz tone, of the pictures' length if not of so many `seconds`.
    gop: frames from one key frame to the next.
    """
    pts = list(range(frames)) if pts is None else pts
    with av.open(str(path), "w") as container:
        convert = VideoReformatter()
        video = container.add_stream(codec, rate=25)
        video.width, video.height, video.pix_fmt = (*size, "yuv420p")
        video.codec_context.time_base = time_base
        if codec == "libx264":
            video.options = {"preset": "ultrafast"}
        if gop is not None:
            video.codec_context.gop_size = gop
        audio = None if sound is None else container.add_stream(sound, rate=48000)
        if audio is not None:
            audio.layout = "stereo"
        for index, when in enumerate(pts):
            frame = av.VideoFrame.from_ndarray(picture(index, size), format="rgb24")
            frame = convert.reformat(frame, format="yuv420p", threads=1)
            frame.pts, frame.time_base = when + shift, time_base
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            seconds = float((pts[-1] + 1) * time_base) if seconds is None else seconds
            tone = np.sin(np.arange(int(seconds * 48000)) * (2 * np.pi * 440 / 48000)) / 2
            for at in range(0, len(tone), 960):
                part = np.tile((tone[at : at + 960] * 32767).astype(np.int16), (2, 1))
                frame = av.AudioFrame.from_ndarray(part.T.reshape(1, -1), "s16", "stereo")
                frame.pts, frame.sample_rate, frame.time_base = at, 48000, Fraction(1, 48000)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def turn(path, a, b, c, d):
    """Write a display matrix into an MP4, as phones do: x goes to (a, b), y to (c, d)."""
    data = bytearray(path.read_bytes())
    at = data.index(UNITY, data.index(b"tkhd"))
    one = 1 << 16
    data[at : at + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def decode(path, form="rgb24"):
    """(arrays, times in seconds as fractions) of the pictures of a video."""
    arrays, times = [], []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoder = stream.codec_context
        if decoder.name == "vp9" and form == "rgba":
            decoder = av.CodecContext.create("libvpx-vp9", "r")  # FFmpeg's own drops the alpha
        for packet in container.demux(stream):
            for frame in decoder.decode(packet if packet.size else None):
                arrays.append(frame.to_ndarray(format=form))
                times.append(frame.pts * stream.time_base)
    return arrays, times


def sound_packets(path):
    """(codec, [(bytes, time)]) of the first sound track."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        packets = [(bytes(p), p.pts * p.time_base) for p in container.demux(stream) if p.size]
        return stream.codec_context.name, packets


def sound_samples(path):
    """(channels, samples) float of the first sound track."""
    with av.open(str(path)) as container:
        parts = [frame.to_ndarray() for frame in container.decode(audio=0)]
    return np.concatenate(parts, -1)
