"""What the app computes and refuses, without its page."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers.runs import build_tiny_vae, draw_images
from PIL import Image
from torch import Tensor

from srl_utils.app import __main__ as app
from srl_utils.app import purifying, tables
from srl_utils.app.attacking import ATTACKS, amplified, attack_of, compare
from srl_utils.app.editing import LONGEST_PROMPT, Request, edit_of, protect_and_edit
from srl_utils.app.purifying import PURIFIERS, purify
from srl_utils.app.serving import FRAMES, PREFIX, BodyLimit, check_address, temporary_folder
from srl_utils.app.tables import HEADERS, KINDS, in_order, read_table, results_among
from srl_utils.app.uploads import MAX_BYTES, MAX_FILES, MAX_FRAMES, MAX_PIXELS, MAX_TOTAL, checked, in_use, read_square
from srl_utils.app.watching import Cancelled, Stoppable, WatchedBar
from srl_utils.app.world import Visitors, World
from srl_utils.errors import MissingFile, MissingPackage, UserError
from srl_utils.files import LOCK
from srl_utils.pipelines import files, sanitize
from srl_utils.purifiers import filters
from srl_utils.vae.codec import Codec, frozen_codec
from srl_utils.vae.networks import frozen

EXAMPLES = Path(app.__file__).parent / "examples"
CPU = torch.device("cpu")
ROW = {
    "vae": "<b>robust</b>", "attack": "pgd-10", "objective": "mse", "threat_model": "adaptive", "epsilon": 8 / 255,
    "metric": "psnr", "value": 21.123456, "ci95": [20.5, 22.0], "n": 16,
}  # fmt: skip


@pytest.fixture
def codecs() -> list[Codec]:
    """Two small VAEs."""
    return [
        frozen_codec(build_tiny_vae(seed=seed), name, device=CPU) for seed, name in enumerate(("original", "robust"))
    ]


@pytest.fixture(scope="module")
def world() -> World:
    """The embedded world."""
    return app.load_world(app.parse_args(["--device", "cpu"]))


def quiet_bar(stop: Event | None = None, report: Callable[[float, str], object] = lambda *_: None) -> WatchedBar:
    return WatchedBar(report, stop or Event())


# --- uploads ---


def test_uploads_are_bounded(tmp_path: Path) -> None:
    """Oracle: specification; a file of exactly the limit passes."""
    files = [tmp_path / f"{number}.png" for number in range(MAX_FILES + 1)]
    for file in files:
        file.touch()
    assert checked([str(files[0])]) == [files[0]]
    for refused, said in (([], "choose a file"), (None, "choose a file"), (files, f"choose {MAX_FILES} at most")):
        with pytest.raises(UserError, match=said):
            checked(refused)
    for size, fits in ((MAX_BYTES, True), (MAX_BYTES + 1, False)):
        with files[0].open("wb") as file:
            file.truncate(size)
        if fits:
            checked([files[0]])
        else:
            with pytest.raises(UserError, match="too large"):
                checked([files[0]])


def test_uploads_are_bounded_together(tmp_path: Path) -> None:
    """Oracle: specification; files of exactly the limit pass."""
    files = [tmp_path / f"{number}.json" for number in range(MAX_TOTAL // MAX_BYTES + 1)]
    for file in files:
        with file.open("wb") as opened:
            opened.truncate(MAX_BYTES)
    checked(files[1:])
    with pytest.raises(UserError, match="too large together; they may have 64 MB"):
        checked(files)


def test_an_upload_that_was_deleted_is_named(tmp_path: Path) -> None:
    """Oracle: specification; an upload that is used counts as new."""
    (tmp_path / "kept.png").touch()
    before = (tmp_path / "kept.png").stat().st_ctime_ns
    checked([tmp_path / "kept.png"])
    assert (tmp_path / "kept.png").stat().st_ctime_ns > before
    for read in (lambda path: checked([path]), lambda path: read_square(path, 8)):
        with pytest.raises(UserError, match=r"^gone.png was deleted after 10 minutes; choose it again$"):
            read(tmp_path / "gone.png")


def test_uploads_in_use_stay_new(tmp_path: Path) -> None:
    """Oracle: their age, by which gradio deletes files: it begins again and again, and no longer after the end."""
    file = tmp_path / "photo.png"
    file.touch()
    seen = {file.stat().st_ctime_ns}
    with in_use([tmp_path / "gone.png", file], every=0.01):
        deadline = time.monotonic() + 60
        while len(seen) < 4:
            assert time.monotonic() < deadline
            seen.add(file.stat().st_ctime_ns)
    last = file.stat().st_ctime_ns
    time.sleep(0.1)
    assert file.stat().st_ctime_ns == last


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"content-length": f"{FRAMES + 8}"}, 200),
        ({"content-length": f"{FRAMES + 9}"}, 413),
        ({"transfer-encoding": "chunked"}, 411),
    ],
)
def test_large_requests_are_refused_unread(headers: dict[str, str], status: int) -> None:
    """Oracle: HTTP's codes; a refused body is taken off the line and handed to nobody."""
    body = [{"type": "http.request", "more_body": more} for more in (True, True, False)]
    sent: list[dict] = []

    async def receive() -> dict:
        return body.pop(0)

    async def send(message: dict) -> None:
        sent.append(message)

    async def app_of_page(scope: object, receive: object, send: Callable) -> None:
        await send({"type": "http.response.start", "status": 200})

    scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    asyncio.run(BodyLimit(app_of_page, most=8)(scope, receive, send))
    assert sent[0]["status"] == status
    assert len(body) == (3 if status == 200 else 0)


