"""Training: one epoch loop for all networks, saving and resuming."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

from datasets import digest
from errors import UserError
from models.integer_layers import round_weights, rounded
from pipeline.checkpoints import save_weights
from pipeline.resuming import write_last
from pipeline.run_folder import RunFolder
from pipeline.runtime import processes
from pipeline.runtime.device import Machine, Network
from pipeline.runtime.seeds import derive_seed
from pipeline.training.averaging import batch_norms, moving_average, recalibrated
from pipeline.training.interruption import Interruption
from pipeline.training.schedules import Schedule
from progress import Pace, in_words, progress_bar

STEPS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 50}  # of the loss; a GPU would have to be waited for
CALIBRATION_IMAGES = 10_000  # of batch-norm recalibration

Losses = dict[str, Tensor]
LossFunction = Callable[..., Losses]
Batch = tuple[Tensor, ...]
NoiseFunction = Callable[[Batch, torch.Generator], Batch]
Values = dict[str, float]


def _unrecorded(**facts: Any) -> None:
    """Record nothing."""


class Place(NamedTuple):
    """Where a stage is trained: run folder, schedule, and the device and precision it computes with.

    `record` is called whenever weights are saved: with the number of `images` seen, the `minutes` that took, and the
    digest of the weights as `weights_after`.
    """

    run: RunFolder
    schedule: Schedule
    machine: Machine
    record: Callable[..., None] = _unrecorded


@dataclass
class Progress:
    """Progress of a stage: completed epochs, steps of the next, and that epoch's seconds and loss sums so far."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)


