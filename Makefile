# daxfs. Two commands do everything: `make mount` and `make test`; the others are parts of them.

MNT ?= /mnt/x
FUZZ_S ?= 300
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
NATIVE := $(wildcard daxfs/*/*.pyx daxfs/*/*.pxd daxfs/*/*.h \
	$(addprefix daxfs/daemon/,fuseio.c hotpath.c linger.c lostpages.c persist.c spare.c))

# What is tested a second time with -o hotpath=off: data, and who uses it at once. The long ones are about something else.
COLD := $(addprefix tests/mount/test_,data.py concurrency.py exerciser.py conformance_data.py pins.py crash.py)
NOT_COLD := four_at_once or with_pins or notices or s47 or listing_under_change or kills_under_load

# The first that is new enough; empty when none is.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	command -v $$python; break; fi; done)

.PHONY: help install mount test lint fuzz kills bench soak clean system system-test system-bench

help:
	@echo "make mount [MNT=/mnt/x]  set up what is missing and mount"
	@echo "make test [JOBS=2]       set up and run the whole test suite"
	@echo "make install             set up only: system packages (as root), .venv, build"
	@echo "make fuzz [FUZZ_S=300]   coverage-guided fuzzing of mount and fsck for so many seconds"
	@echo "make kills               kill the daemon under load a thousand times"
	@echo "make lint                ruff and mypy"
	@echo "make bench [BENCH=--quick] compare speed and memory with other file systems"
	@echo "make soak                explore crashes until a million distinct images were recovered"
	@echo "make clean               remove .venv and everything that was built"

install: system $(VENV)/installed

mount: install
	@if mountpoint -q "$(MNT)" && findmnt -no FSTYPE "$(MNT)" | grep -q daxfs; then \
		echo "daxfs: $(MNT) is mounted; see: daxfs info $(MNT)"; \
	else \
		mkdir -p "$(MNT)" && $(BIN)/daxfs mount "$(MNT)"; \
	fi

test: system-test $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal --hotpath=off -k "not ($(NOT_COLD))" $(COLD)

lint: system $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

fuzz: system-test $(VENV)/installed-fuzz
	$(BIN)/python -m tools.fuzz_coverage --seconds $(FUZZ_S) --corpus build/fuzz/corpus --keep build/fuzz/harm

kills: system-test $(VENV)/installed-dev
	DAXFS_TEST_KILLS=1000 $(BIN)/python -m pytest tests/mount/test_crash.py -k under_load -s

bench: system-bench $(VENV)/installed
	$(BIN)/daxfs bench $(BENCH)

soak: $(VENV)/installed
	$(BIN)/daxfs lab crash --images 1000000

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find daxfs -name '*.so' -delete
	for source in daxfs/*/*.pyx; do rm -f "$${source%.pyx}.c"; done
	find . -name __pycache__ -prune -exec rm -rf {} +

system:
	@tools/system-packages.sh "$(PYTHON)"

system-test:
	@tools/system-packages.sh "$(PYTHON)" test

system-bench:
	@tools/system-packages.sh "$(PYTHON)" bench

# Stamps: a step is done again when what it comes from has changed. Python files need no step, the install is editable.
$(BIN)/python: | system
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml tools/build_backend.py $(NATIVE) | system $(BIN)/python
	@echo "building daxfs: a minute or two, without output"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@mkdir -p $(VENV)/share/man && ln -sfn $(CURDIR)/docs/man $(VENV)/share/man/man1 && ln -sfn $(CURDIR)/docs/man $(VENV)/share/man/man8
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(VENV)/installed
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"], sep="\n")' \
		| $(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement /dev/stdin
	@touch $@

$(VENV)/installed-fuzz: pyproject.toml $(VENV)/installed-dev
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["fuzz"], sep="\n")' \
		| $(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement /dev/stdin
	@touch $@
