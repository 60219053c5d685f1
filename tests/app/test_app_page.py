"""The page as programs see it: gradio's own client against the real server on this machine."""

from __future__ import annotations

import json
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import build_tiny_vae
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed; pip install -r requirements/app.txt")
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from srl_utils.app import __main__ as app
from srl_utils.app import page as page_module
from srl_utils.app.attacking import ATTACKS
from srl_utils.app.page import build_page, launch_settings, message, said
from srl_utils.app.purifying import PURIFIERS
from srl_utils.app.uploads import MAX_BYTES
from srl_utils.app.world import Visitors, World
from srl_utils.vae.codec import frozen_codec

EXAMPLES = Path(app.__file__).parent / "examples"
LOOP = PURIFIERS[0]


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the page's temporary files."""
    folder = tmp_path_factory.mktemp("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder.parent))
        yield folder


@pytest.fixture(scope="module")
def address(temporary: Path) -> Iterator[str]:
    """Where the page of two small VAEs is served."""
    codecs = {
        name: frozen_codec(build_tiny_vae(seed=seed), name, device=torch.device("cpu"))
        for seed, name in enumerate(("original", "robust"))
    }
    page = build_page(World(codecs=codecs, pipelines={}, resolution=16), Visitors()).queue()
    _, local, _ = page.launch(server_name=app.LOCALHOST, prevent_thread_lock=True, quiet=True, **launch_settings())
    yield local
    page.close()


@pytest.fixture(scope="module")
def client(address: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(address, verbose=False, analytics_enabled=False, download_files=str(tmp_path_factory.mktemp("got")))


def refusal(client: Client, *arguments: Any, api_name: str) -> str:
    """Return the message of a call that is refused."""
    with pytest.raises(AppError) as refused:
        client.predict(*arguments, api_name=api_name)
    assert "Traceback" not in str(refused.value)
    return str(refused.value)


def test_purify_returns_a_png_of_the_same_size_and_keeps_nothing(
    client: Client, tmp_path: Path, temporary: Path
) -> None:
    """Oracle: the upload's size; of the computation's own folder nothing is left."""
    pixels = np.random.default_rng(0).integers(0, 255, (13, 21, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.webp", lossless=True)
    pair, _, results, status = client.predict(
        [handle_file(str(tmp_path / "photo.webp"))], "robust", LOOP, api_name="/purify"
    )
    with Image.open(results[0]) as result:
        assert (result.format, result.size) == ("PNG", (21, 13))
    assert Path(results[0]).name == "photo-purified.png" and "Images cleaned: 1." in status
    with Image.open(pair[0]) as before:
        np.testing.assert_array_equal(np.asarray(before), pixels)
    assert not list(temporary.parent.glob("tmp*/photo-purified.png"))


def test_attack_returns_pictures_and_their_psnr(client: Client) -> None:
    """Oracle: specification."""
    pictures, table, status = client.predict(
        handle_file(str(EXAMPLES / "scene.png")), "PGD", "original", "robust", 8, 3, 10, api_name="/attack"
    )
    captions = [picture["caption"] for picture in pictures]
    assert captions[:3] == ["image", "attacked", "difference, 10 times"] and len(captions) == 5
    assert [line[0] for line in table["data"]] == ["original", "robust"]
    assert f"{table['data'][0][2]:.1f} dB" in captions[3]
    assert status == "pgd-3 on original is done."


def test_results_become_a_table(client: Client) -> None:
    """Oracle: the number of rows in the file."""
    path = EXAMPLES / "results.json"
    table, status = client.predict([handle_file(str(path))], None, "value", True, api_name="/results")
    assert len(table["data"]) == len(json.loads(path.read_text()))
    assert status == f"Rows: {len(table['data'])}."
    values = [line[5] for line in table["data"]]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("api_name", ["/purify", "/attack"])
def test_a_broken_image_is_a_message(client: Client, tmp_path: Path, api_name: str) -> None:
    """Oracle: specification; no path of the server is in the message."""
    (tmp_path / "broken.png").write_bytes((EXAMPLES / "scene.png").read_bytes()[:200])
    upload = handle_file(str(tmp_path / "broken.png"))
    arguments = ([upload], "robust", LOOP) if api_name == "/purify" else (upload, "PGD", "original", "robust", 8, 3, 10)
    told = refusal(client, *arguments, api_name=api_name)
    assert "cannot be read" in told and "/" not in told.replace("8/255", "")


def test_nothing_is_chosen_that_is_not_offered(client: Client) -> None:
    """Oracle: specification: neither paths nor Hub ids nor other attacks."""
    scene = handle_file(str(EXAMPLES / "scene.png"))
    assert "user/model" in refusal(client, [scene], "user/model", LOOP, api_name="/purify")
    assert "/etc" in refusal(client, scene, "PGD", "/etc", "robust", 8, 3, 10, api_name="/attack")
    assert "glaze" in refusal(client, scene, "glaze", "original", "robust", 8, 3, 10, api_name="/attack")
    assert "1000" in refusal(client, scene, next(iter(ATTACKS)), "original", "robust", 8, 1000, 10, api_name="/attack")
    assert "Choose an image first" in refusal(client, None, "PGD", "original", "robust", 8, 3, 10, api_name="/attack")


def test_no_file_outside_is_read(address: str, tmp_path: Path) -> None:
    """Oracle: the server's answers to a path on its own disk, as a file and as an upload."""
    secret = tmp_path / "secret.png"
    shutil.copy(EXAMPLES / "scene.png", secret)
    for path in (secret, EXAMPLES.parent / "page.py", Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert refused.value.code in (403, 404)
    body = json.dumps(
        {"data": [[{"path": str(secret), "meta": {"_type": "gradio.FileData"}}], "robust", LOOP]}
    ).encode()
    call = urllib.request.Request(f"{address}gradio_api/call/purify", body, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(call))["event_id"]
    answer = urllib.request.urlopen(f"{address}gradio_api/call/purify/{event}").read().decode()
    assert answer.startswith("event: error") and "Traceback" not in answer


def test_a_large_upload_is_refused(address: str) -> None:
    """Oracle: HTTP's code for it."""
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        + bytes(MAX_BYTES + 1)
        + b"\r\n--x--"
    )
    request = urllib.request.Request(
        f"{address}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413


def test_an_unexpected_error_is_logged_and_not_shown(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: specification."""

    def broken(*_: object) -> None:
        raise RuntimeError("secret of the server")

    monkeypatch.setattr(page_module, "read_table", broken)
    told = refusal(client, [handle_file(str(EXAMPLES / "results.json"))], None, "value", True, api_name="/results")
    assert "something went wrong" in told.lower() and "secret" not in told
    assert "secret of the server" in caplog.text


def test_texts_are_shown_as_they_are() -> None:
    """Oracle: HTML; names of files come from visitors."""
    assert said("<b>1</b>", "2") == "&lt;b&gt;1&lt;/b&gt;<br>2"
    assert message("`x` of <b> is bad").message == "X of &lt;b&gt; is bad"


def test_the_page_asks_for_nothing_elsewhere(address: str) -> None:
    """Oracle: the page itself: no script and no style of another host."""
    text = urllib.request.urlopen(address).read().decode()
    assert "fonts.googleapis.com" not in text and "cdnjs" not in text
