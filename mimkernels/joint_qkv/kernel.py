"""Every stream's rows go straight to their places: no concatenation is copied."""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.launch import accumulator, launch

# Elements of a block, and programs that fill a GPU without too many partial sums.
_BLOCK, _PROGRAMS = 2048, 2048


@triton.jit
def write_rows(
    p_x, p_out, weight, mask, o_d, width, eps, NORM: tl.constexpr, ACCUMULATOR: tl.constexpr
):
    """Rows of one head, [ROWS, WIDTH], from p_x to p_out, RMS-normalised if NORM."""
    b_x = tl.load(p_x, mask=mask, other=0.0)
    if NORM:
        b_x = b_x.to(ACCUMULATOR)
        b_w = tl.load(weight + o_d, mask=o_d < width, other=0.0).to(ACCUMULATOR)  # [WIDTH]
        rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / width + eps)
        b_x = b_x * rstd[:, None] * b_w[None, :]
    tl.store(p_out, b_x.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    q, k, v,
    qkv0, q_weight0, k_weight0, tokens0, q_offset0, offset0, stride_b0, stride_t0,
    qkv1, q_weight1, k_weight1, tokens1, q_offset1, offset1, stride_b1, stride_t1,
    tiles0, heads, width,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    eps,
    QUERIES: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Two streams, to rows of q, k and v from their offsets on.

    Grid (token tiles of the first stream, then those of the second; heads; B).
    """
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    second = tl.program_id(0) >= tiles0
    i_tile = tl.program_id(0) - tl.where(second, tiles0, 0)
    qkv = tl.where(second, qkv1, qkv0)
    i_t = (i_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_d = tl.arange(0, WIDTH)
    mask = (i_t < tl.where(second, tokens1, tokens0)) & (o_d < width)[None, :]
    p_x = qkv + i_b * tl.where(second, stride_b1, stride_b0) + i_h * width + o_d[None, :]
    p_x += i_t * tl.where(second, stride_t1, stride_t0)  # [ROWS, WIDTH]
    if QUERIES:
        i_q = i_t + tl.where(second, q_offset1, q_offset0)
        p_q = q + i_b * stride_qb + i_h * stride_qh + i_q * stride_qt + o_d[None, :]
        weight = tl.where(second, q_weight1, q_weight0)
        write_rows(p_x, p_q, weight, mask, o_d, width, eps, NORM_Q, ACCUMULATOR)
        p_x += heads * width
    i_k = i_t + tl.where(second, offset1, offset0)
    p_k = k + i_b * stride_kb + i_h * stride_kh + i_k * stride_kt + o_d[None, :]
    weight = tl.where(second, k_weight1, k_weight0)
    write_rows(p_x, p_k, weight, mask, o_d, width, eps, NORM_K, ACCUMULATOR)
    p_v = v + i_b * stride_vb + i_h * stride_vh + i_k * stride_vt + o_d[None, :]
    p_x += heads * width
    write_rows(p_x, p_v, weight, mask, o_d, width, eps, False, ACCUMULATOR)


@triton.jit
def read_rows(
    p_g,
    p_x,
    p_dx,
    weight,
    acc,
    mask,
    o_d,
    width,
    eps,
    NORM: tl.constexpr,
    SUMS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """The gradient of `write_rows`, p_g to p_dx; adds the weight's to acc [ROWS, WIDTH]."""
    b_g = tl.load(p_g, mask=mask, other=0.0)
    if NORM:
        b_g = b_g.to(ACCUMULATOR)
        b_x = tl.load(p_x, mask=mask, other=0.0).to(ACCUMULATOR)
        b_w = tl.load(weight + o_d, mask=o_d < width, other=0.0).to(ACCUMULATOR)
        rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / width + eps)[:, None]
        b_norm = b_x * rstd
        if SUMS:
            acc += b_g * b_norm
        b_g = b_g * b_w[None, :]
        along = tl.sum(b_g * b_norm, axis=1) / width
        b_g = rstd * (b_g - b_norm * along[:, None])
    tl.store(p_dx, b_g.to(p_dx.dtype.element_ty), mask=mask)
    return acc


