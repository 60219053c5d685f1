"""The training command, `train_srl_vae.py`: modules that read its flags."""
