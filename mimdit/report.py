"""Which experts restored a picture: figures for JSON, and a heat map to look at."""

import io
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Drawn at twice the size of a plain screen.
_FONT, _SMALL, _TITLE = 24, 20, 32
_CELL = 46
# Cells of few blocks fill this width.
_WIDE = 620
_MARGIN, _LABEL, _LEGEND = 40, 210, 190
_INK, _FAINT, _PAPER, _EMPTY = (31, 35, 40), (110, 118, 129), (255, 255, 255), (240, 242, 245)
# From little to much, equally spaced; dark enough at the low end to stand out from an empty cell.
_COLOURS = np.array(
    [(190, 220, 240), (120, 180, 225), (56, 130, 195), (18, 80, 155), (6, 38, 98)], np.float64
)


def expert_names(pipe: Any, routing: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Names of the expert groups, each different, and the number of sub-experts in one.

    pipe: a pipeline; one without a transformer (an exported one) may not know its groups' names.
    """
    mim = getattr(getattr(pipe, "transformer", None), "mim", None)
    inter, index = np.asarray(routing["inter"]), np.asarray(routing["index"])
    kinds = mim.groups if mim is not None else ["group"] * inter.shape[-1]
    experts = mim.experts if mim is not None else int(index.max()) + 1
    names = [
        f"{kind} {list(kinds[: i + 1]).count(kind)}" if list(kinds).count(kind) > 1 else kind
        for i, kind in enumerate(kinds)
    ]
    return tuple(names), experts


def weights(routing: Mapping[str, Any], experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Inter weights [L,G] and the weights of all sub-experts [L,G,E], NaN where not chosen.

    A sub-expert counts with its group's weight times its own in the group (Eq. 3 and 4 of
    arXiv 2603.02710). routing: `Routing.as_dict()` of B pictures, or tiles of one, which are
    averaged.
    """
    inter = np.asarray(routing["inter"], np.float64)  # [L,B,G]
    intra, index = np.asarray(routing["intra"], np.float64), np.asarray(routing["index"])
    one_hot = index[..., None] == np.arange(experts)  # [L,B,G,k,E]
    shares = (inter[..., None, None] * intra[..., None] * one_hot).sum(-2).mean(1)
    return inter.mean(1), np.where(one_hot.any((1, 3)), shares, np.nan)


def summary(routing: Mapping[str, Any], groups: Sequence[str], experts: int) -> dict[str, Any]:
    """The figures that people look for first, of all blocks together.

    groups: their names, in the order of `routing`. experts: sub-experts a group. Of the result,
    inter_mean is the mean weight of each group, and picks says how many blocks chose each
    sub-expert, of a group in order.
    """
    inter, shares = weights(routing, experts)
    picks = (~np.isnan(shares)).sum(0)
    return {
        "groups": list(groups),
        "sub_experts": experts,
        "inter_mean": dict(zip(groups, np.round(inter.mean(0), 4).tolist(), strict=True)),
        "picks": dict(zip(groups, picks.tolist(), strict=True)),
    }


def heat_map(
    routing: Mapping[str, Any], groups: Sequence[str], experts: int, title: str
) -> Image.Image:
    """A chart: blocks across, and down first the groups, then the sub-experts of each group.

    Coloured cells are weights, those of the groups sum to one in a block; empty cells are
    sub-experts that were not chosen. Numbers start at 0, as in `routing`. The arguments are those
    of `summary`.
    """
    inter, shares = weights(routing, experts)
    layers = len(inter)
    cell = min(max(_CELL, _WIDE // layers), 3 * _CELL)
    wide = layers * cell
    width = _MARGIN + _LABEL + max(wide, _WIDE) + _LEGEND + _MARGIN
    line = _CELL
    top = _MARGIN + 150
    gap = 22
    height = top + len(groups) * line + 110 + len(groups) * (experts * line + gap) + 70
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    left = _MARGIN + _LABEL
    draw.text((_MARGIN, _MARGIN), "Which experts restored", _INK, _font(_TITLE))
    draw.text((_MARGIN, _MARGIN + 44), _fitting(title, width - 2 * _MARGIN), _FAINT, _font(_FONT))

    draw.text((_MARGIN, top - 44), "How much each group counts", _INK, _font(_FONT))
    for g, name in enumerate(groups):
        y = top + g * line
        _text(draw, (_MARGIN, y + line // 2), name, "lm")
        _row(draw, (left, y), inter[:, g], cell, line, inter.max())
    _scale(draw, (left + max(wide, _WIDE) + 40, top), len(groups) * line, inter.max())

    top += len(groups) * line + 110
    draw.text((_MARGIN, top - 44), "Sub-experts that were chosen", _INK, _font(_FONT))
    most = float(np.nanmax(shares))
    first = top
    for g, name in enumerate(groups):
        _text(draw, (_MARGIN, top + experts * line // 2), name, "lm")
        for e in range(experts):
            y = top + e * line
            _text(draw, (left - 16, y + line // 2), str(e), "rm", _FAINT, _SMALL)
            _row(draw, (left, y), shares[:, g, e], cell, line, most)
        top += experts * line + gap
    x, y = left + max(wide, _WIDE) + 40, first + min(4, experts) * line
    _scale(draw, (x, first), y - first, most)
    draw.rounded_rectangle((x, y + 20, x + 26, y + 46), 5, _EMPTY)
    _text(draw, (x + 38, y + 33), "not chosen", "lm", _FAINT, _SMALL)
    every = 1 if layers <= 30 else 5
    for i in range(0, layers, every):
        _text(draw, (left + i * cell + cell // 2, top + 6), str(i), "mm", _FAINT, _SMALL)
    _text(draw, (left + wide // 2, top + 40), "block", "mm", _FAINT, _FONT)
    return sheet


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _row(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    values: np.ndarray,
    cell: int,
    line: int,
    most: float,
) -> None:
    """Cells of one row, with their values where these fit."""
    x, y = corner
    for value in values:
        empty = bool(np.isnan(value))
        colour = _EMPTY if empty else _colour(value / max(most, 1e-9))
        draw.rounded_rectangle((x + 1, y + 1, x + cell - 2, y + line - 2), 5, colour)
        if not empty:
            ink = _PAPER if sum(colour) < 420 else _INK
            # Two digits without the leading zero fit the smallest cell.
            text = f"{value:.2f}"
            text = text.lstrip("0") if cell < 60 else text
            _text(draw, (x + cell // 2, y + line // 2), text, "mm", ink, _SMALL - 2)
        x += cell


def _scale(draw: ImageDraw.ImageDraw, corner: tuple[int, int], height: int, most: float) -> None:
    """The legend: colours from nothing to the largest weight."""
    x, y = corner
    bar = max(height - 2, 60)
    for i in range(bar):
        draw.line((x, y + i, x + 26, y + i), _colour(1 - i / (bar - 1)))
    _text(draw, (x + 38, y + 8), f"{most:.2f}", "lm", _FAINT, _SMALL)
    _text(draw, (x + 38, y + bar - 8), "0", "lm", _FAINT, _SMALL)
    _text(draw, (x + 38, y + bar // 2), "weight", "lm", _INK, _SMALL)


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    anchor: str,
    colour: tuple[int, ...] = _INK,
    size: int = _FONT,
) -> None:
    draw.text(place, text, colour, _font(size), anchor=anchor)


@cache
def _font(size: int) -> Any:
    """Pillow's own font, so that every machine draws the same."""
    return ImageFont.load_default(size=size)


def _fitting(text: str, width: int) -> str:
    """The text in letters that the font has, shortened in the middle to a width in pixels."""
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    plain = "".join(c if " " <= c <= "~" else "?" for c in plain)
    font, kept = _font(_FONT), plain
    while font.getlength(kept) > width and len(plain) > 8:
        middle = len(plain) // 2
        plain = plain[: middle - 1] + plain[middle:]
        kept = plain[: len(plain) // 2] + "..." + plain[len(plain) // 2 :]
    return kept


def _colour(share: float) -> tuple[int, int, int]:
    """The colour of a value from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(_COLOURS) - 1)
    low = min(int(place), len(_COLOURS) - 2)
    mixed = _COLOURS[low] + (place - low) * (_COLOURS[low + 1] - _COLOURS[low])
    red, green, blue = (round(c) for c in mixed)
    return red, green, blue
