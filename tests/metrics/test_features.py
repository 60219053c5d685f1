from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from helpers.runs import ROOT, write_photos
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch_fidelity import FeatureExtractorInceptionV3, calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchvision.models import alexnet
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    RegNetConfig,
    RegNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from srl_utils.errors import UserError
from srl_utils.evaluation.cli import main as evaluation
from srl_utils.images.pixels import from_pil, to_pil
from srl_utils.metrics import features as set_metrics
from srl_utils.metrics.features import (
    INCEPTION_LAYERS,
    INCEPTION_WEIGHTS,
    SET_METRICS,
    ClipSimilarity,
    ImageClassifier,
    InceptionFeatures,
    changes_of_clips,
    classifier_distance,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_clip_similarity,
    load_image_classifier,
    load_inception_features,
    mean_similarity,
)
from srl_utils.metrics.losses import LPIPS_TRUNKS, load_perceptual_distance

SET_SIZE, BATCH = 8, 3
SUBSETS = {"subset_size": 6, "subsets": 4, "seed": 3}
SPLITS = {"splits": 3, "seed": 3}
PATIENCE = 5.0
"""In seconds, what a report may lose on a metric that it has to leave out."""
UNREACHABLE = "http://127.0.0.1:9"
REPORTED = (INCEPTION_WEIGHTS, "as `inception_weights`")

TEXTS = ["a cat", "the cat ate a great many of the cakes", "cake"]
CLIP_LIMIT = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LOST_FILES = {
    "no weights": ["model.safetensors"],
    "no config": ["config.json"],
    # One name of transformers 5 and one of transformers 4.
    "no processor": ["processor_config.json", "preprocessor_config.json"],
    "no tokenizer": ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"],
}
CLIP_FILES = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "folder as `clip_model`",
)


def draw_patterns(count: int, size: tuple[int, int], cells: int) -> Tensor:
    """`[count,3,*size]` of random colours and contrasts, with `cells` patches along a side; in part beyond [-1,1]."""
    generator = torch.Generator().manual_seed(cells)
    patches = torch.randn(count, 3, cells, cells, generator=generator)
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    contrast = torch.rand(count, 1, 1, 1, generator=generator)
    return contrast * nn.functional.interpolate(patches, size, mode="bilinear") + 0.3 * colour


# --- Inception -----------------------------------------------------------------------------------------------


class UnloadedInception(FeatureExtractorInceptionV3):
    """The architecture; the class itself insists on weights."""

    def load_state_dict(self, *_) -> None:
        """Leaves the weights as they were drawn."""


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """A weights file as torch-fidelity reads it: seeded, and drawn so that 94 layers keep the signal's scale."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UnloadedInception("random", ["logits"], feature_extractor_weights_path=folder / "empty.pth")
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.normal_(network.fc.weight, std=0.3)
        nn.init.normal_(network.fc.bias, std=3)
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


@pytest.fixture(scope="session")
def inception(inception_weights) -> InceptionFeatures:
    return load_inception_features(inception_weights)


@pytest.fixture(scope="session")
def image_sets() -> list[Tensor]:
    """Two sets `[8,3,64,64]`, one of coarse and one of fine patterns."""
    return [draw_patterns(SET_SIZE, (64, 64), cells) for cells in (4, 16)]


@pytest.fixture(scope="session")
def features(inception, image_sets) -> list[dict[str, Tensor]]:
    """Of both sets, in batches of 3."""

    def batched(images: Tensor) -> dict[str, Tensor]:
        parts = [inception.features(batch) for batch in images.split(BATCH)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return [batched(images) for images in image_sets]


@pytest.fixture(scope="session")
def published(inception_weights, image_sets, tmp_path_factory) -> dict[str, float]:
    """What torch-fidelity makes of the same images, saved as PNG."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for folder, images in zip(folders, image_sets, strict=True):
        for index, image in enumerate(images):
            to_pil(image).save(folder / f"{index:03}.png")
    return calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), fid=True, kid=True, isc=True,
        feature_extractor_weights_path=inception_weights, batch_size=BATCH, rng_seed=3,
        kid_subset_size=6, kid_subsets=4, isc_splits=3,
        cuda=False, save_cpu_ram=True, cache=False, verbose=False,
    )  # fmt: skip


