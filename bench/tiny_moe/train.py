"""Training: windows drawn from a seed and a step, AdamW on float32 masters, resumable, the best state kept."""

from __future__ import annotations

import dataclasses
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.tiny_moe.corpus import Ids
from bench.tiny_moe.model import RouterTap, zipf_targets
from bench.tiny_moe.presets import Preset
from bench.tiny_moe.report import token_losses
from profiles.atomic import replacing
from profiles.errors import DataError

BALANCE_WEIGHT = 0.02
WARM_UP_SHARE = 0.03
SAVE_EVERY_S = 60.0
NUM_VALIDATIONS = 20
WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 1.0


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a training is.

    Attributes:
        step: steps done.
        seconds: spent so far, resumed runs together.
        best_loss: the least validation loss, nats a token.
        last_loss: a training loss, some steps old.
        share: 0 at the start, 1 at the end, by steps or by time, whichever is further.
    """

    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    last_loss: float = math.nan
    share: float = 0.0


class Trainer:
    """One training of one model; `run` may be called again in another process with the same state file."""

    def __init__(
        self, model: nn.Module, preset: Preset, train: Ids, validation: Tensor, seed: int, state: Path
    ) -> None:
        """The model is trained in its own dtype and place: bf16 on a GPU, float32 on a CPU.

        Args:
            model: its parameters are updated.
            preset: sizes and schedule.
            train: tokens.
            validation: sequences int64 [number, length + 1].
            seed: of windows and targets.
            state: the file that a killed training goes on from; gone once the model is saved.

        Raises:
            DataError: the state file is of another training, or unreadable.
        """
        self.progress = Progress()
        self._model, self._preset, self._train, self._validation = model, preset, train, validation
        self._seed, self._state = seed, state
        self._num_steps = preset.steps_on(len(train))
        self._parameters = list(model.parameters())
        self._device = self._parameters[0].device
        self._masters = [parameter.detach().float().clone() for parameter in self._parameters]
        self._best = [parameter.detach().clone() for parameter in self._parameters]
        decayed = [master for master in self._masters if master.dim() > 1]
        plain = [master for master in self._masters if master.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=preset.learning_rate, betas=(0.9, 0.95), fused=True)
        self._tap = RouterTap(model)
        self._targets = zipf_targets(preset.num_layers, seed).to(self._device)
        if state.exists():
            self._load()

    @property
    def tap(self) -> RouterTap:
        """What the routers chose last."""
        return self._tap

    def run(self, on_step: Callable[[Progress], None], max_steps: int | None = None) -> bool:
        """Trains to the end of the schedule and leaves the best validated parameters in the model, True; or stops after
        `max_steps` with the state saved, False.
        """
        saved = start = time.monotonic()
        before = self.progress.seconds
        first = self.progress.step
        validate_every = max(1, self._num_steps // NUM_VALIDATIONS)
        while self.progress.share < 1:
            if max_steps is not None and self.progress.step - first >= max_steps:
                self.save()
                return False
            self._step()
            self.progress.step += 1
            self.progress.seconds = before + time.monotonic() - start
            self.progress.share = self._share()
            if self.progress.step % validate_every == 0:
                self._validate()
            if time.monotonic() - saved > SAVE_EVERY_S:
                self.save()
                saved = time.monotonic()
            on_step(self.progress)
        self._validate()
        _copy(self._best, self._parameters)
        return True

    def save(self) -> None:
        """The state file, whole or not at all."""
        content = {
            "settings": self._settings(),
            "progress": dataclasses.asdict(self.progress),
            "masters": self._masters,
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
        }
        try:
            with replacing(self._state) as temporary:
                torch.save(content, temporary)
        except OSError as error:
            raise DataError(f"{self._state}: the state cannot be written ({error.strerror or error})") from error

    def _share(self) -> float:
        return min(
            1.0, max(self.progress.step / self._num_steps, self.progress.seconds / (60 * self._preset.max_minutes))
        )

    def _settings(self) -> dict[str, Any]:
        """What must agree for a training to go on; how long it lasts may change."""
        fields = dataclasses.asdict(self._preset)
        del fields["num_steps"], fields["max_passes"], fields["max_minutes"]
        return fields | {"seed": self._seed, "train_tokens": len(self._train), "first": int(self._train[0])}

    def _load(self) -> None:
        try:
            content = torch.load(self._state, map_location=self._device, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(f"{self._state}: not a state of a training, truncated or foreign; remove it") from error
        if not isinstance(content, dict) or content.get("settings") != self._settings():
            raise DataError(f"{self._state}: the state of another training; remove it or choose another --out")
        self.progress = Progress(**content["progress"])
        self.progress.share = self._share()
        _copy(content["masters"], self._masters)
        _copy(content["masters"], self._parameters)
        _copy(content["best"], self._best)
        self._optimizer.load_state_dict(content["optimizer"])

    def _step(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._preset.learning_rate * _schedule(self.progress.share)
        batch = self._batch()
        logits = self._model(batch[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        (loss + BALANCE_WEIGHT * self._tap.balance_loss(self._targets)).backward()  # type: ignore[no-untyped-call]
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self._masters, MAX_GRADIENT_NORM)
        self._optimizer.step()
        _copy(self._masters, self._parameters)
        if self.progress.step % 20 == 0:  # reading it waits for the GPU
            self.progress.last_loss = float(loss.detach())
            if not math.isfinite(self.progress.last_loss):
                raise DataError(
                    f"the loss is {self.progress.last_loss} at step {self.progress.step}; choose another --seed"
                )

    def _batch(self) -> Tensor:
        """Windows int64 [batch, length + 1], the same for a seed and a step."""
        length = self._preset.sequence_length + 1
        rng = np.random.default_rng((self._seed, self.progress.step))
        starts = rng.integers(0, len(self._train) - length + 1, self._preset.batch_size)
        rows = self._train[starts[:, None] + np.arange(length)].astype(np.int64)
        return torch.from_numpy(rows).to(self._device, non_blocking=True)

    def _validate(self) -> None:
        loss = float(token_losses(self._model, self._validation, self._preset.batch_size).mean())
        if loss < self.progress.best_loss:
            self.progress.best_loss = loss
            _copy(self._parameters, self._best)


def _schedule(share: float) -> float:
    """The learning rate's factor: up in a line, down along a cosine to a hundredth."""
    if share < WARM_UP_SHARE:
        return (share + 1e-3) / (WARM_UP_SHARE + 1e-3)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (share - WARM_UP_SHARE) / (1 - WARM_UP_SHARE)))


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(list(targets), list(sources))
