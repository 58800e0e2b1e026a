"""MIPICLoss: the base loss at every truncation dimension, plus SIA and PIC (Eq. 18)."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self

import torch
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, MatryoshkaLoss
from sentence_transformers.util import all_gather
from torch import Tensor, distributed, nn

from mipic_st.encoder.final_norm import first_shown
from mipic_st.encoder.hidden_states import RecordedPass, Recorder, pooled_tokens, record_states, require_eager_attention
from mipic_st.encoder.structure import Backbone, backbone_of, embedding_width, require_same_vectors, unwrap
from mipic_st.encoder.tail import push_vectors
from mipic_st.losses import pic, presets, sia
from mipic_st.losses.cached import cached_terms, require_supported
from mipic_st.losses.distillation import similarity_divergence
from mipic_st.losses.matryoshka import truncated_passes
from mipic_st.validation import (
    as_list,
    checked_chain,
    checked_choice,
    checked_count,
    checked_dims,
    checked_flag,
    checked_layers,
    checked_number,
    checked_pairs,
    is_number,
    is_whole,
    plain,
)

logger = logging.getLogger(__name__)

Aggregation = Literal["sum", "mean"]
TokenImportance = Literal["similarity", "attention"]


class Observation(NamedTuple):
    """What the alignment terms need of R sentences.

    Attributes:
        layers: SIA of each layer, per sentence and prefix.
        links: (phi_c(z_c), z_{c+1}) of each PIC link, (R, dim) each.
        has_text: (R,), boolean; a sentence without a token counts zero.
    """

    layers: list[sia.SIATerms]
    links: list[tuple[Tensor, Tensor]]
    has_text: Tensor

    def pack(self) -> Tensor:
        """All of it side by side.

        Returns:
            (R, X), for the cache of a gradient-cached base loss.
        """
        parts = [part for layer in self.layers for part in layer]
        parts += [part for link in self.links for part in link]
        kind = torch.promote_types(parts[-1].dtype, torch.float32)
        return torch.cat([part.to(kind) for part in [*parts, self.has_text[:, None]]], dim=-1)


class MIPICLoss(nn.Module):
    r"""Matryoshka training of any sentence-transformers loss, with MIPIC's two alignments on the encoder's own layers.

    A drop-in for ``MatryoshkaLoss``: the base loss is applied to every truncation dimension, and while it runs, the
    hidden states of its own forward passes are recorded. On them, SIA asks each prefix to see the tokens of a sentence
    as the full width does (the full width teaches, and by default takes no gradient), and PIC, if it is switched on,
    chains narrow, early sentence vectors to wide, late ones (each target is a constant). By default the loss has no
    parameters of its own, so it needs no callback and no checkpoint beside the model's. For small dimensions, start
    from a rotated model (:func:`mipic_st.transforms.rotation.rotate_model`): from there the loss scores as
    ``MatryoshkaLoss`` does, and a larger teacher adds to it. From a plain start, SIA helps a weak encoder. Evaluation
    and serving need nothing of it: the trained model is a plain SentenceTransformer.

    .. math:: L = \alpha L_{MRL} + (1 - \alpha) (L_{SIA} + L_{PIC}) \qquad \text{(Eq. 18)}

    One more term is no part of MIPIC, and off by default: with ``distill_weight``, the similarities within a batch
    follow at every dim those that a larger, frozen model sees (:mod:`mipic_st.losses.distillation`). It joins the
    alignment terms in Eq. 18, and its vectors come with the data, see Teacher.

    With ``alpha=1``, or all four weights zero, no such term is active: the base term is then not scaled, nothing is
    recorded, and loss and gradients are those of ``MatryoshkaLoss`` to the last bit.

    Args:
        model: SentenceTransformer model: a Transformer and a Pooling module, behind which any chain of Dense,
            LayerNorm, Dropout and Normalize may follow, see Tails.
        loss: The base loss, e.g. ``MultipleNegativesRankingLoss`` or ``CoSENTLoss``. It may return a tensor or a dict.
        matryoshka_dims: Embedding dimensions for the base loss, e.g. [768, 256, 64, 16]. Those below the full width
            are the prefixes of SIA. Any order; the order has no effect.
        matryoshka_weights: One weight per dim for the base loss. Default: 1 for each.
        n_dims_per_step: Number of dims that the base loss is applied to in each training batch; -1 is all. They are
            drawn from the seed, the trainer's step (known with :class:`~mipic_st.losses.callback.MIPICCallback`) and
            the batch within it; without the callback from the number of the batch in this process, so that a resumed
            run draws other dims than the interrupted one. Evaluation and the other terms always use all dims.
        alpha: Weight of the base term in Eq. 18, in [0, 1].
        attention_weight: Weight of SIA's attention term (Eq. 6), >= 0. Zero switches it off. Small by default: with a
            weight of 1 a model with random upper layers got worse at full width, by 1.6 points with
            ``detach_full_width`` and by 7 without.
        cka_weight: Weight of SIA's CKA term (Eq. 11), >= 0. Zero switches it off.
        pic_weight: Weight of PIC (Eq. 17), >= 0. Zero, the default, switches it off: its heads are parameters, and it
            added nothing on any start that was measured.
        distill_weight: Weight of the teacher's term, >= 0. Zero, the default, switches it off. With 4 and ``alpha=0.8``
            it counts as much as the base loss, which is what was measured. ``matryoshka_weights`` are the base loss's.
        distill_temperature: tau of the similarities that follow the teacher's, > 0.
        sia_layers: Layers that carry SIA, 1 to the model's depth. Default: the last one.
        pic_chain: Ordered (dim, layer) pairs for PIC (the paper's checkpoints), both ascending, at least two. Default:
            the published pairs for the backbones of the paper; for others one per dim on evenly spaced layers, an even
            choice of dims if there are more than layers (:func:`mipic_st.losses.presets.default_chain`).
        gammas: Share of a sentence's tokens in the top-k set of each prefix, ascending with the prefix (App. A.5), in
            (0, 1]. Default: .2 to .7, interpolated to the number of prefixes.
        min_k: Smallest top-k set, in tokens, >= 1 (App. A.5).
        attention_temperature: tau in the two softmaxes of Eq. 4-5, > 0. The paper has 0.05, which makes them nearly
            one-hot.
        chain_temperature: tau of PIC's InfoNCE (Eq. 16), > 0.
        aggregation: ``"sum"`` adds layers, prefixes and links as Eq. 13, 14 and 17 do, and the teacher's dims;
            ``"mean"`` averages them.
        kl_direction: ``"prefix_full"`` for KL(prefix || full), the paper's Eq. 6; ``"full_prefix"`` for the
            reverse, as in the released notebooks.
        detach_full_width: Whether all of SIA's full-width side (query, distribution, Gram matrix) is a constant.
            Without, the full width can meet the prefix half-way by becoming simpler itself.
        lift_init: The lifts P (Eq. 5): ``"frozen"`` is ordinary truncation, and no parameter. The others are trained:
            ``"identity"`` starts at ordinary truncation, ``"orthogonal"`` and ``"random"`` do not.
        token_importance: ``"similarity"`` ranks tokens by the full-width query (Eq. 4). ``"attention"`` takes the
            model's own attention maps of that layer, pooled like its tokens, heads averaged, before dropout; the model
            is then switched to eager attention, with a warning in the log.
        gather_across_devices: Whether PIC's negatives come from all devices of a distributed run (every device must
            then have the same batch size). Set it as on the base loss.
        seed: Seeds the lifts, the heads and the draw of dims; the global generators are left alone.

    Inputs:
        +-------+--------+
        | Texts | Labels |
        +=======+========+
        | any   | any    |
        +-------+--------+

        Whatever the base loss takes. With a teacher: two columns of texts or more, whose labels are its vectors.

    Teacher:
        :func:`mipic_st.losses.distillation.add_teacher_vectors` encodes the texts of a dataset with the teacher and
        puts the vectors into the column ``label``, so labels are then (B, columns, T), of any width T. They are not
        handed to the base loss, which must be one that needs no labels, as ``MultipleNegativesRankingLoss``. The first
        column is compared with all others, on each device by itself. All dims take part, also with ``n_dims_per_step``.

    Tails:
        Modules behind the pooling (EmbeddingGemma, sentence-t5, LaBSE and others have Dense layers there) change the
        space that is served, so the terms are taken in it: SIA sees token states pushed through the tail, PIC pooled
        states pushed through it, and D, the dims, lifts and the chain are those of the tail's own width. The tail's
        parameters get gradients from all terms. The pooled vector always goes through exactly. For tokens that is
        exact too, in the sense that pooling the pushed tokens gives the pushed vector, where the tail is linear (a
        Dense without bias or activation) and the pooling is not ``max``; with a bias, where the pooling is ``mean``,
        ``cls``, ``lasttoken`` or ``weightedmean``. An activation, a residual around one, LayerNorm or a Normalize
        before the end do not commute with pooling: tokens then go through one by one, as their best counterpart. A
        Normalize at the end is not applied to what the terms see, nor is Dropout: both of its sides would be blurred
        differently. States of intermediate layers are taken as they are, without the final norm of pre-norm encoders.

    Shapes:
        B sentences per column, L padded tokens, D full width, K dims: hidden states are (B, L, D). Parameters, if there
        are any: one (d, D) lift per SIA layer and prefix, and one two-layer head per PIC link, all under
        ``mipic_projections``. They need :class:`~mipic_st.losses.callback.MIPICCallback`: without it they are neither
        saved with checkpoints nor clipped, which is logged, and training in several processes is refused. That a run
        was resumed without them cannot be seen from here.

    Returns:
        dict[str, Tensor]: Scalars, already weighted, whose sum is the loss. Names are ``matryoshka``
        (``matryoshka_<key>`` for each key of a dict-valued base loss), ``sia_attention``, ``sia_cka``, ``pic`` and
        ``distillation``; inactive terms are absent. The trainer logs each.

    Raises:
        ValueError: If an argument is out of its range, a dim exceeds the model's width, a layer its depth, or the
            model is not built of Transformer, Pooling and such a tail. The message names the argument and what is
            allowed. In the first ``forward``, if the model does not pool its last hidden state. In ``forward``, if
            labels are no vectors of a teacher where ``distill_weight`` asks for them.
        TypeError: If ``model`` or ``loss`` is none, or an argument no number, flag or sequence where it has to be one.
        FloatingPointError: In ``forward``, if a term is nan or inf, and in the backward pass, if the vector of an empty
            text makes the base loss's gradient overflow. The message names term, step and text. With fp16's gradient
            scaler such batches are logged, and skipped by it.
        RuntimeError: In ``forward``, if the base loss never called ``model``.

    Numerics:
        SIA, PIC, the teacher's term, their softmaxes and norms run in float32 also under autocast and for bf16 models.
        A sentence with one real token, or with equal tokens, has no CKA: it counts zero and is left out of that mean.
        One without any (an empty text, a tokenizer without special tokens) adds nothing to SIA and PIC, and is no
        negative in PIC. Padding and the other sentences of a batch do not change a sentence's SIA value.

    Source:
        Huy et al., "MIPIC", arXiv 2604.24374. Eq. 4-6 and 7-12 in :mod:`mipic_st.losses.sia`, Eq. 15-17 in
        :mod:`mipic_st.losses.pic`, Table 7 and App. A.5 in :mod:`mipic_st.losses.presets`. Where the paper and the
        released notebooks differ, the paper is followed: KL(prefix || full) instead of the reverse, similarity to the
        pooled query instead of separate 64-d attention spaces. Top-k sizes come from each sentence's own length, where
        the released code takes the padded length. SIA's full width is a constant by default, as a teacher is; the
        released notebooks, and so the paper preset, let gradients through both sides. Defaults differ from the paper's
        settings; ``MIPICLoss.from_preset(model, loss, "paper", dims)`` has those.

    Relations:
        - Does what ``MatryoshkaLoss`` does, and stands in its place: outermost, around the base loss.
        - Cannot wrap another loss that patches the model (``MatryoshkaLoss``, ``AdaptiveLayerLoss``), nor be wrapped by
          one, since it returns a dict.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        >>> from mipic_st import MIPICLoss
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> loss = MultipleNegativesRankingLoss(model)  # doctest: +SKIP
        >>> loss = MIPICLoss(model, loss, [384, 128, 64, 32, 16])  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | Sequence[int] | None = None,
        n_dims_per_step: int = -1,
        *,
        alpha: float = 0.8,
        attention_weight: float = 0.1,
        cka_weight: float = 1.0,
        pic_weight: float = 0.0,
        distill_weight: float = 0.0,
        sia_layers: Sequence[int] | None = None,
        pic_chain: Sequence[tuple[int, int]] | None = None,
        gammas: Sequence[float] | None = None,
        min_k: int = 8,
        attention_temperature: float = 1.0,
        chain_temperature: float = 0.05,
        distill_temperature: float = 0.1,
        aggregation: Aggregation = "sum",
        kl_direction: sia.KLDirection = "prefix_full",
        detach_full_width: bool = True,
        lift_init: sia.LiftInit | Literal["frozen"] = "frozen",
        token_importance: TokenImportance = "similarity",
        gather_across_devices: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a sentence-transformers loss (a torch.nn.Module), got {loss!r}.")
        wrappers = (MIPICLoss, MatryoshkaLoss, AdaptiveLayerLoss)
        if inner := next((module for module in loss.modules() if isinstance(module, wrappers)), None):
            raise TypeError(
                f"loss holds a {type(inner).__name__}, which runs its own base loss several times. MIPICLoss takes its "
                "place: give MIPICLoss the base loss itself."
            )
        self._uses_cache = require_supported(loss)
        width = embedding_width(model)
        self.model = model
        self.loss = loss
        dims = checked_dims("matryoshka_dims", matryoshka_dims, width)
        weights = _checked_weights(dims, matryoshka_weights)
        if width is not None and width not in dims:
            logger.warning(
                "The model's full width %d is not among matryoshka_dims %s, so the base loss will not train it. Add it "
                "unless that is meant.",
                width,
                dims,
            )
        pairs = sorted(zip(dims, weights, strict=True), reverse=True)
        self.matryoshka_dims = tuple(dim for dim, _ in pairs)
        self.matryoshka_weights = tuple(weight for _, weight in pairs)
        self.n_dims_per_step = _checked_dims_per_step(n_dims_per_step, len(self.matryoshka_dims))
        self.alpha = checked_number("alpha", alpha, 0, 1)
        self.attention_weight = checked_number("attention_weight", attention_weight, 0)
        self.cka_weight = checked_number("cka_weight", cka_weight, 0)
        self.pic_weight = checked_number("pic_weight", pic_weight, 0)
        self.distill_weight = checked_number("distill_weight", distill_weight, 0)
        self.min_k = checked_count("min_k", min_k)
        self.attention_temperature = checked_number("attention_temperature", attention_temperature, 0, exclusive=True)
        self.chain_temperature = checked_number("chain_temperature", chain_temperature, 0, exclusive=True)
        self.distill_temperature = checked_number("distill_temperature", distill_temperature, 0, exclusive=True)
        self.aggregation = checked_choice("aggregation", aggregation, ("sum", "mean"))
        self.kl_direction = checked_choice("kl_direction", kl_direction, ("prefix_full", "full_prefix"))
        self.detach_full_width = checked_flag("detach_full_width", detach_full_width)
        self.lift_init = checked_choice("lift_init", lift_init, ("identity", "orthogonal", "random", "frozen"))
        self.token_importance = checked_choice("token_importance", token_importance, ("similarity", "attention"))
        self.gather_across_devices = checked_flag("gather_across_devices", gather_across_devices)
        self.seed = checked_count("seed", seed, least=0)
        # Set by MIPICCallback; a loop of your own that looks after the projections sets managed.
        self.managed = False
        self.skips_nonfinite = False
        self.global_step: int | None = None
        self._batches = self._batches_before_step = 0

        self.prefixes: tuple[int, ...] = ()
        self.sia_layers: tuple[int, ...] = ()
        self.pic_chain: tuple[tuple[int, int], ...] = ()
        self.gammas: tuple[float, ...] = ()
        self.mipic_projections = nn.ModuleDict()
        wanted = self.attention_weight or self.cka_weight or self.pic_weight
        self._backbone: Backbone | None = backbone_of(model) if wanted and self.alpha < 1 else None
        self._behind = list(unwrap(model).children())[1:]
        # Found out in the first batch, which asks for hidden states anyway: transformers then leaves hooks in a model
        # that cannot be pickled.
        self._model_checked = False
        self._first_shown: int | None = None
        if self._backbone is not None:
            self._set_up_alignment(self._backbone, sia_layers, pic_chain, gammas)

    def __setattr__(self, name: str, value: Any) -> None:
        """The trainer puts wrapped models here, and with ``model_init`` a new one for each run."""
        if name == "model" and "mipic_projections" in self.__dict__.get("_modules", {}):
            self._follow(value)
        super().__setattr__(name, value)

    def _follow(self, model: nn.Module) -> None:
        """Begin anew with another model, everything as at the start, so that no trial inherits from the last."""
        if unwrap(model) is unwrap(self.model):
            return
        settings: dict[str, Any] = {
            name: None if value == () else value for name, value in self.get_config_dict().items()
        }
        settings["loss"] = self.loss
        try:
            fresh = MIPICLoss(model, **settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"This MIPICLoss does not fit the model that model_init made: {error}") from error
        shapes = [loss._backbone and (loss._backbone.depth, loss._backbone.width) for loss in (self, fresh)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"This MIPICLoss was made for a model of (depth, width) {shapes[0]}, and model_init made one of "
                f"{shapes[1]}. Make a trainer and a loss for each shape."
            )
        # Before the first batch they are as they were made, or were loaded to start from.
        for own, other in zip(self.parameters_of_its_own(), fresh.parameters_of_its_own(), strict=True):
            if self._batches:
                own.data.copy_(other.data)
                own.grad = None
        self._backbone, self._batches = fresh._backbone, 0
        self.begin_step(None)
        self._behind = fresh._behind
        self._model_checked, self._first_shown = False, None

    def _set_up_alignment(
        self,
        backbone: Backbone,
        sia_layers: Sequence[int] | None,
        pic_chain: Sequence[tuple[int, int]] | None,
        gammas: Sequence[float] | None,
    ) -> None:
        depth, width = backbone.depth, backbone.width
        self.prefixes = tuple(sorted(dim for dim in self.matryoshka_dims if dim < width))
        layers: tuple[int, ...] = (depth,)
        if sia_layers is not None:
            given = [sia_layers] if is_whole(plain(sia_layers)) else sia_layers
            fix = ", or switch SIA off with attention_weight=cka_weight=0"
            layers = checked_layers("sia_layers", given, depth, otherwise=fix)
        if pic_chain is None:
            chain = presets.default_chain(self.matryoshka_dims, depth, width)
        else:
            chain = checked_pairs("pic_chain", pic_chain, depth, width)
            chain = checked_chain("pic_chain", chain)
        if self.prefixes:
            self.gammas = _checked_gammas(gammas, len(self.prefixes))

        # Seeded on the side: the same projections on every rank, and the caller's random stream stays as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would seed all GPUs, too
            # PIC first, so that options of SIA do not change its heads.
            if self.pic_weight and len(chain) > 1:
                self.pic_chain = chain
                self.mipic_projections["pic"] = nn.ModuleList(
                    pic.chain_head(dim, next_dim) for (dim, _), (next_dim, _) in pairwise(chain)
                )
            if (self.attention_weight or self.cka_weight) and self.prefixes:
                self.sia_layers = layers
                if self.attention_weight and self.lift_init != "frozen":
                    self.mipic_projections["sia"] = nn.ModuleDict(
                        {
                            str(layer): nn.ParameterDict(
                                {str(dim): sia.initial_lift(dim, width, self.lift_init) for dim in self.prefixes}
                            )
                            for layer in layers
                        }
                    )
        if not self.sia_layers and not self.pic_chain:
            logger.warning(
                "matryoshka_dims=%s has no prefix below the width of %d to align, so SIA and PIC are off.",
                list(self.matryoshka_dims),
                width,
            )
            self._backbone = None
        if self.sia_layers and self.token_importance == "attention":
            require_eager_attention(self.model)

    @classmethod
    def from_preset(
        cls,
        model: nn.Module,
        loss: nn.Module,
        preset: str,
        matryoshka_dims: Sequence[int] | None = None,
        **overrides: Any,
    ) -> Self:
        """Make the loss with a named configuration.

        Args:
            model: SentenceTransformer model.
            loss: The base loss.
            preset: ``"paper"`` is the published formulation: plain sums, tau 0.05, random lifts, gradients through the
                teacher, layers, chain and alpha of Table 7 for a backbone of a published shape and by the same rule
                for others. ``"released"`` is what the authors' own BERT-base run used: no attention term, a chain of
                three pairs, tau 0.07, alpha 0.6. ``"tinybert-6l"``, ``"bert-base"``, ``"bge-m3"`` and
                ``"qwen3-0.6b"`` are the paper's and refuse a backbone of another shape. ``"default"`` is the
                constructor's defaults.
            matryoshka_dims: Embedding dimensions. Default: the paper's, 16 to 512 and the full width.
            **overrides: Any keyword argument of :class:`MIPICLoss`, which then wins over the preset.

        Returns:
            The loss.

        Raises:
            ValueError: If the preset is unknown or the backbone has not the shape it was published for.
            TypeError: If an override is no argument of :class:`MIPICLoss`.

        Example:
            >>> loss = MIPICLoss.from_preset(model, loss, "paper", [384, 64, 16])  # doctest: +SKIP
        """
        names = ("default", "paper", "released", *presets.RECIPES)
        if preset not in names:
            raise ValueError(f"preset must be one of {names}, got {preset!r}.")
        recipe = presets.RECIPES.get(preset)
        width = embedding_width(model)
        shape = None
        try:
            backbone = backbone_of(model)
            shape = (backbone.depth, backbone.width)
        except ValueError:
            # Fine without alignment (alpha=1); with it, the constructor refuses the model in the same words.
            if recipe is not None or (width is None and matryoshka_dims is None):
                raise
        if recipe is not None and shape is not None and (recipe.depth, recipe.width) != shape:
            raise ValueError(
                f"preset={preset!r} was published for {recipe.depth} layers of width {recipe.width}, the model has "
                f"{shape[0]} of width {shape[1]}. Use preset='paper', which fits any shape."
            )
        if matryoshka_dims is None:
            assert width is not None
            matryoshka_dims = presets.paper_dims(width)
        settings: dict[str, Any] = {}
        if preset != "default":
            settings |= presets.PAPER_SETTINGS
            if shape is not None:
                settings |= {"alpha": presets.paper_alpha(*shape), "sia_layers": presets.paper_layers(*shape)}
        if preset == "released":
            settings |= presets.RELEASED_SETTINGS
            if shape is not None:
                settings["pic_chain"] = presets.released_chain(matryoshka_dims, *shape) or None
        return cls(model, loss, matryoshka_dims, **{**settings, **overrides})

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> dict[str, Tensor]:
        """Compute the weighted terms of Eq. 18.

        Args:
            sentence_features: One dict of model inputs per column.
            labels: Whatever the base loss takes; with a teacher its vectors, (B, columns, T).

        Returns:
            Dict of scalars whose sum is the loss.

        Raises:
            TypeError: If ``sentence_features`` is no list of dicts.
            ValueError: If all texts of a column are empty, or ``distill_weight`` asks for a teacher's vectors and
                labels are none.
        """
        # A single dict would be taken for a list of its keys.
        features = list(sentence_features)
        if not all(isinstance(column, Mapping) for column in features):
            raise TypeError(
                "sentence_features must be a list with one dict of model inputs per column, e.g. "
                f"[model.preprocess(anchors), model.preprocess(positives)], got {type(sentence_features).__name__} of "
                f"{type(features[0]).__name__}."
            )
        self._begin_batch()
        masks = [column.get("attention_mask") for column in features]
        if any(isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == 0 for mask in masks):
            # encoders fail on a column of length 0, each in its own words
            where = self._empty_texts(features)
            raise ValueError(f"MIPICLoss: a column has no token at all at {self._place()}. {where}")
        compute = self._forward_cached if self._uses_cache else self._forward
        if not self.distill_weight or self.alpha == 1:
            return compute(features, labels, None)
        teacher = self._checked_teacher(features, labels)
        try:
            return compute(features, None, teacher)
        except (AttributeError, TypeError, ValueError) as error:
            error.add_note(
                f"With distill_weight, labels are the teacher's vectors, and {type(self.loss).__name__} gets none. If "
                "it needs labels, it cannot have a teacher: set distill_weight=0."
            )
            raise

    def _forward(
        self, features: list[dict[str, Tensor]], labels: Tensor | None, teacher: Tensor | None
    ) -> dict[str, Tensor]:
        """All terms, for a base loss that embeds in its forward pass."""
        with nullcontext() if self._backbone is None else self._recorded() as recorder:
            terms, embeddings = self._base_terms(features, labels)
        if not embeddings:
            raise RuntimeError(
                f"MIPICLoss recorded no forward pass: {type(self.loss).__name__} did not call the model that MIPICLoss "
                "holds. Give both the same model. A loss that keeps it under another name than `model` cannot be used "
                "in distributed or compiled training."
            )
        if recorder is None and teacher is None:
            return self._check_finite(terms, features, embeddings)
        terms = {name: self.alpha * term.float() for name, term in terms.items()}
        if recorder is not None:
            columns = self._columns(recorder, features)
            terms |= self._alignment_terms([self._observe(recorded) for recorded in recorder.passes], columns)
            self._model_checked = True
        if teacher is not None:
            terms |= self._teacher_term(torch.cat(embeddings), teacher)
        return self._check_finite(terms, features, embeddings)

    def _forward_cached(
        self, features: list[dict[str, Tensor]], labels: Tensor | None, teacher: Tensor | None
    ) -> dict[str, Tensor]:
        """The same for a base loss with gradient caching."""
        scale = 1 if self._backbone is None and teacher is None else self.alpha
        dims = [(self.matryoshka_dims[index], scale * self.matryoshka_weights[index]) for index in self._draw_dims()]

        def guard(embeddings: list[Tensor], leaves: list[Tensor]) -> None:
            if any(torch.stack([_has_zero_vector(embedding) for embedding in embeddings]).tolist()):
                self._guard_gradients(leaves, features)

        teach = None if teacher is None else lambda columns: self._teacher_term(torch.cat(columns), teacher)
        if self._backbone is None:
            terms, total = cached_terms(self.loss, features, labels, dims, guard=guard, teach=teach)
        else:
            terms, total = cached_terms(
                self.loss,
                features,
                labels,
                dims,
                self._recorded,
                lambda recorded: self._observe(recorded).pack(),
                lambda columns: self._alignment_terms([self._unpack(torch.cat(columns))], len(columns[0])),
                guard,
                teach,
            )
            self._model_checked = True
        terms = self._check_finite(terms, features)
        if total.requires_grad:
            # One term carries the gradient of all; the difference is zero.
            terms["matryoshka"] = terms["matryoshka"] + (total - total.detach())
        return terms

    def _read_again(self) -> None:
        """Read off the model once more if modules came or went behind the encoder: ``rotate_model`` puts one in.

        Raises:
            ValueError: If the model has another shape now.
        """
        behind = list(unwrap(self.model).children())[1:]
        if behind == self._behind:
            return
        assert self._backbone is not None
        backbone = backbone_of(self.model)
        shapes = [(known.depth, known.width) for known in (self._backbone, backbone)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"This MIPICLoss was made for a model of (depth, width) {shapes[0]}, which is {shapes[1]} now. Make a "
                "new loss for it."
            )
        self._backbone, self._behind, self._model_checked = backbone, behind, False

    def _recorded(self) -> AbstractContextManager[Recorder]:
        """The context in which the base loss's forward passes are recorded."""
        self._read_again()
        assert self._backbone is not None
        if self._first_shown is None:
            self._first_shown = first_shown(self.model)
        importance = "no"
        if self.sia_layers and self.token_importance == "attention":
            importance = "detached" if self.detach_full_width else "with_gradient"
        return record_states(self.model, self._backbone.depth, importance, self._first_shown)

    def _check_finite(
        self, terms: dict[str, Tensor], features: list[dict[str, Tensor]], embeddings: Sequence[Tensor] = ()
    ) -> dict[str, Tensor]:
        """Stop at a term that is nan or inf, before it reaches the parameters.

        Only where gradients are computed. It waits for the device once per batch, as the trainer does by itself for
        each logged term (``logging_nan_inf_filter``). Gradients that overflow in fp16 are no concern of this: the
        gradient scaler needs them. Where a scaler is at work (fp16 autocast around the loss, or fp16 training with
        ``MIPICCallback``) it also skips batches whose loss is not finite, so these are then logged, not refused.

        Args:
            terms: What :meth:`forward` is about to return.
            features: One dict of model inputs per column.
            embeddings: What the model gave. A zero vector has no direction, so the gradient of its normalisation can
                overflow while all values are finite: then that is watched.

        Returns:
            The terms.

        Raises:
            FloatingPointError: If a term is not finite; the message names it, the step, and empty texts.
        """
        if not torch.is_grad_enabled():
            return terms
        finite = torch.stack([term.detach().float() for term in terms.values()]).isfinite().all()
        all_finite, *zero = torch.stack([finite, *map(_has_zero_vector, embeddings)]).tolist()
        if any(zero):
            self._guard_gradients([e for e, is_zero in zip(embeddings, zero, strict=True) if is_zero], features)
        if all_finite:
            return terms
        bad = ", ".join(f"{name} = {term.item()}" for name, term in terms.items() if not term.isfinite())
        if self._scaler_skips(next(iter(terms.values())).device.type):
            logger.warning("MIPICLoss: %s at %s. The gradient scaler will skip this step.", bad, self._place())
            return terms
        empty = self._empty_texts(features)
        advice = (
            "Look for nan in the labels, for a learning rate that is too high, or, in fp16, for overflow: bf16 avoids "
            "it, and MIPICCallback lets fp16's gradient scaler skip such batches."
        )
        raise FloatingPointError(
            f"MIPICLoss: {bad} at {self._place()}. No parameter was changed by this batch. {empty or advice}"
        )

    def _place(self) -> str:
        """Where in the training an error is, for its message."""
        batch = f"training batch {self._batches} of this loss"
        return batch if self.global_step is None else f"step {self.global_step + 1} ({batch})"

    def _scaler_skips(self, device_type: str) -> bool:
        """Whether fp16's gradient scaler leaves out steps whose gradients are not finite."""
        autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
        return self.skips_nonfinite or autocast

    def _empty_texts(self, features: list[dict[str, Tensor]]) -> str:
        """Which texts have no token, with the fix, or nothing."""
        pooling = None if self._backbone is None else self._backbone.pooling
        found = []
        for number, column in enumerate(features, start=1):
            mask, offsets = column.get("attention_mask"), column.get("offsets")
            if isinstance(mask, Tensor) and mask.ndim == 2:
                lengths = pooled_tokens(mask, pooling, column.get("prompt_length"))
            elif isinstance(offsets, Tensor):  # StaticEmbedding: tokens of all texts in one row
                lengths = torch.cat([offsets, offsets.new_tensor([len(column["input_ids"])])]).diff()
            else:
                continue
            found += [f"text {row + 1} of input column {number}" for row in (lengths <= 0).nonzero()[:, 0].tolist()]
        if not found:
            return ""
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        return (
            f"There is no token in {', '.join(found[:3])}{more}: of an empty text the model pools nothing, and a "
            "vector of nothing has no direction. Leave empty texts out of the data, or use a tokenizer that adds "
            "special tokens."
        )

    def _guard_gradients(self, tensors: Sequence[Tensor], features: list[dict[str, Tensor]]) -> None:
        """Stop in the backward pass, before any parameter changes, where a zero vector makes gradients overflow."""
        if self._scaler_skips(tensors[0].device.type):
            return
        empty = self._empty_texts(features) or (
            "The model gave a sentence vector of zeros, which has no direction. Look for empty texts, or weights of "
            "zero."
        )
        message = (
            f"MIPICLoss: the gradient of the base loss is not finite at {self._place()}. No parameter was changed by "
            f"this batch. {empty}"
        )
        # Pooling divides by at least 1e-9: a gradient beyond this overflows there, if it has not before.
        limit = torch.finfo(torch.float32).max * 1e-9

        def check(gradient: Tensor) -> None:
            if not bool(gradient.detach().float().abs().max() < limit):
                raise FloatingPointError(message)

        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(check)

    def _base_terms(
        self, features: list[dict[str, Tensor]], labels: Tensor | None
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """L_MRL: the base loss at every truncation dimension, summed with ``matryoshka_weights``.

        Args:
            features: One dict of model inputs per column.
            labels: Whatever the base loss takes; embeddings of the full width (distillation) are cut like the outputs.

        Returns:
            L_MRL under the name ``matryoshka``, or one entry per key of a dict-valued base loss; and what the model
            gave in each forward pass.
        """
        totals: dict[str, Tensor] = {}
        width = embedding_width(self.model)
        with truncated_passes(self.model) as passes:
            for index in self._draw_dims():
                dim, weight = self.matryoshka_dims[index], self.matryoshka_weights[index]
                passes.start_dim(dim)
                dim_labels = labels
                if isinstance(labels, Tensor) and labels.ndim in (2, 3) and labels.shape[-1] == width:
                    dim_labels = labels[..., :dim]
                value = self.loss(features, dim_labels)
                parts = value if isinstance(value, Mapping) else {None: value}
                for key, part in parts.items():
                    name = "matryoshka" if key is None else f"matryoshka_{key}"
                    totals[name] = totals.get(name, 0.0) + weight * part
        return totals, passes.embeddings

    @property
    def draws_dims(self) -> bool:
        """Whether the base loss is applied to some dims in each training step, not to all."""
        return 0 < self.n_dims_per_step < len(self.matryoshka_dims)

    def parameters_of_its_own(self) -> list[nn.Parameter]:
        """The projections."""
        return list(self.mipic_projections.parameters())

    def begin_step(self, step: int | None) -> None:
        """Note the trainer's step, which ``n_dims_per_step`` and messages go by; None outside of a training."""
        self.global_step, self._batches_before_step = step, self._batches

    def _begin_batch(self) -> None:
        """Count it, and say or refuse it if nobody looks after the projections."""
        self._batches += self.model.training
        if self.managed or not self.model.training or not torch.is_grad_enabled() or not self.parameters_of_its_own():
            return
        fix = (
            "SentenceTransformerTrainer(..., callbacks=[MIPICCallback(loss)]) does; in a loop of your own do it, and "
            "set loss.managed = True."
        )
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise RuntimeError(
                "MIPICLoss has projections, and in training by several processes nobody averages their gradients. "
                f"{fix} The defaults have no projections: lift_init='frozen' and pic_weight=0."
            )
        if self._batches == 1:
            logger.warning(
                "MIPICLoss has projections, which nobody clips, saves with checkpoints or restores from them: a run "
                "that is resumed goes on with others. %s",
                fix,
            )

    def _draw_dims(self) -> Sequence[int]:
        """Indices of the dims for this step, largest dim first: all of them, or a seeded draw while training."""
        count = len(self.matryoshka_dims)
        if not self.draws_dims or not self.model.training:
            return range(count)
        key = f"{self.seed} {self.global_step} {self._batches - self._batches_before_step}"
        return sorted(random.Random(key).sample(range(count), self.n_dims_per_step))

    def _columns(self, recorder: Recorder, features: list[dict[str, Tensor]]) -> int:
        """B, the number of sentences in one column.

        A base loss may run several columns in one forward pass, one after the other; a pass of k * B rows then holds k
        columns.

        Args:
            recorder: What was recorded.
            features: One dict of model inputs per column.

        Returns:
            B.

        Raises:
            RuntimeError: If passes cannot be split into columns of B sentences.
        """
        rows = [len(recorded.mask) for recorded in recorder.passes]
        size = min(rows)
        ids = features[0].get("input_ids", features[0].get("attention_mask")) if features else None
        if ids is not None:
            size = len(ids)
        if any(count % size for count in rows):
            raise RuntimeError(f"Forward passes of {rows} rows cannot be split into columns of {size} sentences.")
        return size

    def _observe(self, recorded: RecordedPass) -> Observation:
        """All that the alignment terms need of the sentences of one forward pass.

        Args:
            recorded: The forward pass.

        Returns:
            Per-sentence values; everything that mixes sentences comes after.
        """
        assert self._backbone is not None
        if not self._model_checked:
            self._check_model(recorded)
        has_text = recorded.has_text(self._backbone.pooling)
        layers = [self._sia_layer(recorded, layer, has_text) for layer in self.sia_layers]
        links = []
        if self.pic_chain:
            vectors = [self._vector(recorded, layer, has_text)[:, :dim] for dim, layer in self.pic_chain]
            links = [
                (pic.predict_next(head, vector), target.detach().to(torch.promote_types(target.dtype, torch.float32)))
                for head, (vector, target) in zip(self._chain_heads(), pairwise(vectors), strict=True)
            ]
        return Observation(layers, links, has_text)

    def _vector(self, recorded: RecordedPass, layer: int, has_text: Tensor) -> Tensor:
        """The sentence vectors of a layer, (R, D): its pooled states, pushed through the model's tail."""
        assert self._backbone is not None
        pooled = recorded.pool(self._backbone.pooling, recorded.hidden_states[layer])
        # Pooling nothing may give -inf, which would spoil the gradients of head and tail even if it counts zero.
        return push_vectors(self._backbone.steps, pooled.masked_fill(~has_text[:, None], 0.0))

    def _check_model(self, recorded: RecordedPass) -> None:
        """Make sure, in the first batch, that the states which were recorded are those that the embedding is made of.

        Args:
            recorded: A forward pass.

        Raises:
            ValueError: If the model pools something else.
        """
        assert self._backbone is not None
        fix = "Use alpha=1 for plain Matryoshka training."
        with torch.no_grad():
            pooling, last = self._backbone.pooling, recorded.hidden_states[self._backbone.depth]
            pooled = recorded.pool(pooling, last)
            if recorded.token_embeddings is not None:
                require_same_vectors(recorded.pool(pooling, recorded.token_embeddings), pooled, self.model, fix)
            if recorded.sentence_embedding is None or (self._backbone.dropout and self.model.training):
                return
            own, pushed = recorded.sentence_embedding, push_vectors(self._backbone.steps, pooled)
            if self._backbone.normalize:
                own, pushed = (nn.functional.normalize(vectors.float(), dim=-1) for vectors in (own, pushed))
            # The trainer puts autocast around the model only, so its own tail may have run in half precision.
            require_same_vectors(own, pushed, self.model, fix, half=True if self._backbone.steps else None)

    def _unpack(self, packed: Tensor) -> Observation:
        """Undo :meth:`Observation.pack`."""
        count = len(self.prefixes)
        sizes = [size for _ in self.sia_layers for size in (count, count, count)]
        sizes += [size for _, (dim, _) in pairwise(self.pic_chain) for size in (dim, dim)]
        sizes.append(1)
        parts = iter(packed.split(sizes, dim=-1))
        layers = [sia.SIATerms(next(parts), next(parts), next(parts).detach() > 0) for _ in self.sia_layers]
        links = [(next(parts), next(parts).detach()) for _ in self.pic_chain[1:]]
        return Observation(layers, links, next(parts)[:, 0].detach() > 0)

    def _alignment_terms(self, observations: list[Observation], size: int) -> dict[str, Tensor]:
        """L_SIA in its two parts and L_PIC, weighted.

        Args:
            observations: One per forward pass.
            size: B, sentences per column.

        Returns:
            ``sia_attention``, ``sia_cka`` and ``pic``, as far as they are active.
        """
        terms: dict[str, Tensor] = {}
        if self.sia_layers:
            terms |= self._sia_terms([observation.layers for observation in observations])
        if self.pic_chain:
            has_text = torch.cat([observation.has_text for observation in observations])
            terms["pic"] = self._pic_term([observation.links for observation in observations], has_text, size)
        return {name: (1 - self.alpha) * term for name, term in terms.items()}

    def _sia_terms(self, passes: list[list[sia.SIATerms]]) -> dict[str, Tensor]:
        """L_SIA in its two parts (Eq. 13 and 14), weighted but for ``1 - alpha``.

        Args:
            passes: One entry per forward pass: SIA of each layer, per sentence and prefix.

        Returns:
            ``sia_attention`` and ``sia_cka``, as far as their weights are not zero.
        """
        attention, cka = [], []
        for parts in zip(*passes, strict=True):
            attention.append(torch.cat([part.attention for part in parts]).mean(dim=0))
            valid = torch.cat([part.cka_valid for part in parts]).sum(dim=0)
            cka.append(torch.cat([part.cka for part in parts]).sum(dim=0) / valid.clamp(min=1))
        terms = {}
        if self.attention_weight:
            terms["sia_attention"] = self.attention_weight * self._aggregate(torch.stack(attention))
        if self.cka_weight:
            terms["sia_cka"] = self.cka_weight * self._aggregate(torch.stack(cka))
        return terms

    def _sia_layer(self, recorded: RecordedPass, layer: int, has_text: Tensor) -> sia.SIATerms:
        """SIA of one layer in one forward pass, per sentence and prefix (Eq. 4-12).

        Args:
            recorded: The forward pass.
            layer: 1 to depth.
            has_text: (R,), sentences with a token that is pooled.

        Returns:
            :class:`mipic_st.losses.sia.SIATerms`.
        """
        assert self._backbone is not None
        hidden = recorded.hidden_states[layer]
        teacher_attention = None
        if recorded.attentions:
            teacher_attention = recorded.pool(self._backbone.pooling, recorded.attentions[layer - 1])
        return sia.sia_terms(
            push_vectors(self._backbone.steps, hidden),
            self._vector(recorded, layer, has_text),
            recorded.mask & has_text[:, None],
            self.prefixes,
            self._lifts(layer),
            self.gammas,
            min_k=self.min_k,
            temperature=self.attention_temperature,
            kl_direction=self.kl_direction,
            detach_full_width=self.detach_full_width,
            teacher_attention=teacher_attention,
            with_cka=bool(self.cka_weight),
        )

    def _pic_term(self, passes: list[list[tuple[Tensor, Tensor]]], has_text: Tensor, size: int) -> Tensor:
        """L_PIC (Eq. 17), weighted but for ``1 - alpha``.

        Args:
            passes: One entry per forward pass: (phi_c(z_c), z_{c+1}) of each link.
            has_text: Which sentences of all passes have a token; the others are left out.
            size: B, sentences per column.

        Returns:
            Scalar.
        """
        links = []
        gather = self.gather_across_devices and distributed.is_available() and distributed.is_initialized()
        valid = has_text.unflatten(0, (-1, size))
        if gather:
            valid = all_gather(valid.float().transpose(0, 1).contiguous()).transpose(0, 1) > 0
        for pairs in zip(*passes, strict=True):
            # (columns, B, dim): negatives come from the same column, however columns were batched
            predicted, target = (torch.cat(parts).unflatten(0, (-1, size)) for parts in zip(*pairs, strict=True))
            offset = 0
            if gather:
                # No gradient flows into targets, so plain gathering is exact.
                target = all_gather(target.transpose(0, 1).contiguous()).transpose(0, 1)
                offset = distributed.get_rank() * size
            links.append(pic.chain_info_nce(predicted, target, self.chain_temperature, offset, valid))
        return self.pic_weight * self._aggregate(torch.stack(links))

    def _checked_teacher(self, features: list[dict[str, Tensor]], labels: Any) -> Tensor:
        """The teacher's vectors, (B, columns, T)."""
        if len(features) < 2:
            raise ValueError("distill_weight compares two columns of texts or more, and there is one. Give pairs.")
        if not isinstance(labels, Tensor) or labels.ndim != 3 or labels.shape[1] != len(features):
            got = f"a tensor of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f"distill_weight={self.distill_weight:g} needs the teacher's vectors of these {len(features)} columns "
                f"as labels, (B, {len(features)}, T), got {got}. mipic_st.add_teacher_vectors puts them into a "
                "dataset; an evaluation dataset needs them too."
            )
        return labels

    def _teacher_term(self, vectors: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """The term of :mod:`mipic_st.losses.distillation`, weighted.

        Args:
            vectors: The model's, one column after the other, (columns * B, D).
            teacher: (B, columns, T).

        Returns:
            ``distillation``.
        """
        count, columns = teacher.shape[:2]
        if len(vectors) != count * columns:
            raise RuntimeError(
                f"{type(self.loss).__name__} ran the model on {len(vectors)} sentences, and labels are the teacher's "
                f"vectors of {columns} columns of {count}. Give labels of the same rows; with a loss that runs the "
                "model on other texts than those of its columns set distill_weight=0."
            )
        student = vectors.unflatten(0, (columns, count))
        constant = teacher.to(vectors.device, torch.float32).transpose(0, 1)
        divergences = similarity_divergence(student, constant, self.matryoshka_dims, self.distill_temperature)
        return {"distillation": (1 - self.alpha) * self.distill_weight * self._aggregate(divergences)}

    def _lifts(self, layer: int) -> list[Tensor] | None:
        """The lifts P of one layer in ascending order of their prefix, or None if the attention term is off.

        Args:
            layer: One of ``sia_layers``.

        Returns:
            One (d, D) parameter per prefix; constants where they are frozen.
        """
        if not self.attention_weight:
            return None
        if self.lift_init == "frozen":
            assert self._backbone is not None
            return [sia.initial_lift(dim, self._backbone.width) for dim in self.prefixes]
        return [self.mipic_projections.get_parameter(f"sia.{layer}.{dim}") for dim in self.prefixes]

    def _chain_heads(self) -> list[nn.Module]:
        """The heads phi, one per PIC link."""
        return list(self.mipic_projections["pic"].children())

    def _aggregate(self, values: Tensor) -> Tensor:
        """Add or average over layers, prefixes and links (Eq. 13, 14 and 17).

        Args:
            values: The terms, any shape.

        Returns:
            Scalar.
        """
        return values.sum() if self.aggregation == "sum" else values.mean()

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        config: dict[str, Any] = {
            "loss": type(self.loss).__name__,
            "matryoshka_dims": self.matryoshka_dims,
            "matryoshka_weights": self.matryoshka_weights,
            "n_dims_per_step": self.n_dims_per_step,
            "alpha": self.alpha,
            "attention_weight": self.attention_weight,
            "cka_weight": self.cka_weight,
            "pic_weight": self.pic_weight,
            "distill_weight": self.distill_weight,
            "sia_layers": self.sia_layers,
            "pic_chain": self.pic_chain,
            "gammas": self.gammas,
        }
        settings = (
            "min_k",
            "attention_temperature",
            "chain_temperature",
            "distill_temperature",
            "aggregation",
            "kl_direction",
            "detach_full_width",
            "lift_init",
            "token_importance",
            "gather_across_devices",
            "seed",
        )
        return config | {name: getattr(self, name) for name in settings}

    @property
    def citation(self) -> str:
        """BibTeX of the method."""
        return """
@misc{huy2026mipic,
    title={MIPIC: Matryoshka Representation Learning via Self-Distilled Intra-Relational and Progressive
           Information Chaining},
    author={Phung Gia Huy and Hai An Vu and Minh-Phuc Truong and Thang Duc Tran and Linh Ngo Van and
            Thanh Nguyen Hong and Trung Le},
    year={2026},
    eprint={2604.24374},
    archivePrefix={arXiv}
}
"""


def _has_zero_vector(embeddings: Tensor) -> Tensor:
    """Whether any row is all zeros, as a boolean scalar on its device."""
    return (embeddings.detach() == 0).all(dim=-1).any()


def _checked_weights(dims: list[int], weights: Any) -> list[float]:
    weights = [1] * len(dims) if weights is None else as_list("matryoshka_weights", weights, "[1, 1, 2]")
    if len(weights) != len(dims):
        raise ValueError(
            f"matryoshka_weights must have one weight per dimension: {len(dims)} dims, {len(weights)} weights."
        )
    if wrong := [weight for weight in weights if not is_number(weight) or not 0 <= weight < float("inf")]:
        raise ValueError(f"matryoshka_weights must be finite and >= 0, got {wrong}.")
    return weights


def _checked_dims_per_step(count: Any, dims: int) -> int:
    count = plain(count)
    if not is_whole(count) or (count != -1 and count < 1):
        raise ValueError(f"n_dims_per_step must be -1 (all dims) or at least 1, got {count!r}.")
    if count > dims:
        raise ValueError(f"n_dims_per_step={count} exceeds the number of matryoshka_dims, {dims}. Use -1 for all.")
    return int(count)


def _checked_gammas(gammas: Any, prefixes: int) -> tuple[float, ...]:
    if gammas is None:
        return presets.default_gammas(prefixes)
    gammas = tuple(as_list("gammas", gammas, "[0.2, 0.4, 0.7]"))
    if len(gammas) != prefixes:
        raise ValueError(
            f"gammas must have one share per prefix below the full width: {prefixes} prefixes, {len(gammas)} gammas."
        )
    if wrong := [gamma for gamma in gammas if not is_number(gamma) or not 0 < gamma <= 1]:
        raise ValueError(f"gammas must be shares of the tokens in (0, 1], got {wrong}.")
    if list(gammas) != sorted(gammas):
        raise ValueError(f"gammas must ascend with the prefix, so that the sets are nested, got {gammas}.")
    return tuple(float(gamma) for gamma in gammas)
