"""The pipeline, a pass a line: this list is the theory, in the order in which it is carried out.

What decides touches no weight and changes nothing that was captured (it works on a copy); what rewrites decides
nothing. The deciding passes run again, with fewer operators written out, until those that are written out are those in
which something folds (:func:`lncompile.analysis.analyse`). That every pass reads only what passes before it have made
is checked as they run (:mod:`.interface`). Which can be switched off, and what that leaves out, stands in
:mod:`lncompile.passes.switches`.
"""

from __future__ import annotations

from typing import Any

from lncompile.passes.pipeline.context import Known, Rewriting
from lncompile.passes.pipeline.deciding import (
    absorptions,
    chains,
    deferrals,
    expand,
    facts,
    gather,
    gradients,
    obstacles,
    one_row,
    place,
    regions,
    sites,
    streams,
    verdicts,
    writes,
)
from lncompile.passes.pipeline.interface import Pass
from lncompile.passes.pipeline.rewriting import (
    absorb,
    center,
    defer,
    eager,
    handwritten,
    hoist,
    lower,
    matrix_vector,
    transpose,
)

DECIDE: tuple[Pass[Known], ...] = (
    regions,  #        write out the calls of compiled regions
    expand,  #         write out opaque encoder layers
    gather,  #         norms that were folded before, each as one operation
    writes,  #         what is written to in place
    gradients,  #      whether gradients are wanted
    facts,  #          whose values are parameters
    chains,  #         norms written by hand
    sites,  #          the LayerNorms
    streams,  #        what could be computed centered, what that needs, who would notice
    place,  #          the minimum cut: what is centered where
    one_row,  #        products of one row that become sums
    deferrals,  #      norms whose scale goes behind products
    absorptions,  #    norms whose γ and β go into products
    obstacles,  #      what has to go so that the others fold
    verdicts,  #       a reason for every site
)
REWRITE: tuple[Pass[Rewriting], ...] = (
    center,  #         CW in the place of W, Cx in the place of x
    handwritten,  #    x - mean(x) is x
    absorb,  #         W diag(γ), b + Wβ
    transpose,  #      weights of sums, row by row
    hoist,  #          parameter expressions become extra inputs
    defer,  #          s ⊙ (x W) in the place of (s ⊙ x) W
    matrix_vector,  #  Σₖ W[n, k] x[k]
    lower,  #          RMSNorm in the place of LayerNorm
    eager,  #          ATen's LayerNorm where nothing folds, if asked
)
PIPELINE: tuple[Pass[Any], ...] = (*DECIDE, *REWRITE)
