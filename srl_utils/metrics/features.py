"""Metrics that see through a pretrained network: Inception's or a classifier's, of sets of images, CLIP's, of pairs.

Networks run in float32 without gradient, on the device of the images and in the batches that the caller makes.
Images are taken as the 8-bit pictures they would be saved as; values beyond [-1,1] are clipped.
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
from huggingface_hub import constants, hf_hub_url
from safetensors import SafetensorError
from torch import Tensor
from torch_fidelity import FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.utils import create_feature_extractor

from srl_utils.errors import MissingFile, MissingPackage, UnusableFile
from srl_utils.images.pixels import to_unit_range

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, CLIPModel, CLIPProcessor, PreTrainedModel

INCEPTION = "inception-v3-compat"
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_LAYERS = {"pool": "2048", "logits": "logits_unbiased"}
"""What torch-fidelity calls them: FID and KID are of the pool, the Inception Score of the logits without bias."""
SUBSET_SIZE, SPLITS = 1000, 10
"""torch-fidelity's, of KID and of the Inception Score."""
CLIP_MODEL = "openai/clip-vit-base-patch32"
NETWORK_TIMEOUT = 10.0
"""In seconds, for each wait for a server."""
UNREADABLE = (
    OSError, EOFError, HTTPException, ImportError, RuntimeError, TypeError, ValueError,
    pickle.UnpicklingError, SafetensorError,
)  # fmt: skip
"""What loading raises where there is no network, no file, a file cut short or a file of something else."""


class Spread(NamedTuple):
    """Mean and standard deviation of an estimate over its subsets or splits."""

    mean: float
    std: float


class Features(Protocol):
    """A network whose view of images is what sets of them are compared by."""

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """`pool` `[N,D]` and `logits` `[N,K]`, float32, of images `[N,3,H,W]` in [-1,1]."""


class InceptionFeatures:
    """Features of the Inception network that FID was defined with (Heusel et al. 2017), as torch-fidelity has it."""

    def __init__(self, network: FeatureExtractorInceptionV3) -> None:
        self.network = network

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """`pool` `[N,2048]` and `logits` `[N,1008]`, float32, of images `[N,3,H,W]` in [-1,1].

        Raises:
            ValueError: if a pixel is not finite.
        """
        network = self.network.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            layers = network.convert_features_tuple_to_dict(network(_to_bytes(images)))
        return {name: layers[layer] for name, layer in INCEPTION_LAYERS.items()}


def load_inception_features(weights: str | Path | None = None) -> InceptionFeatures:
    """The network on the weights file given, or else on torch-fidelity's, downloaded where it is not cached.

    Raises:
        MissingFile: a FileNotFoundError, if the weights are not to be had.
        UnusableFile: an OSError, if they are not those of this network.
    """
    folder = Path(torch.hub.get_dir(), "checkpoints")
    try:
        path = Path(weights) if weights else _cached_inception_weights(folder)
        # torch-fidelity unpickles whatever the file holds; this refuses all but tensors.
        torch.load(path, map_location="cpu", weights_only=True)
        network = create_feature_extractor(
            INCEPTION, list(INCEPTION_LAYERS.values()), cuda=False, verbose=False, feature_extractor_weights_path=path
        )
    except UNREADABLE as error:
        raise _kind(error, weights or folder / INCEPTION_WEIGHTS)(
            f"cannot load the Inception weights {weights or URL_INCEPTION_V3} ({_reason(error)}); put an intact "
            f"{INCEPTION_WEIGHTS} into {folder} (TORCH_HOME moves it), or give its path as inception_weights"
        ) from None
    return InceptionFeatures(network)


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """FID (Heusel et al. 2017) of two sets of `pool` features `[N,2048]`, `[M,2048]`.

    It is biased upwards, the more the fewer the images are: compare only values of equal N and M, and mind that
    below 2048 images not even the covariance has full rank.

    Raises:
        ValueError: below 2 images a set, where there is no covariance.
    """
    _require(2, "FID", features, others)
    statistics = [fid_features_to_statistics(each.cpu()) for each in (features, others)]
    # Of a set and itself it may be below 0 by rounding.
    return max(0.0, fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def kernel_distance(
    features: Tensor, others: Tensor, *, subset_size: int = SUBSET_SIZE, subsets: int = 100, seed: int = 2020
) -> Spread:
    """KID (Binkowski et al. 2018) of two sets of `pool` features `[N,2048]`, `[M,2048]`; unbiased, so also negative.

    Over `subsets` pairs of random subsets; the defaults, seed included, are torch-fidelity's.

    Raises:
        ValueError: below `subset_size` images a set, or for subsets of fewer than 2.
    """
    if subset_size < 2:
        raise ValueError(f"KID needs subsets of at least 2 images, got {subset_size}")
    _require(subset_size, f"KID on subsets of {subset_size}", features, others)
    settings = {"kid_subset_size": subset_size, "kid_subsets": subsets, "rng_seed": seed, "verbose": False}
    result = kid_features_to_metric(features, others, **settings)
    return Spread(result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD])


