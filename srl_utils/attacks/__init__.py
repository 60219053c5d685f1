"""Perturbations of images.

`gradient` has PGD and APGD, `random_search` the Square attack, `corruptions` changes that no attacker makes, and
`protections` published perturbations against diffusion models. `denoiser` is the UNet that some protections attack.
"""
