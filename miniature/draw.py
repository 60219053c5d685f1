"""Draw images into a folder that the datasets library reads; scenes get captions in a `metadata.jsonl`.

    python -m miniature.draw --num_images 64 --output_dir outputs/scenes
    python -m miniature.draw --num_images 64 --num_frames 9 --output_dir outputs/clips      # a folder of frames for each
    python -m miniature.draw --kind dead-leaves --output_dir outputs/dead-leaves

The miniature's networks were trained on another series of scenes and dead leaves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from miniature.scenes import draw_clip, draw_dead_leaves, draw_scene
from srl_utils.files import write_text_atomically

UNSEEN_SERIES = 20_000


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.kind == "dead-leaves":
        draw_leaves(args)
    elif args.num_frames == 1:
        draw_images(args)
    else:
        draw_clips(args)
    print(f"{args.num_images} {args.kind} in {args.output_dir}")


def draw_images(args: argparse.Namespace) -> None:
    """Draw scenes and their captions."""
    lines = []
    for number in range(args.num_images):
        scene = draw_scene(UNSEEN_SERIES + args.seed, number, pair_share=args.pair_share)
        name = f"{number:05d}.png"
        scene.image.save(args.output_dir / name)
        lines.append(json.dumps({"file_name": name, "text": scene.caption}))
    write_text_atomically(args.output_dir / "metadata.jsonl", "\n".join(lines) + "\n")


def draw_leaves(args: argparse.Namespace) -> None:
    """Draw dead leaves, which have no captions."""
    for number in range(args.num_images):
        draw_dead_leaves(UNSEEN_SERIES + args.seed, number).save(args.output_dir / f"{number:05d}.png")


def draw_clips(args: argparse.Namespace) -> None:
    """Draw scenes whose objects move, the frames of each in a folder."""
    for number in range(args.num_images):
        folder = args.output_dir / f"{number:05d}"
        folder.mkdir(exist_ok=True)
        clip = draw_clip(UNSEEN_SERIES + args.seed, number, frames=args.num_frames, pair_share=args.pair_share)
        for time, frame in enumerate(clip):
            frame.save(folder / f"{time:03d}.png")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/scenes"))
    parser.add_argument("--kind", choices=("scenes", "dead-leaves"), default="scenes")
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument(
        "--num_frames", type=int, default=1, help="of scenes: 1 draws images, more draw clips of moving objects"
    )
    parser.add_argument("--pair_share", type=float, default=0.0, help="share of scenes with two objects")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kind == "dead-leaves" and args.num_frames > 1:
        parser.error("dead leaves do not move: leave out --num_frames")
    return args


if __name__ == "__main__":
    main()