def test_frechet_distance_equals_torch_fidelity(features, published) -> None:
    """Oracle: torch_fidelity.calculate_metrics on the saved images and the same weights; float64 sums."""
    expected = published["frechet_inception_distance"]
    assert expected > 1
    assert frechet_distance(*(each["pool"] for each in features)) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_is_never_below_zero() -> None:
    """Oracle: a distance of 0; torch-fidelity's of a set and itself is on either side of it, by rounding."""
    of_sets = [frechet_distance(same, same) for same in (_noise(24, 12), _noise(20, 4), _noise(9, 30))]
    assert of_sets == pytest.approx([0.0] * 3, abs=1e-9) and not any(str(value).startswith("-") for value in of_sets)


def test_kernel_distance_equals_torch_fidelity(features, published) -> None:
    """Oracle: as above; mean and deviation over the same seeded subsets, float32 kernels."""
    expected = [published[f"kernel_inception_distance_{part}"] for part in ("mean", "std")]
    value = kernel_distance(*(each["pool"] for each in features), **SUBSETS)
    assert min(expected) > 1e-3
    assert list(value) == pytest.approx(expected, rel=1e-5)
    assert value != kernel_distance(*(each["pool"] for each in features), **{**SUBSETS, "seed": 4})


def test_inception_score_equals_torch_fidelity(features, published) -> None:
    """Oracle: as above; mean and deviation over the same splits of the same shuffled images."""
    expected = [published[f"inception_score_{part}"] for part in ("mean", "std")]
    value = inception_score(features[0]["logits"], **SPLITS)
    assert expected[0] > 1.1 and expected[1] > 1e-3
    assert list(value) == pytest.approx(expected, rel=1e-5)
    assert value != inception_score(features[0]["logits"], **{**SPLITS, "seed": 4})


def test_features_do_not_depend_on_the_batch(inception, features, image_sets) -> None:
    """Oracle: invariance, each image has its own; convolutions of other batch sizes may sum in another order."""
    alone = inception.features(image_sets[0][3:4].requires_grad_(True))
    for name, width in {"pool": 2048, "logits": 1008}.items():
        assert alone[name].shape == (1, width) and alone[name].dtype == torch.float32
        assert not alone[name].requires_grad
        torch.testing.assert_close(alone[name], features[0][name][3:4], rtol=1e-3, atol=1e-3)


