"""lncompile: ``torch.compile(model, backend="lnfold")`` folds LayerNorms' mean-centering into upstream weights."""

from lncompile.abtest import ABTest
from lncompile.explain import explain, refresh, reports
from lncompile.fold import FoldedModule, fold
from lncompile.integrations import allow_in_accelerate
from lncompile.lowering.inspection import GeneratedCode, generated_code
from lncompile.options import OptionError, Options
from lncompile.passes.decisions import Reason, Site
from lncompile.report import FoldReport
from lncompile.signature import CallError
from lncompile.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "ABTest",
    "CallError",
    "FoldReport",
    "FoldedModule",
    "GeneratedCode",
    "OptionError",
    "Options",
    "Reason",
    "Site",
    "Verification",
    "__version__",
    "allow_in_accelerate",
    "explain",
    "fold",
    "generated_code",
    "refresh",
    "reports",
    "verify",
]
