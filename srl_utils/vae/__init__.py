"""Variational autoencoders: loading, the networks that the method trains and freezes, a VAE under judgement."""
