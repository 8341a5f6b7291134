"""A window that shows pictures as they are made; by tkinter, which comes with Python."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from ..errors import InputError


class Window:
    """A window on this machine's screen, made by the main thread and used by it alone.

    Raises InputError where there is no display, or a Python without tkinter.
    """

    def __init__(self, title: str):
        try:
            import tkinter
        except ImportError:
            raise InputError(
                "show=True needs tkinter, which this Python lacks (Debian: apt install python3-tk)"
            ) from None
        try:
            self.root = tkinter.Tk(className="vsod")
        except tkinter.TclError as error:
            raise InputError(f"show=True needs a display: {error}") from None
        self.root.title(title)
        self.label = tkinter.Label(self.root, borderwidth=0)
        self.label.pack()
        self.image: Any = None
        self.closed = False
        self.root.protocol("WM_DELETE_WINDOW", self._close)
        for key in ("<Escape>", "q"):
            self.root.bind(key, lambda event: self._close())

    def _close(self) -> None:
        self.closed = True

    def show(self, picture: np.ndarray) -> None:
        """(H, W), (H, W, 3) or (H, W, 4) uint8; what is larger than the screen is made smaller."""
        from PIL import Image
        from PIL.ImageTk import PhotoImage

        height, width = picture.shape[:2]
        room = (self.root.winfo_screenwidth() / width, self.root.winfo_screenheight() / height)
        if min(room) < 1:
            size = max(1, int(width * min(room))), max(1, int(height * min(room)))
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        made = Image.fromarray(picture)
        if self.image is None or (self.image.width(), self.image.height()) != made.size:
            self.image = PhotoImage(made, master=self.root)
            self.label.configure(image=self.image)
        else:
            self.image.paste(made)
        self.update()

    def update(self) -> None:
        """To be called often; KeyboardInterrupt once the user closed it, as by Ctrl-C."""
        self.root.update()
        if self.closed:
            raise KeyboardInterrupt

    def close(self) -> None:
        self.image = None  # which belongs to the window
        self.root.destroy()
