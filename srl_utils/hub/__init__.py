"""The model card, and publishing on the Hugging Face Hub without ever costing a run."""
