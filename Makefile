# What there is to do here. Each target does its own set-up, and nothing twice. `make` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test soak fuzz guest lint bench sqlx-prepare clean run-demo run-tests run-soak run-bench need-rust need-npm

TARGET := $(or $(CARGO_TARGET_DIR),target)
# The queries are checked against .sqlx; `sqlx-prepare` alone asks a database.
export SQLX_OFFLINE := true

CARGO_DENY := 0.20.2
CARGO_FUZZ := 0.13.2

# A heading, so that a long run shows where it is.
step = @printf '\n\033[1m== %s\033[0m\n' '$(1)'

help: ## List these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

setup: need-npm ## Bring the pinned OpenCode and ripgrep, and a Postgres server where none is installed
	@scripts/with-setup

demo: need-rust need-npm ## Run one real task in a real OpenCode, and show all of it
	$(call step,Set-up)
	@scripts/with-setup $(MAKE) --no-print-directory run-demo

run-demo:
	$(call step,Release build)
	@cargo build --locked --release
	@$(TARGET)/release/opencode-sidecar demo

test: need-rust need-npm ## Run every check and all tests: what has to pass
	$(call step,Set-up)
	@guest=$$(scripts/setup-guest --if-possible); \
	if [[ -n $$guest ]]; then export OPENCODE_SIDECAR_GUEST=$$guest; fi; \
	OPENCODE_SIDECAR_SCHEMATHESIS=$$(scripts/setup-schemathesis); export OPENCODE_SIDECAR_SCHEMATHESIS; \
	scripts/with-setup $(MAKE) --no-print-directory lint run-tests

run-tests:
	$(call step,Tests)
	@cargo test --locked
	$(call step,Interleavings of the event log)
	@cargo test --locked --lib --features shuttle -- interleavings

soak: need-rust need-npm ## Kill the sidecar at random instants, 500 times (SOAK_ROUNDS, SOAK_SEED); and page a log of a million events
	$(call step,Set-up)
	@SOAK=1 SOAK_ROUNDS=$${SOAK_ROUNDS:-500} scripts/with-setup $(MAKE) --no-print-directory run-soak

run-soak:
	$(call step,Soak)
	@cargo test --locked --test it -- --nocapture run::soak run::million

fuzz: need-rust need-npm ## Throw bytes at what reads them, each target for FUZZ_SECONDS (60); FUZZ=NAME for one alone
	$(call step,Fuzzers)
	@export PATH="$$PWD/target/tools/bin:$$PATH"; \
	if [[ $$(cargo-fuzz --version 2>/dev/null) != 'cargo-fuzz $(CARGO_FUZZ)' ]]; then \
	    echo 'Building cargo-fuzz $(CARGO_FUZZ), once'; \
	    cargo install --locked --debug --quiet --root target/tools --version $(CARGO_FUZZ) cargo-fuzz; \
	fi; \
	export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$$PWD/target/fuzz; \
	mkdir -p target/fuzz/found; \
	for target in $${FUZZ:-$$(ls fuzz/corpus)}; do \
	    printf '\n%s\n' "$$target"; \
	    mkdir -p "target/fuzz/corpus/$$target"; \
	    cargo fuzz run "$$target" "target/fuzz/corpus/$$target" "fuzz/corpus/$$target" -- \
	        -max_total_time=$${FUZZ_SECONDS:-60} -max_len=65536 -rss_limit_mb=2048 -print_final_stats=1 \
	        -artifact_prefix=target/fuzz/found/$$target-; \
	done
	$(call step,Requests that schemathesis makes)
	@OPENCODE_SIDECAR_SCHEMATHESIS=$$(scripts/setup-schemathesis) SCHEMATHESIS_EXAMPLES=$${SCHEMATHESIS_EXAMPLES:-500} \
	    scripts/with-setup cargo test --locked --test it -- --nocapture run::schema

guest: need-rust ## Of the tests, only the limits of control groups in a small virtual machine with version 2 alone (Debian's QEMU)
	@guest=$$(scripts/setup-guest) && OPENCODE_SIDECAR_GUEST=$$guest cargo test --locked --test it -- --nocapture cgroup::guest

lint: need-rust need-npm ## Check format, lints, dependencies and the compiled queries
	$(call step,Format)
	@cargo fmt --check || { echo 'make: the format is not that of cargo fmt, or it could not run' >&2; exit 1; }
	$(call step,Clippy)
	@cargo clippy --locked --all-targets -- -D warnings
	$(call step,Queries)
	@scripts/sqlx-prepare --check
	$(call step,Dependencies)
	@PATH="$$PWD/target/tools/bin:$$PATH"; \
	if [[ $$(cargo-deny --version 2>/dev/null) != 'cargo-deny $(CARGO_DENY)' ]]; then \
	    echo 'Building cargo-deny $(CARGO_DENY), once'; \
	    cargo install --locked --debug --quiet --root target/tools --version $(CARGO_DENY) cargo-deny; \
	fi; \
	cargo-deny --locked check --hide-inclusion-graph bans licenses sources

bench: need-rust need-npm ## Measure, both sides in one run
	$(call step,Set-up)
	@scripts/with-setup $(MAKE) --no-print-directory run-bench

run-bench:
	$(call step,Benchmarks)
	@cargo bench --locked --bench '*'

sqlx-prepare: need-rust need-npm ## Write .sqlx again, after a change of a query or a migration
	@scripts/sqlx-prepare

clean: need-rust ## Remove everything that was built or brought
	@cargo clean
	@rm -rf target sidecars/*/node_modules

need-rust:
	@if ! cargo --version >/dev/null 2>&1; then \
	    echo 'make: Rust is missing: install 1.95 or later with https://rustup.rs' >&2; exit 1; fi
	@if ! command -v cc >/dev/null; then \
	    echo 'make: a C compiler is missing: apt-get install build-essential' >&2; exit 1; fi

need-npm:
	@if ! command -v npm >/dev/null || ! command -v node >/dev/null; then \
	    echo 'make: npm is missing: apt-get install npm, or Node 18 or later from https://nodejs.org' >&2; exit 1; fi
