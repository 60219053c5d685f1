"""Endless synthetic images drawn from a seed: captioned scenes, still or moving, and dead leaves.

`draw_scene` draws one or two objects on a background with a caption that describes them, and `draw_clip` lets them move.
`draw_dead_leaves` draws the
classical occlusion model of natural images: opaque leaves whose radii follow a power law, with the edges and the 1/f
spectrum of photographs (Lee, Mumford, Huang, "Occlusion Models for Natural Images", IJCV 2001; as training data for
networks that see photographs: Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "hexagon")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (244, 140, 30),
    "yellow": (250, 215, 60),
    "green": (50, 160, 70),
    "cyan": (60, 195, 205),
    "blue": (45, 85, 200),
    "purple": (130, 60, 170),
    "pink": (245, 140, 180),
    "brown": (125, 80, 45),
    "white": (245, 245, 240),
    "gray": (130, 130, 135),
    "black": (25, 25, 30),
}
SIZES = {"small": (0.15, 0.18), "large": (0.21, 0.24)}
"""Radii as fractions of the image's side. Smaller objects, hardly two latent pixels across, lose their shape in the
autoencoder; larger ones would not leave room for two."""
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("plain", "shaded", "cloudy")
Layer = tuple[np.ndarray, np.ndarray]
"""Colours `[side,side,3]` and coverage `[side,side,1]`, both about in [0,1]."""
RELATIONS = ("left of", "right of", "above", "below")

FASTEST = 0.04  # of the side, from frame to frame
BORDER = 0.02  # between an object and the image's border
SUPERSAMPLING = 4  # drawn this much larger, then averaged: anti-aliased edges


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One drawn object. `center` (x, y) and `radius` are fractions of the image's side; y points down."""

    shape: str
    color: str
    size: str
    texture: str
    center: tuple[float, float]
    radius: float

    @property
    def phrase(self) -> str:
        """The object in words, as in the caption."""
        texture = "" if self.texture == "plain" else f" {self.texture}"
        return f"a {self.size}{texture} {self.color} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A drawn image with its contents: one or two objects, and the kind and colour of the background."""

    image: Image.Image
    caption: str
    objects: tuple[SceneObject, ...]
    background: tuple[str, str]


def draw_scene(seed: int, index: int = 0, *, size: int = 64, pair_share: float = 0.5) -> Scene:
    """Draw scene number `index` of the endless series `seed`.

    Args:
        seed: the series.
        index: number of the scene.
        size: side of the RGB image in pixels.
        pair_share: probability of two objects instead of one.
    """
    drawn = _draw(seed, index, pair_share)
    caption = _caption(drawn.objects, drawn.relation, drawn.background)
    image = _picture([drawn.ground, *drawn.layers], size)
    return Scene(image=image, caption=caption, objects=drawn.objects, background=drawn.background)


def draw_clip(seed: int, index: int = 0, *, frames: int, size: int = 64, pair_share: float = 0.5) -> list[Image.Image]:
    """Draw a scene whose objects move, `frames` images; the first one is that of `draw_scene`.

    Each object keeps its direction and speed, up to `FASTEST` of the side from frame to frame, and turns at the border. The
    background stands still.

    Args:
        seed: the series.
        index: number of the scene.
        frames: number of frames.
        size: side of the RGB images in pixels.
        pair_share: probability of two objects instead of one.
    """
    drawn = _draw(seed, index, pair_share)
    rng = np.random.default_rng((seed, index, 3))
    velocities = [_polar(rng.uniform(0, FASTEST), rng.uniform(0, 2 * np.pi)) for _ in drawn.objects]
    clip = []
    for time in range(frames):
        paths = [_path(item, velocity, time) for item, velocity in zip(drawn.objects, velocities, strict=True)]
        moved = [_moved(layer, path) for layer, path in zip(drawn.layers, paths, strict=True)]
        clip.append(_picture([drawn.ground, *moved], size))
    return clip


def draw_dead_leaves(seed: int, index: int = 0, *, size: int = 64) -> Image.Image:
    """Draw dead-leaves image number `index` of the endless series `seed`: RGB, `size` x `size` pixels.

    The density of radii r is proportional to r^-3, up to 3/5 of the side. This exponent makes the image's statistics
    scale invariant. Every leaf has its own colour, shading and texture.
    """
    rng = np.random.default_rng((seed, index, 1))
    side = 2 * size
    labels = _leaf_labels(rng, side)
    canvas = _shade_leaves(rng, labels)
    blur = Image.Resampling.BOX if rng.random() < 0.5 else Image.Resampling.BICUBIC
    return Image.fromarray(_to_bytes(canvas)).resize((size, size), blur)


