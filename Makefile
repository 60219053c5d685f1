# make setup | demo | app | paper | paper-quick | results | tokens | clips | defences | defences-quick | compatibility |
#      compatibility-quick | zoo | test | test-slow | test-browser | faults | test-hub | docs | miniature | clean
PYTHON ?= python3
VENV := .venv
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
CORES := $(shell nproc)
# On the CPU as many processes of one thread as share the demo's 8 images a step evenly: threads of one process wait for
# each other thousands of times a step, which beside a busy process makes them many times slower.
GPU := $(shell nvidia-smi -L 2>/dev/null | head -1)
PROCESSES := $(if $(GPU),1,$(shell for n in 8 4 2 1; do if [ $$n -le $(CORES) ]; then echo $$n; break; fi; done))

DEMO := accelerate launch $(if $(filter-out 1,$(PROCESSES)),--multi_gpu) --num_processes $(PROCESSES) \
	--num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1 \
	train_srl_vae.py --pretrained_model_name_or_path miniature/weights/vae --dataset_name scikit-image \
	--recipe fast --resolution 64 --train_batch_size $(shell expr 8 / $(PROCESSES)) --max_train_steps 400 \
	--learning_rate 5e-4 --lpips_weight 0 \
	--random_flip --no-torch_compile --num_validation_images 16 --validation_steps 400 --output_dir outputs/demo

.PHONY: setup demo app paper paper-quick results tokens clips defences defences-quick compatibility compatibility-quick zoo test test-slow test-browser faults test-hub docs miniature clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-test: requirements-test.txt $(wildcard requirements/*.txt) $(VENV)/.installed
	$(VENV)/bin/pip install --quiet -r requirements-test.txt
	touch $@

$(VENV)/.installed-docs: requirements/docs.txt $(VENV)/.installed
	$(VENV)/bin/pip install --quiet -r requirements/docs.txt
	touch $@

# The pages are in outputs/site. Warnings are errors; the variable hides an advertisement, which is none.
docs: $(VENV)/.installed-docs
	$(RUN) python -m docs.scripts.flags
	$(RUN) NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

demo: setup
	$(RUN) $(DEMO)

$(VENV)/.installed-app: requirements/eval.txt requirements/app.txt $(VENV)/.installed
	$(VENV)/bin/pip install --quiet -r requirements/eval.txt -r requirements/app.txt
	touch $@

app: $(VENV)/.installed-app
	$(RUN) python -m srl_utils.app

# One worker a core, each with one thread.
test: $(VENV)/.installed-test
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) lint-imports --no-logo
	$(RUN) mypy
	$(RUN) python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-slow: $(VENV)/.installed-test
	$(RUN) python -m pytest -m slow

# The app, used in a real browser; chromium is the system's, as `apt-get install chromium` gives it.
test-browser: $(VENV)/.installed-test
	$(VENV)/bin/pip install --quiet -r requirements/browser.txt
	$(RUN) python -m pytest -m browser

# Attacks on whole runs: docs/reliability.md says which.
faults: $(VENV)/.installed-test
	$(RUN) python -m pytest -m faults

# The Hub's tests with the oldest huggingface_hub, the newest 1.x and the newest 2.x: versions as pip's `~=` reads them.
# What has to be of another version is in .venv-hub, the rest in $(VENV). With the oldest go a diffusers and a datasets
# that accept it, and neither transformers nor peft: those of $(VENV) are hidden, their versions first and then they.
HUB_VERSIONS := 1.0.1 1.0 2.0
.venv-hub/1.0.1/.installed: OLDEST := diffusers==0.36.0 datasets==4.0.0
.venv-hub/1.0.1/.installed: HIDDEN := transformers peft

test-hub: $(HUB_VERSIONS:%=test-hub-%)

test-hub-%: .venv-hub/%/.installed
	.venv-hub/$*/bin/python -c "import huggingface_hub, diffusers; print(huggingface_hub.__version__, diffusers.__version__)"
	.venv-hub/$*/bin/python -m pytest -rs tests/hub

.PRECIOUS: .venv-hub/%/.installed
.venv-hub/%/.installed: $(VENV)/.installed-test
	$(VENV)/bin/python -m venv --clear --without-pip $(@D)
	$(VENV)/bin/pip --python $(@D)/bin/python install --quiet huggingface_hub~=$*
	$(if $(OLDEST),$(VENV)/bin/pip --python $(@D)/bin/python install --quiet --no-deps $(OLDEST))
	cd $(@D)/lib/python3*/site-packages && echo $(abspath $(VENV))/lib/python3*/site-packages > venv.pth
	cd $(@D)/lib/python3*/site-packages && for name in $(HIDDEN); do mkdir $$name-0.dist-info && \
		printf "Metadata-Version: 2.1\nName: $$name\nVersion: 0\n" > $$name-0.dist-info/METADATA && \
		echo "import sys; sys.modules['$$name'] = None" >> hidden.pth; done
	touch $@

# On one core, without --torch_compile: the VAE takes 1 h 40 min, the classifier 1 h, the video autoencoder an estimated
# 3 h (8 min on an H100), the diffusion model an estimated 7 h (9 min on an H100).
miniature: $(VENV)/.installed-test
	$(RUN) python -m miniature.build vae
	$(RUN) python -m miniature.build vq --torch_compile
	$(RUN) python -m miniature.build video
	$(RUN) python -m miniature.build clip
	$(RUN) python -m miniature.build classifier
	$(RUN) python -m miniature.build diffusion
	$(RUN) python -m miniature.measure_world

# The paper's experiments, then its open questions.
paper: $(VENV)/.installed-test
	$(RUN) python -m experiments.paper
	$(RUN) python -m experiments.tokens
	$(RUN) python -m experiments.compatibility
	$(RUN) python -m experiments.clips

paper-quick: $(VENV)/.installed-test
	$(RUN) python -m experiments.paper --quick

# docs/results.md and its pictures, from the experiments that were run. Its sentences are typed, so read them again.
results: $(VENV)/.installed-test
	$(RUN) python -m experiments.measured $(wildcard $(addprefix outputs/,paper tokens compatibility clips defences))
	$(RUN) python -m docs.scripts.results

tokens: $(VENV)/.installed-test
	$(RUN) python -m experiments.tokens

clips: $(VENV)/.installed-test
	$(RUN) python -m experiments.clips

defences: $(VENV)/.installed-test
	$(RUN) python -m experiments.defences

defences-quick: $(VENV)/.installed-test
	$(RUN) python -m experiments.defences --quick

compatibility: $(VENV)/.installed-test
	$(RUN) python -m experiments.compatibility

compatibility-quick: $(VENV)/.installed-test
	$(RUN) python -m experiments.compatibility --quick

# Hours on a CPU; it can be interrupted and repeated.
zoo: $(VENV)/.installed-test
	set -e; for entry in zoo/entries/embedded-*.yaml; do \
		name=$$(basename $$entry .yaml); \
		$(RUN) python -m srl_utils.zoo evaluate $$name; \
		$(RUN) python -m srl_utils.zoo submit $$entry outputs/zoo/$$name/row.json; \
	done
	$(RUN) python -m srl_utils.zoo leaderboard

clean:
	rm -rf outputs $(VENV) .venv-hub
