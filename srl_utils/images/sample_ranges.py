"""Turn the numbers in an image file into values in [0,1]: decide which number is white."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

OVERSHOOT = 0.25  # share of the range by which resampling may exceed black and white
NOISE = 1 / 255  # share of white by which noise may be below black
DIMMEST_BYTES = 16  # values of 8 bits have at least this maximum
DIMMEST_SHARE = 1 / 4  # values of more bits have at least this maximum, as a share of white
DARKEST_MEDIAN = 1 / 64  # least median of values above black, as a share of white; darker fractions have no known white

BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE, SAMPLE_FORMAT, S_MAX_SAMPLE = 258, 262, 281, 339, 341  # tags of TIFF
WHITE_IS_ZERO = 0
SIGNED, FLOAT = 2, 3


class AmbiguousRange(ValueError):
    """Values whose white is unknown; the message is a short reason."""


class Declared(NamedTuple):
    """What a file says of its samples."""

    bits: int | None = None
    kind: int = 1  # TIFF's SampleFormat
    highest: float | None = None
    inverted: bool = False

    @classmethod
    def of_tiff(cls, tags: Mapping[int, object]) -> Declared:
        """Return what the tags of a page say; of several samples the first counts."""
        bits, kind = _number(tags.get(BITS_PER_SAMPLE)), _number(tags.get(SAMPLE_FORMAT))
        highest = _number(tags.get(S_MAX_SAMPLE, tags.get(MAX_SAMPLE)))
        inverted = _number(tags.get(PHOTOMETRIC)) == WHITE_IS_ZERO
        return cls(None if bits is None else int(bits), int(kind or 1), highest, inverted)

    def white(self, values: np.ndarray) -> float:
        """Return the number that is white.

        The declared highest value counts only if it is the largest number of some number of bits and no value is above
        it: some software writes the brightest value of the image there.

        Raises:
            AmbiguousRange: if neither the file nor the values tell.
        """
        highest = self.highest
        if highest and _is_full_scale(highest) and values.max() <= highest * (1 + OVERSHOOT):
            return highest
        if self.bits is None or self.bits > 16 or self.kind == FLOAT or (self.kind == SIGNED and self.bits > 8):
            return _guessed_white(values)
        return float(2 ** (self.bits - (self.kind == SIGNED)) - 1)


def unit_values(values: np.ndarray, declared: Declared) -> np.ndarray:
    """Return `values` of any shape and number type as float32 in [0,1], 1 white.

    Raises:
        AmbiguousRange: if the values are not finite or far below 0, or if white is unknown.
    """
    if values.dtype.kind not in "buif":
        raise AmbiguousRange(f"holds {values.dtype} values")
    if not np.isfinite(values).all():
        raise AmbiguousRange("contains NaN or infinite values")
    white, low, high = declared.white(values), float(values.min()), float(values.max())
    if low < -max(OVERSHOOT * high, NOISE * white):
        raise AmbiguousRange(f"has values down to {low:.6g}; convert it to values from 0 to 1")
    unit = np.clip(values.astype(np.float32 if white < 2**20 else np.float64) / white, 0, 1).astype(np.float32)
    return 1 - unit if declared.inverted else unit


def _guessed_white(values: np.ndarray) -> float:
    """Guess the white of fractions and of signed or long integers, for which most files state none."""
    high = float(values.max())
    if high <= 1 + OVERSHOOT:
        return 1.0
    median = float(np.median(values[values > 0]))
    whole = values.dtype.kind in "bui" or bool((values == np.round(values)).all())
    sixteen_bits = 2.0**15 - 1 if values.dtype == np.int16 else 2.0**16 - 1
    for white, dimmest in ((255.0, DIMMEST_BYTES), (sixteen_bits, DIMMEST_SHARE * sixteen_bits)):
        if dimmest <= high <= white * (1 + OVERSHOOT) and (whole or median >= DARKEST_MEDIAN * white):
            return white
    if values.dtype.kind in "ui" and high >= DIMMEST_SHARE * np.iinfo(values.dtype).max:
        return float(np.iinfo(values.dtype).max)
    raise AmbiguousRange(f"has values up to {high:.6g}, whose white is unknown; convert it to values from 0 to 1")


def _is_full_scale(highest: float) -> bool:
    """Return whether `highest` is 1 or the largest number of 8 to 32 bits."""
    return highest == 1 or any(highest == 2**bits - 1 for bits in range(8, 33))


def _number(value: object) -> float | None:
    """Return the first number of a tag's value; None without one."""
    first: Any = value[0] if isinstance(value, (tuple, list)) and value else value
    try:
        return float(first)
    except (TypeError, ValueError):
        return None
