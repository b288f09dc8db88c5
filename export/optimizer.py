"""What torch's exporter does to a graph after translating it, for graphs of any size.

`onnxscript.optimizer.optimize_ir` with its default rules takes time in the square of the nodes: its
rule of two slices that make a split is tried on every pair of a node and the graph. Without it a
conditioner of 1740 nodes had 1742.
"""

from collections.abc import Sequence
from typing import Any

from export.libraries import library

# Rounds of folding and rewriting, as by default.
_ROUNDS = 2
# The default rules that apply to what models are made of, but for the split of slices, and for
# adding zero, which takes 1e-30 for zero, too.
_RULES = (
    "sub_0_rule",
    "div_by_1_rule",
    "two_reshapes_matmul_reshape_rule",
    "one_reshape_matmul_reshape_rule",
    "cast_constant_of_shape_rule",
    "cast_constant_of_shape_without_value_rule",
    "collapse_slice_rule",
    "collapse_slice2_rule",
    "materialize_reshape_shape_rule",
    "min_min_rule",
    "max_max_rule",
    "min_max_rule",
    "max_min_rule",
    "cast_cast_rule",
    "no_op_cast_rule",
    "no_op_expand_rule",
    "flatten_to_reshape_rule",
    "reshape_reshape_rule",
    "no_op_transpose_rule",
    "transpose_transpose_rule",
    "unsqueeze_unsqueeze_rule",
    "squeeze_reshape_1d_rule",
    "no_op_dynamic_scatter_nd_rule",
    "no_op_static_scatter_nd_rule",
    "normalize_pad_format_conv_rule",
    "fuse_pad_into_conv_rule",
    "remove_optional_bias_from_conv_rule",
    "remove_optional_bias_from_gemm_rule",
)


def optimize(model: Any, outputs: Sequence[str]) -> None:
    """Fold, rewrite and merge nodes of an `onnx_ir.Model` in place; `outputs` names its outputs.

    Weights stay whole and under their own names: they can then be compared with the checkpoint one
    by one, and exchanged for others.
    """
    optimizer, rewriter = library("onnxscript.optimizer"), library("onnxscript.rewriter")
    known, passes = library("onnxscript.rewriter.rules.common"), library("onnx_ir.passes.common")
    chosen = [*known.mul_by_1_rule.commute(), *(getattr(known, name) for name in _RULES)]
    rules = rewriter.RewritePass(chosen)

    def should_fold(node: Any) -> bool | None:
        weights = (v is not None and v.is_initializer() and is_weight(v.name) for v in node.inputs)
        return False if any(weights) else None

    passes.InlinePass()(model)
    for _ in range(_ROUNDS):
        optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=should_fold)
        rules(model)
        passes.RemoveUnusedNodesPass()(model)
        passes.RemoveUnusedFunctionsPass()(model)
        passes.RemoveUnusedOpsetsPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)
    library("onnxscript.rewriter.onnx_fusions").fuse(model)
    # Outputs that are equal have been merged, and parted again under other names.
    for i, value in enumerate(model.graph.outputs):
        value.name = f"result_{i}"
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name


def is_weight(name: str) -> bool:
    """Whether an initializer is a tensor of the model, and no constant of the graph."""
    return name.startswith(("model.", "codec."))
