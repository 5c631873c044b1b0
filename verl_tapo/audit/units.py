"""Shares, lifts and sizes as people read them. The report's scripts do the same, in `page/text.js`."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal


def percent(share: float | None) -> str:
    """A share in [0, 1] in whole percent: ``8 %``, ``67 %``; a dash where there is none.

    Below 1 % and above 99 % there is one decimal, so that what is not 0 or 1 never looks like it.
    """
    if share is None:
        return "–"
    value = 100 * share
    text = _rounded(value, 1 if 0 < value < 1 or 99 < value < 100 else 0)
    if text == "0" and share > 0:
        text = "<0.1"
    if text == "100" and share < 1:
        text = ">99.9"
    return f"{text} %"


def points(lift: float | None) -> str:
    """A difference of two shares in percentage points, with its sign: ``+16 points``; one decimal below 1."""
    if lift is None:
        return "–"
    value = abs(100 * lift)
    text = _rounded(value, 1 if value < 1 else 0)
    sign = "" if text == "0" else "+" if lift > 0 else "−"
    return f"{sign}{text} {'point' if text == '1' else 'points'}"


def file_size(size: int) -> str:
    """Bytes as ``826 kB`` or ``1.2 MB``."""
    return f"{-(-size // 1000)} kB" if size < 1_000_000 else f"{size / 1e6:.1f} MB"


def _rounded(value: float, digits: int) -> str:
    """Rounds halves up, as JavaScript's toFixed does. A last decimal of 0 is left out."""
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)).removesuffix(".0")
