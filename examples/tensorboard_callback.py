"""Metrics of `offload launch` in TensorBoard, by a callback.

    pip install tensorboard
    offload launch examples/byte_gpt.toml --set 'output.callbacks=["examples.tensorboard_callback:TensorBoard"]'
    tensorboard --logdir runs/byte_gpt/log

Or name it in the configuration: ``output.callbacks = ["examples.tensorboard_callback:TensorBoard"]``.
"""

from __future__ import annotations

from torch.utils.tensorboard import SummaryWriter

from offload import Callback
from offload.callbacks import CommitBegun, Evaluation, RunEnded, RunStarted, StepMetrics


class TensorBoard(Callback):
    """Writes scalars of each step to the folder ``tensorboard`` of ``output.run``."""

    def on_start(self, run: RunStarted) -> None:
        # After a crash, steps that will be made again replace those logged before.
        self.writer = SummaryWriter(run.folder / "tensorboard", purge_step=run.step + 1)
        self.writer.add_text("configuration", f"```json\n{run.config.dumped()}```", run.step)

    def on_step(self, metrics: StepMetrics) -> None:
        scalars = {
            "loss/training": metrics.loss,
            "learning rate": metrics.lr,
            "speed/seconds per step": metrics.step_s,
            "speed/share of waiting for pages": metrics.wait_share,
            "memory/RAM MiB": metrics.host_bytes / 2**20,
            "memory/SSD MiB": metrics.ssd_bytes / 2**20,
            "SSD/read MiB": metrics.ssd_read_bytes / 2**20,
            "SSD/written MiB": metrics.ssd_written_bytes / 2**20,
        }
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, metrics.step)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self.writer.add_scalar("loss/validation", evaluation.loss, evaluation.step)

    def on_commit(self, commit: CommitBegun) -> None:
        self.writer.flush()  # so that a commit has the metrics of its steps

    def on_end(self, end: RunEnded) -> None:
        self.writer.close()
