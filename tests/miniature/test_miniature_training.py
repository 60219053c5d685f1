"""What the miniature world's networks are trained with: resumable steps, their samples, and the words they know."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from helpers.runs import build_tiny_vae
from torch import Tensor, nn

from miniature import autoencoder, classifier, contrastive, diffusion, discrete, mixture, video
from miniature.imagenet import ImageNetLayers
from miniature.scene_set import LABELS, NO_LABEL, scene_set
from miniature.scenes import draw_scene
from miniature.teacher import FEATURE_CHANNELS, PIXEL_CHANNELS, PrincipalComponents, Teacher
from miniature.tokens import MAX_TOKENS, learn_tokenizer
from miniature.training import WARMUP_STEPS, Settings, cosine_schedule, train
from srl_utils.evaluation.tasks.finetuning import draw_numbers
from srl_utils.images.pixels import from_pil


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scene_set(tmp_path_factory.mktemp("scenes"), seed=4, count=60, pair_share=0.3)


def settings(work_dir: Path, *, batch_size: int = 4, steps: int = 2, learning_rate: float = 1e-3) -> Settings:
    return Settings(
        work_dir=work_dir, steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=0, device="cpu",
        torch_compile=False,
    )  # fmt: skip


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def loss(module: nn.Module, step: int) -> Tensor:
    batch = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
    return (module(batch).float() - batch.sum(dim=1, keepdim=True)).square().mean()


def test_a_stopped_training_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    """Oracle: invariance, an undisturbed run, to the last bit of weights and statistics."""
    six = settings(tmp_path, steps=6, learning_rate=1e-2)
    whole = train(network(), loss, "whole.pt", six)

    def stopping(module: nn.Module, step: int) -> Tensor:
        if step == 3:
            raise KeyboardInterrupt
        return loss(module, step)

    with pytest.raises(KeyboardInterrupt):
        train(network(), stopping, "parts.pt", six, saving_steps=2)
    resumed = train(network(), loss, "parts.pt", six, saving_steps=2)
    assert not torch.equal(whole[0].weight, network()[0].weight)
    assert all(
        torch.equal(*pair) for pair in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_schedule_warms_up_and_ends_at_zero() -> None:
    """Oracle: closed form, a line up to the peak and half a cosine from there to zero."""
    optimizer = torch.optim.SGD(network().parameters(), lr=2.0)
    schedule, rates = cosine_schedule(optimizer, WARMUP_STEPS + 100), []
    for _ in range(WARMUP_STEPS + 101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    picked = [rates[step] for step in (0, WARMUP_STEPS // 2, WARMUP_STEPS, WARMUP_STEPS + 50, WARMUP_STEPS + 100)]
    assert picked == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0], abs=1e-12)


def test_autoencoder_s_training_resumes_in_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance, an undisturbed run of two steps apart, two together and two against the discriminator, exact."""
    monkeypatch.setattr(mixture, "PHOTOGRAPH_SIDE", 64)
    for module in (mixture, autoencoder):
        monkeypatch.setattr(module, "SIZE", 16)
    monkeypatch.setattr(autoencoder, "TEACHER_SAMPLES", 16)

    def run(work_dir: Path, *, adversarial_steps: int = 2) -> dict[str, Tensor]:
        torch.manual_seed(0)
        args = Namespace(
            teaching_steps=2, joint_steps=2, adversarial_steps=adversarial_steps, batch_size=4, learning_rate=1e-2,
            adversarial_learning_rate=1e-3, checkpointing_steps=1, num_workers=0, seed=0, device="cpu",
            torch_compile=False, work_dir=work_dir,
        )  # fmt: skip
        return autoencoder.train(args).state_dict()

    whole = run(tmp_path / "whole")
    for adversarial_steps in (-3, -1, 1):
        run(tmp_path / "parts", adversarial_steps=adversarial_steps)
    resumed = run(tmp_path / "parts")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    state = torch.load(tmp_path / "parts/state.pt", weights_only=True)
    (group,) = state["optimizer"]["param_groups"]
    assert (state["step"], group["lr"], tuple(group["betas"])) == (6, 1e-3, (0.5, 0.9))


