# The commands that people and CI run. Everything that is needed is installed into .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
CLIPQ_SHARED ?= ../shared

.PHONY: demo test test-on-ray test-without-ray test-chaos test-s3 test-models test-cluster test-chaos-then-s3 attack check ci install bench bench-operator bench-joint bench-codec bench-search bench-fleet bench-chaos bench-data bench-scale bench-records bench-imagenet

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python jobs/compress.py --config recipes/demo.yaml --storage ./runs

# What starts Ray runs in a process of its own beside the rest: it waits more than it computes.
test: install
	$(MAKE) --no-print-directory --jobs 2 test-on-ray test-without-ray

QUICK := -m "not models and not s3 and not cluster and not chaos" --durations 25
test-on-ray: install
	$(BIN)/python -m pytest $(QUICK) tests/cluster

test-without-ray: install
	$(BIN)/python -m pytest $(QUICK) --ignore tests/cluster

# What is killed at random moments on three nodes of this machine, and waits for hosts: 8 minutes, most of them waiting.
test-chaos: install
	$(BIN)/python -m pytest -m chaos --durations=0

# Against a real S3 server on loopback, which is installed where it is missing; where that is not possible, it says why in one line.
test-s3: install
	$(BIN)/python -m pytest -m s3

test-models: install
	$(BIN)/python -m pytest -m models

# Hosts in network namespaces, on this machine: needs root, openssh-server, rsync and iproute2, and says so where they are missing. 10 to 15 minutes on 2 cores.
test-cluster: install
	$(BIN)/python -m pytest -m cluster -x -rs --durations=0

# Longer than in `make test`: other hostile files for the reader, so many of them.
CASES ?= 2000000
SEED ?= 1
attack: install
	CLIPQ_ATTACK_CASES=$(CASES) CLIPQ_ATTACK_SEED=$(SEED) $(BIN)/python -m pytest tests/codec/test_attack.py --timeout 0

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Hosts that are made and waited for leave room for what is killed and waited for.
ci: check test
	$(MAKE) --no-print-directory --jobs 2 test-cluster test-chaos-then-s3

test-chaos-then-s3: install
	$(MAKE) --no-print-directory test-chaos
	$(MAKE) --no-print-directory test-s3

# Benches write bench/results/NAME.json; `make bench` prints what falls short of its goal.
bench: install
	$(BIN)/python bench/record.py

bench-operator: install
	$(BIN)/python bench/operator_speed.py $(OPERATOR)

# Requests and trials per network, for docs/scale.md.
bench-scale: install
	$(BIN)/python bench/scale.py

bench-joint: install
	$(BIN)/python bench/joint.py --data $(CLIPQ_SHARED)/data/cifar10 --weights $(CLIPQ_SHARED)/weights/resnet20-cifar10.safetensors

bench-search: install
	$(BIN)/python bench/search.py --data $(CLIPQ_SHARED)/data/cifar10 --weights $(CLIPQ_SHARED)/weights/resnet20-cifar10.safetensors
	$(BIN)/python bench/search_cost.py --shared $(CLIPQ_SHARED)
	$(BIN)/python bench/search_engine.py --data $(CLIPQ_SHARED)/data/cifar10 --weights $(CLIPQ_SHARED)/weights/resnet20-cifar10.safetensors
	$(BIN)/python bench/search_global.py --data $(CLIPQ_SHARED)/data/cifar10 --weights $(CLIPQ_SHARED)/weights/resnet20-cifar10.safetensors

# Days on 2 cores for all of it: one (target, variant, seed) is one unit of minutes (LeNets) to four and more hours (ResNets there; minutes on a GPU), goes on where it was cut off, and what is there is not made again. Parts: RECORDS="--only lenet5 --seeds 0".
bench-records: install
	$(BIN)/python bench/records.py --shared $(CLIPQ_SHARED) $(RECORDS)

bench-fleet: install
	$(BIN)/python bench/fleet.py

bench-data: install
	$(BIN)/python bench/data.py --data $(CLIPQ_SHARED)/data/cifar10

bench-codec: install .venv-nncodec/installed
	$(BIN)/python bench/codec.py --weights $(CLIPQ_SHARED)/weights
	$(BIN)/python bench/packed_file.py

# Two hours or so for 200 kills; run again it goes on behind the last run.
bench-chaos: install
	$(BIN)/python bench/chaos.py

# NNCodec needs numpy 1 and a C++ compiler; none of the packages that its networks' part asks for is needed here.
.venv-nncodec/installed: bench/codec_peers.txt
	test -x .venv-nncodec/bin/python || $(PYTHON) -m venv .venv-nncodec
	.venv-nncodec/bin/python -m pip install --quiet --no-deps --requirement bench/codec_peers.txt
	touch $@

# ImageNet's recipes at real shapes, on generated images and random weights: that they run through, memory and time.
bench-imagenet: install
	$(BIN)/python bench/imagenet.py