def test_pixels_are_bounded_and_read_from_the_centre(tmp_path: Path) -> None:
    """Oracle: closed form, an image whose central square is white."""
    picture = Image.new("RGB", (24, 8))
    picture.paste("white", (8, 0, 16, 8))
    picture.save(tmp_path / "strip.png")
    torch.testing.assert_close(read_square(tmp_path / "strip.png", 8), torch.ones(1, 3, 8, 8))
    Image.new("1", (MAX_PIXELS // 1024, 1025)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match=r"large.png has more than 4,194,304 pixels"):
        read_square(tmp_path / "large.png", 8)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"^text.png cannot be read: no image of a known format"):
        read_square(tmp_path / "text.png", 8)
    with pytest.raises(UserError, match="choose an image"):
        read_square(None, 8)


def test_visitors_choose_from_the_world_alone(codecs: list[Codec]) -> None:
    """Oracle: specification; a path or a Hub id is no name of a model."""
    world = World(codecs={codec.name: codec for codec in codecs}, pipelines={}, resolution=16)
    assert world.codec("robust") is codecs[1]
    for name in ("/etc/passwd", "user/model", None):
        with pytest.raises(UserError, match=r"there is no VAE .*; choose from original, robust"):
            world.codec(name)
    with pytest.raises(UserError, match=r"there is no pipeline .*; choose from none"):
        world.pipeline("user/model")


# --- cancelling ---


def test_each_visitor_stops_their_own_computation_of_a_tab() -> None:
    """Oracle: specification: all others go on; at the end, all are stopped."""
    visitors = Visitors()
    with visitors.computing("mine", "Edit") as mine:
        for others in (("theirs", "Edit"), ("mine", "Purify"), ("theirs",)):
            visitors.stop(*others)
        assert not mine.is_set()
        visitors.stop("mine", "Edit")
        assert mine.is_set()
    with visitors.computing("mine", "Edit") as again:
        assert not again.is_set()
        visitors.stop("mine")
        assert again.is_set()


def test_computations_run_one_at_a_time_and_end_with_the_app() -> None:
    """Oracle: specification: the second begins after the first has ended, and both are told to end."""
    ended: list[str] = []
    begun = Event()

    def compute(session: str) -> None:
        with visitors.computing(session, "Edit") as stop:
            begun.set()
            assert stop.wait(60)
            ended.append(session)

    with Visitors() as visitors, ThreadPoolExecutor(2) as pool:
        first = pool.submit(compute, "first")
        assert begun.wait(60)
        second = pool.submit(compute, "second")
        while len(visitors._stops) < 2:
            time.sleep(0.001)
        assert ended == []
        visitors.__exit__()
        first.result(60), second.result(60)
    assert ended == ["first", "second"]


@pytest.mark.parametrize("purifier", [PURIFIERS[0], "adverse-cleaner"])
def test_the_cleaning_of_a_single_image_ends_when_it_is_stopped(
    codecs: list[Codec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, purifier: str
) -> None:
    """Oracle: the decoder and the guided filters, which come last, are not reached."""
    stop, reached = Event(), []
    codecs[0].vae.encoder.register_forward_hook(lambda *_: stop.set())
    codecs[0].vae.decoder.register_forward_hook(lambda *_: reached.append("decoder"))
    monkeypatch.setattr(filters, "bilateral", lambda images, **_: stop.set() or images)
    monkeypatch.setattr(filters, "guided", lambda *_, **__: reached.append("guided") or torch.zeros(1))
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    with pytest.raises(Cancelled), Stoppable(stop):
        purify([tmp_path / "photo.png"], codecs[0], purifier, tmp_path, lambda _: None)
    assert stop.is_set() and "decoder" not in reached
    assert not (tmp_path / "photo-purified.png").exists()


@pytest.mark.parametrize("stopped", ["in the context", "before its end"])
def test_what_is_stopped_leaves_no_trace(stopped: str) -> None:
    """Oracle: gradients are on and weights are trained as before; the contexts set them back by functions of torch, too."""
    stop, network, images = Event(), torch.nn.Linear(2, 2), torch.ones(2, 2)
    with pytest.raises(Cancelled), Stoppable(stop):
        with torch.no_grad(), frozen(network):
            if stopped == "in the context":
                stop.set()
            network(images)
            stop.set()
        network(images)
    assert torch.is_grad_enabled() and all(weight.requires_grad for weight in network.parameters())


def test_an_edit_ends_at_the_next_step(world: World) -> None:
    """Oracle: the share that is done, which would be 1."""
    stop, shares = Event(), []

    def report(share: float, title: str) -> None:
        shares.append(share)
        if title == "edit of the image" and share > shares[0]:
            stop.set()

    request = wanted(inference_steps=20)
    clean, original = read_square(EXAMPLES / "scene.png", world.resolution), world.codec("original")
    edit = edit_of(world.pipeline("miniature"), request)
    with pytest.raises(Cancelled):
        protect_and_edit(clean, edit, original, original, request, quiet_bar(stop, report))
    assert stop.is_set() and shares[-1] < 0.6


def test_a_bar_tells_its_share_and_ends_when_it_is_stopped() -> None:
    """Oracle: closed form."""
    told, stop = [], Event()
    bar = quiet_bar(stop, lambda share, title: told.append((share, title)))
    bar.total = 4
    bar.set_description_str("half", refresh=False)
    bar.update(2)
    bar.update(5)
    assert told == [(0.5, "half"), (1.0, "half")]
    stop.set()
    with pytest.raises(Cancelled):
        bar.update()


def test_an_attack_ends_at_the_next_step(codecs: list[Codec]) -> None:
    """Oracle: the number of calls of the attacked VAE, which would be 200."""
    stop, shares = Event(), []

    def report(share: float, title: str) -> None:
        shares.append(share)
        if share > 0:
            stop.set()

    with pytest.raises(Cancelled):
        compare(draw_images(1, 16), *codecs, attack_of("PGD", epsilon=0.1, steps=200), quiet_bar(stop, report))
    assert shares[-1] < 0.05


# --- purifying ---


@pytest.mark.parametrize("purifier", PURIFIERS)
def test_cleaned_images_keep_their_size(codecs: list[Codec], tmp_path: Path, purifier: str) -> None:
    """Oracle: the sizes of the uploads; what draws nothing equals `sanitize`."""
    sources = []
    for folder, size in (("a", (21, 13)), ("b", (16, 16))):
        sources.append(tmp_path / folder / "photo.png")
        sources[-1].parent.mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)).save(sources[-1])
    (tmp_path / "out").mkdir()
    told: list[int] = []
    made = purify(sources, codecs[0], purifier, tmp_path / "out", told.append)
    assert [each.result.name for each in made] == ["photo-purified.png", "photo-purified-2.png"]
    assert told == [0, 1]
    for each in made:
        with Image.open(each.source) as before, Image.open(each.result) as after:
            assert (after.format, after.size) == ("PNG", before.size)
            if "noise" not in purifier:
                wanted = sanitize(before, codecs[0].vae, purifier=purifier)
                np.testing.assert_array_equal(np.asarray(after), np.asarray(wanted))


