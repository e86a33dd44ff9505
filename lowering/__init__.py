"""What a folded LayerNorm becomes, how the graph is handed to Inductor, and what Inductor made of it."""

from lncompile.lowering import torch_private, torch_private_breaks, torch_private_dynamo, torch_private_inductor
from lncompile.lowering.device_words import compare_words, record_words
from lncompile.lowering.emit import emit
from lncompile.lowering.host_words import HostWords, Look, can_compare
from lncompile.lowering.matrix_vector import (
    blocks_of_weight,
    is_faster_as_sum,
    matrix_vector,
    normed_matrix_vector,
    transposed_copy,
)
from lncompile.lowering.norms import NormCall, lower_to_aten, lower_to_rms_norm
from lncompile.lowering.persistent import (
    FOLDED_STATISTIC,
    is_folded_statistic,
    leave_rows_to_inductor,
    persistent_norms,
)
from lncompile.lowering.realised import realised
from lncompile.lowering.rms_norm import (
    compute_dtype_of,
    grouped_rms_norm,
    rms_norm,
    row_scale,
    scale_rows,
    slices_of_row,
)
from lncompile.lowering.stored_scale import Spacing, StoredScale, scale_stored_apart, stored_scale_of
from lncompile.lowering.target import target_of
from lncompile.lowering.tensor_layout import places_of, tensor_layout

__all__ = [
    "FOLDED_STATISTIC",
    "HostWords",
    "Look",
    "NormCall",
    "Spacing",
    "StoredScale",
    "blocks_of_weight",
    "can_compare",
    "compare_words",
    "compute_dtype_of",
    "emit",
    "grouped_rms_norm",
    "is_faster_as_sum",
    "is_folded_statistic",
    "leave_rows_to_inductor",
    "lower_to_aten",
    "lower_to_rms_norm",
    "matrix_vector",
    "normed_matrix_vector",
    "persistent_norms",
    "places_of",
    "realised",
    "record_words",
    "rms_norm",
    "row_scale",
    "scale_rows",
    "scale_stored_apart",
    "slices_of_row",
    "stored_scale_of",
    "target_of",
    "tensor_layout",
    "torch_private",
    "torch_private_breaks",
    "torch_private_dynamo",
    "torch_private_inductor",
    "transposed_copy",
]
