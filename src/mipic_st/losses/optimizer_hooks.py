"""Keeping the projections of a loss right while an optimizer that somebody else made steps them.

A trainer hands the parameters of a loss to its optimizer and then forgets them: it does not average their gradients
over processes, does not put them into checkpoints, and older versions do not clear their gradients. What can be set
right without any configuration is done here, from PyTorch's public hook before an optimizer step; the rest is in
:mod:`mipic_st.losses.callback`.
"""

from __future__ import annotations

import logging
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import sentence_transformers
import torch
from packaging.version import Version
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

logger = logging.getLogger(__name__)

RESUME_FIX = "SentenceTransformerTrainer(..., callbacks=[MIPICCallback(loss)])"

# Until then the trainer cleared the gradients of the model only, so those of a loss's own parameters piled up.
_TRAINER_CLEARS_LOSS = Version(sentence_transformers.__version__) >= Version("6.2")


# Classes that keep a model's parameters elsewhere, by name: they need not be installed.
_SHARDING = {
    "FSDPModule": "FSDP",
    "FullyShardedDataParallel": "FSDP",
    "DeepSpeedEngine": "DeepSpeed",
    "PipelineEngine": "DeepSpeed",
}
# The same as the trainer's accelerator calls them.
_SHARDING_RUNS = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}

# What _steps_in gives for an optimizer that keeps a state but no step count.
_UNKNOWN = -1


@dataclass
class _Record:
    """What a keeper knows about one optimizer: its state for the first projection, and the steps it made."""

    moments: Any
    steps: int


def _steps_in(moments: Any) -> int:
    """Number of steps that an optimizer's state for one parameter has seen; zero for one that was just made."""
    if not moments:
        return 0
    if "step" in moments:
        return int(moments["step"])
    return _UNKNOWN if any(bool(value.any()) for value in moments.values() if isinstance(value, Tensor)) else 0


class Projections(nn.ModuleDict):
    """The projections of one loss, which know whether they came out of a state dict.

    Attributes:
        loaded: Names of the parameters that ``load_state_dict`` set, of these projections or of a module around them,
            since an optimizer last stepped them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loaded: set[str] = set()
        self.register_load_state_dict_post_hook(_note_loaded)

    def restart(self, fresh: Projections) -> None:
        """Take over the values of projections of the same shapes, in place."""
        with torch.no_grad():
            for own, other in zip(self.parameters(), fresh.parameters(), strict=True):
                own.copy_(other)
                own.grad = None


def _note_loaded(projections: nn.Module, keys: Any) -> None:
    """Hook after ``load_state_dict``: remember which projections it set."""
    assert isinstance(projections, Projections)
    # The keys start at the module that was loaded, the names at the projections.
    missing = [f".{key}" for key in keys.missing_keys]
    projections.loaded = {
        name for name, _ in projections.named_parameters() if not any(key.endswith(f".{name}") for key in missing)
    }


def check_not_sharded(model: nn.Module, projections: nn.Module) -> None:
    """Refuse projections beside a model whose parameters are sharded, by its wrapper or by the trainer to come.

    What shards takes over the optimizer with the parameters of the model, and knows no others.

    Args:
        model: The model, wrapped or not.
        projections: The module that holds the projections; without any, everything is allowed.

    Raises:
        ValueError: If there are projections, and FSDP or DeepSpeed.
    """
    if next(projections.parameters(), None) is None:
        return
    kinds = (_SHARDING.get(kind.__name__) for module in model.modules() for kind in type(module).__mro__)
    name = next(filter(None, kinds), None) or sharding_run()
    if name is not None:
        raise ValueError(
            f"{name} takes over the optimizer with the parameters of the model, and would lose the projections of "
            "MIPICLoss. Train with DistributedDataParallel, or without projections, as the defaults do: "
            "lift_init='frozen' and pic_weight=0; or alpha=1."
        )


def sharding_run() -> str | None:
    """What the accelerator of this process shards with, if there is one and it does."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return None
    return _SHARDING_RUNS.get(state.AcceleratorState().distributed_type.name)


