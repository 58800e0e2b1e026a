"""Matryoshka embeddings for sentence-transformers: rotations, MIPICLoss, layer cuts, evaluation, export, serving.

Names are imported when they are first used, so that ``import mipic_st`` and ``mipic-st --version`` are instant.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, editors and the documentation; the same as _HOME says
    from mipic_st.callback import MIPICCallback
    from mipic_st.evaluation import ClassificationProbeEvaluator, MatryoshkaEvaluator
    from mipic_st.export import export_truncated, measure_speedup
    from mipic_st.layer_cuts import LayerCuts, fit_layer_cuts
    from mipic_st.loss import MIPICLoss
    from mipic_st.model_config import set_matryoshka_config
    from mipic_st.mteb_tasks import evaluate_mteb
    from mipic_st.report import EvaluationReport
    from mipic_st.rotation import Rotation, fit_rotation, rotate_model
    from mipic_st.serving import check_endpoint, export_onnx, save_for_tei
    from mipic_st.teacher import add_teacher_vectors

__version__ = "0.1.0"

__all__ = [
    "ClassificationProbeEvaluator",
    "EvaluationReport",
    "LayerCuts",
    "MIPICCallback",
    "MIPICLoss",
    "MatryoshkaEvaluator",
    "Rotation",
    "__version__",
    "add_teacher_vectors",
    "check_endpoint",
    "evaluate_mteb",
    "export_onnx",
    "export_truncated",
    "fit_layer_cuts",
    "fit_rotation",
    "measure_speedup",
    "rotate_model",
    "save_for_tei",
    "set_matryoshka_config",
]

_HOME = {
    "ClassificationProbeEvaluator": "evaluation",
    "EvaluationReport": "report",
    "LayerCuts": "layer_cuts",
    "MIPICCallback": "callback",
    "MIPICLoss": "loss",
    "MatryoshkaEvaluator": "evaluation",
    "Rotation": "rotation",
    "add_teacher_vectors": "teacher",
    "check_endpoint": "serving",
    "evaluate_mteb": "mteb_tasks",
    "export_onnx": "serving",
    "export_truncated": "export",
    "fit_layer_cuts": "layer_cuts",
    "fit_rotation": "rotation",
    "measure_speedup": "export",
    "rotate_model": "rotation",
    "save_for_tei": "serving",
    "set_matryoshka_config": "model_config",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, at its first use."""
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
