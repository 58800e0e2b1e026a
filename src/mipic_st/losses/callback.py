"""What a trainer leaves undone for a loss that has parameters of its own: the callback."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState, TrainingArguments

from mipic_st.encoder.card import describe_dims
from mipic_st.files import write_whole
from mipic_st.losses.distillation import require_taught_order
from mipic_st.losses.mipic import MIPICLoss
from mipic_st.processes import processes

logger = logging.getLogger(__name__)

PROJECTIONS_FILE = "mipic_projections.safetensors"
"""Name of the file in each checkpoint that holds the projections."""

# What shards a model's parameters takes over the optimizer with them, and knows no others; as accelerate calls it.
_SHARDING = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}


class MIPICCallback(TrainerCallback):
    """Keeps the projections of MIPICLoss in step with the trainer: checkpoints, resuming, clipping, saved config.

    - Every checkpoint gets ``mipic_projections.safetensors``. Resuming restores it, and the run continues bit for bit,
      also with ``n_dims_per_step``, whose draw follows the trainer's step. It is looked for in
      ``args.resume_from_checkpoint`` and in ``checkpoint-<step>`` of the output folder. A file that does not belong to
      the resumed optimizer's moments is refused; plain SGD has none, so there that is not noticed.
    - With ``load_best_model_at_end`` the projections of the best checkpoint are loaded with the model.
    - In several processes, all begin with the projections of the first, and gradients are averaged before each step.
    - Gradients of the projections are clipped to ``args.max_grad_norm``, on their own. The norm before clipping is
      ``projections_grad_norm`` in ``state.log_history`` and the printed log; integrations (``report_to``) run before
      callbacks and do not see it.
    - In fp16 training, batches whose loss is not finite are left to the gradient scaler, which skips them.
    - Vectors of a larger model that belong to columns in another order are refused.
    - ``config.json`` and the model card get what :func:`mipic_st.encoder.card.set_matryoshka_config` writes.

    With ``hub_strategy="checkpoint"`` the upload starts before callbacks see the checkpoint, so the projections may be
    missing in it. Under FSDP and DeepSpeed, projections are refused.

    Args:
        loss: The loss given to the trainer, or its dict of losses by data set; those that are no MIPICLoss are passed
            over.
        resume_from_checkpoint: Folder to restore the projections from when the trainer resumes from a folder of
            another name.
        missing_projections: What to do when resuming from a checkpoint that was made without the callback: ``"error"``,
            or ``"reset"``, which keeps the projections as they are and makes the optimizer forget its moments of them.

    Raises:
        TypeError: If ``loss`` is or holds no MIPICLoss.
        ValueError: If ``missing_projections`` is neither of the two; from the trainer, if it shards the model or its
            optimizer lacks the projections.

    Example:
        >>> trainer = SentenceTransformerTrainer(  # doctest: +SKIP
        ...     model=model, args=args, train_dataset=data, loss=loss, callbacks=[MIPICCallback(loss)]
        ... )
    """

    def __init__(
        self,
        loss: MIPICLoss | Mapping[str, nn.Module],
        *,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
        missing_projections: Literal["error", "reset"] = "error",
    ) -> None:
        named = dict(loss) if isinstance(loss, Mapping) else {"": loss}
        self.losses: dict[str, MIPICLoss] = {}
        for name, each in named.items():
            if isinstance(each, MIPICLoss) and each not in self.losses.values():
                self.losses[name] = each
        if not self.losses:
            kinds = sorted({type(each).__name__ for each in named.values()})
            raise TypeError(
                f"loss must be the MIPICLoss that the trainer gets, or the dict that holds it, got {kinds}. A function "
                "that makes losses has to be called first."
            )
        if missing_projections not in ("error", "reset"):
            raise ValueError(f"missing_projections must be 'error' or 'reset', got {missing_projections!r}.")
        self.resume_from_checkpoint = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        self.missing_projections = missing_projections
        self.projections_grad_norm: Tensor | None = None

    def projections(self) -> dict[str, nn.Parameter]:
        """All by their name in the file: that in the loss, behind the data set's name if there are several."""
        return {
            f"{name}.{key}" if name else key: parameter
            for name, loss in self.losses.items()
            for key, parameter in loss.mipic_projections.named_parameters(prefix="mipic_projections")
        }

    def save(self, folder: str | os.PathLike[str], optimizer: Optimizer | None = None) -> Path:
        """Write the projections into a folder; the file is there whole or not at all.

        Args:
            folder: An existing folder.
            optimizer: The optimizer saved with it, so that the two can be recognised as belonging together.

        Returns:
            Path of the file.

        Raises:
            FileNotFoundError: If there is no such folder.
        """
        path = Path(folder) / PROJECTIONS_FILE
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"There is no folder {path.parent} to save the projections in: make it first. Hyperparameter search, "
                "which saves elsewhere, needs save_strategy='no'."
            )
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.projections().items()}
        notes = {"moments": self._moments(optimizer)}
        write_whole(path, lambda place: save_file(tensors, place, metadata=notes))
        return path

    def load(self, folder: str | os.PathLike[str], optimizer: Optimizer | None = None) -> None:
        """Read projections from a folder, in place. Nothing is changed unless all of it fits.

        Args:
            folder: A checkpoint folder.
            optimizer: The optimizer that was loaded from it; its moments must be those of the file's projections.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If it is damaged, of another run, or made by a loss with other projections.
        """
        path, own = Path(folder) / PROJECTIONS_FILE, self.projections()
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint was made without MIPICCallback, or lies elsewhere. Name the folder "
                "that the trainer resumes from: MIPICCallback(loss, resume_from_checkpoint=...). "
                "MIPICCallback(loss, missing_projections='reset') goes on with fresh projections."
            )
        try:
            with safe_open(path, framework="pt") as file:
                saved_moments = (file.metadata() or {}).get("moments", "")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({error}). Resume from an earlier checkpoint, or delete the file and use "
                "MIPICCallback(loss, missing_projections='reset')."
            ) from error
        shapes = [{(name, tuple(tensor.shape)) for name, tensor in part.items()} for part in (own, tensors)]
        if differing := sorted(shapes[0] ^ shapes[1]):
            raise ValueError(
                f"{path} was made by a loss with other projections, they differ in {differing}. Make MIPICLoss with "
                "the model and the arguments it had then (matryoshka_dims, sia_layers, pic_chain, weights; names of "
                "the data sets)."
            )
        moments = self._moments(optimizer)
        if moments and saved_moments and moments != saved_moments:
            raise ValueError(
                f"{path} is not of the run whose optimizer the trainer resumed. Name the folder that the "
                "trainer resumes from: MIPICCallback(loss, resume_from_checkpoint=...)."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def _moments(self, optimizer: Optimizer | None) -> str:
        """What tells an optimizer from those of other runs: the sums of its moments of the projections."""
        sums = [
            float(value.detach().cpu().double().sum())
            for projection in self.projections().values()
            for name, value in sorted((optimizer.state.get(projection) or {}).items() if optimizer else ())
            if name != "step" and isinstance(value, Tensor)
        ]
        return " ".join(map(repr, sums))

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Refuse projections where the model will be sharded, before the optimizer fails on them."""
        from accelerate.state import AcceleratorState  # there if there is a trainer

        name = _SHARDING.get(AcceleratorState().distributed_type.name)
        if name and self.projections():
            raise ValueError(
                f"{name} takes over the optimizer with the parameters of the model, and would lose the projections of "
                "MIPICLoss. Train with DistributedDataParallel, or without projections, as the defaults do: "
                "lift_init='frozen' and pic_weight=0; or alpha=1."
            )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Restore what a resumed run needs, begin equal on all ranks, and mark the model's config."""
        self.on_init_end(args, state, control)
        if any(loss.settings.distils for loss in self.losses.values()):
            require_taught_order(getattr(kwargs.get("train_dataloader"), "dataset", None))
        optimizer, own = _innermost(kwargs["optimizer"]), list(self.projections().values())
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) not in stepped for parameter in own if parameter.requires_grad):
            raise ValueError(
                "The trainer's optimizer does not have the projections of the loss given to MIPICCallback: give "
                "both the same loss object. `optimizers=` and `optimizer_cls_and_kwargs=` of the trainer leave out "
                "a loss's parameters; choose the optimizer with `args.optim`."
            )
        if state.global_step > 0 and own:
            self._resume(args, state, optimizer)
        for parameter in own if processes() > 1 else ():
            distributed.broadcast(parameter.data, src=0)
        for loss in self.losses.values():
            loss.managed, loss.skips_nonfinite = True, bool(args.fp16)
        dims = {dim for loss in self.losses.values() for dim in loss.matryoshka_dims}
        describe_dims(kwargs["model"], dims, sorted({pair for loss in self.losses.values() for pair in loss.pic_chain}))

    def _resume(self, args: TrainingArguments, state: TrainerState, optimizer: Optimizer) -> None:
        given = args.resume_from_checkpoint
        folders = [Path(given)] if isinstance(given, str) and os.path.isdir(given) else []
        folders = [self.resume_from_checkpoint] if self.resume_from_checkpoint else [*folders, _checkpoint(args, state)]
        found = [folder for folder in folders if (folder / PROJECTIONS_FILE).is_file()]
        folder = (found or folders)[0]
        if self.missing_projections == "reset" and not found:
            logger.warning("No %s in %s: the projections start afresh, with new moments.", PROJECTIONS_FILE, folder)
            for parameter in self.projections().values():
                optimizer.state.pop(parameter, None)
            return
        self.load(folder, optimizer)
        logger.info("Restored the projections of MIPICLoss from %s.", folder)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Give the losses the step, which their draw of dims and their messages go by."""
        for loss in self.losses.values():
            loss.begin_step(state.global_step)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Average the projections' gradients over the ranks, then clip them as the trainer clipped the model's."""
        own = list(self.projections().values())
        if own and processes() > 1:
            _average_gradients(own)
        if own and args.max_grad_norm > 0:
            self.projections_grad_norm = nn.utils.clip_grad_norm_(own, args.max_grad_norm)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Clear the projections' gradients: sentence-transformers before 6.2 clears the model's only."""
        for parameter in self.projections().values():
            parameter.grad = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add the norm of the projections' gradients to the model's."""
        if logs and "grad_norm" in logs and self.projections_grad_norm is not None:
            logs["projections_grad_norm"] = round(float(self.projections_grad_norm), 6)
            if state.log_history:
                state.log_history[-1].setdefault("projections_grad_norm", logs["projections_grad_norm"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Put the projections into the checkpoint that was just written."""
        if args.should_save and self.projections():
            self.save(_checkpoint(args, state), _innermost(kwargs.get("optimizer")))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """With ``load_best_model_at_end``, take the projections that belong to the best model."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and self.projections():
            try:
                self.load(state.best_model_checkpoint)
            except (FileNotFoundError, ValueError) as error:
                # The model is loaded and right; without these projections only its loss is another.
                logger.error("The projections of the best model could not be loaded: %s", error)
        for loss in self.losses.values():
            loss.managed = loss.skips_nonfinite = False
            loss.begin_step(None)


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over all ranks, in one collective that is the same on all.

    Missing ones count as zero, as in DistributedDataParallel; a parameter that no rank has a gradient for keeps none.
    """
    with torch.no_grad():
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        values = torch.cat([gradient.reshape(-1) for gradient in [*gradients, present]])
        distributed.all_reduce(values)
        *parts, present = values.split([tensor.numel() for tensor in [*gradients, present]])
        for parameter, gradient, part, used in zip(parameters, gradients, parts, present.tolist(), strict=True):
            parameter.grad = gradient.copy_((part / processes()).view_as(gradient)) if used else None


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the trainer saves the present step."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _innermost(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
