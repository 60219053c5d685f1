from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miniature import draw
from miniature.scenes import (
    COLORS,
    FASTEST,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    draw_clip,
    draw_dead_leaves,
    draw_scene,
)

SCENES = 200


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(5, index, size=128) for index in range(SCENES)]


@pytest.mark.parametrize("drawing", [lambda *key: draw_scene(*key).image, draw_dead_leaves], ids=["scene", "leaves"])
def test_image_is_a_function_of_seed_and_number(drawing) -> None:
    """Oracle: invariance, the same key gives the same pixels; another seed or number gives others."""
    pixels = np.asarray(drawing(3, 4))
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(drawing(3, 4)))
    assert not np.array_equal(pixels, np.asarray(drawing(3, 5)))
    assert not np.array_equal(pixels, np.asarray(drawing(4, 4)))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_scene_is_the_same_at_every_size(size) -> None:
    """Oracle: invariance, the box filter keeps the mean colour: half a level of rounding per pixel."""
    largest = draw_scene(3, 4, size=256)
    scene = draw_scene(3, 4, size=size)
    assert scene.image.size == (size, size) and scene.caption == largest.caption
    means = [np.asarray(image, dtype=float).mean(axis=(0, 1)) for image in (scene.image, largest.image)]
    np.testing.assert_allclose(*means, atol=0.5)


def test_caption_tells_every_object_and_the_background(scenes) -> None:
    """Oracle: the scene's own description, word by word."""
    for scene in scenes:
        words = scene.caption.replace(" a ", "|a ").split("|")
        assert len(words) == len(scene.objects) + 1  # the background comes last
        for item, phrase in zip(scene.objects, words, strict=False):
            texture = [] if item.texture == "plain" else [item.texture]
            relation = phrase.split()[4 + len(texture) :]
            assert phrase.split()[: 4 + len(texture)] == ["a", item.size, *texture, item.color, item.shape]
            assert " ".join(relation) in (*RELATIONS, "on")
        kind, color = scene.background
        assert words[-1] == f"a {color} background" if kind == "plain" else words[-1] == f"a {kind} {color} background"


def test_everything_there_is_gets_drawn(scenes) -> None:
    """Oracle: coverage. Among 200 scenes (300 objects) the rarest kind, 1 in 12, is missed once in 10^11."""
    items = [item for scene in scenes for item in scene.objects]
    assert {item.shape for item in items} == set(SHAPES)
    assert {item.color for item in items} == set(COLORS)
    assert {item.texture for item in items} == set(TEXTURES)
    assert {item.size for item in items} == set(SIZES)
    assert {len(scene.objects) for scene in scenes} == {1, 2}


def test_relation_is_true_of_the_centers(scenes) -> None:
    """Oracle: the words' meaning, x pointing right and y down; the named axis is also the one that separates."""
    seen = set()
    for scene in scenes:
        if len(scene.objects) == 1:
            assert not any(f" {relation} " in scene.caption for relation in RELATIONS)
            continue
        (relation,) = [relation for relation in RELATIONS if f" {relation} a " in scene.caption]
        seen.add(relation)
        (x, y), (other_x, other_y) = (item.center for item in scene.objects)
        right, down = x - other_x, y - other_y
        assert {"left of": -right, "right of": right, "above": -down, "below": down}[relation] > 0
        across, along = sorted([abs(right), abs(down)])
        assert (along == abs(right)) == (relation in ("left of", "right of")) and across < along
    assert seen == set(RELATIONS)


def test_objects_lie_within_the_image_and_do_not_overlap(scenes) -> None:
    """Oracle: geometry of the circles that hold the objects."""
    for scene in scenes:
        for item in scene.objects:
            low, high = SIZES[item.size]
            assert low <= item.radius <= high
            assert all(item.radius <= value <= 1 - item.radius for value in item.center)
        for first, second in combinations(scene.objects, 2):
            assert np.hypot(*np.subtract(first.center, second.center)) >= first.radius + second.radius
            assert first.color != second.color
        assert all(item.color != scene.background[1] for item in scene.objects)


def test_pixels_outside_the_objects_are_background(scenes) -> None:
    """Oracle: a plain background is one colour: nothing is painted outside the circles that the scene describes."""
    rows, columns = (np.indices((128, 128)) + 0.5) / 128
    checked = 0
    for scene in scenes:
        if scene.background[0] != "plain":
            continue
        outside = np.ones((128, 128), dtype=bool)
        for item in scene.objects:
            # 1.5 px more, for the pixels that the edge shares with the background.
            outside &= np.hypot(columns - item.center[0], rows - item.center[1]) > item.radius + 1.5 / 128
        pixels = np.asarray(scene.image)[outside]
        assert (pixels == pixels[0]).all()
        assert closest_color(pixels[0]) == scene.background[1]
        checked += 1
    assert checked > SCENES / 6