def test_features_ignore_autocast(inception, image_sets) -> None:
    """Oracle: the same features without autocast, exactly."""
    expected = inception.features(image_sets[1][:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = inception.features(image_sets[1][:1])
    assert all(torch.equal(value[name], expected[name]) for name in INCEPTION_LAYERS)


@pytest.mark.parametrize(
    ("metric", "too_few"),
    [
        (lambda n: frechet_distance(_noise(n, 4), _noise(20, 4)), 1),
        (lambda n: frechet_distance(_noise(20, 4), _noise(n, 4)), 1),
        (lambda n: kernel_distance(_noise(n, 4), _noise(20, 4), subset_size=6), 5),
        (lambda n: kernel_distance(_noise(20, 4), _noise(n, 4), subset_size=6), 5),
        (lambda n: inception_score(_noise(n, 4), splits=3), 5),
        (lambda n: kernel_distance(_noise(20, 4), _noise(20, 4), subset_size=n), 1),
    ],
    ids=["FID first", "FID second", "KID first", "KID second", "IS", "KID subset"],
)
def test_metric_needs_a_minimum_of_images(metric: Callable, too_few: int) -> None:
    """Oracle: specification; one image fewer is refused by number, and the minimum itself gives finite numbers."""
    with pytest.raises(ValueError, match=rf"at least {too_few + 1} images, got {too_few}"):
        metric(too_few)
    assert torch.tensor(metric(too_few + 1)).isfinite().all()


def _noise(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


# --- Weights that are not to be had --------------------------------------------------------------------------


@pytest.fixture
def torch_home(tmp_path, monkeypatch) -> Path:
    """An empty cache; the folder where torch.hub keeps weights below it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    return tmp_path / "torch-home/hub/checkpoints"


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., str]]:
    """`serve(body, status=200)` starts a server that answers everything so, and returns its address.

    A body of None is silence; a status of None is not HTTP.
    """
    # Else the server's address would be asked of a proxy, where the environment names one.
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers, silence = [], threading.Event()

    def start(body: bytes | None, status: int | None = 200) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if body is None:
                    silence.wait(30)
                    return
                if status is not None:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_) -> None:
                """Says nothing."""

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    silence.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def refusal(load: Callable, *arguments) -> str:
    """The one line that `load` refuses with, within the patience of a report."""
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert time.monotonic() - start < PATIENCE
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_weights_file_is_that_of_torch_fidelity() -> None:
    """Oracle: torch-fidelity's own address of its weights."""
    assert URL_INCEPTION_V3.rsplit("/", 1)[-1] == INCEPTION_WEIGHTS


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def damaged_weights(kind: str, intact: Path, folder: Path) -> Path:
    path = folder / "weights.pth"
    if kind == "of another network":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    elif kind == "no weights":
        torch.save([1, 2, 3], path)
    elif kind == "code":
        torch.save(Payload(folder / "trace"), path)
    elif kind != "absent":
        path.write_bytes({"empty": b"", "text": b"<html>", "cut short": intact.read_bytes()[:1_000_000]}[kind])
    return path


@pytest.mark.parametrize("kind", ["absent", "empty", "text", "cut short", "of another network", "no weights", "code"])
def test_unusable_weights_file_is_explained(kind, inception_weights, tmp_path, torch_home) -> None:
    """Oracle: specification, one line that names the file given and what to put where; nothing in it is run."""
    path = damaged_weights(kind, inception_weights, tmp_path)
    message = refusal(load_inception_features, path)
    assert all(part in message for part in (*REPORTED, str(path), str(torch_home)))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "answer",
    [(b"<html>no weights here</html>",), (b"gone", 404), (b"no HTTP\r\n\r\n", None), (None,)],
    ids=["other file", "error", "other protocol", "silence"],
)
def test_failed_download_leaves_nothing(answer, serve, torch_home, monkeypatch) -> None:
    """Oracle: a real server that sends something else or nothing; the cache holds no file afterwards."""
    monkeypatch.setattr(set_metrics, "URL_INCEPTION_V3", serve(*answer))
    monkeypatch.setattr(set_metrics, "NETWORK_TIMEOUT", 0.5)
    refusal(load_inception_features)
    assert not [path for path in torch_home.rglob("*") if path.is_file()]


def test_weights_are_downloaded_once(serve, torch_home, inception_weights, image_sets, inception, monkeypatch) -> None:
    """Oracle: a real server of weights whose name holds their checksum; then without it, from torch.hub's cache."""
    content = inception_weights.read_bytes()
    name = f"weights-{sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setattr(set_metrics, "INCEPTION_WEIGHTS", name)
    for address in (serve(content), UNREACHABLE):
        monkeypatch.setattr(set_metrics, "URL_INCEPTION_V3", address)
        weights = load_inception_features().network.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in inception.network.state_dict().items())
    assert [path.name for path in torch_home.iterdir()] == [name]


WITHOUT_NETWORK = """
import json, time
from srl_utils.errors import UserError
from srl_utils.metrics.features import load_clip_similarity, load_inception_features
import transformers.models.clip.modeling_clip

for load in (load_inception_features, load_clip_similarity):
    start = time.monotonic()
    try:
        load()
    except UserError as error:
        print(json.dumps([time.monotonic() - start, str(error)]))
"""


def test_no_network_costs_a_report_little(tmp_path) -> None:
    """Oracle: a real process with empty caches, whose every way out is closed, and nothing set to tell it so.

    Both networks are given up in seconds, and each message is one line that names the files, the flag and the folder.
    """
    closed = dict.fromkeys(("https_proxy", "http_proxy", "all_proxy", "HF_ENDPOINT"), UNREACHABLE)
    caches = {name: str(tmp_path / name) for name in ("TORCH_HOME", "HF_HOME")}
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith(("proxy", "_offline"))}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK],
        cwd=ROOT, env={**inherited, **closed, **caches}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (inception_time, inception_message), (clip_time, clip_message) = map(json.loads, result.stdout.splitlines())
    assert max(inception_time, clip_time) < PATIENCE
    folder = str(tmp_path / "TORCH_HOME/hub/checkpoints")
    assert all(part in inception_message for part in (*REPORTED, folder))
    assert all(part in clip_message for part in ("openai/clip-vit-base-patch32", *CLIP_FILES))
    assert "\n" not in inception_message + clip_message
    assert not [path for path in (tmp_path / "TORCH_HOME").rglob("*") if path.is_file()]


