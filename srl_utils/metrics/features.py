"""Compute metrics on features of pretrained networks: Inception or a classifier for sets of images, CLIP for pairs.

Networks run in float32 without gradient, on the device of the images and in the caller's batches. Images are rounded
to the 8 bits of a saved file; values outside [-1,1] are clipped.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
from huggingface_hub import constants, hf_hub_url
from safetensors import SafetensorError
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.utils import create_feature_extractor

from srl_utils.errors import MissingFile, MissingPackage, UnusableFile
from srl_utils.images.pixels import to_unit_range
from srl_utils.metrics.losses import FeatureDistance

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, CLIPModel, CLIPProcessor, PreTrainedModel

INCEPTION = "inception-v3-compat"
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_LAYERS = {"pool": "2048", "logits": "logits_unbiased"}
"""torch-fidelity's names. FID and KID use the pool, the Inception Score the logits without bias."""
SUBSET_SIZE, SPLITS = 1000, 10
"""torch-fidelity's defaults for KID and the Inception Score."""
CLIP_MODEL = "openai/clip-vit-base-patch32"
NETWORK_TIMEOUT = 10.0
"""Seconds, for each wait for a server."""
UNREADABLE = (
    OSError, EOFError, HTTPException, ImportError, RuntimeError, TypeError, ValueError,
    pickle.UnpicklingError, SafetensorError,
)  # fmt: skip
"""Errors of loading without a network, without a file, or from a damaged file or one of another kind."""


class Spread(NamedTuple):
    """Mean and standard deviation of an estimate over its subsets or splits."""

    mean: float
    std: float


class Features(Protocol):
    """A network whose features compare sets of images."""

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return `pool` `[N,D]` and `logits` `[N,K]`, float32, of images `[N,3,H,W]` in [-1,1]."""


class InceptionFeatures:
    """Features of the Inception network that defines FID (Heusel et al. 2017), in torch-fidelity's version."""

    def __init__(self, network: FeatureExtractorInceptionV3) -> None:
        self.network = network

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return `pool` `[N,2048]` and `logits` `[N,1008]`, float32, of images `[N,3,H,W]` in [-1,1].

        Raises:
            ValueError: if a pixel is not finite.
        """
        network = self.network.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            layers = network.convert_features_tuple_to_dict(network(_to_bytes(images)))
        return {name: layers[layer] for name, layer in INCEPTION_LAYERS.items()}


def load_inception_features(weights: str | Path | None = None) -> InceptionFeatures:
    """Load the Inception network.

    Args:
        weights: path of a weights file; None takes torch-fidelity's, and downloads it if it is not cached.

    Raises:
        MissingFile: a FileNotFoundError, if the weights are missing and cannot be downloaded.
        UnusableFile: an OSError, if they are not those of this network.
    """
    folder = Path(torch.hub.get_dir(), "checkpoints")
    try:
        path = Path(weights) if weights else _cached_inception_weights(folder)
        # Refuse a file with anything but tensors, since torch-fidelity would unpickle it.
        torch.load(path, map_location="cpu", weights_only=True)
        network = create_feature_extractor(
            INCEPTION, list(INCEPTION_LAYERS.values()), cuda=False, verbose=False, feature_extractor_weights_path=path
        )
    except UNREADABLE as error:
        raise _kind(error, weights or folder / INCEPTION_WEIGHTS)(
            f"cannot load the Inception weights {weights or URL_INCEPTION_V3} ({_reason(error)}); put an intact "
            f"{INCEPTION_WEIGHTS} into {folder} (TORCH_HOME moves it), or give its path as `inception_weights`"
        ) from None
    return InceptionFeatures(network)


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Return the FID (Heusel et al. 2017) of two sets of `pool` features `[N,2048]` and `[M,2048]`.

    FID is biased upwards, and more so for fewer images: compare only values of equal N and M. Below 2048 images the
    covariance does not have full rank.

    Raises:
        ValueError: if a set has fewer than 2 images, and so no covariance.
    """
    _require(2, "FID", features, others)
    statistics = [fid_features_to_statistics(each.cpu()) for each in (features, others)]
    # Rounding may make the distance of a set to itself negative.
    return max(0.0, fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def kernel_distance(
    features: Tensor, others: Tensor, *, subset_size: int = SUBSET_SIZE, subsets: int = 100, seed: int = 2020
) -> Spread:
    """Return the KID (Binkowski et al. 2018) of two sets of `pool` features `[N,2048]` and `[M,2048]`.

    KID is unbiased, so it may be negative. The defaults, seed included, are torch-fidelity's.

    Args:
        features: one set.
        others: the other set.
        subset_size: images in a random subset.
        subsets: number of pairs of subsets.
        seed: of the random subsets.

    Raises:
        ValueError: if a set has fewer than `subset_size` images, or if subsets have fewer than 2.
    """
    if subset_size < 2:
        raise ValueError(f"KID needs subsets of at least 2 images, got {subset_size}")
    _require(subset_size, f"KID on subsets of {subset_size}", features, others)
    settings = {"kid_subset_size": subset_size, "kid_subsets": subsets, "rng_seed": seed, "verbose": False}
    result = kid_features_to_metric(features, others, **settings)
    return Spread(result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD])