def test_discrete_autoencoder_s_training_resumes_in_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance, an undisturbed run of two steps without codes and four with them, exact, with a window's end
    before and after each stop."""
    monkeypatch.setattr(mixture, "PHOTOGRAPH_SIDE", 64)
    monkeypatch.setattr(mixture, "SIZE", 16)
    monkeypatch.setattr(discrete, "SAMPLES", 40)
    monkeypatch.setattr(discrete, "WINDOW", 2)

    def run(work_dir: Path, *, joint_steps: int = 4) -> dict[str, Tensor]:
        torch.manual_seed(0)
        args = Namespace(
            plain_steps=2, joint_steps=joint_steps, batch_size=4, learning_rate=1e-2, checkpointing_steps=1,
            num_workers=0, seed=0, device="cpu", torch_compile=False, work_dir=work_dir,
        )  # fmt: skip
        return discrete.train(args).state_dict()

    whole = run(tmp_path / "whole")
    for joint_steps in (-1, 0, 1, 3):
        run(tmp_path / "parts", joint_steps=joint_steps)
    resumed = run(tmp_path / "parts")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_video_autoencoder_s_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance, an undisturbed run of two steps on still images and three on clips, exact; and its batches."""
    for module in (mixture, video):
        monkeypatch.setattr(module, "SIZE", 16)
        monkeypatch.setattr(module, "PHOTOGRAPH_SIDE", 64)
    monkeypatch.setattr(video, "FRAMES", 5)
    seen, calls = video.seen, []

    def run(work_dir: Path, *, stop_at: int) -> dict[str, Tensor]:
        def stopping(perceptual: nn.Module, reconstruction: Tensor, frames: Tensor) -> dict[str, Tensor]:
            calls.append(len(frames))
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return seen(perceptual, reconstruction, frames)

        torch.manual_seed(0)
        calls.clear()
        monkeypatch.setattr(video, "seen", stopping)
        args = Namespace(
            still_steps=2, clip_steps=3, batch_size=2, learning_rate=1e-2, checkpointing_steps=1, num_workers=0, seed=0,
            device="cpu", work_dir=work_dir,
        )  # fmt: skip
        return video.train(args).state_dict()

    whole = run(tmp_path / "whole", stop_at=0)
    assert calls == [8, 8, 10, 10, 10]
    for stop_at, done in ((2, [8, 8]), (3, [8, 10, 10])):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", stop_at=stop_at)
        assert calls == done
    resumed = run(tmp_path / "parts", stop_at=0)
    assert calls == [10, 10]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_pans_move_within_the_photograph() -> None:
    """Oracle: Pillow, which refuses a box beyond the image; frames of most pans differ; a clip depends on its number."""
    clips, moved = video.Clips(0), 0
    for number in range(40):
        clip = clips._pan(np.random.default_rng(number))
        assert clip.shape == (3, video.FRAMES, video.SIZE, video.SIZE)
        moved += bool((clip[:, 0] - clip[:, -1]).abs().mean() > 0.02)
    assert moved > 20
    assert torch.equal(clips[3], clips[3]) and not torch.equal(clips[3], clips[4])


def test_unused_codes_move_to_features() -> None:
    """Oracle: specification: used codes stay, each other one is a feature of its own, and the counts begin anew."""
    use, codebook = discrete.CodeUse(), torch.nn.Embedding(discrete.CODES, 2)
    before = codebook.weight.detach().clone()
    used = torch.arange(10, discrete.CODES)
    features = torch.arange(40.0).view(20, 2) + 100
    use.count(used)
    use.renew(codebook, features, torch.Generator().manual_seed(0))
    assert torch.equal(codebook.weight[10:], before[10:])
    moved = {tuple(row) for row in codebook.weight[:10].tolist()}
    assert len(moved) == 10 and moved <= {tuple(row) for row in features.tolist()}
    assert use.counts.sum() == 0