# --- scenes ---------------------------------------------------------------------------------------------


def _arrange(
    rng: np.random.Generator, *, background_color: str, pair_share: float
) -> tuple[tuple[SceneObject, ...], str | None]:
    """Return one object, or two objects that do not touch, and their relation."""
    free_colors = [name for name in COLORS if name != background_color]
    count = 1 + int(rng.random() < pair_share)
    colors = rng.choice(free_colors, size=count, replace=False)
    shapes = rng.choice(SHAPES, size=count, replace=False)
    sizes = rng.choice(list(SIZES), size=count)
    textures = rng.choice(TEXTURES, size=count, p=(0.55, 0.15, 0.15, 0.15))
    radii = [rng.uniform(*SIZES[size]) for size in sizes]
    relation = str(rng.choice(RELATIONS)) if count == 2 else None
    centers = _single_center(rng, radii[0]) if relation is None else _pair_centers(rng, radii, relation)
    objects = tuple(
        SceneObject(
            shape=str(shapes[i]), color=str(colors[i]), size=str(sizes[i]), texture=str(textures[i]),
            center=centers[i], radius=radii[i],
        )
        for i in range(count)
    )  # fmt: skip
    return objects, relation


def _single_center(rng: np.random.Generator, radius: float) -> list[tuple[float, float]]:
    return [tuple(rng.uniform(radius + 0.02, 0.98 - radius, size=2))]


def _pair_centers(rng: np.random.Generator, radii: list[float], relation: str) -> list[tuple[float, float]]:
    """Return the centres of two objects with a gap between them along one axis, and nearly level on the other."""
    gap = rng.uniform(0.0, 0.96 - 2 * sum(radii)) / 2
    first = rng.uniform(0.02 + radii[0], 0.98 - 2 * radii[1] - gap - radii[0])
    second = first + radii[0] + gap + radii[1]
    level = rng.uniform(0.02 + max(radii), 0.98 - max(radii))
    levels = np.clip(level + rng.uniform(-0.06, 0.06, size=2), max(radii) + 0.02, 0.98 - max(radii))
    along = [first, second]
    if relation in ("right of", "below"):  # the first object in the caption is at the far end
        along = [1 - first, 1 - second]
    if relation in ("left of", "right of"):
        return [(along[0], levels[0]), (along[1], levels[1])]
    return [(levels[0], along[0]), (levels[1], along[1])]


def _caption(objects: tuple[SceneObject, ...], relation: str | None, background: tuple[str, str]) -> str:
    kind, color = background
    ground = f"on a {color} background" if kind == "plain" else f"on a {kind} {color} background"
    if relation is None:
        return f"{objects[0].phrase} {ground}"
    return f"{objects[0].phrase} {relation} {objects[1].phrase} {ground}"


def _background(rng: np.random.Generator, kind: str, color: str) -> np.ndarray:
    side = 64 * SUPERSAMPLING
    base = _jittered_color(rng, color)
    if kind == "plain":
        return np.broadcast_to(base, (side, side, 3)).copy()
    if kind == "shaded":
        field = _ramp(side, rng.uniform(0, 2 * np.pi)) * 0.14
    else:
        field = _smooth_noise(rng, side, cells=int(rng.integers(3, 7))) * 0.14
    return base + field[..., None]


@dataclass(frozen=True)
class _Drawn:
    """What a scene consists of, and its layers."""

    background: tuple[str, str]
    objects: tuple[SceneObject, ...]
    relation: str | None
    ground: Layer
    layers: list[Layer]
    """One for each object, from the back to the front."""


def _draw(seed: int, index: int, pair_share: float) -> _Drawn:
    """Draw the layers of scene number `index`."""
    rng = np.random.default_rng((seed, index, 0))
    background = (str(rng.choice(BACKGROUNDS)), str(rng.choice(list(COLORS))))
    objects, relation = _arrange(rng, background_color=background[1], pair_share=pair_share)
    ground = _background(rng, *background)
    layers = [_layer(rng, len(ground), item) for item in objects]
    return _Drawn(background, objects, relation, (ground, np.ones_like(ground[..., :1])), layers)


def _picture(layers: list[Layer], size: int) -> Image.Image:
    """Return the image of layers in front of each other."""
    (canvas, _), *others = layers
    for fill, coverage in others:
        canvas = canvas * (1 - coverage) + fill * coverage
    return Image.fromarray(_to_bytes(canvas)).resize((size, size), Image.Resampling.BOX)


def _polar(length: float, angle: float) -> tuple[float, float]:
    return length * np.cos(angle), length * np.sin(angle)


