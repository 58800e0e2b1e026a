# The one table of public names, and where each lives ("as" makes a name of a stub public).
from .advice.advice import Advice as Advice
from .advice.advise import advise as advise
from .deploy.endpoint import check_endpoint as check_endpoint
from .deploy.onnx import export_onnx as export_onnx
from .deploy.tei import save_for_tei as save_for_tei
from .deploy.truncated import export_truncated as export_truncated
from .deploy.truncated import measure_speedup as measure_speedup
from .encoder.card import set_matryoshka_config as set_matryoshka_config
from .evaluation.matryoshka import MatryoshkaEvaluator as MatryoshkaEvaluator
from .evaluation.mteb import evaluate_mteb as evaluate_mteb
from .evaluation.probe import ClassificationProbeEvaluator as ClassificationProbeEvaluator
from .evaluation.report import EvaluationReport as EvaluationReport
from .losses.callback import MIPICCallback as MIPICCallback
from .losses.distillation import add_teacher_vectors as add_teacher_vectors
from .losses.mipic import MIPICLoss as MIPICLoss
from .stored.job import rotate_files as rotate_files
from .stored.rotate import RotateVectors as RotateVectors
from .transforms.layer_cut import LayerCuts as LayerCuts
from .transforms.layer_cut import fit_layer_cuts as fit_layer_cuts
from .transforms.model_rotation import rotate_model as rotate_model
from .transforms.rotation import Rotation as Rotation
from .transforms.rotation_fit import fit_rotation as fit_rotation

__version__: str