def test_components_are_those_of_the_samples() -> None:
    """Oracle: NumPy's singular values; the components of the samples have mean 0, variance 1 and no correlation."""
    maps = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6).view(5, 1, 1) + 3
    found = PrincipalComponents(maps, 2)(maps).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.cov(found), torch.eye(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.mean(dim=1), torch.zeros(2), atol=1e-4, rtol=0)
    samples = maps.transpose(0, 1).flatten(1).numpy().T
    *_, directions = np.linalg.svd(samples - samples.mean(axis=0), full_matrices=False)
    strongest = (samples - samples.mean(axis=0)) @ directions[:2].T
    assert np.linalg.matrix_rank(np.hstack([found.numpy().T, strongest]), tol=1e-2) == 2  # the same plane


def test_the_teacher_s_latents_hold_pixels_and_features() -> None:
    """Oracle: closed form; noise too faint to see moves the features' channels further than the pixels'."""
    images = torch.stack([from_pil(draw_scene(0, number).image) for number in range(32)])
    teacher = Teacher(ImageNetLayers(), images)
    latents = teacher(images)
    assert latents.shape == (32, PIXEL_CHANNELS + FEATURE_CHANNELS, 8, 8)
    deviations = latents.transpose(0, 1).flatten(1).std(dim=1)
    torch.testing.assert_close(deviations, teacher.spread(latents).flatten(), atol=1e-2, rtol=1e-2)
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = (teacher(images + 16 / 255 * signs) - latents) / teacher.spread(latents)
    pixels, features = moved.split([PIXEL_CHANNELS, FEATURE_CHANNELS], dim=1)
    assert features.std() > 4 * pixels.std()


