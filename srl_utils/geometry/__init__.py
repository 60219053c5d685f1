"""The geometry of an autoencoder: loss surfaces, clusters of latents, smoothness, certificates, paths and re-encoding.

The functions take tensors and functions of tensors, store nothing, and know nothing of evaluations.
"""
