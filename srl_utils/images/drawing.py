"""Draw endless series of images of kinds that photographs lack: rendered text, line drawings and textures.

Image number `index` of a series is a function of (seed, index): the same on every machine with the same Pillow.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SUPERSAMPLING = 4  # lines are drawn this much larger, then averaged: anti-aliased edges
TEXT, LINES, TEXTURE = 1, 2, 3  # third words of seeds, so that the kinds do not share random numbers
SAMPLE = (
    "light water under several stone paper morning table river often number figure between small garden winter "
    "letter eleven window silver north answer quickly yellow 1873 2504 0.75 road island measure simple, again. "
    "of the and to in is a not"
)
Colour = tuple[int, int, int]


def draw_text(seed: int, index: int, *, size: int) -> Image.Image:
    """Draw lines of English words in Pillow's own font: RGB, `size` x `size` pixels, dark on light or light on dark."""
    rng = np.random.default_rng((seed, index, TEXT))
    paper, ink = _paper_and_ink(rng)
    image = Image.new("RGB", (size, size), paper)
    height = max(round(size * rng.uniform(0.09, 0.2)), 6)  # smaller letters have no shape
    font = ImageFont.load_default(height)
    margin = round(size * 0.04)
    draw = ImageDraw.Draw(image)
    for top in range(margin, size, round(1.25 * height)):
        draw.text((margin, top), " ".join(rng.choice(SAMPLE.split(), size=16)), fill=ink, font=font)
    return image


def draw_lines(seed: int, index: int, *, size: int) -> Image.Image:
    """Draw strokes, ellipses and polygons in outline: RGB, `size` x `size` pixels, dark on light or light on dark."""
    rng = np.random.default_rng((seed, index, LINES))
    paper, ink = _paper_and_ink(rng)
    side = SUPERSAMPLING * size
    image = Image.new("RGB", (side, side), paper)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 10)):
        width = max(round(side * rng.uniform(0.006, 0.02)), SUPERSAMPLING)
        draw.line(_outline(rng, side), fill=ink, width=width, joint="curve")
    return image.resize((size, size), Image.Resampling.BOX)


def draw_texture(seed: int, index: int, *, size: int) -> Image.Image:
    """Draw filtered noise in two colours: RGB, `size` x `size` pixels.

    The amplitude falls with a random power of the frequency, from 0.5 to 2, which is 1 for photographs. It is stretched in
    a random direction, so that some textures look like grain and others like clouds or fibres.
    """
    rng = np.random.default_rng((seed, index, TEXTURE))
    noise = rng.standard_normal((size, size))
    angle, stretch, power = rng.uniform(0, np.pi), rng.uniform(1, 6), rng.uniform(0.5, 2)
    down, across = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
    along, beside = np.cos(angle) * across + np.sin(angle) * down, np.cos(angle) * down - np.sin(angle) * across
    frequency = np.hypot(stretch * along, beside)
    frequency[0, 0] = np.inf  # a texture of mean 0
    field = np.fft.ifft2(np.fft.fft2(noise) * frequency**-power).real
    blend = 1 / (1 + np.exp(-2 * field / field.std()))[..., None]
    first, second = rng.uniform(0, 255, size=(2, 3))
    return Image.fromarray(np.rint(blend * first + (1 - blend) * second).astype(np.uint8))


def _paper_and_ink(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """Return a light and a dark colour, in random order."""
    light, dark = (_colour(rng, low, high) for low, high in ((190, 256), (0, 90)))
    return (light, dark) if rng.random() < 0.7 else (dark, light)


def _colour(rng: np.random.Generator, low: int, high: int) -> Colour:
    red, green, blue = rng.integers(low, high, size=3).tolist()
    return red, green, blue


def _outline(rng: np.random.Generator, side: int) -> list[tuple[float, float]]:
    """Return the points of a smooth stroke, an ellipse or a closed polygon in a square of `side` pixels."""
    kind = rng.integers(3)
    centre, radii = rng.uniform(0.15, 0.85, size=2), rng.uniform(0.08, 0.4, size=2)
    if kind == 0:  # a quadratic Bezier curve
        time = np.linspace(0, 1, 40)[:, None]
        start, bend, end = rng.uniform(0, 1, size=(3, 2))
        points = (1 - time) ** 2 * start + 2 * time * (1 - time) * bend + time**2 * end
    else:
        corners = 60 if kind == 1 else int(rng.integers(3, 7))
        angles = np.linspace(0, 2 * np.pi, corners + 1) + rng.uniform(0, 2 * np.pi)
        points = centre + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return [(float(x), float(y)) for x, y in side * points]
