"""MIPIC losses and per-dimension evaluation for sentence-transformers."""

from mipic_st.evaluation import ClassificationProbeEvaluator, MatryoshkaEvaluator
from mipic_st.export import export_truncated, measure_speedup
from mipic_st.loss import MIPICLoss
from mipic_st.mteb_tasks import evaluate_mteb
from mipic_st.report import EvaluationReport
from mipic_st.training import MIPICCallback, set_matryoshka_config

__version__ = "0.1.0"

__all__ = [
    "ClassificationProbeEvaluator",
    "EvaluationReport",
    "MIPICCallback",
    "MIPICLoss",
    "MatryoshkaEvaluator",
    "__version__",
    "evaluate_mteb",
    "export_truncated",
    "measure_speedup",
    "set_matryoshka_config",
]
