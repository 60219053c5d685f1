"""The page as programs see it: gradio's own client against the real server on this machine."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import ROOT, build_tiny_vae
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed; pip install -r requirements/app.txt")
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from srl_utils.app import __main__ as app
from srl_utils.app import page as page_module
from srl_utils.app import purifying
from srl_utils.app.attacking import ATTACKS
from srl_utils.app.page import build_page, launch_settings, message, said
from srl_utils.app.purifying import PURIFIERS
from srl_utils.app.serving import PREFIX
from srl_utils.app.tables import MAX_REPORTS
from srl_utils.app.uploads import MAX_BYTES
from srl_utils.app.watching import WatchedBar
from srl_utils.app.world import Visitors, World
from srl_utils.vae.codec import frozen_codec

EXAMPLES = Path(app.__file__).parent / "examples"
LOOP = PURIFIERS[0]
ATTACK = ["PGD", "original", "robust", 8, 1, 10]
"""What follows the image in a call of /attack."""


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
    with served() as local:
        yield local


@contextmanager
def served() -> Iterator[str]:
    """Serve the page of two small VAEs within."""
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


def post(address: str, place: str, content: object) -> Any:
    """Return the server's answer to a request of JSON."""
    request = urllib.request.Request(
        f"{address}gradio_api/{place}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request))


def called(address: str, name: str, data: list[Any]) -> str:
    """Return the events of a call that no client has prepared."""
    event = post(address, f"call/{name}", {"data": data})["event_id"]
    return urllib.request.urlopen(f"{address}gradio_api/call/{name}/{event}").read().decode()


def upload(address: str, file: Path) -> dict[str, Any]:
    """Upload a file, and return what a call takes for it."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n\r\n'
    request = urllib.request.Request(
        f"{address}gradio_api/upload", head.encode() + file.read_bytes() + b"\r\n--x--\r\n",
        {"Content-Type": "multipart/form-data; boundary=x"},
    )  # fmt: skip
    return {"path": json.load(urllib.request.urlopen(request))[0], "meta": {"_type": "gradio.FileData"}}


def await_that(true: Callable[[], bool]) -> None:
    """Wait for something, a minute at most."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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


def test_a_report_folder_of_many_files_is_read(address: str, tmp_path: Path) -> None:
    """Oracle: specification: the limit holds for results files alone; what no float holds is sent as nothing."""
    (row, *_) = json.loads((EXAMPLES / "results.json").read_text())
    (tmp_path / "Results.JSON").write_text(json.dumps([{**row, "value": 10**400, "n": 10**30, "vae": "\ud800"}]))
    (tmp_path / "000000.json").write_text("{")
    (cell, results) = (upload(address, tmp_path / name) for name in ("000000.json", "Results.JSON"))
    answer = called(address, "results", [None, [cell] * MAX_REPORTS + [results], "value", True])
    assert "Rows: 1." in answer and "event: error" not in answer
    answer = called(address, "results", [None, [results] * (MAX_REPORTS + 1), "value", True])
    assert answer.startswith("event: error") and f"choose {MAX_REPORTS} at most" in answer


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
def test_no_results_outside_are_read(address: str, tmp_path: Path, meta: dict[str, Any]) -> None:
    """Oracle: the answer to a path on the server's own disk, in either input, among uploads."""
    shutil.copy(EXAMPLES / "results.json", tmp_path)
    mine, secret = upload(address, EXAMPLES / "results.json"), {"path": str(tmp_path / "results.json"), **meta}
    for inputs in ([[mine, secret], None], [None, [mine, secret]]):
        assert called(address, "results", [*inputs, "value", True]).startswith("event: error")


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


def test_an_image_of_the_server_is_not_read(address: str, tmp_path: Path) -> None:
    """Oracle: the message; gradio checks a path only if the request marks it as a file, which this one does not."""
    shutil.copy(EXAMPLES / "scene.png", tmp_path / "secret.png")
    answer = called(address, "attack", [{"path": str(tmp_path / "secret.png")}, *ATTACK])
    assert answer.startswith("event: error") and "Upload the file" in answer


def test_images_within_a_request_are_refused_and_not_kept(address: str, temporary: Path) -> None:
    """Oracle: the message, and the files of the server before and after."""
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    before = set(temporary.rglob("*"))
    for payload in ({"path": None, "url": url}, {"path": None, "url": url, "meta": {"_type": "gradio.FileData"}}):
        answer = called(address, "attack", [payload, *ATTACK])
        assert answer.startswith("event: error")
        assert "meta" in payload or "Upload the file" in answer
    assert set(temporary.rglob("*")) == before


@pytest.mark.parametrize("name", ["attack", "purify", "results"])
def test_files_of_urls_are_not_fetched(address: str, name: str) -> None:
    """Oracle: the message; the address is one of those that the network never gives to anybody."""
    file = {"path": "http://192.0.2.1/scene.png", "meta": {"_type": "gradio.FileData"}}
    data = {"attack": [file, *ATTACK], "purify": [[file], "robust", LOOP], "results": [[file], None, "value", True]}
    assert "Upload the file" in called(address, name, data[name])


@pytest.mark.parametrize("name", ["attack", "purify"])
def test_a_file_that_was_deleted_meanwhile_is_a_message(
    address: str, name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the message, and a log without traceback."""
    file = upload(address, EXAMPLES / "scene.png")
    Path(file["path"]).unlink()
    answer = called(address, name, [file, *ATTACK] if name == "attack" else [[file], "robust", LOOP])
    assert "Scene.png was deleted after 10 minutes; choose it again" in answer
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_files_are_deleted_when_their_time_is_over(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the disk; an upload and the results of a computation, with seconds in place of ten minutes."""
    monkeypatch.setattr(page_module, "SWEEP", 1)
    monkeypatch.setattr(page_module, "KEEP", 3)
    with served() as address:
        file = upload(address, EXAMPLES / "protected.png")
        assert "protected-purified.png" in called(address, "purify", [[file], "robust", LOOP])
        await_that(lambda: not Path(file["path"]).exists() and not list(temporary.rglob("protected-purified.png")))


def test_files_are_kept_while_a_long_computation_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the answer: the second file is still there after the first has taken longer than files are kept."""
    monkeypatch.setattr(page_module, "SWEEP", 1)
    monkeypatch.setattr(page_module, "KEEP", 3)
    sanitize_file = purifying.sanitize_file
    monkeypatch.setattr(
        purifying, "sanitize_file", lambda *given, **named: time.sleep(6) or sanitize_file(*given, **named)
    )
    with served() as address:
        uploads = [upload(address, EXAMPLES / name) for name in ("scene.png", "protected.png")]
        assert "Images cleaned: 2." in called(address, "purify", [uploads, "robust", LOOP])


def test_a_request_of_unknown_size_is_refused(address: str) -> None:
    """Oracle: HTTP's code for it."""
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"))
    connection.request("POST", "/gradio_api/upload", iter([b"x"]), encode_chunked=True)
    assert connection.getresponse().status == 411


def test_cancel_ends_what_its_own_tab_has_begun(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: which computations run: one that waits never begins, and neither another tab nor another visitor ends it."""
    running: list[int] = []

    def endless(*arguments: Any) -> None:
        running.append(len(running))
        bar: WatchedBar = arguments[-1]
        try:
            await_that(lambda: bar.update(0) and False)
        finally:
            running.pop()

    monkeypatch.setattr(page_module, "compare", endless)
    functions = {
        each["api_name"]: each["id"] for each in json.load(urllib.request.urlopen(f"{address}config"))["dependencies"]
    }
    file = upload(address, EXAMPLES / "scene.png")

    def join(session: str) -> str:
        return post(address, "queue/join", {
            "data": [file, *ATTACK], "fn_index": functions["attack"], "session_hash": session,
        })["event_id"]  # fmt: skip

    def cancel(session: str, stop: str, event: str | None = None) -> None:
        """Do what the button does: it asks the app to end the computation, and gradio to forget the event."""
        post(address, "run/predict", {"data": [], "fn_index": functions[stop], "session_hash": session})
        if event is not None:
            post(address, "cancel", {"session_hash": session, "fn_index": functions["attack"], "event_id": event})

    mine = join("mine")
    await_that(lambda: running == [0])
    theirs = join("theirs")
    cancel("theirs", "stop_1", theirs)
    cancel("mine", "stop")
    time.sleep(0.5)
    assert running == [0]
    cancel("mine", "stop_1", mine)
    await_that(lambda: running == [])
    time.sleep(0.5)
    assert running == []


def test_a_killed_and_an_ended_app_leave_nothing(tmp_path: Path) -> None:
    """Oracle: the disk after SIGTERM in the middle of a computation; the real command."""
    (tmp_path / f"{PREFIX}killed").mkdir()
    command = [sys.executable, "-m", "srl_utils.app", "--device", "cpu", "--port", str(free_port())]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as child:
        address = f"http://{app.LOCALHOST}:{command[-1]}/"
        while not answers(address):
            assert child.poll() is None
            time.sleep(0.1)
        (folder,) = tmp_path.glob(f"{PREFIX}*")
        assert folder.name != f"{PREFIX}killed"
        file = upload(address, EXAMPLES / "scene.png")
        post(address, "call/attack", {"data": [file, "PGD", "original", "robust", 8, 200, 10]})
        time.sleep(1)
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 0 and "Traceback" not in errors
    assert not folder.exists()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address).read()
    except urllib.error.URLError:
        return False
    return True


def free_port() -> int:
    with socket.create_server((app.LOCALHOST, 0)) as server:
        return server.getsockname()[1]


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
