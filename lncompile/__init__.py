"""lncompile: ``torch.compile(model, backend="lnfold")`` folds LayerNorms' mean-centering into upstream weights.

Importing it imports nothing else, not even torch: each public name is imported from its module when it is first asked
for. torch finds the backend by its entry point, with or without this import.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lncompile.nn as nn  # noqa: F401 - a public module, found in the package
    from lncompile.abtest import ABTest
    from lncompile.explanation import explain, refresh, reports
    from lncompile.integrations import allow_in_accelerate
    from lncompile.lowering.inspect.generated_code import GeneratedCode, generated_code
    from lncompile.options import OptionError, Options
    from lncompile.passes.decisions import Reason, Verdict
    from lncompile.plans.capture import Call
    from lncompile.plans.entries import PlanError
    from lncompile.plans.fold_plan import FoldPlan
    from lncompile.plans.loading import load_folded
    from lncompile.plans.planning import fold, plan
    from lncompile.reporting.report import FoldReport
    from lncompile.verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "ABTest",
    "Call",
    "FoldPlan",
    "FoldReport",
    "GeneratedCode",
    "OptionError",
    "Options",
    "PlanError",
    "Reason",
    "Verdict",
    "Verification",
    "__version__",
    "allow_in_accelerate",
    "explain",
    "fold",
    "generated_code",
    "load_folded",
    "plan",
    "refresh",
    "reports",
    "verify",
]

# The import statements above, for the interpreter: which module each name is in. No module of the package may be called
# as one of these names, or importing it would put the module in the name's place.
_MODULES = {
    "abtest": ("ABTest",),
    "explanation": ("explain", "refresh", "reports"),
    "integrations": ("allow_in_accelerate",),
    "lowering.inspect.generated_code": ("GeneratedCode", "generated_code"),
    "options": ("OptionError", "Options"),
    "passes.decisions": ("Reason", "Verdict"),
    "plans.capture": ("Call",),
    "plans.fold_plan": ("FoldPlan",),
    "plans.loading": ("load_folded",),
    "plans.planning": ("fold", "plan"),
    "plans.entries": ("PlanError",),
    "reporting.report": ("FoldReport",),
    "verification": ("Verification", "verify"),
}

if not TYPE_CHECKING:  # a type checker that sees `__getattr__` takes every misspelt name for one of ours

    def __getattr__(name: str) -> object:
        """Import what a public name stands for, once (PEP 562), or the public module ``lncompile.nn``."""
        import importlib

        if name == "nn":
            return importlib.import_module(f"{__name__}.nn")
        for module, names in _MODULES.items():
            if name in names:
                value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")

    def __dir__() -> list[str]:
        """Public names, whether or not they were asked for yet."""
        return sorted({*globals(), *__all__, "nn"})
