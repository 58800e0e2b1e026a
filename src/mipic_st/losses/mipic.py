"""MIPICLoss: the base loss at every truncation dimension, plus SIA and PIC (Eq. 18)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from mipic_st.encoder.hidden_states import LayerRecorder, RecordedPass, record_states
from mipic_st.encoder.structure import backbone_of, embedding_width, unwrap
from mipic_st.losses import presets, sia
from mipic_st.losses.cached import require_supported, run_cached
from mipic_st.losses.faults import Watch, checked_features, labels_are_taken, require_base_loss, require_managed
from mipic_st.losses.matryoshka import Dims, drawn, run_plain
from mipic_st.losses.settings import Aggregation, Settings, TokenImportance
from mipic_st.losses.terms import DistillationTerm, Observers, make_terms
from mipic_st.validation import checked_dims

logger = logging.getLogger(__name__)


class MIPICLoss(nn.Module):
    r"""Matryoshka training of any sentence-transformers loss, with MIPIC's two alignments on the encoder's own layers.

    A drop-in for ``MatryoshkaLoss``: the base loss is applied to every truncation dimension, and the hidden states of
    its own forward passes are recorded. On them, SIA asks each prefix to see the tokens of a sentence as the full width
    does, and PIC, if it is switched on, chains narrow, early sentence vectors to wide, late ones. With
    ``distill_weight``, which is not part of MIPIC, the similarities within a batch follow those that a larger model
    finds. For small dimensions start from a rotated model (:func:`mipic_st.transforms.model_rotation.rotate_model`):
    from there the loss scores as ``MatryoshkaLoss`` does, and a larger model adds to it. From a plain start, SIA helps
    a weak encoder. The trained model is a plain SentenceTransformer.

    .. math:: L = \alpha L_{MRL} + (1 - \alpha) (L_{SIA} + L_{PIC} + L_{distillation}) \qquad \text{(Eq. 18)}

    With ``alpha=1``, or all four weights zero, the base term is not scaled, nothing is recorded, and loss and gradients
    are those of ``MatryoshkaLoss`` to the last bit.

    Args:
        model: SentenceTransformer model: a Transformer and a Pooling module, behind which any chain of Dense,
            LayerNorm, Dropout and Normalize may follow, see Tails.
        loss: The base loss, e.g. ``MultipleNegativesRankingLoss`` or ``CoSENTLoss``. It may return a tensor or a dict.
        matryoshka_dims: Embedding dimensions for the base loss, in any order, e.g. [768, 256, 64, 16]. Those below the
            full width are the prefixes of SIA.
        matryoshka_weights: One weight per dim for the base loss. Default: 1 for each.
        n_dims_per_step: Number of dims that the base loss is applied to in each training batch; -1 is all. The draw
            depends on the seed, the trainer's step and the batch within it; without
            :class:`~mipic_st.losses.callback.MIPICCallback`, which knows the step, a resumed run draws dims different
            from those of the interrupted one. Evaluation and the other terms always use all dims.
        alpha: Weight of the base term in Eq. 18, in [0, 1].
        attention_weight: Weight of SIA's attention term (Eq. 6), >= 0. Zero switches it off.
        cka_weight: Weight of SIA's CKA term (Eq. 11), >= 0. Zero switches it off.
        pic_weight: Weight of PIC (Eq. 17), >= 0. Zero switches it off.
        distill_weight: Weight of the larger model's term, >= 0. Zero switches it off. With 4 and ``alpha=0.8`` it
            counts as much as the base loss.
        sia_layers: Layers that carry SIA, 1 to the model's depth. Default: the last one.
        pic_chain: Ordered (dim, layer) pairs for PIC (the paper's checkpoints), both ascending, at least two. Default:
            :func:`mipic_st.losses.presets.default_chain`.
        gammas: Share of a sentence's tokens in the top-k set of each prefix, ascending with the prefix (App. A.5), in
            (0, 1]. Default: .2 to .7, interpolated to the number of prefixes.
        min_k: Smallest top-k set, in tokens, >= 1 (App. A.5).
        attention_temperature: tau in the two softmaxes of Eq. 4-5, > 0. The paper's 0.05 makes them nearly one-hot.
        chain_temperature: tau of PIC's InfoNCE (Eq. 16), > 0.
        distill_temperature: tau of the similarities that follow the larger model's, > 0.
        aggregation: ``"sum"`` adds layers, prefixes, links and dims as Eq. 13, 14 and 17 do; ``"mean"`` averages them.
        kl_direction: ``"prefix_full"`` for KL(prefix || full), the paper's Eq. 6; ``"full_prefix"`` for the reverse, as
            in the released notebooks.
        detach_full_width: Whether all of SIA's full-width side (query, distribution, Gram matrix) is a constant.
        lift_init: The lifts P (Eq. 5): ``"frozen"`` is ordinary truncation, without parameters. The others are trained:
            ``"identity"`` starts at ordinary truncation, ``"orthogonal"`` and ``"random"`` do not.
        token_importance: ``"similarity"`` ranks tokens by the full-width query (Eq. 4). ``"attention"`` takes the
            model's own attention maps of that layer, before dropout; the model is then switched to eager attention,
            with a warning in the log.
        gather_across_devices: Whether PIC's negatives come from all devices of a distributed run (every device must
            then have the same batch size). Set it as on the base loss.
        seed: Seeds the lifts, the heads and the draw of dims; the global generators are left alone.

    Inputs:
        Whatever the base loss takes. With ``distill_weight`` two columns of texts or more, whose labels are the larger
        model's vectors, (B, columns, T), as :func:`mipic_st.losses.distillation.add_teacher_vectors` puts them into a
        dataset; the base loss gets none.

    Tails:
        Modules behind the pooling change the space that is served, so the terms are taken in it: SIA sees token states
        pushed through the tail, PIC pooled states. Pooled tokens are then the pushed vector where the tail is linear
        and the pooling is not ``max``, with a bias where it is ``mean``, ``cls``, ``lasttoken`` or ``weightedmean``;
        other modules do not commute with pooling. Dropout and a Normalize at the end are left out of what the terms
        see, and so is the final norm of pre-norm encoders for layers before the last.

    Shapes:
        B sentences per column, L padded tokens, D full width: hidden states are (B, L, D). Parameters, if there are
        any, begin with ``mipic_projections``: one (d, D) lift per SIA layer and prefix, one two-layer head per PIC
        link. They need :class:`~mipic_st.losses.callback.MIPICCallback`: without it they are neither saved with
        checkpoints nor clipped, which is logged, and training in several processes is refused.

    Returns:
        dict[str, Tensor]: Float32 scalars, already weighted, whose sum is the loss: ``matryoshka``
        (``matryoshka_<key>`` for each key of a dict-valued base loss), ``sia_attention``, ``sia_cka``, ``pic`` and
        ``distillation``, as far as they are active. The trainer logs each.

    Raises:
        ValueError: If an argument is out of its range, or the model is not built of Transformer, Pooling and such a
            tail; in the first ``forward``, if it does not pool its last hidden state.
        TypeError: If ``model`` or ``loss`` is not one, or an argument is of the wrong type.
        FloatingPointError: In ``forward``, if a term is nan or inf, and in the backward pass, if the vector of an empty
            text makes the base loss's gradient overflow. With fp16's gradient scaler such batches are logged, and
            skipped by it.
        RuntimeError: In ``forward``, if the base loss never called ``model``.

    Numerics:
        The terms run in float32 also under autocast and for bf16 models. A sentence of one token, or of equal ones,
        has no CKA and is left out of that mean; one without any adds nothing. Padding and the other sentences of a
        batch do not change a sentence's SIA value.

    Source:
        Huy et al., "MIPIC", arXiv 2604.24374; equations in :mod:`~mipic_st.losses.sia`, :mod:`~mipic_st.losses.cka` and
        :mod:`~mipic_st.losses.pic`. Where the released notebooks differ, the paper is followed: KL(prefix || full),
        similarity to the pooled query instead of separate 64-d attention spaces. Top-k sizes come from each sentence's
        own length. The paper's settings are ``MIPICLoss.from_preset(model, loss, "paper", dims)``.

    Relations:
        Use it instead of ``MatryoshkaLoss``: outermost, around the base loss, which must be none that patches the
        model itself (``MatryoshkaLoss``, ``AdaptiveLayerLoss``). Takes further terms, see :meth:`add_term`.

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
        # All that follows matryoshka_dims, by name: Settings has these fields and no others.
        given = {name: value for name, value in locals().items() if name not in ("self", "model", "loss", "__class__")}
        super().__init__()
        require_base_loss(loss, MIPICLoss)
        self._uses_cache = require_supported(loss)
        self.settings = Settings.checked(embedding_width(model), **given)
        self.model = model
        self.loss = loss
        # Set by MIPICCallback; a loop of your own that looks after the projections sets managed.
        self.managed = False
        self.skips_nonfinite = False
        self.global_step: int | None = None
        self._batches = self._batches_before_step = 0
        self._layers, terms = self._made_for(model)
        self.mipic_projections = nn.ModuleDict({term.name: term for term in terms})  # type: ignore[misc]
        self.matryoshka_dims = self.settings.matryoshka_dims
        self.sia_layers, self.pic_chain = self._of("sia", "layers"), self._of("pic", "chain")

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
            preset: ``"paper"`` is the published formulation, with layers, chain and alpha of Table 7, by the same rule
                for other backbones. ``"released"`` is the authors' own BERT-base run: no attention term, a chain of
                three pairs, tau 0.07, alpha 0.6. ``"tinybert-6l"``, ``"bert-base"``, ``"bge-m3"`` and ``"qwen3-0.6b"``
                are the paper's and refuse a backbone of another shape. ``"default"`` is the constructor's defaults.
            matryoshka_dims: Embedding dimensions. Default: the paper's, 16 to 512 and the full width.
            **overrides: Any keyword argument of :class:`MIPICLoss`, which then wins over the preset.

        Returns:
            The loss.

        Raises:
            ValueError: If the preset is unknown or the backbone has not the shape it was published for.
            TypeError: If an override is no argument.

        Example:
            >>> loss = MIPICLoss.from_preset(model, loss, "paper", [384, 64, 16])  # doctest: +SKIP
        """
        width, shape = embedding_width(model), None
        try:
            shape = backbone_of(model)[:2]
        except ValueError:
            # Fine without alignment (alpha=1); with it, the constructor refuses the model in the same words.
            if preset in presets.RECIPES or (width is None and matryoshka_dims is None):
                raise
        if matryoshka_dims is None:
            assert width is not None
            matryoshka_dims = presets.paper_dims(width)
        settings = presets.preset_settings(preset, matryoshka_dims, shape)
        return cls(model, loss, matryoshka_dims, **{**settings, **overrides})

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> dict[str, Tensor]:
        """The weighted terms of Eq. 18, whose sum is the loss.

        Args:
            sentence_features: One dict of model inputs per column.
            labels: Whatever the base loss takes; with ``distill_weight`` vectors of a larger model, (B, columns, T).

        Returns:
            Dict of scalars.
        """
        features, settings = checked_features(sentence_features), self.settings
        self._batches += self.model.training
        if self.model.training and torch.is_grad_enabled() and not self.managed:
            require_managed(self.mipic_projections, first_batch=self._batches == 1)
        pooling = self._layers and self._layers.backbone.pooling
        watch = Watch(features, self._place, pooling, self.skips_nonfinite)
        watch.check_lengths()

        terms: list[Any] = list(self.terms.values())
        if settings.distils:
            terms.append(DistillationTerm.of(settings, type(self.loss).__name__, features, labels))
            labels = None
        alpha = settings.alpha if terms else 1.0
        observers = Observers(terms, 1 - alpha, self.record)
        with labels_are_taken(self.loss, settings.distils):
            if self._uses_cache:
                outcome = run_cached(self.loss, features, labels, self._dims(), alpha, observers, watch.guard)
            else:
                outcome = run_plain(self.loss, self.model, features, labels, self._dims(), alpha, observers)
        if self._layers is not None:
            self._layers.checked = True
        watch.check_finite(outcome.terms, outcome.embeddings)
        return outcome.with_gradient()

    @property
    def terms(self) -> nn.ModuleDict:
        """The terms other than the base loss, by name; distillation, which belongs to a batch, is not among them."""
        return self.mipic_projections

    def add_term(self, term: nn.Module) -> None:
        """Add a term of your own, with its parameters; do it before an optimizer is made.

        Args:
            term: A module with the attributes of :class:`mipic_st.losses.terms.Term`. What its ``reduce`` returns is
                multiplied by ``1 - alpha``. With ``model_init`` its parameters stay as they are.

        Raises:
            ValueError: If ``alpha`` is 1, there is a term of that name, or the model's layers cannot be aligned.
        """
        name = str(term.name)
        if self.settings.alpha == 1 or name in self.terms:
            reason = "alpha=1 leaves no weight for it" if self.settings.alpha == 1 else "there is one of that name"
            raise ValueError(f"term {name!r} cannot be added: {reason}.")
        self._layers = self._layers or LayerRecorder(self.model)
        self.terms[name] = term

    def record(self) -> AbstractContextManager[list[RecordedPass]]:
        """The context in which the model's forward passes are recorded as the terms observe them."""
        if self._layers is None or not len(self.terms):
            return record_states(self.model, None)
        wanted = (term.attentions for term in self.terms.values() if hasattr(term, "attentions"))
        return self._layers.record(self.model, str(next(wanted, "no")))

    def begin_step(self, step: int | None) -> None:
        """Note the trainer's step, which ``n_dims_per_step`` and messages go by; None outside of a training."""
        self.global_step, self._batches_before_step = step, self._batches

    @property
    def _place(self) -> str:
        """Where in the training an error is, for its message."""
        batch = f"training batch {self._batches} of this loss"
        return batch if self.global_step is None else f"step {self.global_step + 1} ({batch})"

    def _dims(self) -> Dims:
        """(dim, weight) pairs for this batch, largest dim first."""
        settings = self.settings
        dims = list(zip(settings.matryoshka_dims, settings.matryoshka_weights, strict=True))
        if not settings.draws_dims or not self.model.training:
            return dims
        batch = self._batches - self._batches_before_step
        return drawn(dims, settings.n_dims_per_step, f"{settings.seed} {self.global_step} {batch}")

    def _made_for(self, model: nn.Module) -> tuple[LayerRecorder | None, list[nn.Module]]:
        """What records a model, and the terms that fit it."""
        if not self.settings.aligns:
            return None, []
        layers = LayerRecorder(model)
        return layers, make_terms(self.settings, model, layers.backbone)

    def __setattr__(self, name: str, value: Any) -> None:
        """The trainer puts wrapped models here, and with ``model_init`` a new one for each run."""
        if name == "model" and "mipic_projections" in self.__dict__.get("_modules", {}):
            self._follow(value)
        super().__setattr__(name, value)

    def _follow(self, model: nn.Module) -> None:
        """Begin again with another model, everything as at the start, so that no trial inherits from the last."""
        if unwrap(model) is unwrap(self.model):
            return
        try:
            checked_dims("matryoshka_dims", self.settings.matryoshka_dims, embedding_width(model))
            layers, terms = self._made_for(model)
            layers = layers or (self._layers and LayerRecorder(model))
        except (TypeError, ValueError) as error:
            raise ValueError(f"This MIPICLoss does not fit the model that model_init made: {error}") from error
        if self._layers and layers and (was := self._layers.backbone[:2]) != (is_now := layers.backbone[:2]):
            raise ValueError(
                f"This MIPICLoss was made for a model of (depth, width) {was}, and model_init made one of {is_now}. "
                "Make a trainer and a loss for each shape."
            )
        # Before the first batch they are as they were made, or were loaded to start from.
        for term in terms if self._batches else ():
            for own, other in zip(self.terms[str(term.name)].parameters(), term.parameters(), strict=True):
                own.data.copy_(other.data)
                own.grad = None
        self._layers, self._batches = layers, 0
        self.begin_step(None)

    def _of(self, term: str, name: str) -> Any:
        """An attribute of a term, empty if the term is off."""
        return getattr(self.terms[term], name) if term in self.terms else ()

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        chosen = {"sia_layers": self.sia_layers, "pic_chain": self.pic_chain, "gammas": self._of("sia", "gammas")}
        return {"loss": type(self.loss).__name__} | vars(self.settings) | chosen

    @property
    def citation(self) -> str:
        """BibTeX of the method."""
        return presets.CITATION