def inception_score(logits: Tensor, *, splits: int = SPLITS, seed: int = 2020) -> Spread:
    """Return the Inception Score (Salimans et al. 2016) of `logits` `[N,1008]`, over splits of the shuffled images.

    Like FID it is biased by the number of images. The defaults, seed included, are torch-fidelity's.

    Raises:
        ValueError: if a split has fewer than 2 images; a single image scores 1 whatever it shows.
    """
    _require(2 * splits, f"the Inception Score in {splits} splits", logits)
    result = isc_features_to_metric(logits.cpu(), splits, rng_seed=seed)
    return Spread(result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD])


def _kernel_distance_of_any(features: Tensor, others: Tensor) -> float:
    """Return the KID; sets of up to `SUBSET_SIZE` images are one subset."""
    if len(features) <= SUBSET_SIZE:
        return kernel_distance(features, others, subset_size=len(features), subsets=1).mean
    return kernel_distance(features, others).mean


class SetMetric(NamedTuple):
    """A metric of a set of images.

    Attributes:
        least: the smallest number of images.
        layer: of the features that it takes.
        value: computes it from those of the original images and of the images made from them.
    """

    least: int
    layer: str
    value: Callable[[Tensor, Tensor], float]


RFID_CHANGES = "rfid-changes"


def changes_of_clips(features: Tensor, count: int) -> Tensor:
    """Return how the features `[count*T,D]` of clips' frames change from frame to frame, `[count*(T-1),D]`."""
    return features.unflatten(0, (count, -1)).diff(dim=1).flatten(0, 1)


SET_METRICS = {
    "rfid": SetMetric(2, "pool", frechet_distance),
    RFID_CHANGES: SetMetric(2, "changes", frechet_distance),
    "fid": SetMetric(2, "pool", frechet_distance),
    "kid": SetMetric(2, "pool", _kernel_distance_of_any),
    "is": SetMetric(2 * SPLITS, "logits", lambda _, shown: inception_score(shown, splits=SPLITS).mean),
}
"""By their names in the results; rfid is the FID of reconstructions, rfid-changes that of the changes between frames."""

FEATURE_SIMILARITY = "feature-similarity"
"""Name in the results of the similarity to a set of images in a network's features."""


def mean_similarity(features: Tensor, others: Tensor) -> Tensor:
    """Return each image's mean cosine similarity `[N]` with a set of other images, in [-1,1].

    With CLIP embeddings this is CLIP-I of DreamBooth (Ruiz et al., arXiv 2208.12242, section 4.1).

    Args:
        features: of the images, `[N,D]`.
        others: of the set, `[M,D]`.
    """
    return F.normalize(features, dim=1) @ F.normalize(others, dim=1).mean(dim=0)