class Trainer(Generic[Network]):
    """Trains one network on examples in memory; the order of examples and all noise follow from the seed.

    Several processes each take a share of every batch and make the same step together.

    Args:
        stage: its number (1 or 2) and name, for seeds, log and progress bar.
        model: trained in place.
        examples: tensors `[N,...]` of what belongs to each example; kept on the machine's device as a whole.
        losses: the network, a generator of this process's own, and this process's share of a batch, as `with_noise`
            returns it, to mean losses by name; the one called "loss" is minimised, all are logged.
        preview: called after each epoch, with the network that is kept and the epoch's number; returns values for
            the log.
        place: run folder, schedule and machine.
        checkpoint: where the weights of the network that is kept go whenever they are saved.
        with_noise: a whole batch, in such tensors, and a generator to tensors of examples and their noise, which are
            the same for any number of processes; by default, the batch alone.
        held_out: the same tensors of examples that are not trained on; their loss is logged after each epoch.

    Attributes:
        kept: what training is for: `model` itself, or with `ema_decay` the average of its weights over the steps, with
            batch norm recalibrated (an average of statistics would belong to other weights).

    With `fixed_norm`, batch norm is recalibrated once and then frozen, in training as in evaluation: a neuron fires or
    not, so the network learns with the very statistics that it is used with. Averaged weights share them.

    With `int8_weights`, the last steps are made with rounded weights (quantization-aware training, arXiv 1712.05877),
    and what is kept in the end is rounded: the network in whole numbers then has the very weights of this one.
    """

    def __init__(
        self,
        stage: tuple[int, str],
        model: Network,
        examples: Batch,
        losses: LossFunction,
        preview: Callable[[Network, int], Values],
        place: Place,
        checkpoint: Path,
        with_noise: NoiseFunction = lambda batch, _: batch,
        held_out: Batch | None = None,
    ):
        self.number, self.name = stage
        self.model, self.with_noise, self.losses, self.preview = model, with_noise, losses, preview
        self.run, self.schedule, self.machine, self.record = place
        schedule, machine = self.schedule, self.machine
        self.checkpoint = checkpoint
        self.network = processes.share_training(model, machine.device)
        self.examples = TensorDataset(*(each.to(machine.device) for each in examples))
        self.held_out = TensorDataset(*(each.to(machine.device) for each in held_out)) if held_out else None
        self.steps = math.ceil(len(self.examples) / schedule.batch_size)  # of an epoch
        self.optimizer = torch.optim.AdamW(model.parameters(), schedule.lr, betas=(0.9, 0.999), weight_decay=1e-3)
        self.average = moving_average(model, schedule.ema_decay) if schedule.ema_decay else None
        self.kept = cast(Network, self.average.module) if self.average else model
        self.progress = Progress()
        self.pace, self._has_told_time = Pace(self.steps * schedule.epochs), False

    @property
    def title(self) -> str:
        """Stage and epoch, as displayed."""
        return f"stage {self.number} ({self.name}) epoch {self.progress.epoch + 1}/{self.schedule.epochs}"

    @property
    def _steps_done(self) -> int:
        """Steps in all epochs so far; one epoch may be shorter than the time between two checks of the loss."""
        return self.progress.epoch * self.steps + self.progress.step

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state that `save` wrote to last.pth."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])
        sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["sums"].items()}
        self.progress = Progress(state["epoch"], state["step"], state["seconds"], sums)
        if self.progress.epoch >= self.schedule.epochs:  # no save follows; a kill may have come between two files
            self._save_kept()

    def save(self) -> None:
        """Write last.pth, then the weights. Raises UserError, and writes nothing, if loss or weights are non-finite."""
        self._save_state()
        self._save_kept()
        processes.wait_for_all()  # the first process to end is taken for a failure, and ends the others

    def _save_state(self) -> None:
        """Write last.pth, which is all that `--resume` needs."""
        progress, states = self.progress, {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self._check_finite(progress.sums, states["model"])
        if self.average:
            states["average"] = self.average.state_dict()
        sums = {name: value.item() for name, value in progress.sums.items()}
        where = {"epoch": progress.epoch, "step": progress.step, "seconds": progress.seconds, "sums": sums}
        write_last(self.run, {"stage": self.name, **where, **states})

    def _save_kept(self) -> None:
        """Write the weights that are kept."""
        if self.average and self.progress.step:  # at the end of an epoch it has been done for the preview
            self._calibrate_average()
        weights = self.kept.state_dict()
        save_weights(self.checkpoint, weights)
        images, seconds = self.cost
        self.record(images=images, minutes=round(seconds / 60, 4), weights_after=digest(weights))

    @property
    def cost(self) -> tuple[int, float]:
        """Images seen and seconds taken since the first step."""
        progress, count = self.progress, len(self.examples)
        epochs = [
            line for line in self.run.read_log() if line["stage"] == self.name and line["epoch"] <= progress.epoch
        ]
        seconds = sum(line["images"] / line["images_per_second"] for line in epochs) + progress.seconds
        return progress.epoch * count + min(progress.step * self.schedule.batch_size, count), seconds

    def train(self) -> bool:
        """Train to the last epoch; False if time ran out.

        Saves after each epoch and at the end, and every `save_every` minutes what `--resume` needs. Raises Interrupted,
        after saving, if a signal came, and UserError, without saving, if loss or weights are not finite.
        """
        deadline = time.monotonic() + 60 * (self.schedule.max_minutes or float("inf"))
        with Interruption(self.run.resume_hint) as interruption:
            while self.progress.epoch < self.schedule.epochs:
                if self._train_epoch(deadline, interruption):
                    self._end_epoch(interruption)
                else:
                    interruption.say(f"{self.title}: stopped, saving")
                self.save()
                signal, over, _ = self._agree(interruption, time.monotonic() > deadline)
                if signal or (over and self.progress.epoch < self.schedule.epochs):
                    return False
        return True

    def _agree(self, interruption: Interruption, over: bool, due: bool = False) -> list[int]:
        """The signal (0: none), whether time is up, and whether a save is due, in any process.

        What happens next must follow from these alone: a signal noted later is not known to the other processes yet.
        """
        agreed = processes.most(interruption.signal or 0, over, due)
        interruption.signal = agreed[0] or interruption.signal
        return agreed

    def _train_epoch(self, deadline: float, interruption: Interruption) -> bool:
        """Train the rest of the current epoch; False if it was stopped by a signal or by the time limit."""
        schedule, progress, count = self.schedule, self.progress, len(self.examples)
        batches = self._shuffled("order", progress.epoch).split(schedule.batch_size)
        generator = torch.Generator(self.machine.device)
        first = progress.step * schedule.batch_size
        saved = time.monotonic()
        started = saved - progress.seconds
        self.model.train()
        with progress_bar(count, self.title, done=first, shown=processes.is_rank_0()) as bar:
            for indices in batches[progress.step :]:
                self._seed(generator, "noise", self._steps_done)
                self._set_lr()
                self._fix_norms()
                losses = self._step(self.examples[indices], generator)
                for name, value in losses.items():
                    progress.sums[name] = progress.sums.get(name, 0) + value * len(indices)
                progress.step += 1
                bar.update(len(indices))
                if self._steps_done % STEPS_BETWEEN_CHECKS[self.machine.device.type] == 0:
                    self._check_finite(progress.sums)
                    self._tell_time(bar, losses["loss"], interruption)
                now = time.monotonic()
                progress.seconds = now - started
                if progress.step == self.steps:
                    break
                signal, over, due = self._agree(interruption, now > deadline, now > saved + 60 * schedule.save_every)
                if signal or over:
                    return False
                if due:
                    self._save_state()
                    saved = now
        return True

    def _tell_time(self, bar: tqdm, loss: Tensor, interruption: Interruption) -> None:
        """Say once how long the stage will take, and in the bar again and again."""
        left = self.pace.seconds_left(self._steps_done, time.monotonic())
        if left is None or bar.disable:
            return
        if not self._has_told_time:
            bar.clear()
            interruption.say(f"stage {self.number} ({self.name}): about {in_words(left)}")
            self._has_told_time = True
        bar.set_postfix_str(f"loss {loss.item():.4f}, stage: {in_words(left)} left", refresh=False)

    def _end_epoch(self, interruption: Interruption) -> None:
        """Preview and log entry of a completed epoch, before it is saved as completed."""
        progress, count = self.progress, len(self.examples)
        self._check_finite(progress.sums, self.model.state_dict())
        means = {name: value.item() / count for name, value in progress.sums.items()}
        rate = count / progress.seconds
        if self.schedule.rounds_weights(1) and progress.epoch + 1 == self.schedule.epochs:
            round_weights(self.kept)
        if self.average:
            self._calibrate_average()
        self.kept.eval()
        values = {**means, **self._held_out_loss(), **self.preview(self.kept, progress.epoch + 1)}
        cost = {"images": count, "images_per_second": round(rate, 2)}
        self.run.log(self.name, progress.epoch + 1, {**values, **cost})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        interruption.say(f"{self.title}: {shown}, {rate:.0f} images/s, {datetime.now():%Y-%m-%d %H:%M:%S}")
        self.progress = Progress(progress.epoch + 1)

    @torch.no_grad()
    def _held_out_loss(self) -> Values:
        """The loss of the network that is kept, in evaluation mode, on the held-out examples; nothing without any.

        It has the same noise after every epoch. Of several processes, the first computes it as if it were alone.
        """
        examples = self.held_out
        if examples is None:
            return {}

        def mean() -> float:
            generator, total = torch.Generator(self.machine.device), 0.0
            batches = torch.arange(len(examples)).split(self.schedule.batch_size)
            with processes.alone(), progress_bar(len(examples), f"stage {self.number}, held-out images") as bar:
                for number, indices in enumerate(batches):
                    self._seed(generator, "held out", number)
                    losses, _ = self._share_of_losses(self.kept, examples[indices], generator)
                    total += losses["loss"].double().item() * len(indices)
                    bar.update(len(indices))
            return total / len(examples)

        return {"held_out_loss": processes.from_rank_0(mean)}

    def _check_finite(self, *numbers: dict[str, Tensor]) -> None:
        """Raise UserError, which says what to do, if one of the losses or weights is non-finite (NaN or infinite)."""
        for name, value in ((name, value) for group in numbers for name, value in group.items()):
            if not math.isfinite(total := value.sum().item()):
                where = f"{self.title}, step {self.progress.step}: {name} is {total}"
                saved = self.run.last.exists()
                good = f"{self.run.last} is the last good checkpoint" if saved else "nothing is saved yet"
                raise UserError(f"{where}; {good}: begin a new run with a lower --lr, or try --precision float32")

    def _shuffled(self, purpose: str, index: int = 0) -> Tensor:
        """Indices of all examples in random order, `[N]` on the machine's device."""
        generator = self._seed(torch.Generator(), purpose, index)
        return torch.randperm(len(self.examples), generator=generator).to(self.machine.device)

    def _seed(self, generator: torch.Generator, purpose: str, index: int) -> torch.Generator:
        """Seed a generator for this purpose in this stage."""
        return generator.manual_seed(derive_seed(self.schedule.seed, purpose, self.number, index))

    def _done(self, step: float) -> float:
        """Fraction of the schedule completed before this step of the current epoch."""
        return (self.progress.epoch + step / self.steps) / self.schedule.epochs

    def _set_lr(self) -> None:
        """The learning rate of the current step: that in its middle, since a schedule may begin and end at 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr_at(self._done(self.progress.step + 0.5))

    def _norms_fixed(self, step: int) -> bool:
        """Whether batch norm's statistics do not change in this step of the current epoch; the first is number 0."""
        return self.schedule.freezes_norms(self._done(step))

    def _as_used(self, network: nn.Module) -> AbstractContextManager[None]:
        """Context in which a network has the weights that it is trained with in this step."""
        rounds = self.schedule.rounds_weights(self._done(self.progress.step))
        return rounded(network) if rounds else nullcontext()

    def _fix_norms(self) -> None:
        """Freeze the batch-norm statistics from the scheduled step on."""
        step = self.progress.step
        if self._norms_fixed(step):
            if not self._norms_fixed(step - 1):
                with self._as_used(self.model):
                    self._calibrate(self.model)
                self.model.train()
            for norm in batch_norms(self.model):
                norm.eval()

    def _calibrate_average(self) -> None:
        """Recalibrate the averaged weights, until statistics are frozen and `update_parameters` copies them."""
        if not self._norms_fixed(self.progress.step - 1):
            self._calibrate(self.kept)

    @torch.no_grad()
    def _calibrate(self, network: nn.Module) -> None:
        """Recalibrate batch norm on CALIBRATION_IMAGES examples; `network` is in evaluation mode afterwards."""
        generator = torch.Generator(self.machine.device)
        chosen = self._shuffled("statistics order")[:CALIBRATION_IMAGES]
        with recalibrated(network):
            title = f"stage {self.number}, batch-norm statistics"
            with progress_bar(len(chosen), title, shown=processes.is_rank_0()) as bar:
                for batch, indices in enumerate(chosen.split(self.schedule.batch_size)):
                    self._seed(generator, "statistics", batch)
                    self._share_of_losses(network, self.examples[indices], generator)
                    bar.update(len(indices))

    def _step(self, batch: Batch, generator: torch.Generator) -> Losses:
        """One step on a batch; returns its losses in float64."""
        with self._as_used(self.model):
            losses, weight = self._share_of_losses(self.network, batch, generator)
            self.optimizer.zero_grad()
            (losses["loss"] * weight * processes.size()).backward()  # of which the processes take the mean
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)
        torch.clear_autocast_cache()  # within an autocast of the caller's, it would keep the weights of before
        return processes.total({name: value.detach().double() * weight for name, value in losses.items()})

    def _share_of_losses(self, network: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Losses, float]:
        """The losses of this process's share of a batch, and the weight of that share in the mean of the batch."""
        part, weight = processes.share_of_batch(len(batch[0]))
        with self.machine.autocast():
            share = [values[part] for values in self.with_noise(batch, generator)]
            return self.losses(network, processes.own_noise(generator), *share), weight