def test_every_sample_is_seen_once_an_epoch() -> None:
    """Oracle: counting; the batch at an epoch's end takes the first samples of the next one."""
    drawn = torch.cat([draw_numbers(0, step, batch_size=4, out_of=10) for step in range(10)])
    epochs = drawn.split(10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(draw_numbers(0, 3, batch_size=4, out_of=10), drawn[12:16])


def test_scenes_are_kept_as_they_were_drawn(scenes, tmp_path: Path) -> None:
    """Oracle: `draw_scene` itself, and the second reading, which draws nothing."""
    scene = draw_scene(4, 7, pair_share=0.3)
    torch.testing.assert_close(scenes.pixels(torch.tensor([7]))[0], from_pil(scene.image), atol=1e-6, rtol=0)
    assert scenes.captions[7] == scene.caption
    for number, label in enumerate(scenes.labels.tolist()):
        objects = draw_scene(4, number, pair_share=0.3).objects
        single = f"{objects[0].color} {objects[0].shape}"
        assert label == (LABELS.index(single) if len(objects) == 1 else NO_LABEL)
    scene_set(tmp_path, seed=4, count=2)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    scene_set(tmp_path, seed=4, count=2)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == kept


def test_pairs_are_as_frequent_as_asked_for() -> None:
    """Oracle: the extremes, and that half of them is what scenes had before this could be chosen."""
    assert {len(draw_scene(0, number, pair_share=0.0).objects) for number in range(20)} == {1}
    assert {len(draw_scene(0, number, pair_share=1.0).objects) for number in range(20)} == {2}
    assert (
        draw_scene(0, 3) == draw_scene(0, 3, pair_share=0.5)
        or draw_scene(0, 3).caption == draw_scene(0, 3, pair_share=0.5).caption
    )


def test_tokenizer_knows_every_word_and_spells_the_others(scenes, tmp_path: Path) -> None:
    """Oracle: one token for each word of a caption, as CLIP has it; and decoding, which gives any text back."""
    tokenizer = learn_tokenizer(scenes.captions, tmp_path)
    for caption in scenes.captions[:20]:
        assert tokenizer.tokenize(caption) == [f"{word}</w>" for word in caption.split()]
    for text in ("a zebra on mars", "painting, x 42!"):
        tokens = tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    again = learn_tokenizer(["something else"], tmp_path)  # a folder's own are kept: networks were trained with them
    assert again.get_vocab() == tokenizer.get_vocab()
    padded = tokenizer([""], padding="max_length")["input_ids"][0]
    assert len(padded) == MAX_TOKENS and set(padded[1:]) == {tokenizer.eos_token_id}


def test_velocity_loss_of_a_perfect_prediction_is_zero() -> None:
    """Oracle: closed form. For latents of 0, v is sqrt(a) noise, which the noised latents tell exactly."""
    scheduler = diffusion.build_scheduler()
    scale = scheduler.alphas_cumprod.sqrt()

    def predict(network: nn.Module, noised: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        a = scale[timesteps][:, None, None, None]
        return noised * a / (1 - a**2).sqrt()

    value = diffusion.velocity_loss(
        nn.Linear(1, 1), 3, predict=predict, scheduler=scheduler, latents=torch.zeros(8, 4, 4, 4),
        tokens=torch.zeros(9, 5, dtype=torch.long), settings=settings(Path("unused"), batch_size=6),
    )  # fmt: skip
    assert value.item() < 1e-6
    assert scheduler.alphas_cumprod[-1] == 0  # the last timestep is pure noise


def test_one_step_of_each_network_changes_it(scenes, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: the real trainings of two steps; their results are of the classes that transformers loads."""
    model = classifier.train_classifier(scenes, tiny_vae, settings(tmp_path))
    assert model.config.id2label == dict(enumerate(LABELS))
    tokenizer = learn_tokenizer(scenes.captions, tmp_path / "tokenizer")
    diffusion.build_pipeline(scenes, tiny_vae, tokenizer, settings(tmp_path)).save_pretrained(tmp_path / "sd")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "sd")  # the UNet was saved in half precision
    assert pipeline.unet.dtype == torch.float32
    clip = contrastive.train_clip(scenes, tokenizer, settings(tmp_path))
    assert clip.config.text_config.vocab_size == len(tokenizer)
    images = pipeline(
        ["a red circle", ""], num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)
    )
    assert images.images.isfinite().all() and len(images.images) == 2


def test_latents_are_those_that_a_pipeline_would_make(scenes, tmp_path: Path) -> None:
    """Oracle: the posterior's mean times the scaling factor, within half precision; another autoencoder has its own."""
    for seed in (0, 1, 1):
        vae = build_tiny_vae(seed=seed)
        latents = diffusion.scaled_latents(vae, scenes, tmp_path / "latents.safetensors")
        with torch.no_grad():
            mean = vae.encode(scenes.pixels(torch.arange(3))).latent_dist.mean
        torch.testing.assert_close(latents[:3].float(), mean * vae.config.scaling_factor, rtol=2e-3, atol=2e-3)


def test_each_scene_is_reconstructed_once(scenes) -> None:
    """Oracle: the function itself, within the rounding to 8 bits, and a count of the scenes that it was given."""
    given: list[Tensor] = []

    def darker(images: Tensor) -> Tensor:
        given.extend(images)
        return 0.5 * images - 0.8

    reconstructions = classifier.Reconstructions(scenes, darker, "cpu")
    for numbers in (torch.tensor([2, 0]), torch.tensor([0, 1, 2])):
        expected = (0.5 * scenes.pixels(numbers) - 0.8).clamp(-1, 1)
        torch.testing.assert_close(reconstructions.pixels(numbers), expected, rtol=0, atol=1.01 / 255)
    assert len(given) == 3


def test_half_of_the_classifier_s_images_are_mirrored() -> None:
    """Oracle: each image is itself or its mirror image, and both occur."""
    images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    result = classifier.mirrored(images, torch.Generator().manual_seed(1))
    same = [torch.equal(one, other) for one, other in zip(images, result, strict=True)]
    assert all(
        is_same or torch.equal(image.flip(2), other) for is_same, image, other in zip(same, images, result, strict=True)
    )
    assert 16 < sum(same) < 48
