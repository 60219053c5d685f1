"""The model card, and publishing on the Hugging Face Hub. A failed push never ends a training."""
