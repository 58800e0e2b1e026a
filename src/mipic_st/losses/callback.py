"""What a trainer leaves undone for a loss that has parameters of its own: the callback.

``SentenceTransformerTrainer(..., loss=loss, callbacks=[MIPICCallback(loss)])`` saves the projections beside each
checkpoint and restores them, clips their gradients, logs the norm, and writes into the model's ``config.json`` what
serving engines read. Projections in several processes need no callback, see :mod:`mipic_st.losses.optimizer_hooks`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mipic_st.encoder.card import describe_dims
from mipic_st.encoder.structure import unwrap
from mipic_st.losses.mipic import MIPICLoss
from mipic_st.losses.optimizer_hooks import sharding_run

logger = logging.getLogger(__name__)

PROJECTIONS_FILE = "mipic_projections.safetensors"
"""Name of the file beside each checkpoint that holds the projections."""


class MIPICCallback(TrainerCallback):
    """Keeps the projections of MIPICLoss in step with the trainer: checkpoints, resuming, clipping, saved config.

    - Every checkpoint gets ``mipic_projections.safetensors``: the projections and the state of the draw of dims. It
      goes with the folder, so ``save_total_limit`` needs nothing more.
    - Resuming restores them; the run then continues bit for bit. The folder is ``args.resume_from_checkpoint``, or
      ``checkpoint-<step>`` in the output folder; for any other, name it in ``resume_from_checkpoint``. That the file
      belongs to the resumed optimizer is checked, or to the resumed model where an optimizer has no state of
      projections.
    - With ``load_best_model_at_end`` the projections of the best checkpoint are loaded with the model.
    - Gradients of the projections are clipped to ``args.max_grad_norm``, on their own; the norm before clipping is
      logged as ``projections_grad_norm`` beside the trainer's ``grad_norm``, which is the model's. Reporting
      integrations (``report_to``) run before callbacks and do not see it; ``state.log_history`` and the printed log
      have it.
    - In fp16 training, batches whose loss is not finite are left to the gradient scaler, which skips them.
    - ``config.json`` of checkpoints and of the trained model gets the keys of
      :func:`mipic_st.encoder.card.set_matryoshka_config`, and the model card the tag ``matryoshka`` and a line on
      loading with ``truncate_dim``.

    With ``hub_strategy="checkpoint"`` the upload starts before callbacks see the checkpoint, so the projections may be
    missing in it. Under FSDP and DeepSpeed, MIPICLoss refuses to have projections.

    Args:
        loss: The loss given to the trainer, or its dict of losses by data set; those that are no MIPICLoss are passed
            over.
        resume_from_checkpoint: Folder to restore the projections from when the trainer resumes, if not found by itself.
        missing_projections: What to do when resuming from a checkpoint that was made without the callback: ``"error"``,
            or ``"reset"``, which keeps the projections as they are and makes the optimizer forget its moments of them.

    Raises:
        TypeError: If ``loss`` is or holds no MIPICLoss.
        ValueError: If ``missing_projections`` is neither of the two.

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
        self._warned = False
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

    # --- the file ---------------------------------------------------------------------------------------------------

    def projections(self) -> dict[str, nn.Parameter]:
        """All by their name in the file: that in the loss, behind the data set's name if there are several."""
        return {
            f"{name}.{key}" if name else key: parameter
            for name, loss in self.losses.items()
            for key, parameter in loss.mipic_projections.named_parameters(prefix="mipic_projections")
        }

    def save(self, folder: str | os.PathLike[str], optimizer: Optimizer | None = None) -> Path:
        """Write projections and draws into a folder; the file is there whole or not at all.

        Args:
            folder: An existing folder.
            optimizer: The optimizer saved beside it, so that the two can be recognised as belonging together.

        Returns:
            Path of the file.

        Raises:
            FileNotFoundError: If there is no such folder.
        """
        path = Path(folder) / PROJECTIONS_FILE
        if not path.parent.is_dir():
            raise FileNotFoundError(f"There is no folder {path.parent} to save the projections in: make it first.")
        projections = {name: parameter.detach().cpu().contiguous() for name, parameter in self.projections().items()}
        metadata = {
            "optimizer": self._fingerprint(optimizer),
            "model": self._model_sample(),
            "draws": json.dumps({name: loss._draw_state() for name, loss in self.losses.items()}),
        }
        partial = path.with_suffix(".partial")
        save_file(projections, partial, metadata=metadata)
        os.replace(partial, path)
        return path

    def load(self, folder: str | os.PathLike[str], with_draws: bool = True) -> None:
        """Read projections (and draws) from a folder, in place. Nothing is changed unless all of it fits.

        Args:
            folder: A checkpoint folder.
            with_draws: Whether to restore the draw of dims too.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If it is damaged, or made by a loss with other projections.
        """
        metadata, tensors = self._read(Path(folder) / PROJECTIONS_FILE)
        self._restore(metadata, tensors, with_draws)

    def _restore(self, metadata: dict[str, str], tensors: dict[str, Tensor], with_draws: bool = True) -> None:
        with torch.no_grad():
            for name, parameter in self.projections().items():
                parameter.copy_(tensors[name])
        if with_draws:
            for name, state in json.loads(metadata["draws"]).items():
                self.losses[name]._set_draw_state(state)

    def _read(self, path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint was made without MIPICCallback. "
                "MIPICCallback(loss, missing_projections='reset') goes on with fresh projections."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            draws = json.loads(metadata["draws"])
            for state in draws.values():
                random.Random().setstate((state[0], tuple(state[1]), state[2]))
        except (SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({error}). Resume from an earlier checkpoint, or delete the file and use "
                "MIPICCallback(loss, missing_projections='reset')."
            ) from error
        if draws.keys() != self.losses.keys():
            raise ValueError(
                f"{path} was made by MIPICLoss for {_data_sets(draws)}, this callback has it for "
                f"{_data_sets(self.losses)}. Name the data sets as they were named then."
            )
        own = self.projections()
        if own.keys() != tensors.keys():
            raise ValueError(
                f"{path} was made by a loss with other projections: it lacks {sorted(own.keys() - tensors.keys())} "
                f"and has {sorted(tensors.keys() - own.keys())} besides. Make MIPICLoss with the arguments it had then "
                "(matryoshka_dims, sia_layers, pic_chain, weights; names of the data sets)."
            )
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(
                    f"{path}: {name} has shape {tuple(tensors[name].shape)}, this loss needs "
                    f"{tuple(parameter.shape)}. Make MIPICLoss with the model and dims it had then."
                )
        return metadata, tensors

    def _fingerprint(self, optimizer: Optimizer | None) -> str:
        """Digest of the optimizer's moments of the projections; empty if it has none."""
        digest = hashlib.sha256()
        found = False
        states = [] if optimizer is None else [optimizer.state.get(head) or {} for head in self.projections().values()]
        for parameter, moments in zip(self.projections().values(), states, strict=False):
            for _, value in sorted(moments.items()):
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    found = True
                    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest() if found else ""

    def _model_sample(self) -> str:
        """Digest of the first values of each of the model's parameters: cheap, and another at each step.

        Empty for a sharded model, which has parts of them here, and perhaps not yet those of the checkpoint.
        """
        if sharding_run():
            return ""
        digest = hashlib.sha256()
        for parameter in unwrap(next(iter(self.losses.values())).model).parameters():
            digest.update(parameter.detach().reshape(-1)[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _restores(self) -> bool:
        """Whether there is anything that a checkpoint has to hold for a run to go on as it was."""
        return bool(self.projections()) or any(loss.draws_dims for loss in self.losses.values())

    # --- the trainer's events ---------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore what a resumed run needs; mark the model's config."""
        optimizer = _innermost(kwargs.get("optimizer"))
        if optimizer is not None:
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if any(
                id(parameter) not in stepped for parameter in self.projections().values() if parameter.requires_grad
            ):
                raise ValueError(
                    "The trainer's optimizer does not have the projections of the loss given to MIPICCallback: give "
                    "both the same loss object. `optimizers=` and `optimizer_cls_and_kwargs=` of the trainer leave out "
                    "a loss's parameters; choose the optimizer with `args.optim`."
                )
        for loss in self.losses.values():
            loss.skips_nonfinite = bool(args.fp16)
        if state.global_step > 0:
            self._resume(args, state, optimizer)
        self._mark(kwargs["model"])

    def _resume(self, args: TrainingArguments, state: TrainerState, optimizer: Optimizer | None) -> None:
        candidates = [_checkpoint(args, state)]
        if isinstance(args.resume_from_checkpoint, str) and os.path.isdir(args.resume_from_checkpoint):
            candidates.insert(0, Path(args.resume_from_checkpoint))
        if self.resume_from_checkpoint is not None:
            candidates = [self.resume_from_checkpoint]
        folder = next((folder for folder in candidates if (folder / PROJECTIONS_FILE).is_file()), candidates[0])
        there = (folder / PROJECTIONS_FILE).is_file()
        if not there and not self._restores():
            return
        if not there and self.missing_projections == "reset":
            logger.warning("No %s in %s: the projections start afresh, with new moments.", PROJECTIONS_FILE, folder)
            if optimizer is not None:
                for parameter in self.projections().values():
                    optimizer.state.pop(parameter, None)
        else:
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"Resuming at step {state.global_step}, but there is no {folder}. Name the folder that the trainer "
                    f"resumes from: MIPICCallback(loss, resume_from_checkpoint=...)."
                )
            metadata, tensors = self._read(folder / PROJECTIONS_FILE)
            for what, present in (("optimizer", self._fingerprint(optimizer)), ("model", self._model_sample())):
                if not (present and metadata.get(what)):
                    continue
                if present == metadata[what]:
                    break
                if what == "optimizer" or self.resume_from_checkpoint is None:
                    raise ValueError(
                        f"{folder / PROJECTIONS_FILE} is of another run than the {what} that the trainer resumed. Name "
                        "the folder that the trainer resumes from: MIPICCallback(loss, resume_from_checkpoint=...)."
                    )
            self._restore(metadata, tensors)
            logger.info("Restored the projections of MIPICLoss from %s.", folder)
        if optimizer is not None:
            for loss in self.losses.values():
                loss.keeper.adopt(optimizer)

    def _mark(self, model: nn.Module) -> None:
        dims = {dim for loss in self.losses.values() for dim in loss.matryoshka_dims}
        chain = {pair for loss in self.losses.values() for pair in loss.pic_chain}
        describe_dims(model, dims, chain)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the losses the step, for their messages."""
        for loss in self.losses.values():
            loss.global_step = state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average the projections' gradients over the ranks, then clip them as the trainer clipped the model's."""
        optimizer = _innermost(kwargs.get("optimizer"))
        if optimizer is not None:
            for loss in self.losses.values():
                loss.keeper.prepare(optimizer)
        if args.max_grad_norm > 0 and self.projections():
            self.projections_grad_norm = nn.utils.clip_grad_norm_(self.projections().values(), args.max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step is done, or was called off by the gradient scaler."""
        for loss in self.losses.values():
            loss.keeper.finish()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Clear the projections' gradients: sentence-transformers before 6.2 clears the model's only."""
        if not self._warned and not any(loss.trained for loss in self.losses.values()):
            self._warned = True
            logger.warning(
                "The first step trained with another loss than the one given to MIPICCallback, whose dims go into the "
                "model's config and whose state into checkpoints. Unless a later data set has it, give both the same "
                "object."
            )
        for parameter in self.projections().values():
            parameter.grad = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the norm of the projections' gradients beside the model's."""
        if logs is not None and "grad_norm" in logs and self.projections_grad_norm is not None:
            logs["projections_grad_norm"] = round(float(self.projections_grad_norm), 6)
            if state.log_history:
                state.log_history[-1].setdefault("projections_grad_norm", logs["projections_grad_norm"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the projections into the checkpoint that was just written."""
        if not args.should_save:
            return
        folder = _checkpoint(args, state)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"The trainer saved a checkpoint, but not in {folder}; the projections cannot be put beside it. "
                "Hyperparameter search, which saves elsewhere, needs save_strategy='no'."
            )
        self.save(folder, _innermost(kwargs.get("optimizer")))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With ``load_best_model_at_end``, take the projections that belong to the best model."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            try:
                self.load(state.best_model_checkpoint, with_draws=False)
            except (FileNotFoundError, ValueError) as error:
                # The model is loaded and right; without these projections only its loss is another.
                logger.error("The projections of the best model could not be loaded: %s", error)
        for loss in self.losses.values():
            loss.skips_nonfinite, loss.global_step = False, None


def _data_sets(names: Iterable[str]) -> str:
    """The names in words; a loss that is not in a dict goes by the empty one."""
    return "a single loss, without a data set's name" if list(names) == [""] else f"the data sets {sorted(names)}"


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the trainer saves the present step."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _innermost(optimizer: Any) -> Optimizer | None:
    """The optimizer inside accelerate's wrapper, the one that PyTorch's hooks see."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