@triton.jit
def backward_kernel(
    dq, dk, dv,
    qkv, q_weight, k_weight, dqkv, parts,
    tokens, q_offset, offset, stride_b, stride_t,
    heads, width, share,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    eps,
    QUERIES: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Gradients of `share` tokens, a multiple of ROWS, of one stream and head.

    Grid (shares, heads, B); dqkv [B,T,3·h·d] or [B,T,2·h·d] dense; parts [2, B·h·shares, d]: sums
    for the weights of q and k.
    """
    i_p, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_d = tl.arange(0, WIDTH)
    m_d = o_d < width
    dq += i_b * stride_qb + i_h * stride_qh
    dk += i_b * stride_kb + i_h * stride_kh
    dv += i_b * stride_vb + i_h * stride_vh
    columns = (3 if QUERIES else 2) * heads * width
    acc_q = tl.zeros([ROWS, WIDTH], dtype=ACCUMULATOR)
    acc_k = tl.zeros([ROWS, WIDTH], dtype=ACCUMULATOR)
    for start in range(0, share, ROWS):
        i_t = (i_p * share + start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (i_t < tokens) & m_d[None, :]
        o_x = i_h * width + o_d[None, :]
        p_x = qkv + i_b * stride_b + i_t * stride_t + o_x
        p_dx = dqkv + (i_b * tokens + i_t) * columns + o_x
        if QUERIES:
            p_g = dq + (q_offset + i_t) * stride_qt + o_d[None, :]
            acc_q = read_rows(
                p_g, p_x, p_dx, q_weight, acc_q, mask, o_d, width, eps, NORM_Q, SUMS, ACCUMULATOR
            )
            p_x += heads * width
            p_dx += heads * width
        p_g = dk + (offset + i_t) * stride_kt + o_d[None, :]
        acc_k = read_rows(
            p_g, p_x, p_dx, k_weight, acc_k, mask, o_d, width, eps, NORM_K, SUMS, ACCUMULATOR
        )
        p_g = dv + (offset + i_t) * stride_vt + o_d[None, :]
        p_dx += heads * width
        read_rows(p_g, p_x, p_dx, k_weight, acc_k, mask, o_d, width, eps, False, False, ACCUMULATOR)
    if SUMS:
        row = (i_b * heads + i_h) * tl.num_programs(0) + i_p
        rows = (tl.num_programs(0) * heads).to(tl.int64) * tl.num_programs(2)
        tl.store(parts + row * width + o_d, tl.sum(acc_q, axis=0), mask=m_d)
        tl.store(parts + (rows + row) * width + o_d, tl.sum(acc_k, axis=0), mask=m_d)


def write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qkvs: Sequence[Tensor],
    q_norm_weights: Sequence[Tensor | None],
    k_norm_weights: Sequence[Tensor | None],
    q_offsets: Sequence[int],
    offsets: Sequence[int],
    eps: float,
) -> None:
    """Streams [B,T,3·h·d] or [B,T,2·h·d] to q, k, v [B,h,…,d], from their offsets on."""
    pictures, heads, _, width = k.shape
    options = _options(k)
    # Streams that run the same code share a launch, two by two.
    alike: dict[tuple[Any, ...], list[list[Any]]] = {}
    streams = zip(qkvs, q_norm_weights, k_norm_weights, q_offsets, offsets, strict=True)
    for qkv, q_weight, k_weight, q_offset, offset in streams:
        if qkv.numel() == 0:
            continue
        types = (None if w is None else w.dtype for w in (q_weight, k_weight))
        weights = (qkv if w is None else w for w in (q_weight, k_weight))
        stream = [qkv, *weights, qkv.shape[1], q_offset, offset, *qkv.stride()[:2]]
        alike.setdefault((_queries(qkv, k), *types), []).append(stream)
    for (queries, q_type, k_type), some in alike.items():
        for i in range(0, len(some), 2):
            pair = some[i : i + 2]
            tiles = [triton.cdiv(stream[3], options["ROWS"]) for stream in pair]
            launch(
                forward_kernel,
                (sum(tiles), heads, pictures),
                q,
                k,
                v,
                *pair[0],
                *pair[-1],
                tiles[0],
                heads,
                width,
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                eps,
                QUERIES=queries,
                NORM_Q=q_type is not None,
                NORM_K=k_type is not None,
                **options,
            )


def forward(
    qkvs: Sequence[Tensor],
    q_norm_weights: Sequence[Tensor | None],
    k_norm_weights: Sequence[Tensor | None],
    heads: int,
    width: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B,h,ΣT_i,d] of streams as in `write`, dense."""
    x = qkvs[0]
    k = x.new_empty(x.shape[0], heads, sum(qkv.shape[1] for qkv in qkvs), width)
    q_offsets, offsets = _places(qkvs, k)
    q = x.new_empty(x.shape[0], heads, q_offsets.pop(), width)
    v = x.new_empty(k.shape)
    write(q, k, v, qkvs, q_norm_weights, k_norm_weights, q_offsets, offsets[:-1], eps)
    return q, k, v


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkvs: Sequence[Tensor],
    q_norm_weights: Sequence[Tensor | None],
    k_norm_weights: Sequence[Tensor | None],
    eps: float,
    with_weights: bool,
) -> tuple[list[Tensor], Tensor]:
    """dqkv of each of N streams and, if wanted, their weights' gradients [N,2,d], q then k."""
    pictures, heads, _, width = dk.shape
    options = _options(dk)
    if dk.element_size() >= 4:
        # Twice the registers for each operand beside two sums: whole blocks spill on sm_86.
        options["ROWS"] = max(1, options["ROWS"] // 2)
    wide = torch.promote_types(dk.dtype, torch.float32)
    grads, sums = [qkv.new_empty(qkv.shape) for qkv in qkvs], []
    places = zip(*_places(qkvs, dk), strict=True)
    # The last places are no stream's, but the numbers of rows.
    streams = zip(qkvs, grads, q_norm_weights, k_norm_weights, places, strict=False)
    for qkv, dqkv, q_weight, k_weight, (q_offset, offset) in streams:
        tiles = triton.cdiv(qkv.shape[1], options["ROWS"])
        tiles_each = triton.cdiv(tiles, max(1, _PROGRAMS // max(1, pictures * heads)))
        shares = triton.cdiv(tiles, max(1, tiles_each))
        rows = pictures * heads * shares if with_weights else 0
        parts = dk.new_empty(2, rows, width, dtype=wide)
        if qkv.numel():
            launch(
                backward_kernel,
                (shares, heads, pictures),
                dq,
                dk,
                dv,
                qkv,
                q_weight if q_weight is not None else qkv,
                k_weight if k_weight is not None else qkv,
                dqkv,
                parts,
                qkv.shape[1],
                q_offset,
                offset,
                *qkv.stride()[:2],
                heads,
                width,
                tiles_each * options["ROWS"],
                *dq.stride()[:3],
                *dk.stride()[:3],
                *dv.stride()[:3],
                eps,
                QUERIES=_queries(qkv, dk),
                NORM_Q=q_weight is not None,
                NORM_K=k_weight is not None,
                SUMS=with_weights,
                **options,
            )
        sums.append(parts.sum(1))
    return grads, torch.stack(sums) if with_weights else dk.new_empty(0, 2, width, dtype=wide)


def _queries(qkv: Tensor, k: Tensor) -> bool:
    return qkv.shape[2] == 3 * k.shape[1] * k.shape[3]


def _places(qkvs: Sequence[Tensor], k: Tensor) -> tuple[list[int], list[int]]:
    """First row of each stream in q, and in k and v; last, the number of rows."""
    q_ends, ends = [0], [0]
    for qkv in qkvs:
        q_ends.append(q_ends[-1] + (qkv.shape[1] if _queries(qkv, k) else 0))
        ends.append(ends[-1] + qkv.shape[1])
    return q_ends, ends


def _options(k: Tensor) -> dict[str, Any]:
    width = triton.next_power_of_2(max(16, k.shape[3]))
    return {
        "ROWS": max(1, _BLOCK // width),
        "WIDTH": width,
        "ACCUMULATOR": accumulator(k.dtype),
        "num_warps": 4,
        "num_stages": 2,
    }


def typical_launches(dtype: torch.dtype) -> None:
    """Every kernel once, on tensors without data, at the sizes of one SD3.5-medium block.

    Image and text with their gradients; conditioning keys and values into resident buffers.
    """
    image = torch.empty(1, 4096, 4608, dtype=dtype, device="meta")
    qkvs, weights = [image, image[:, :333]], [image.new_empty(64)] * 2
    grads = forward(qkvs, weights, weights, 24, 64, 1e-6)
    backward(*grads, qkvs, weights, weights, 1e-6, with_weights=True)
    q, k, v = (image.new_empty(1, 24, tokens, 64) for tokens in (4429, 8525, 8525))
    write(q, k, v, [image[..., :3072]], [None], weights[:1], [4429], [4429], 1e-6)
