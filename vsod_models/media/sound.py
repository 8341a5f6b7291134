"""Sound, carried over from one file to another."""

from __future__ import annotations

import io
import itertools
import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from .reading import clock_start, open_container

LAYOUTS = {"1 channels": "mono", "2 channels": "stereo", "6 channels": "5.1", "8 channels": "7.1"}


class Sound:
    """The sound of one file, added to another while that is written.

    Packets are copied unchanged where the container takes their codec, and else encoded again:
    AAC for MP4, MOV and MPEG-TS, Opus for WebM.
    """

    COPIED = types.MappingProxyType(
        {
            ".mp4": {"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus"},
            ".mov": {"aac", "ac3", "alac", "mp3", "pcm_s16le", "pcm_s16be", "pcm_s24le"},
            ".webm": {"opus", "vorbis"},
            ".mpegts": {"aac", "ac3", "eac3", "mp2", "mp3"},
        }
    )

    def __init__(self, path: Path, container: Any, ending: str):
        self.container = container
        self.input: Any = open_container(path)
        self.start = clock_start(self.input)
        self.left_out = 0  # tracks that FFmpeg cannot read
        self.tracks: dict[int, Any] = {}  # index of the input stream -> what takes its packets
        for stream in self.input.streams.audio:
            if stream.codec_context is None:
                self.left_out += 1
            elif stream.codec_context.name in self.COPIED[ending] and _fits(path, stream, ending):
                self.tracks[stream.index] = _CopiedTrack(stream, container)
            elif _can_be_coded(stream, ending):
                self.tracks[stream.index] = _CodedTrack(stream, container, ending)
            else:
                self.left_out += 1
        streams = [self.input.streams[index] for index in self.tracks]
        self.packets = self.input.demux(streams) if streams else iter(())
        self.next: Any = next(self.packets, None)

    def copy(self, until: float | None) -> None:
        """Everything that starts before `until` seconds, or all that is left."""
        while self.next is not None:
            packet = self.next
            if packet.pts is not None:  # the demuxer ends with an empty packet for each stream
                if until is not None and packet.pts * packet.time_base - self.start >= until:
                    return
                shift = round(self.start / packet.time_base)
                packet.pts -= shift
                packet.dts = packet.pts
                self.container.mux(self.tracks[packet.stream.index].take(packet))
            self.next = next(self.packets, None)

    def close(self) -> None:
        for track in self.tracks.values():
            self.container.mux(track.rest())
        self.input.close()


def _fits(path: Path, stream: Any, ending: str) -> bool:
    """Whether its packets can be laid into such a file as they are."""
    try:
        with open_container(path) as source, _nowhere(ending) as trial:
            if source.format.name == "avi":  # cuts sound where it likes, and says no exact times
                return False
            track = _CopiedTrack(source.streams[stream.index], trial)
            for packet in itertools.islice(source.demux(source.streams[stream.index]), 4):
                if packet.pts is not None:
                    packet.dts = packet.pts
                    trial.mux(track.take(packet))
    except (av.error.FFmpegError, ValueError):
        return False
    return True


def _can_be_coded(stream: Any, ending: str) -> bool:
    try:
        with _nowhere(ending) as trial:
            _CodedTrack(stream, trial, ending)
            trial.start_encoding()
    except (av.error.FFmpegError, ValueError):
        return False
    return True


def _nowhere(ending: str) -> Any:
    """A container in memory, to see what such a file takes."""
    return av.open(io.BytesIO(), "w", format=ending[1:])


class _CopiedTrack:
    def __init__(self, stream: Any, container: Any):
        self.stream = container.add_stream_from_template(stream)

    def take(self, packet: Any) -> list[Any]:
        packet.stream = self.stream
        return [packet]

    def rest(self) -> list[Any]:
        return []


class _CodedTrack:
    def __init__(self, stream: Any, container: Any, ending: str):
        context = stream.codec_context
        if ending == ".webm":
            self.stream = container.add_stream("libopus", rate=48000)
            form = "flt"
        else:
            self.stream = container.add_stream("aac", rate=min(context.sample_rate, 48000))
            self.stream.bit_rate = 96000 * max(1, context.channels)
            form = "fltp"
        # WAV and AVI may count their channels without naming them.
        layout = LAYOUTS.get(context.layout.name, context.layout.name)
        self.stream.layout = layout
        self.next: Any = None  # samples so far
        self.stream.codec_context.open()
        self.resampler = av.AudioResampler(
            form, layout, self.stream.rate, self.stream.codec_context.frame_size
        )

    def take(self, packet: Any) -> list[Any]:
        try:
            decoded = packet.decode()
        except av.error.InvalidDataError:
            return []  # a damaged piece of sound is left out, as players do
        frames = [made for frame in decoded for made in self.resampler.resample(frame)]
        return [coded for frame in frames for coded in self.stream.encode(self._timed(frame))]

    def rest(self) -> list[Any]:
        frames = [self._timed(frame) for frame in self.resampler.resample(None)]
        return [coded for frame in [*frames, None] for coded in self.stream.encode(frame)]

    def _timed(self, frame: Any) -> Any:
        """By counting samples, since times of AVI are too coarse; a gap of .1 s is one."""
        rate = self.stream.rate
        due = self.next if frame.pts is None else round(frame.pts * frame.time_base * rate)
        if self.next is None or due > self.next + rate // 10:
            self.next = due or 0
        frame.pts, frame.time_base = self.next, Fraction(1, rate)
        self.next += frame.samples
        return frame