@pytest.mark.parametrize(("status", "answers"), [(200, True), (404, True), (401, True), (503, False)])
def test_hub_that_refuses_has_answered(status, answers, serve, monkeypatch) -> None:
    """Oracle: specification; a model that is not there is the Hub's to explain, a Hub that is down would be retried."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(set_metrics, "hf_hub_url", lambda *_: f"{serve(b'', status)}/a/b/resolve/main/config.json")
    assert set_metrics._hub_answers("a/b") is answers


# --- CLIP ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP of two layers and 16 channels on pictures of 24 pixels, with a tokenizer of letters and one word."""
    folder = tmp_path_factory.mktemp("clip")
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n", encoding="utf-8")
    ends = {"bos_token_id": vocabulary["<|startoftext|>"], "eos_token_id": vocabulary["<|endoftext|>"]}
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**layers, **ends, "vocab_size": len(words), "max_position_embeddings": CLIP_LIMIT},
        vision_config={**layers, "image_size": 24, "patch_size": 8},
        projection_dim=12,
        initializer_factor=20.0,  # else the embeddings of all pictures are nearly one
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    pictures = CLIPImageProcessor(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24},
        image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.3],
    )  # fmt: skip
    CLIPProcessor(pictures, CLIPTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip(clip_folder) -> ClipSimilarity:
    return load_clip_similarity(str(clip_folder))


@pytest.fixture
def pictures() -> list[Tensor]:
    """Two batches `[3,3,40,56]`: to be resized and cropped, as they are not square."""
    return [draw_patterns(3, (40, 56), cells) for cells in (4, 16)]


def clip_outputs(folder: Path, images: Tensor):
    """transformers' own forward pass on the saved pictures and `TEXTS`."""
    inputs = CLIPProcessor.from_pretrained(folder)(
        text=TEXTS, images=[to_pil(image) for image in images],
        return_tensors="pt", padding=True, truncation=True, max_length=CLIP_LIMIT,
    )  # fmt: skip
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**inputs), model.logit_scale.exp()


def test_image_text_similarity_equals_transformers(clip, clip_folder, pictures) -> None:
    """Oracle: the diagonal of CLIPModel's logits without their scale, from CLIPProcessor's inputs; float32 rounding.

    One of the texts is longer than this CLIP reads, and one is shorter than the others.
    """
    outputs, scale = clip_outputs(clip_folder, pictures[0])
    value = clip.image_text(pictures[0], TEXTS)
    torch.testing.assert_close(value, outputs.logits_per_image.diagonal() / scale, rtol=0, atol=1e-5)
    assert value.shape == (3,) and value.std() > 0.01


def test_image_image_similarity_equals_transformers(clip, clip_folder, pictures) -> None:
    """Oracle: products of CLIPModel's normalised image embeddings; 1 for an image and itself; float32 rounding."""
    embeddings = [clip_outputs(clip_folder, images)[0].image_embeds for images in pictures]
    value = clip.image_image(*pictures)
    torch.testing.assert_close(value, (embeddings[0] * embeddings[1]).sum(dim=1), rtol=0, atol=1e-5)
    assert value.shape == (3,) and value.std() > 0.01
    torch.testing.assert_close(clip.image_image(pictures[0], pictures[0]), torch.ones(3), rtol=0, atol=1e-5)


