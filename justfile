# The commands of CONTRIBUTING.md. `just` lists them; https://just.systems.

default:
    @just --list

# Lint, format, types, import borders.
check:
    uv run ruff check .
    uv run ruff format --check .
    uv run mypy
    uv run lint-imports

# Put imports and layout in order.
format:
    uv run ruff check --fix .
    uv run ruff format .

# Everything but slow variants, as CI does. `just test tests/cortex_core` runs a part.
test *paths:
    uv run pytest -n 2 {{ paths }}

# The quick tests: no process, less than a second each.
unit *paths:
    uv run pytest -n 2 -m unit {{ paths }}

# The slow variants too.
test-full:
    CORTEX_FULL=1 uv run pytest -n 2

# Longer random histories of scheduler, pages and lifecycle, and of what clients may send.
test-long rounds="500":
    CORTEX_ROUNDS={{ rounds }} uv run pytest tests/neuron -k accounting
    CORTEX_ROUNDS={{ rounds }} uv run pytest tests/fuzz

# What a change must pass, from a clean environment to installed wheels.
ci:
    .ci/run

# A neuron, a gateway and a small model on loopback, and a chat.
demo *args:
    uv run cortex demo {{ args }}

# CPU of the gateway beside a bare pass-through.
bench-gateway:
    uv run python tests/bench/gateway.py

# The engine beside transformers, on a CPU.
bench-engine:
    uv run python tests/bench/engine.py --model demo

# The RPMs; needs rpmbuild.
rpm out="dist/rpm":
    rpm/build {{ out }}
