# make setup | demo | test | test-slow | miniature | clean
PYTHON ?= python3
VENV := .venv
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
THREADS := $(shell nproc)

DEMO := accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS) \
	train_srl_vae.py --pretrained_model_name_or_path miniature/weights/vae --dataset_name scikit-image \
	--resolution 64 --train_batch_size 8 --max_train_steps 220 --learning_rate 3e-4 --lr_scheduler cosine \
	--lr_warmup_steps 10 --pgd_steps 3 --lpips_weight 0 --originality_units scaled --originality_weight 0.02 \
	--random_flip --num_validation_images 16 --validation_steps 110 --output_dir outputs/demo

.PHONY: setup demo test test-slow miniature clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(VENV)/bin/pip install --quiet -r requirements-test.txt
	touch $@

demo: setup
	$(RUN) $(DEMO)

test: $(VENV)/.installed-test
	$(RUN) ruff check .
	$(RUN) python -m pytest

test-slow: $(VENV)/.installed-test
	$(RUN) python -m pytest -m slow

miniature: setup
	$(RUN) python -m miniature.build

clean:
	rm -rf outputs $(VENV)
