"""SAM 2 as a refiner: a mask of another model is the prompt, what it tracks the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch

from ..errors import InputError, one_line
from .transformers import library_and_place

FRAMES = 24  # refined together: SAM 2 holds them all, each of 1024x1024 pixels


class Sam2Refiner:
    """Video SAM 2 of the library `transformers`: "owner/name", "owner/name@revision" or a folder.

    Raises InputError where the library or the repository is missing, or it is another model.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        self.name, self.device = f"sam2:{name}", torch.device(device)
        transformers, place, revision = library_and_place(name, f"refine {self.name}")
        named: dict[str, Any] = {"revision": revision}
        try:
            kind = transformers.PretrainedConfig.get_config_dict(place, **named)[0]["model_type"]
            if kind != "sam2_video":
                raise InputError(f"refine {self.name}: is a model of type {kind}, not sam2_video")
            model = transformers.Sam2VideoModel.from_pretrained(
                place, use_safetensors=True, **named
            )
            self.processor: Any = transformers.Sam2VideoProcessor.from_pretrained(place, **named)
        except InputError:
            raise
        except Exception as error:  # the library and the hub's client raise what they like
            kind = type(error).__name__
            raise InputError(f"refine {self.name}: {kind}: {one_line(error)}") from error
        self.model: Any = model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(
        self, pictures: Sequence[np.ndarray], saliency: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Frames of one size (H, W, 3) uint8 and their saliency (H, W) -> refined saliency.

        The frame whose mask is surest is the prompt; where none has a mask, all stay as they are.
        """
        prompt = surest(saliency)
        if prompt is None:
            return list(saliency)
        session = self.processor.init_video_session(
            video=list(pictures), inference_device=self.device, video_storage_device="cpu"
        )
        self.processor.add_inputs_to_inference_session(
            session, frame_idx=prompt, obj_ids=1, input_masks=saliency[prompt] >= 0.5
        )
        height, width = saliency[prompt].shape
        refined = list(saliency)
        for reverse in (False, True):
            for made in self.model.propagate_in_video_iterator(
                session, start_frame_idx=prompt, reverse=reverse
            ):
                logits = made.pred_masks.float().cpu().numpy().reshape(made.pred_masks.shape[-2:])
                shares = 1 / (1 + np.exp(-logits.clip(-30, 30)))
                refined[made.frame_idx] = cv2.resize(
                    shares, (width, height), interpolation=cv2.INTER_LINEAR
                )
        return refined


def surest(saliency: Sequence[np.ndarray]) -> int | None:
    """The frame with the largest share of its saliency in its mask; None where none has one."""
    shares = [
        float(values[values >= 0.5].sum() / values.sum()) if (values >= 0.5).any() else 0.0
        for values in saliency
    ]
    best = int(np.argmax(shares)) if shares else 0
    return best if shares and shares[best] > 0 else None