def test_similarity_ignores_autocast_and_keeps_no_graph(clip, pictures) -> None:
    """Oracle: the same values without either, exactly."""
    first, second = pictures
    expected = clip.image_text(first, TEXTS), clip.image_image(first, second)
    first.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = clip.image_text(first, TEXTS), clip.image_image(first, second)
    for value, known in zip(values, expected, strict=True):
        assert torch.equal(value, known) and not value.requires_grad


def test_half_precision_weights_run_in_full(clip_folder, tmp_path, pictures) -> None:
    """Oracle: the same weights, rounded to half precision and stored in float32, exactly."""
    values = []
    for dtype in (torch.float16, torch.float32):
        processor = CLIPProcessor.from_pretrained(clip_folder)
        folder = tmp_path / str(dtype)
        CLIPModel.from_pretrained(clip_folder).half().to(dtype).save_pretrained(folder)
        processor.save_pretrained(folder)
        values.append(load_clip_similarity(str(folder)).image_text(pictures[0], TEXTS))
    assert values[0].dtype == torch.float32 and torch.equal(*values)


def test_mean_similarity_is_the_mean_over_all_pairs() -> None:
    """Oracle: PyTorch's cosine similarity of each pair; features of any length."""
    draws = torch.Generator().manual_seed(0)
    features, others = torch.randn(3, 5, generator=draws), 7 * torch.randn(4, 5, generator=draws)
    expected = [torch.cosine_similarity(one[None], others).mean() for one in features]
    torch.testing.assert_close(mean_similarity(features, others), torch.stack(expected))


def test_pairs_have_to_be_complete(clip, pictures) -> None:
    """Oracle: specification; one of a kind would otherwise be compared with all of the other."""
    for compare in (
        lambda: clip.image_text(pictures[0], TEXTS[:1]),
        lambda: clip.image_image(pictures[0][:1], pictures[1]),
    ):
        with pytest.raises(ValueError, match=r"3 images .* 1|1 images .* 3"):
            compare()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_refused(value, clip, inception, images) -> None:
    """Oracle: specification; rounded to bytes they would pass for some colour."""
    broken = images(2)
    broken[1, 0, 0, 0] = value
    for see in (inception.features, lambda pixels: clip.image_text(pixels, TEXTS[:2])):
        with pytest.raises(ValueError, match="not finite"):
            see(broken)


def damaged_clip(kind: str, intact: Path, folder: Path) -> str:
    """A copy of the model without what its kind says."""
    for path in intact.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    if kind == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "half of the network":
        model = CLIPModel.from_pretrained(intact)
        model.save_pretrained(folder, state_dict={k: v for k, v in model.state_dict().items() if "text" in k})
    else:
        for name in LOST_FILES[kind]:
            (folder / name).unlink(missing_ok=True)
    return str(folder)


@pytest.mark.parametrize("kind", [*LOST_FILES, "weights cut short", "half of the network"])
def test_unusable_clip_is_explained(kind, clip_folder, tmp_path) -> None:
    """Oracle: specification, one line with the name given, the files and the flag; never a random half."""
    name = damaged_clip(kind, clip_folder, tmp_path)
    message = refusal(load_clip_similarity, name)
    assert all(part in message for part in (name, *CLIP_FILES))


def test_clip_without_transformers_is_explained(clip_folder, monkeypatch) -> None:
    """Oracle: specification; transformers is not among the requirements, and a None in its place cannot be imported."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers" in refusal(load_clip_similarity, str(clip_folder))


@pytest.mark.parametrize("name", ["nobody/nothing", "no/such/folder"])
def test_unknown_clip_is_explained(name) -> None:
    """Oracle: as above, for what is neither cached nor a folder; the tests' Hub is offline."""
    message = refusal(load_clip_similarity, name)
    assert all(part in message for part in (name, *CLIP_FILES))


# --- LPIPS, as it is reported --------------------------------------------------------------------------------


