"""How far training has come, as a callback of Lightning."""

from __future__ import annotations

import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingBar(Callback):
    """One progress bar over all iterations; where there is no terminal, a line a minute."""

    def __init__(self, out: str) -> None:
        self.out = out
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )

    def on_train_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self.active = trainer.is_global_zero
        self.bar = self.active and self.progress.console.is_terminal
        self.first, self.began = trainer.global_step, time.monotonic()
        self.told = self.began
        if self.active:
            print(
                f"vsod train: {type(task.model).__name__} on {trainer.strategy.root_device} x "
                f"{trainer.world_size}, {trainer.precision}, iterations {self.first} to "
                f"{trainer.max_steps}, into {self.out}"
            )
        if self.bar:
            self.progress.start()
            self.row = self.progress.add_task(
                "training", total=trainer.max_steps, completed=trainer.global_step, rate=""
            )

    def on_train_batch_end(self, trainer: lightning.Trainer, *rest: Any) -> None:
        if not self.active:
            return
        now, done = time.monotonic(), trainer.global_step
        loss = float(trainer.callback_metrics.get("loss", float("nan")))
        rate = f"{(done - self.first) / (now - self.began):.2f} it/s"
        if self.bar:
            self.progress.update(
                self.row, completed=done, description=f"loss {loss:.4f}", rate=rate
            )
        elif now - self.told >= 60 or done == trainer.max_steps:
            self.told = now
            print(f"iteration {done} of {trainer.max_steps}, loss {loss:.4f}, {rate}", flush=True)

    def teardown(self, *rest: Any, **named: Any) -> None:
        self.progress.stop()
