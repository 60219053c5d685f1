"""Perturbations of images: `gradient` maximises an objective, `corruptions` need no gradient."""