def test_alex_lpips_equals_the_package(torch_home, images) -> None:
    """Oracle: the lpips package on the same random trunk, read from the file that torchvision would download.

    The package divides by |x| + 1e-10 where this takes the root of |x|^2 + 1e-10.
    """
    torch_home.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in alexnet().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weights = {
        # LPIPS has no use for the classifier, which is most of the file: one zero stands for all.
        name: torch.zeros(1).expand(shape)
        if name.startswith("classifier")
        else torch.randn(shape, generator=generator) * shape[1:].numel() ** -0.5
        for name, shape in shapes.items()
    }
    torch.save(weights, torch_home / LPIPS_TRUNKS["alex"])
    perceptual = load_perceptual_distance("alex")
    first, second = images(2, 64), images(2, 64, seed=1)
    value = perceptual.distance(first, perceptual.features(second))
    expected = perceptual.network(first, second).flatten()
    assert torch.equal(perceptual.network.net.slice1[0].weight, weights["features.0.weight"])
    assert expected.min() > 1e-3
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


# --- classifier ----------------------------------------------------------------------------------------


LABELS = ("red ring", "ring", "blue star")


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory) -> Path:
    """A RegNet of 8 channels for pictures of 24 pixels."""
    folder = tmp_path_factory.mktemp("classifier")
    config = RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, id2label=dict(enumerate(LABELS))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RegNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(
        folder
    )
    return folder


def test_classifier_features_are_those_of_the_library(classifier_folder, image_sets) -> None:
    """Oracle: transformers' own model on images that the library resized, pooled by its own layer."""
    images = image_sets[0][:3]
    found = load_image_classifier(str(classifier_folder)).features(images)
    model = RegNetForImageClassification.from_pretrained(classifier_folder).eval()
    processor = ViTImageProcessor.from_pretrained(classifier_folder)
    pixels = processor([to_pil(image) for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.regnet(pixels).pooler_output.flatten(1), model(pixels).logits
    torch.testing.assert_close(
        found["pool"], expected[0], atol=2e-2, rtol=2e-2
    )  # PIL and torchvision resize differently
    torch.testing.assert_close(found["logits"], expected[1], atol=2e-2, rtol=2e-2)


def test_classifier_distance_is_that_of_its_normalised_layers(classifier_folder, image_sets) -> None:
    """Oracle: the definition, on the layers of transformers' own model; equal images are 0 apart, and attacks find a way."""
    distance = classifier_distance(load_image_classifier(str(classifier_folder)))
    first, second = image_sets[0][:2], image_sets[0][2:4]
    model = RegNetForImageClassification.from_pretrained(classifier_folder).eval()
    with torch.no_grad():  # the processor's mean and deviation, for images in [-1,1]
        layers = [model((each / 2) / 0.25, output_hidden_states=True).hidden_states for each in (first, second)]
        lengths = [[normalize(layer, dim=1) for layer in each] for each in layers]
    apart = [(own - other).square().sum(dim=1).mean(dim=(1, 2)) for own, other in zip(*lengths, strict=True)]
    features = distance.features(second)
    expected = torch.stack(apart).mean(dim=0)
    torch.testing.assert_close(distance.distance(first, features), expected, atol=1e-5, rtol=1e-4)
    assert distance.distance(second, features).max() < 1e-9
    moved = first.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distance.distance(moved, features).sum(), moved)
    assert gradient.isfinite().all() and gradient.abs().amax(dim=(1, 2, 3)).min() > 0


def test_a_classifier_without_maps_gives_no_distance() -> None:
    """Oracle: specification; the layers of a ViT are sequences."""
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=64)
    classifier = ImageClassifier(ViTForImageClassification(config), ViTImageProcessor())
    assert "not convolutional" in refusal(classifier_distance, classifier)