def test_color_is_seen_at_the_center_of_an_object(scenes) -> None:
    """Oracle: the nearest of the twelve named colours. Plain objects only; a ring shows the background there."""
    checked = 0
    for scene in scenes:
        pixels = np.asarray(scene.image, dtype=float)
        for item in scene.objects:
            if item.texture != "plain" or item.shape == "ring":
                continue
            column, row = (int(value * 128) for value in item.center)
            region = pixels[row - 1 : row + 2, column - 1 : column + 2].mean(axis=(0, 1))
            assert closest_color(region) == item.color, scene.caption
            checked += 1
    assert checked > SCENES / 3


def test_dead_leaves_have_the_spectrum_of_photographs() -> None:
    """Oracle: amplitudes of natural images fall like 1/f^a with a near 1 (Lee, Mumford, Huang 2001): 0.7 to 1.6.

    Slope of the radially averaged power on log axes over 3 to 24 cycles per image, away from window and pixel grid;
    white noise would give 0, one smooth scale far more than 2.
    """
    leaves = [np.asarray(draw_dead_leaves(11, index).convert("L"), dtype=float) for index in range(40)]
    assert 0.7 < amplitude_exponent(leaves) < 1.6
    white = np.random.default_rng(0).normal(size=(40, 64, 64))
    assert abs(amplitude_exponent(list(white))) < 0.1


def amplitude_exponent(pictures: list[np.ndarray]) -> float:
    window = np.outer(np.hanning(64), np.hanning(64))
    power = np.mean([np.abs(np.fft.fft2((picture - picture.mean()) * window)) ** 2 for picture in pictures], axis=0)
    frequency = 64 * np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None, :])
    radii = np.arange(3, 25)
    profile = [power[np.abs(frequency - radius) < 0.5].mean() for radius in radii]
    slope, _ = np.polyfit(np.log(radii), np.log(profile), 1)
    return -slope / 2


def closest_color(rgb: np.ndarray) -> str:
    return min(COLORS, key=lambda name: np.linalg.norm(np.subtract(COLORS[name], np.asarray(rgb, dtype=float))))


@pytest.mark.parametrize("index", range(4))
def test_a_clip_begins_with_its_scene(index: int) -> None:
    """Oracle: `draw_scene`, to the pixel; and each frame is the same whatever the length of the clip."""
    clip = [np.asarray(frame) for frame in draw_clip(5, index, frames=5)]
    assert np.array_equal(clip[0], np.asarray(draw_scene(5, index).image))
    longer = [np.asarray(frame) for frame in draw_clip(5, index, frames=9)]
    assert all(np.array_equal(*pair) for pair in zip(clip, longer, strict=False))


def test_objects_move_and_stay_whole() -> None:
    """Oracle: invariance: a plain object on a plain background keeps the number of its pixels in every frame, and its
    centre moves in a line by the same distance, at most the fastest's, until it turns at the border."""
    found = 0
    for index in range(200):
        scene = draw_scene(6, index, pair_share=0.0)
        (item,) = scene.objects
        if scene.background[0] != "plain" or item.texture != "plain":
            continue
        clip = np.stack([np.asarray(frame, dtype=float) for frame in draw_clip(6, index, frames=24, pair_share=0.0)])
        seen = np.abs(clip - clip[0, 0, 0]).max(axis=-1) > 30
        areas, centres = seen.sum(axis=(1, 2)), [np.argwhere(frame).mean(axis=0) for frame in seen]
        assert areas.max() - areas.min() < 0.12 * areas.mean()  # the edge's pixels are half covered
        steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
        assert steps.max() <= 64 * FASTEST + 1 and steps.std() < 1
        found += steps.mean() > 0.5
        if found == 3:
            return
    pytest.fail("no object moved")


def test_clips_are_drawn_into_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the real command: a folder for each clip, its frames in order."""
    flags = ["--num_images", "2", "--num_frames", "3", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["draw", *flags])
    draw.main()
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert names == [f"0000{clip}/00{time}.png" for clip in range(2) for time in range(3)]
    expected = draw_clip(draw.UNSEEN_SERIES, 1, frames=3, pair_share=0.0)[2]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "00001/002.png")), np.asarray(expected))


def test_command_draws_dead_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the real command: images of the series that no network was trained on, without captions."""
    flags = ["--kind", "dead-leaves", "--num_images", "2", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["draw", *flags])
    draw.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.png", "00001.png"]
    expected = draw_dead_leaves(draw.UNSEEN_SERIES, 1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "00001.png")), np.asarray(expected))
