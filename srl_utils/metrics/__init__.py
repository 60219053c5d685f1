"""Distances between images, between sets of images, and the losses made of them."""