def _path(item: SceneObject, velocity: tuple[float, float], time: int) -> tuple[float, float]:
    """Return how far an object has gone from its first place, right and down, as fractions of the side."""
    (x, y), (right, down) = item.center, velocity
    return _reflected(x + time * right, item.radius) - x, _reflected(y + time * down, item.radius) - y


def _reflected(place: float, radius: float) -> float:
    """Return a place on a line that turns wherever an object of this radius reaches the border."""
    low, room = radius + BORDER, 1 - 2 * (radius + BORDER)
    return low + room - abs((place - low) % (2 * room) - room)


def _moved(layer: Layer, path: tuple[float, float]) -> Layer:
    """Return a layer moved by fractions of the side, in whole pixels of the canvas; the object does not leave it."""
    side = len(layer[0])
    right, down = (round(distance * side) for distance in path)
    fill, coverage = (np.roll(part, (down, right), axis=(0, 1)) for part in layer)
    return fill, coverage


def _layer(rng: np.random.Generator, side: int, item: SceneObject) -> Layer:
    """Return the layer of an object."""
    mask = Image.new("L", (side, side), 0)
    _draw_shape(ImageDraw.Draw(mask), item, side, rng.uniform(-0.2, 0.2))
    coverage = np.asarray(mask, dtype=np.float32)[..., None] / 255.0
    color = _jittered_color(rng, item.color)
    # Darker than bright colours and brighter than dark ones, so that a pattern is always visible.
    contrast = color * 0.55 if color.mean() > 0.35 else color + (1 - color) * 0.45
    pattern = _pattern(rng, item.texture, side, item.radius)[..., None]
    shading = 0.05 * _ramp(side, rng.uniform(0, 2 * np.pi))[..., None]
    return color * (1 - pattern) + contrast * pattern + shading, coverage


def _draw_shape(draw: ImageDraw.ImageDraw, item: SceneObject, side: int, tilt: float) -> None:
    x, y, radius = (value * side for value in (*item.center, item.radius))
    box = (x - radius, y - radius, x + radius, y + radius)
    if item.shape in ("circle", "ring"):
        draw.ellipse(box, fill=255)
        if item.shape == "ring":
            hole = radius * 0.5
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        return
    draw.polygon(_polygon(item.shape, x, y, radius, tilt), fill=255)


def _polygon(shape: str, x: float, y: float, radius: float, tilt: float) -> list[tuple[float, float]]:
    """Return the corners of a shape inscribed in the circle of `radius` around (x, y), the top one first."""
    corners = {"square": 4, "triangle": 3, "diamond": 4, "star": 10, "cross": 12, "hexagon": 6}[shape]
    angles = np.arange(corners) * 2 * np.pi / corners - np.pi / 2
    radii = np.full(corners, radius)
    if shape == "square":
        angles = angles + np.pi / 4
    if shape == "star":
        radii[1::2] *= 0.42
    if shape == "cross":
        arm = np.arctan2(0.32, 1.0)
        quarter = np.array([-arm, arm, np.pi / 4])
        angles = np.concatenate([quarter + k * np.pi / 2 for k in range(4)]) - np.pi / 2
        radii = radius * np.tile([1.0, 1.0, 0.32 * np.sqrt(2) / np.sqrt(1 + 0.32**2)], 4)
    tilt = tilt if shape != "diamond" else tilt / 4  # a tilted diamond would be a square
    points = zip(radii * np.cos(angles + tilt), radii * np.sin(angles + tilt), strict=True)
    return [(x + dx, y + dy) for dx, dy in points]