def inception_score(logits: Tensor, *, splits: int = SPLITS, seed: int = 2020) -> Spread:
    """Inception Score (Salimans et al. 2016) of `logits` `[N,1008]`, over `splits` parts of the shuffled images.

    Biased as FID is; the defaults, seed included, are torch-fidelity's.

    Raises:
        ValueError: below 2 images a split: one alone scores 1 whatever it shows.
    """
    _require(2 * splits, f"the Inception Score in {splits} splits", logits)
    result = isc_features_to_metric(logits.cpu(), splits, rng_seed=seed)
    return Spread(result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD])


class SetMetric(NamedTuple):
    """A value for a whole set of images."""

    least: int
    """Images below which it has none."""
    value: Callable[[dict[str, Tensor], dict[str, Tensor]], float]
    """Of the `Features` of the images and of what was made of them."""


FID = SetMetric(2, lambda real, shown: frechet_distance(real["pool"], shown["pool"]))
SET_METRICS = {
    "rfid": FID,
    "fid": FID,
    "kid": SetMetric(2, lambda real, shown: _kernel_distance_of_any(real["pool"], shown["pool"])),
    "is": SetMetric(2 * SPLITS, lambda _, shown: inception_score(shown["logits"], splits=SPLITS).mean),
}
"""By the name that results give them: rfid is what the FID of reconstructions is called."""


def _kernel_distance_of_any(features: Tensor, others: Tensor) -> float:
    """With fewer images than a usual subset the only subset is all of them."""
    if len(features) <= SUBSET_SIZE:
        return kernel_distance(features, others, subset_size=len(features), subsets=1).mean
    return kernel_distance(features, others).mean


class ClipSimilarity:
    """Cosine similarities `[N]`, in [-1,1], of CLIP embeddings (Radford et al. 2021), on the model's own processor.

    What is published as CLIPScore (Hessel et al. 2021) multiplies those of images and texts by 100 or by 2.5.
    """

    def __init__(self, model: CLIPModel, processor: CLIPProcessor) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.processor = processor

    def image_image(self, images: Tensor, others: Tensor) -> Tensor:
        """Of each image with its other, both `[N,3,H,W]` in [-1,1].

        Raises:
            ValueError: if there are not as many of both, or a pixel is not finite.
        """
        _check_pairs(images, others)
        return _cosine(self.embed_images(images), self.embed_images(others))

    def image_text(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Of each image, `[N,3,H,W]` in [-1,1], with its text; what a text has beyond CLIP's length is cut off.

        Raises:
            ValueError: if there are not as many of both, or a pixel is not finite.
        """
        _check_pairs(images, texts)
        return _cosine(self.embed_images(images), self.embed_texts(texts, images.device))

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """`[N,D]` of images `[N,3,H,W]` in [-1,1]."""
        pixels = _processed(self.processor.image_processor, images)
        with torch.autocast(images.device.type, enabled=False):
            return _embedding(self.model.to(images.device).get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """`[N,D]`, on that device."""
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
    """A classifier that sees what an image shows, and whose features stand in for Inception's where those do not fit.

    Its labels are words as prompts have them, such as "red circle" or "golden retriever".
    """

    def __init__(self, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.processor = processor

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """`pool` `[N,D]`, the last layer's mean over the image, and `logits` `[N,K]`, float32.

        Raises:
            ValueError: if a pixel is not finite.
        """
        pixels = _processed(self.processor, images)
        with torch.autocast(images.device.type, enabled=False):
            output = self.model.to(images.device)(pixel_values=pixels, output_hidden_states=True)
        last = output.hidden_states[-1]
        return {"pool": last.flatten(2).mean(dim=2) if last.dim() == 4 else last.mean(dim=1), "logits": output.logits}

    def shown(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """`[N]`: 1 where the likeliest label of an image is among the words of its text, else 0.

        Raises:
            ValueError: if there are not as many of both, or a pixel is not finite.
        """
        _check_pairs(images, texts)
        labels = [
            self.model.config.id2label[number] for number in self.features(images)["logits"].argmax(dim=1).tolist()
        ]
        return torch.tensor([float(f" {label} " in f" {text} ") for label, text in zip(labels, texts, strict=True)])


def load_image_classifier(name: str) -> ImageClassifier:
    """The image classifier of that name on the Hub, or in the local folder of that name.

    Raises:
        MissingFile: a FileNotFoundError, if the model or its processor is not to be had.
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
            "preprocessor_config.json into a folder, and give the folder as classifier"
        ) from None
    return ImageClassifier(model, processor)


