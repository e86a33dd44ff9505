"""vLLM's loader of checkpoints, with folding: a plan from the config, weights centered as they stream in, RMSNorms."""

# mypy: ignore-errors
from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

from torch import nn

from lncompile.engines import vllm_private as private
from lncompile.engines.architecture import Architecture, Unfit, example_media, first_line
from lncompile.engines.fitting import Fit, fit, require_folds
from lncompile.engines.norm_modules import obstacle_of, replacement
from lncompile.engines.probe import problem_with, put
from lncompile.engines.routes import find_routes
from lncompile.engines.vllm_private import DefaultModelLoader, logger
from lncompile.engines.weight_stream import CenteredWeights


class FoldingModelLoader(DefaultModelLoader):
    """Reads what vLLM's own loader reads, and folds what can be folded. What cannot runs as vLLM runs it."""

    _planned: Architecture | None = None
    _fit: Fit | None = None
    _exchanged: dict[str, tuple[nn.Module, nn.Module]]

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """Make the model and load it, folded where that holds on trial."""
        self._planned = self._architecture(vllm_config, model_config)
        if self._planned is None:
            return super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        digest = hashlib.sha256(json.dumps(self._planned.plan.to_dict(), sort_keys=True).encode()).hexdigest()
        with private.forgetting_layers(vllm_config) as forget:
            private.mark(vllm_config, digest)
            model = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            if self._fit is None:
                private.mark(vllm_config, None)
                return model
            problem = private.agreed(self._problem_with(model, vllm_config))
            if not problem:
                self._tell()
                return model
            logger.warning("lncompile: not folded, and loaded anew: on trial, %s", problem)
            private.mark(vllm_config, None)
            self._planned = self._fit = None
            del model
            forget()
        return super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Load the weights, centered where the whole plan fits."""
        self._fit = None if self._planned is None else self._fitted(self._planned, model, model_config)
        if self._fit is None:
            super().load_weights(model, model_config)
            return
        centered = CenteredWeights(self._fit.center)
        load = model.load_weights
        # On the model: weights that are sent to a running engine come this way as well.
        model.load_weights = lambda weights, *args, **kwargs: load(centered(weights), *args, **kwargs)
        super().load_weights(model, model_config)
        centered.require_all()
        norms = {path: model.get_submodule(path) for path in self._fit.norms}
        self._exchanged = {path: (norm, replacement(norm, private.make_norm)) for path, norm in norms.items()}
        put(model, {path: folded for path, (_, folded) in self._exchanged.items()})
        for path in self._fit.lookups:
            private.center_lookups(model.get_submodule(path))

    def _architecture(self, vllm_config: Any, model_config: Any) -> Architecture | None:
        try:
            obstacle = private.obstacle_of(vllm_config, model_config)
            if obstacle:
                raise Unfit(obstacle)
            architecture = Architecture.of(model_config.hf_config)
            require_folds(architecture.plan)
            return architecture
        except Exception as error:  # nothing was changed: the model runs as it is
            logger.info("lncompile: not folded: %s", _words(error))
            return None

    def _fitted(self, architecture: Architecture, model: nn.Module, model_config: Any) -> Fit | None:
        found: Fit | None = None
        problem = ""
        try:
            stored = private.stored_tensors(self, model_config, model)
            if not stored:
                raise Unfit("its checkpoint is not one of safetensors alone")
            routes = functools.partial(find_routes, model, model.load_weights, stored)
            found = fit(architecture, model, stored, routes, obstacle_of, private.is_lookup)
        except Exception as error:  # nothing was changed: the model is loaded as it is
            problem = _words(error)
        problem = private.agreed(problem)
        if problem:
            logger.info("lncompile: not folded: %s", problem)
        return None if problem else found

    def _problem_with(self, model: nn.Module, vllm_config: Any) -> str:
        try:
            media = example_media(vllm_config.model_config.hf_config)
            return problem_with(
                model,
                self._exchanged,
                (*self._fit.streams, *self._fit.lookups),
                lambda: private.call_on_trial(model, vllm_config, media),
            )
        except Exception as error:  # a model that cannot be called like this is not known to be right
            return f"it cannot be called: {type(error).__name__}: {error}"

    def _tell(self) -> None:
        found = self._fit
        logger.info("lncompile: %d of %d LayerNorms are RMSNorms now", len(found.norms), found.total)
        for name, reason in found.stays.items():
            logger.info("lncompile: '%s' stays a LayerNorm: %s", name, reason)


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, Unfit) else first_line(error)


def register() -> None:
    """Take the place of vLLM's own loader. Calling it again changes nothing."""
    for name in private.LOAD_FORMATS:
        if not private.is_loaded_by(name, FoldingModelLoader):
            private.register_model_loader(name)(FoldingModelLoader)