class ClipSimilarity:
    """Cosine similarities `[N]` in [-1,1] of CLIP embeddings (Radford et al. 2021), with the model's own processor.

    CLIPScore (Hessel et al. 2021) is the similarity of image and text times 100 or 2.5.
    """

    def __init__(self, model: CLIPModel, processor: CLIPProcessor) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.processor = processor

    def image_image(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the similarity of each image with its partner, both `[N,3,H,W]` in [-1,1].

        Raises:
            ValueError: if the numbers differ, or a pixel is not finite.
        """
        _check_pairs(images, others)
        return _cosine(self.embed_images(images), self.embed_images(others))

    def image_text(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Return the similarity of each image `[N,3,H,W]` in [-1,1] with its text, which is cut off at CLIP's length.

        Raises:
            ValueError: if the numbers differ, or a pixel is not finite.
        """
        _check_pairs(images, texts)
        return _cosine(self.embed_images(images), self.embed_texts(texts, images.device))

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Return embeddings `[N,D]` of images `[N,3,H,W]` in [-1,1]."""
        pixels = _processed(self.processor.image_processor, images)
        with torch.autocast(images.device.type, enabled=False):
            return _embedding(self.model.to(images.device).get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Return embeddings `[N,D]` of texts, on `device`."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(device)
        with torch.autocast(device.type, enabled=False):
            features = self.model.to(device).get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
        return _embedding(features)


class ImageClassifier:
    """A classifier that tells what an image shows. Its features replace Inception's where those do not fit.

    Its labels are words as in prompts, such as "red circle" or "golden retriever".
    """

    def __init__(self, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.processor = processor

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return `pool` `[N,D]`, the mean of the last layer over the image, and `logits` `[N,K]`, float32.

        Raises:
            ValueError: if a pixel is not finite.
        """
        pixels = _processed(self.processor, images)
        with torch.autocast(images.device.type, enabled=False):
            output = self.model.to(images.device)(pixel_values=pixels, output_hidden_states=True)
        last = output.hidden_states[-1]
        return {"pool": last.flatten(2).mean(dim=2) if last.dim() == 4 else last.mean(dim=1), "logits": output.logits}

    def shown(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Return `[N]`: 1 if the likeliest label of an image is among the words of its text, else 0.

        Raises:
            ValueError: if the numbers differ, or a pixel is not finite.
        """
        _check_pairs(images, texts)
        labels = [
            self.model.config.id2label[number] for number in self.features(images)["logits"].argmax(dim=1).tolist()
        ]
        return torch.tensor([float(f" {label} " in f" {text} ") for label, text in zip(labels, texts, strict=True)])


class ClassifierLayers(nn.Module):
    """The feature maps of a convolutional image classifier, with a gradient and at the images' own size.

    Raises:
        UnusableFile: an OSError, if no layer keeps the image's positions, as those of a transformer do not.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__()
        self.network = classifier.model
        for name in ("mean", "std"):
            value = getattr(classifier.processor, f"image_{name}")
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1))
        if not self(torch.zeros(1, 3, 64, 64, device=self.network.device)):
            raise UnusableFile("the classifier is not convolutional, so it cannot say how different images look")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps `[N,C,h,w]` of images `[N,3,H,W]` in [-1,1], one per layer."""
        pixels = (to_unit_range(images) - self.mean) / self.std
        layers = self.network(pixel_values=pixels, output_hidden_states=True).hidden_states
        return [layer for layer in layers if layer.dim() == 4]


def classifier_distance(classifier: ImageClassifier) -> FeatureDistance:
    """Return how different images look to a classifier; attacks take it where LPIPS has no weights.

    Raises:
        UnusableFile: an OSError, if the classifier is not convolutional.
    """
    return FeatureDistance(ClassifierLayers(classifier), "the distance of the classifier's features")


def load_image_classifier(name: str) -> ImageClassifier:
    """Load an image classifier from the Hub or from a folder.

    Raises:
        MissingFile: a FileNotFoundError, if the model or its processor is missing and cannot be downloaded.
        UnusableFile: an OSError, if their files are damaged or of another kind.
        MissingPackage: an ImportError, without transformers.
    """
    if find_spec("transformers") is None:
        raise MissingPackage(f"the classifier '{name}' needs transformers; pip install transformers")
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        model, processor = _load_whole(AutoModelForImageClassification, AutoImageProcessor, name)
    except UNREADABLE as error:
        raise _kind(error, name)(
            f"cannot load the classifier '{name}' ({_reason(error)}); put its config.json, model.safetensors and "
            "preprocessor_config.json into a folder, and give the folder as `classifier`"
        ) from None
    return ImageClassifier(model, processor)


def load_clip_similarity(name: str = CLIP_MODEL) -> ClipSimilarity:
    """Load a CLIP model from the Hub or from a folder.

    Raises:
        MissingFile: a FileNotFoundError, if the model, its processor or its tokenizer is missing and cannot be
            downloaded.
        UnusableFile: an OSError, if their files are damaged or of another kind.
        MissingPackage: an ImportError, without transformers.
    """
    if find_spec("transformers") is None:
        raise MissingPackage(f"the CLIP model '{name}' needs transformers; pip install transformers")
    from transformers import CLIPModel, CLIPProcessor  # slow to import, and an optional dependency

    try:
        model, processor = _load_whole(CLIPModel, CLIPProcessor, name)
        if processor.tokenizer.get_vocab().keys() <= set(processor.tokenizer.all_special_tokens):
            raise ValueError("it has no tokenizer")
    except UNREADABLE as error:
        raise _kind(error, name)(
            f"cannot load the CLIP model '{name}' ({_reason(error)}); put its config.json, model.safetensors, "
            "preprocessor_config.json and tokenizer.json into a folder, and give the folder as `clip_model`"
        ) from None
    return ClipSimilarity(model, processor)


def _kind(error: Exception, place: str | Path) -> type[UnusableFile]:
    """Return MissingFile if `place` or a part of it is missing, else UnusableFile."""
    return MissingFile if isinstance(error, FileNotFoundError) or not Path(place).exists() else UnusableFile


def _load_whole(model_class: Any, processor_class: Any, name: str) -> tuple[Any, Any]:
    """Load a model and its processor, and refuse a model with missing parts.

    transformers 5 replaces missing parts by defaults without an error: a configuration, random weights, an empty
    vocabulary.
    """
    is_folder = Path(name).is_dir()
    if is_folder and not Path(name, "config.json").exists():
        raise FileNotFoundError("it has no config.json")
    local = is_folder or not _hub_answers(name)
    model, loading = model_class.from_pretrained(name, local_files_only=local, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"its weights lack {len(missing)} tensors, such as {missing[0]}")
    return model, processor_class.from_pretrained(name, local_files_only=local)


def _hub_answers(name: str) -> bool:
    """Return whether the Hub answers, in one request: without a network, transformers' own retries take minutes."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urlopen(Request(hf_hub_url(name, "config.json"), method="HEAD"), timeout=NETWORK_TIMEOUT).close()
    except HTTPError as error:
        return error.code < 500
    except (OSError, HTTPException):
        return False
    return True