def load_clip_similarity(name: str = CLIP_MODEL) -> ClipSimilarity:
    """The CLIP model of that name on the Hub, or in the local folder of that name.

    Raises:
        MissingFile: a FileNotFoundError, if the model, its processor or its tokenizer is not to be had.
        UnusableFile: an OSError, if their files are damaged or of another kind.
        MissingPackage: an ImportError, without transformers.
    """
    if find_spec("transformers") is None:
        raise MissingPackage(f"the CLIP model '{name}' needs transformers; pip install transformers")
    from transformers import CLIPModel, CLIPProcessor  # seconds to import, and not among the requirements

    try:
        model, processor = _load_whole(CLIPModel, CLIPProcessor, name)
        if processor.tokenizer.get_vocab().keys() <= set(processor.tokenizer.all_special_tokens):
            raise ValueError("it has no tokenizer")
    except UNREADABLE as error:
        raise _kind(error, name)(
            f"cannot load the CLIP model '{name}' ({_reason(error)}); put its config.json, model.safetensors, "
            "preprocessor_config.json and tokenizer.json into a folder, and give the folder as clip_model"
        ) from None
    return ClipSimilarity(model, processor)


def _kind(error: Exception, place: str | Path) -> type[UnusableFile]:
    """MissingFile where what `place` names, or a part of it, is not there."""
    return MissingFile if isinstance(error, FileNotFoundError) or not Path(place).exists() else UnusableFile


def _load_whole(model_class: Any, processor_class: Any, name: str) -> tuple[Any, Any]:
    """For what is absent transformers 5 puts a default, and says little: a config, random weights, an empty vocabulary."""
    is_folder = Path(name).is_dir()
    if is_folder and not Path(name, "config.json").exists():
        raise FileNotFoundError("it has no config.json")
    local = is_folder or not _hub_answers(name)
    model, loading = model_class.from_pretrained(name, local_files_only=local, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"its weights lack {len(missing)} tensors, such as {missing[0]}")
    return model, processor_class.from_pretrained(name, local_files_only=local)


def _hub_answers(name: str) -> bool:
    """One question that is not repeated: without a network the libraries' own retries take minutes."""
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
    """Where torch-fidelity looks for its weights; the download is checked and leaves the whole file or none."""
    path = folder / INCEPTION_WEIGHTS
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rpartition("-")[-1]
        with _impatience():
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=digest)
    return path


@contextmanager
def _impatience() -> Iterator[None]:
    """torch.hub waits for a silent server for ever and takes no timeout; the process-wide default is all it obeys."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _processed(processor: BaseImageProcessor, images: Tensor) -> Tensor:
    """On the CPU: transformers 4 resizes with PIL, and so the value does not depend on the device."""
    return processor(list(_to_bytes(images).cpu()), return_tensors="pt")["pixel_values"].to(images.device)


def _to_bytes(images: Tensor) -> Tensor:
    if not images.isfinite().all():
        raise ValueError("images hold values that are not finite")  # which bytes would hide
    return to_unit_range(images.float()).clamp(0, 1).mul(255).round().byte()


def _require(minimum: int, metric: str, *sets: Tensor) -> None:
    if min(map(len, sets)) < minimum:
        raise ValueError(f"{metric} needs at least {minimum} images, got {min(map(len, sets))}")


def _check_pairs(images: Sequence[Any] | Tensor, others: Sequence[Any] | Tensor) -> None:
    if len(images) != len(others):
        raise ValueError(f"{len(images)} images cannot be paired with {len(others)}")


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(first, second, dim=1)


def _embedding(features: Any) -> Tensor:
    """transformers 4 returns the projected embedding, transformers 5 an output that holds it."""
    return getattr(features, "pooler_output", features)


def _reason(error: BaseException) -> str:
    """The first line of what it says; but torch's advice on a suspicious file is to trust it."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something other than weights"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