def test_what_cannot_be_purified_is_named(codecs: list[Codec], tmp_path: Path) -> None:
    """Oracle: specification; a purifier outside the list, such as one of 1,000 steps, is refused."""
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"^text.png cannot be read"):
        purify([tmp_path / "text.png"], codecs[0], PURIFIERS[0], tmp_path, lambda _: None)
    with pytest.raises(UserError, match="there is no purifier 'impress'"):
        purify([tmp_path / "text.png"], codecs[0], "impress", tmp_path, lambda _: None)


@pytest.mark.parametrize(
    ("bad", "said"), [("cut", "cannot be read"), ("text", "cannot be read: no image"), ("large", "4,194,304 pixels")]
)
def test_a_bad_image_is_named_before_any_is_cleaned(codecs: list[Codec], tmp_path: Path, bad: str, said: str) -> None:
    """Oracle: specification; the images before the bad one are not begun, one that only decoding shows included."""
    draw_noise(32, 32).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (MAX_PIXELS // 1024, 1025)).save(tmp_path / "large.png")
    sources, begun = [tmp_path / "good.png", tmp_path / "good.png", tmp_path / f"{bad}.png"], []
    with pytest.raises(UserError, match=rf"^{bad}.png .*{said}"):
        purify(sources, codecs[0], "jpeg-75", tmp_path, begun.append)
    assert begun == [] and not list(tmp_path.glob("*-purified*"))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_pixels_of_all_frames_are_bounded_together(
    codecs: list[Codec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Oracle: specification: frames x width x height; a film of exactly the limit passes, and a longer one is not decoded."""
    film = tmp_path / f"film.{suffix}"
    save_film(film, [draw_noise(20, 10) for _ in range(5)])
    monkeypatch.setattr(purifying, "MAX_PIXELS", 1000)
    (made,) = purify([film], codecs[0], "jpeg-75", tmp_path, lambda _: None)
    with Image.open(made.result) as result:
        assert (result.n_frames, result.size) == (5, (20, 10))
    monkeypatch.setattr(purifying, "MAX_PIXELS", 999)
    monkeypatch.setattr(files, "to_srgb", lambda _: pytest.fail("a frame is decoded"))
    told = (
        rf"^film.{suffix} cannot be read: its 5 frames have more than 999 pixels together; make it smaller or shorter$"
    )
    with pytest.raises(UserError, match=told):
        purify([film], codecs[0], "jpeg-75", tmp_path, lambda _: None)


def test_the_frames_of_a_film_are_bounded(codecs: list[Codec], tmp_path: Path) -> None:
    """Oracle: specification; pages of a TIFF are not counted, as the PNG gets the first alone."""
    frames = [Image.new("L", (1, 1), number % 256) for number in range(MAX_FRAMES + 1)]
    save_film(tmp_path / "long.gif", frames)
    with pytest.raises(
        UserError, match=r"^long.gif cannot be read: its 1,001 frames are more than 1,000; make it shorter$"
    ):
        purify([tmp_path / "long.gif"], codecs[0], "jpeg-75", tmp_path, lambda _: None)
    save_film(tmp_path / "pages.tif", frames)
    (made,) = purify([tmp_path / "pages.tif"], codecs[0], "jpeg-75", tmp_path, lambda _: None)
    assert made.lost == ["1000 of 1001 pages (PNG gets the first)"]


def test_frames_that_grow_are_counted(codecs: list[Codec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the second frame moved 4 pixels to the right of a GIF of 8x8, which Pillow reads as 12x8: 192 pixels."""
    save_film(tmp_path / "film.gif", [draw_noise(8, 8), draw_noise(8, 8)])
    content = bytearray((tmp_path / "film.gif").read_bytes())
    second = content.rindex(b"\x2c\0\0\0\0\x08\0\x08\0")  # where an image is: a comma, left, top, width, height
    content[second + 1] = 4
    (tmp_path / "film.gif").write_bytes(content)
    for most, fits in ((192, True), (191, False)):
        monkeypatch.setattr(purifying, "MAX_PIXELS", most)
        if fits:
            purify([tmp_path / "film.gif"], codecs[0], "jpeg-75", tmp_path, lambda _: None)
        else:
            with pytest.raises(UserError, match="its 2 frames have more than 191 pixels together"):
                purify([tmp_path / "film.gif"], codecs[0], "jpeg-75", tmp_path, lambda _: None)


def draw_noise(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 80)


def save_film(path: Path, frames: list[Image.Image]) -> None:
    frames[0].save(path, save_all=True, append_images=frames[1:])


# --- attacking and editing ---


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_stay_in_their_budget(codecs: list[Codec], name: str) -> None:
    """Oracle: the budget, for all but noise; PSNR of the reconstructions, by its formula."""
    clean, epsilon = draw_images(1, 16, limit=0.5), 8 / 255
    outcome = compare(clean, *codecs, attack_of(name, epsilon=epsilon, steps=3), quiet_bar())
    change = (outcome.attacked - clean).abs().max().item()
    assert change > 0
    assert name == "Gaussian noise" or change <= 2 * epsilon + 1e-6
    for codec in codecs:
        assert outcome.attacked_psnr[codec.name] == decibels(codec.reconstruct(outcome.attacked), clean)
        assert outcome.clean_psnr[codec.name] == decibels(codec.reconstruct(clean), clean)


def decibels(image: Tensor, target: Tensor) -> object:
    """Return 10 log10(1 / mean squared error) of two images in [-1,1], taken to [0,1] and clipped."""
    values, wanted_values = (np.clip((each.double().numpy() + 1) / 2, 0, 1) for each in (image, target))
    return pytest.approx(-10 * np.log10(np.mean((values - wanted_values) ** 2)), abs=1e-3)


def test_a_vae_may_be_compared_with_itself(codecs: list[Codec]) -> None:
    """Oracle: specification; it has one reconstruction."""
    outcome = compare(draw_images(1, 16), codecs[0], codecs[0], attack_of("PGD", epsilon=0.1, steps=1), quiet_bar())
    assert list(outcome.reconstructions) == ["original"]
    with pytest.raises(UserError, match="there is no attack 'DeepFool'"):
        attack_of("DeepFool", epsilon=0.1, steps=1)


def test_differences_are_amplified_on_grey() -> None:
    """Oracle: closed form."""
    clean = torch.zeros(1, 3, 2, 2)
    torch.testing.assert_close(amplified(clean, clean + 0.01, 10), clean + 0.1)
    torch.testing.assert_close(amplified(clean, clean - 0.5, 10), clean - 1)


def wanted(**changed: object) -> Request:
    settings = {"prompt": "a red ring", "strength": 0.5, "inference_steps": 2, "guidance": 2.0, "epsilon": 16 / 255}
    return Request(**{**settings, "protection_steps": 2, **changed})


def test_edits_share_their_noise(world: World) -> None:
    """Oracle: invariance: through the original itself, the edit of the protected image is the same."""
    request, pipeline = wanted(), world.pipeline("miniature")
    original = world.codec("original")
    clean, shares = read_square(EXAMPLES / "scene.png", world.resolution), []
    bar = quiet_bar(report=lambda share, _: shares.append(share))
    edits = protect_and_edit(clean, edit_of(pipeline, request), original, original, request, bar)
    torch.testing.assert_close(edits.through_robust, edits.of_protected, rtol=0, atol=0)
    assert (edits.of_protected - edits.of_clean).abs().max() > 0.01
    assert 0 < (edits.protected - clean).abs().max() <= 2 * 16 / 255 + 1e-6
    assert shares == sorted(shares) and shares[-1] == 1
    assert edits.psnr(edits.of_clean) == 100
    assert edits.psnr(edits.of_protected) == decibels(edits.of_protected, edits.of_clean)
    assert pipeline.vae is not original.vae


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompt": " "}, "write a prompt"),
        ({"prompt": "a" * (LONGEST_PROMPT + 1)}, "301 characters"),
        ({"strength": 0.1}, "takes none of the 2 steps"),
    ],
)
def test_wrong_requests_are_refused(world: World, changed: dict[str, object], said: str) -> None:
    """Oracle: specification."""
    with pytest.raises(UserError, match=said):
        edit_of(world.pipeline("miniature"), wanted(**changed))


def test_a_pipeline_of_other_latents_is_refused(world: World, codecs: list[Codec]) -> None:
    """Oracle: specification: one line, and the pipeline keeps its VAE."""
    pipeline, request = world.pipeline("miniature"), wanted()
    clean = read_square(EXAMPLES / "scene.png", world.resolution)
    with pytest.raises(UserError, match="channels"):
        protect_and_edit(clean, edit_of(pipeline, request), world.codec("original"), codecs[1], request, quiet_bar())


# --- results ---


def test_tables_have_numbers_where_they_sort(tmp_path: Path) -> None:
    """Oracle: closed form; text stays as it is, and what JSON cannot hold is left out."""
    rows = [ROW, {**ROW, "value": math.inf, "ci95": None, "dataset": "faces"}]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    (tmp_path / "study.json").write_text("{}")
    first, second = read_table(results_among([tmp_path / "study.json", tmp_path / "results.json"]))
    assert first == ["<b>robust</b>", "pgd-10", "adaptive", 8.0, "psnr", 21.123, 20.5, 22.0, 16, "results.json"]
    assert second[5:] == [None, None, None, 16, "results.json, faces"]
    assert len(HEADERS) == len(KINDS) == len(first)
    assert all(isinstance(value, (int, float)) == (kind == "number") for value, kind in zip(first, KINDS, strict=True))


def test_lines_are_sorted_by_value() -> None:
    """Oracle: closed form; 9 is less than 10, and a missing value comes last either way."""
    lines = [[None] * 5 + [value] + [None] * 4 for value in (10.0, None, 9.0)]
    for descending, expected in ((False, [9.0, 10.0, None]), (True, [10.0, 9.0, None])):
        assert [line[5] for line in in_order(lines, "value", descending=descending)] == expected


def test_a_file_of_any_name_and_several_files_are_read(tmp_path: Path) -> None:
    """Oracle: specification; the example is one of `make demo`."""
    for name in ("mine.json", "MINE.JSON"):
        (tmp_path / name).write_text(json.dumps([ROW]))
        assert [line[-1] for line in read_table(results_among([tmp_path / name]))] == [name]
    example = EXAMPLES / "results.json"
    both = read_table([example, example])
    assert {line[-1] for line in both} == {"results.json 1", "results.json 2"}


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[1]", '{"a": 1}', "[" * 100_000, json.dumps([{**ROW, "value": "much"}]), json.dumps([{"vae": "x"}]),
        json.dumps([{**ROW, "ci95": [1]}]), json.dumps([{**ROW, "more": 1}]), "\udcff",
        json.dumps([{**ROW, "vae": [1]}]), json.dumps([{**ROW, "metric": None}]), json.dumps([{**ROW, "dataset": 1}]),
        "[" + "1" * 5000 + "]",
    ],
)  # fmt: skip
def test_broken_results_are_one_message(tmp_path: Path, content: str) -> None:
    """Oracle: specification."""
    (tmp_path / "results.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"^results.json holds no results of this project$"):
        read_table([tmp_path / "results.json"])


def test_reading_ends_at_too_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the file after them, which is broken, is not looked at; as many rows as allowed are read."""
    monkeypatch.setattr(tables, "MAX_ROWS", 3)
    for name, count in (("a.json", 2), ("b.json", 1), ("c.json", 2)):
        (tmp_path / name).write_text(json.dumps([ROW] * count))
    (tmp_path / "d.json").write_text("{")
    assert len(read_table([tmp_path / "a.json", tmp_path / "b.json"])) == 3
    with pytest.raises(UserError, match="too many rows; choose files of 3 at most"):
        read_table([tmp_path / name for name in ("a.json", "c.json", "d.json")])


def test_other_files_are_no_results(tmp_path: Path) -> None:
    """Oracle: specification."""
    with pytest.raises(UserError, match=r"there is no results.json among 1 files"):
        results_among([tmp_path / "report.html"])
    assert results_among([]) == []


def test_results_are_chosen_by_name_whatever_its_case(tmp_path: Path) -> None:
    """Oracle: specification; nothing is looked at, so other files may be many, large or gone."""
    others = [tmp_path / f"{number}.json" for number in range(tables.MAX_REPORTS)]
    mine = [tmp_path / "a" / "RESULTS.JSON", tmp_path / "b" / "Results.json", tmp_path / "c" / "results.json"]
    assert results_among(list(map(str, [*mine, *others]))) == mine


@pytest.mark.parametrize("field", ["value", "epsilon", "n", "ci95"])
@pytest.mark.parametrize("number", [10**400, -(10**400), 1e400, -1e400, math.nan])
def test_a_number_beyond_all_floats_is_left_out(tmp_path: Path, field: str, number: float) -> None:
    """Oracle: the table is JSON without infinity; Python reads integers of up to 4300 digits."""
    (tmp_path / "results.json").write_text(
        json.dumps([{**ROW, field: [number, number] if field == "ci95" else number}])
    )
    (line,) = read_table([tmp_path / "results.json"])
    places = {"value": [5], "epsilon": [3], "n": [8], "ci95": [6, 7]}[field]
    assert [place for place, cell in enumerate(line) if cell is None] == places


def test_every_cell_can_be_sent(tmp_path: Path) -> None:
    """Oracle: UTF-8 and 64 bits, in which the page gets the table; numbers of images are kept to the last digit."""
    rows = [{**ROW, "vae": "\ud83d", "dataset": "a\nb", "n": 123_456_789}, {**ROW, "vae": "\ud83d\ude00", "n": 10**30}]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    first, second = read_table([tmp_path / "results.json"])
    assert (first[0], first[8], first[9]) == (r"\ud83d", 123_456_789, r"results.json, a\nb")
    assert (second[0], second[8]) == ("\U0001f600", 1e30) and isinstance(second[8], float)


def test_a_mark_of_byte_order_is_no_fault(tmp_path: Path) -> None:
    """Oracle: the same file without it."""
    for name, encoding in (("a.json", "utf-8"), ("b.json", "utf-8-sig")):
        (tmp_path / name).write_text(json.dumps([{**ROW, "vae": "ä"}], ensure_ascii=False), encoding=encoding)
    assert (tmp_path / "b.json").read_bytes().startswith(b"\xef\xbb\xbf")
    plain, marked = (read_table([tmp_path / name])[0][:-1] for name in ("a.json", "b.json"))
    assert marked == plain


# --- the command ---


def test_the_embedded_world_is_the_default(world: World) -> None:
    """Oracle: the shipped models: a robust VAE with the original's decoder, and the pipeline's own VAE."""
    original, robust = world.codecs.values()
    assert [original.name, robust.name, *world.pipelines] == ["original", "robust", "miniature"]
    assert world.resolution == 64
    for (name, mine), theirs in zip(robust.vae.state_dict().items(), original.vae.state_dict().values(), strict=True):
        assert name.startswith(("encoder", "quant")) or torch.equal(mine, theirs)
    clean = read_square(EXAMPLES / "scene.png", 64)
    outcome = compare(clean, robust, robust, attack_of("PGD", epsilon=8 / 255, steps=10), quiet_bar())
    weaker = compare(clean, original, original, attack_of("PGD", epsilon=8 / 255, steps=10), quiet_bar())
    assert outcome.attacked_psnr["robust"] > weaker.attacked_psnr["original"] + 2


def test_models_are_those_of_the_flags(vae_folder: Path) -> None:
    """Oracle: specification; with a baseline of the user's own, nothing is embedded."""
    flags = ["--baseline", str(vae_folder), "--vae", f"mine={vae_folder}", "--resolution", "32", "--device", "cpu"]
    world = app.load_world(app.parse_args(flags))
    assert [*world.codecs] == ["original", "mine"] and not world.pipelines and world.resolution == 32


def test_only_this_machine_reaches_the_page() -> None:
    """Oracle: specification."""
    args = app.parse_args([])
    assert (args.host, args.share) == ("127.0.0.1", False)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--baseline", "no-such-folder"], "no VAE configuration at 'no-such-folder'"),
        (["--vae", "robust=no-such-folder"], "the VAE robust at no-such-folder"),
        (["--pipeline", "sd=no-such-folder"], "cannot be loaded"),
        (["--device", "abacus"], "abacus cannot be used"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], said: str) -> None:
    """Oracle: specification: one line that names the place."""
    with pytest.raises(UserError, match=said):
        app.load_world(app.parse_args(flags))