@pytest.mark.parametrize(
    ("likeliest", "shown"),
    [(0, [1.0, 0.0, 0.0, 1.0]), (1, [1.0, 1.0, 0.0, 1.0]), (2, [0.0, 0.0, 1.0, 0.0])],
)
def test_shown_is_what_the_text_says_in_whole_words(
    likeliest: int, shown: list[float], classifier_folder, image_sets
) -> None:
    """Oracle: closed form, a classifier that always says the same."""
    classifier = load_image_classifier(str(classifier_folder))
    with torch.no_grad():
        classifier.model.classifier[1].bias[likeliest] = 1e3
    texts = ["a small red ring", "a ring that is red", "one blue star on a ringlet", "blue and red ring star"]
    assert classifier.shown(image_sets[0][:4], texts).tolist() == shown


def test_a_classifier_that_cannot_be_had_is_explained(tmp_path, classifier_folder) -> None:
    """Oracle: specification, one line that says what to do; weights that are missing are not made up."""
    message = refusal(load_image_classifier, str(tmp_path))
    assert "it has no config.json" in message and "folder as `classifier`" in message
    (tmp_path / "config.json").write_bytes((classifier_folder / "config.json").read_bytes())
    refusal(load_image_classifier, str(tmp_path))


# --- in a report -------------------------------------------------------------------------------------------


def test_metrics_of_the_evaluation(
    inception, inception_weights, clip, clip_folder, image_sets, tiny_vae, tmp_path, capsys
) -> None:
    """Oracle: FID, KID and CLIP similarity computed here, against the rows of the real command.

    Only what has values per image has an interval, and the Inception Score, for which there are too few, is left out.
    """
    tiny_vae.save_pretrained(tmp_path / "vae")
    write_photos(tmp_path / "photos", image_sets[0])
    evaluation.main([
        "reconstruction", "--baseline", str(tmp_path / "vae"), "--vae", f"same={tmp_path / 'vae'}", "--data_dir",
        str(tmp_path / "photos"), "--resolution", "64", "--num_images", str(SET_SIZE), "--attacks", "clean",
        "--metrics", "psnr", "rfid", "kid", "is", "clip", "--inception_weights", str(inception_weights),
        "--clip_model", str(clip_folder), "--no_checks", "--output_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    assert "is was left out: it needs at least 20 images, and there are 8" in capsys.readouterr().out
    images = torch.stack([from_pil(to_pil(image)) for image in image_sets[0]])
    with torch.no_grad():
        reconstructions = tiny_vae.decode(tiny_vae.encode(images).latent_dist.mean).sample
    pools = [inception.features(each)["pool"] for each in (images, reconstructions)]
    expected = {
        "rfid": frechet_distance(*pools),
        "kid": kernel_distance(*pools, subset_size=SET_SIZE, subsets=1).mean,
        "clip": clip.image_image(reconstructions, images).mean().item(),
    }
    rows = [row for row in json.loads((tmp_path / "out/results.json").read_text()) if row["metric"] != "psnr"]
    measured = sorted((row["vae"], row["metric"]) for row in rows)
    assert measured == sorted(itertools.product(["original", "same"], expected))
    for row in rows:
        assert (row["ci95"] is None) == (row["metric"] != "clip") and row["n"] == SET_SIZE
        assert row["value"] == pytest.approx(expected[row["metric"]], rel=1e-2)


def test_set_metrics_are_the_published_ones() -> None:
    """Oracle: the functions above with torch-fidelity's own defaults, from the number of images that these need."""
    layers = {"pool": 4, "logits": 6, "changes": 4}
    real, shown = ({layer: _noise(count, width) for layer, width in layers.items()} for count in (1001, 1002))
    values = {name: metric.value(real[metric.layer], shown[metric.layer]) for name, metric in SET_METRICS.items()}
    assert values["rfid"] == values["fid"] == frechet_distance(real["pool"], shown["pool"])
    assert values["kid"] == kernel_distance(real["pool"], shown["pool"]).mean
    assert values["is"] == inception_score(shown["logits"]).mean


def test_changes_of_clips_are_differences_within_each_clip() -> None:
    """Oracle: closed form: a number that grows by k in each frame of clip k changes by k, and never from clip to clip."""
    features = torch.tensor([[0.0], [1.0], [2.0], [7.0], [9.0], [11.0]])
    assert changes_of_clips(features, 2).tolist() == [[1.0], [1.0], [2.0], [2.0]]