class ProjectionKeeper:
    """Watches the optimizer that steps the projections of one loss.

    Before each step of it: projections are made equal on all ranks (first step), their gradients are averaged over the
    ranks, and an optimizer that was resumed from a checkpoint while the projections were not is refused. Projections
    are taken as resumed once ``load_state_dict`` set them, or :class:`mipic_st.losses.callback.MIPICCallback` did.

    A draw of dims that starts anew beside a resumed optimizer is told in the log: the run is sound, but not the one
    that was interrupted.

    The hooks are global, as PyTorch offers no other kind for an optimizer that does not exist yet. They refer to the
    keeper weakly and are removed when it is gone, that is, with its loss.

    Args:
        projections: The module that holds the parameters.

    Attributes:
        draws_restored: Whether the draw of dims goes on from a saved state.
    """

    def __init__(self, projections: Projections) -> None:
        self.projections = projections
        self.draws_restored = False
        self._drawn_for: weakref.ref[nn.Parameter] | None = None
        self._begun: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._prepared = False
        self._records: weakref.WeakKeyDictionary[Optimizer, _Record] = weakref.WeakKeyDictionary()
        reference = weakref.ref(self)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if (keeper := reference()) is not None:
                keeper.before_step(optimizer)

        handles = [register_optimizer_step_pre_hook(before)]
        if not _TRAINER_CLEARS_LOSS:

            def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                if (keeper := reference()) is not None:
                    for parameter in keeper.own(optimizer):
                        parameter.grad = None

            handles.append(register_optimizer_step_post_hook(after))
        for handle in handles:
            weakref.finalize(self, handle.remove).atexit = False

    def own(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """Those of the projections that this optimizer steps, in the order of the loss."""
        theirs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [parameter for parameter in self.projections.parameters() if id(parameter) in theirs]

    def _names(self, own: list[nn.Parameter]) -> set[str]:
        wanted = {id(parameter) for parameter in own}
        return {name for name, parameter in self.projections.named_parameters() if id(parameter) in wanted}

    def before_step(self, optimizer: Optimizer) -> None:
        """Do what has to be done before the step, unless :meth:`prepare` has done it already."""
        self._check_draws(optimizer)
        own = self.own(optimizer)
        if not own:
            return
        if not self._prepared:
            self.prepare(optimizer)
        self._prepared = False
        self._records[optimizer].steps += own[0].grad is not None

    def prepare(self, optimizer: Optimizer) -> None:
        """Do it ahead of the step, so that gradients can be clipped after they were averaged.

        Args:
            optimizer: The optimizer about to step.
        """
        if own := self.own(optimizer):
            first = optimizer not in self._records
            self._check_resumed(optimizer, own)
            if self.projections.loaded:
                self.projections.loaded -= self._names(own)
            self._synchronise(own, first)
            self._prepared = True

    def note_draw(self, model: nn.Module) -> None:
        """Dims were drawn for a training step of the model."""
        if self._drawn_for is None:
            trained = next((parameter for parameter in model.parameters() if parameter.requires_grad), None)
            self._drawn_for = None if trained is None else weakref.ref(trained)

    def _check_draws(self, optimizer: Optimizer) -> None:
        """Warn, once, if the model's optimizer came with steps from elsewhere, and the draw of dims did not."""
        if optimizer not in self._begun:
            self._begun[optimizer] = _steps_in(next(iter(optimizer.state.values()), None))
        if self._drawn_for is None or self.draws_restored or not self._begun[optimizer]:
            return
        first = self._drawn_for()
        if any(parameter is first for group in optimizer.param_groups for parameter in group["params"]):
            self.draws_restored = True
            logger.warning(
                "The optimizer was resumed from a checkpoint, but the draw of n_dims_per_step dims starts anew: this "
                "run is not the one that was interrupted. Save and restore the draw from the first run on: %s.",
                RESUME_FIX,
            )

    def finish(self) -> None:
        """The step was done, or called off by a gradient scaler: the next one is prepared anew."""
        self._prepared = False

    def adopt(self, optimizer: Optimizer) -> None:
        """Take note that the projections belong to the optimizer's present state: both come from one checkpoint.

        Args:
            optimizer: The optimizer that was resumed.
        """
        if own := self.own(optimizer):
            moments = optimizer.state.get(own[0]) or None
            self._records[optimizer] = _Record(moments, max(0, _steps_in(moments)))

    def _check_resumed(self, optimizer: Optimizer, own: list[nn.Parameter]) -> None:
        """Refuse an optimizer whose state was loaded while the projections stayed what they were.

        Its state for a parameter is an object made at the first step and then kept: only when another one is there
        (once after the first step, else after loading) is it looked into, which may wait for the device.
        """
        moments = optimizer.state.get(own[0]) or None
        record = self._records.get(optimizer)
        if record is not None and moments is record.moments:
            return
        count = _steps_in(moments)
        if record is None:
            right, record = count == 0, _Record(None, 0)
        elif count == _UNKNOWN:
            right = record.moments is None and record.steps > 0
        else:
            right = count in (0, record.steps)
        if not right and self._names(own) <= self.projections.loaded:
            right, record.steps = True, max(0, count)
        if not right:
            raise RuntimeError(
                f"The optimizer was resumed from a checkpoint{'' if count < 0 else f' at step {count}'}, but the "
                "projections of MIPICLoss were not: its moments would be applied to other parameters. Save and restore "
                f"them with the callback, from the first run on: {RESUME_FIX}. In a training loop of your own, save "
                "and load the loss's state_dict() beside the optimizer's. For a checkpoint that was made without "
                "either, MIPICCallback(loss, missing_projections='reset') starts the projections afresh."
            )
        if count == 0:
            record.steps = 0
        record.moments = moments
        self._records[optimizer] = record

    @staticmethod
    def _synchronise(own: list[nn.Parameter], first: bool) -> None:
        """Average gradients over all ranks; before the first step, take the projections of rank 0.

        One collective, the same on all ranks, also where some gradients are missing (another data set's loss was
        used): those count as zero, as they do in DistributedDataParallel. A parameter that no rank has a gradient
        for keeps none.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        world = distributed.get_world_size()
        if world == 1:
            return
        with torch.no_grad():
            if first:
                values = _flatten(own)
                distributed.broadcast(values, src=0)
                _unflatten(values, own)
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in own]
            present = torch.tensor([float(p.grad is not None) for p in own], device=own[0].device)
            values = _flatten([*gradients, present])
            distributed.all_reduce(values)
            values, counts = values[: -len(own)] / world, values[-len(own) :]
            missing = [parameter.grad is None for parameter in own]
            used = counts.tolist() if any(missing) else [world] * len(own)
            _unflatten(values, gradients)
            for parameter, gradient, count in zip(own, gradients, used, strict=True):
                parameter.grad = gradient if count else None


def _flatten(tensors: list[Tensor] | list[nn.Parameter]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _unflatten(values: Tensor, tensors: list[Tensor] | list[nn.Parameter]) -> None:
    """Copy the values back, in place."""
    for tensor, part in zip(tensors, values.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
