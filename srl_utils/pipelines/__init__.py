"""Put a robust VAE into any diffusers pipeline, take it out again, and clean images with it.

with robust_vae(pipe, "user/robust-vae"):
    image = pipe(prompt, image=original).images[0]
"""

from srl_utils.pipelines.sanitizing import sanitize
from srl_utils.pipelines.swapping import robust_vae, robustify, swap_vae

__all__ = ["robust_vae", "robustify", "sanitize", "swap_vae"]