def _pattern(rng: np.random.Generator, texture: str, side: int, radius: float) -> np.ndarray:
    """Return the weight of the second colour at each pixel, `[side, side]` in {0, 1}."""
    if texture == "plain":
        return np.zeros((side, side), dtype=np.float32)
    period = max(0.09, radius * 0.55)
    rows, columns = _grid(side)
    angle = rng.uniform(0, np.pi)
    u = (columns * np.cos(angle) + rows * np.sin(angle)) / period + rng.random()
    v = (rows * np.cos(angle) - columns * np.sin(angle)) / period + rng.random()
    if texture == "striped":
        return (u % 1 < 0.5).astype(np.float32)
    if texture == "checkered":
        return ((np.floor(2 * u) + np.floor(2 * v)) % 2).astype(np.float32)
    return (((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2) < 0.3**2).astype(np.float32)


def _jittered_color(rng: np.random.Generator, name: str) -> np.ndarray:
    return np.clip(np.array(COLORS[name], dtype=np.float32) / 255 + rng.normal(0, 0.02, 3), 0, 1)


# --- dead leaves ----------------------------------------------------------------------------------------


def _leaf_labels(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return the number of the topmost leaf at each pixel, `[side, side]`; 0 without a leaf."""
    low, high = rng.uniform(0.02, 0.1) * side, 0.6 * side
    # Enough leaves to cover the image three times; a disc's mean area is 2 pi low^2 log(high / low).
    leaves = min(int(3 * side**2 / (0.7 * 2 * np.pi * low**2 * np.log(high / low))), 700)
    uniform = rng.random(leaves)
    # Inverse of the distribution function of a density proportional to r^-3.
    radii = 1 / np.sqrt(uniform / low**2 + (1 - uniform) / high**2)
    centers = rng.uniform(-0.1 * side, 1.1 * side, size=(leaves, 2))
    stretch = rng.uniform(0.4, 1.0, size=leaves)
    angles = rng.uniform(0, 2 * np.pi, size=leaves)
    corners = rng.choice((3, 4, 5, 24), size=leaves, p=(0.15, 0.3, 0.1, 0.45))
    canvas = Image.new("I", (side, side), 0)
    draw = ImageDraw.Draw(canvas)
    for leaf in range(leaves):
        turn = np.arange(corners[leaf]) * 2 * np.pi / corners[leaf]
        along, across = radii[leaf] * np.cos(turn), stretch[leaf] * radii[leaf] * np.sin(turn)
        cosine, sine = np.cos(angles[leaf]), np.sin(angles[leaf])
        xs = centers[leaf, 0] + along * cosine - across * sine
        ys = centers[leaf, 1] + along * sine + across * cosine
        draw.polygon(list(zip(xs, ys, strict=True)), fill=leaf + 1)
    return np.asarray(canvas)


def _shade_leaves(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Return the image of the leaves with colour, linear shading and texture, `[side, side, 3]`, about [0, 1]."""
    side, count = labels.shape[0], labels.max() + 1
    rows, columns = _grid(side)
    colors = _leaf_colors(rng, count)
    slopes = rng.normal(0, 0.25, size=(count, 2)).astype(np.float32)
    shading = slopes[labels, 0] * (rows - 0.5) + slopes[labels, 1] * (columns - 0.5)
    textures = np.stack(
        [
            rng.standard_normal((side, side)).astype(np.float32) * 0.6,
            _smooth_noise(rng, side, cells=8),
            _smooth_noise(rng, side, cells=24),
            _power_law_noise(rng, side),
            np.sin(2 * np.pi * rng.uniform(4, side / 5) * _ramp(side, rng.uniform(0, np.pi)) / 2),
        ]
    )
    kinds = rng.integers(0, len(textures), size=count)
    strengths = (rng.exponential(0.06, size=count) * (rng.random(count) < 0.7)).astype(np.float32)
    grain = np.take_along_axis(textures, kinds[labels][None], axis=0)[0] * strengths[labels]
    tint = rng.uniform(0.7, 1.3, size=(count, 3)).astype(np.float32)
    return colors[labels] + (shading + grain)[..., None] * tint[labels]


def _leaf_colors(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw the leaves' colours around one palette, with more variation in brightness than in hue, as in photographs."""
    tones = int(rng.integers(2, 6))
    palette = rng.uniform(0.1, 0.9, size=(tones, 1)) + rng.normal(0, 0.12, size=(tones, 3))
    mean = palette[rng.integers(0, len(palette), size=count)]
    brightness = rng.normal(0, rng.uniform(0.05, 0.3), size=(count, 1))
    hue = rng.normal(0, rng.uniform(0.01, 0.08), size=(count, 3))
    gray = rng.random() < 0.15
    colors = mean + brightness + hue
    return (colors.mean(axis=1, keepdims=True).repeat(3, 1) if gray else colors).astype(np.float32)


# --- fields ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and column coordinates of the pixels as fractions of the side."""
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side
    return axis[:, None], axis[None, :]


def _ramp(side: int, angle: float) -> np.ndarray:
    """Return a linear field from about -1 to 1 along `angle`, `[side, side]`."""
    rows, columns = _grid(side)
    return 2 * ((columns - 0.5) * np.float32(np.cos(angle)) + (rows - 0.5) * np.float32(np.sin(angle)))


def _smooth_noise(rng: np.random.Generator, side: int, *, cells: int) -> np.ndarray:
    """Return noise of one scale, `[side, side]`: `cells` random values along the side, interpolated bicubically."""
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def _power_law_noise(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return noise with an amplitude spectrum of 1/f and variance 1, `[side, side]`."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * rng.random(frequency.shape))
    field = np.fft.irfft2(phases / frequency, s=(side, side))
    return (field / field.std()).astype(np.float32)


def _to_bytes(canvas: np.ndarray) -> np.ndarray:
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
