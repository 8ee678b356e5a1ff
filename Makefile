# Haulage. `make demo` and `make test` are all that a new user needs; both install what is missing (as root, on
# Debian 12 or 13) and build.

CARGO ?= cargo
# What whole-system tests and the demo run: the programs as a user would run them.
BINARIES := --workspace --bins

.PHONY: help setup build demo test test-vm test-vm-6.1 bench bench-quick lint clean

help:
	@echo 'make demo    two Docker hosts on this machine, a Redis that moves between them under load (KEEP=1 leaves it running)'
	@echo 'make test    all tests, those with real Docker, CRIU and NATS included'
	@echo 'make test-vm a choice of tests on Debian 13 and its own kernel, in an emulated machine (RELEASE=name: another Debian)'
	@echo 'make test-vm-6.1  soft-dirty tracking on Debian 12 and its own kernel 6.1, in an emulated machine'
	@echo 'make bench   what a move costs, against other ways to do it; up to 40 minutes (PUBLISH=1 writes deploy/BENCHMARKS.md)'
	@echo 'make bench-quick  the most telling part of it; up to 8 minutes'
	@echo 'make lint    formatting, clippy, and the dependency policy where cargo-deny is installed'
	@echo 'make setup   install what the above need: Docker engine, CRIU, NATS server'
	@echo 'make clean   remove what was built'

setup:
	deploy/setup

build: setup
	$(CARGO) build --locked $(BINARIES)

demo: build
	target/debug/demo $(if $(KEEP),--keep)

test: build
	@if $(CARGO) nextest --version >/dev/null 2>&1; \
	then $(CARGO) nextest run --locked --workspace --no-fail-fast; \
	else $(CARGO) test --locked --workspace --no-fail-fast -- --test-threads=1; fi
	$(CARGO) test --locked --workspace --doc

test-vm:
	tests/vm/run $(if $(RELEASE),--release $(RELEASE)) -- tests/vm/checks

# The programs must have been built on Debian 12: its C library is the older one.
test-vm-6.1:
	tests/vm/run --release bookworm -- tests/vm/checks-6.1

# Figures of debug builds mean nothing.
bench: setup
	$(CARGO) build --locked --release $(BINARIES)
	target/release/bench $(if $(PUBLISH),--publish)

bench-quick: setup
	$(CARGO) build --locked --release $(BINARIES)
	target/release/bench --quick $(if $(PUBLISH),--publish)

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- --deny warnings
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny --offline check licenses bans sources; \
	else echo 'cargo-deny is not installed: the dependency policy (deny.toml) is not checked'; fi

clean:
	$(CARGO) clean