def test_a_package_without_the_embedded_world_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: specification."""
    monkeypatch.setattr(app, "EMBEDDED", tmp_path / "weights")
    with pytest.raises(MissingFile, match="give `baseline`"):
        app.load_world(app.parse_args([]))


def test_an_address_that_cannot_be_used_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the system's refusals, one line that names the flag; no model is loaded."""
    monkeypatch.setattr(app, "load_world", lambda args: pytest.fail("models are loaded"))
    monkeypatch.setattr(app, "find_spec", lambda name: "gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, parameter, said in (
            (["--port", str(port)], "port", f"{port} is in use; choose another"),
            (["--port", "65536"], "port", "a port is at most 65535, got 65536"),
            (["--host", "192.0.2.1"], "host", "'192.0.2.1' is no address of this machine"),
            (["--host", "a..b"], "host", "'a..b' is no address of this machine"),
        ):
            with pytest.raises(UserError) as refused:
                app.main([*flags, "--device", "cpu"])
            assert (refused.value.parameter, refused.value.problem) == (parameter, said)
    check_address("127.0.0.1", port)
    check_address("127.0.0.1", None)


def test_temporary_files_are_in_one_folder_that_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what is on the disk: folders whose lock nobody holds are deleted, those of running apps stay."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("killed", "running"):
        (tmp_path / f"{PREFIX}{name}").mkdir()
        (tmp_path / f"{PREFIX}{name}" / "upload.png").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path)
    with FileLock(tmp_path / f"{PREFIX}running" / LOCK), temporary_folder() as folder:
        with tempfile.NamedTemporaryFile() as file:
            assert Path(file.name).parent == folder
        assert not (tmp_path / f"{PREFIX}killed").exists()
        assert (tmp_path / f"{PREFIX}running" / "upload.png").exists()
    assert tempfile.gettempdir() == str(tmp_path) and not folder.exists()


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: specification; nothing is loaded before."""
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    monkeypatch.setattr(app, "load_world", lambda args: SimpleNamespace())
    with pytest.raises(MissingPackage, match="pip install gradio"):
        app.main([])
