"""What a VAE is used for, and how the outcome is measured."""
