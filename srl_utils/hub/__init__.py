"""The model card, publishing on the Hugging Face Hub, and files for other programs. A failed push never ends a training."""