def _cached_inception_weights(folder: Path) -> Path:
    """Return the path where torch-fidelity looks for its weights, and download them if they are missing.

    The download is checked, and leaves the complete file or none.
    """
    path = folder / INCEPTION_WEIGHTS
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rpartition("-")[-1]
        with _impatience():
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=digest)
    return path


@contextmanager
def _impatience() -> Iterator[None]:
    """Limit the time that sockets wait for a server within the context.

    torch.hub has no argument for it, and obeys only the default of the process.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _processed(processor: BaseImageProcessor, images: Tensor) -> Tensor:
    """Preprocess images on the CPU, since transformers 4 resizes with PIL: the result is the same for all devices."""
    return processor(list(_to_bytes(images).cpu()), return_tensors="pt")["pixel_values"].to(images.device)


def _to_bytes(images: Tensor) -> Tensor:
    if not images.isfinite().all():
        raise ValueError("images hold values that are not finite")  # the conversion to bytes would hide them
    return to_unit_range(images.float()).clamp(0, 1).mul(255).round().byte()


def _require(minimum: int, metric: str, *sets: Tensor) -> None:
    if min(map(len, sets)) < minimum:
        raise ValueError(f"{metric} needs at least {minimum} images, got {min(map(len, sets))}")


def _check_pairs(images: Sequence[Any] | Tensor, others: Sequence[Any] | Tensor) -> None:
    if len(images) != len(others):
        raise ValueError(f"{len(images)} images cannot be paired with {len(others)}")


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return F.cosine_similarity(first, second, dim=1)


def _embedding(features: Any) -> Tensor:
    """Return the embedding from transformers 4, which returns it, or from the output of transformers 5."""
    return getattr(features, "pooler_output", features)


def _reason(error: BaseException) -> str:
    """Return the first line of an error, without torch's advice to trust a suspicious file."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something other than weights"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
