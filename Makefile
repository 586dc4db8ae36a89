# What readers need is `make book` and `make test`; `make help` lists the rest.

PORT ?= 8000
export CH REPO
# a Python asked for, else the one .venv has, else the first that fits
pythons = $(or $(PYTHON),.venv/bin/python python3 python3.13 python3.12 python3.11)
# an environment made with TORCH_INDEX stays so until it is given again, or empty
torch_index = $(if $(filter undefined,$(origin TORCH_INDEX)),,--torch-index "$(TORCH_INDEX)")
bin = .venv/bin

.PHONY: help environment book test test-other-cpu execute lab serve bench lock \
	retarget clean clean-all

help:
	@echo "make book                  the rendered book, in _build/html"
	@echo "make test                  every check; the notebooks are executed again"
	@echo "make test-other-cpu        the notebooks again, as on a CPU without AVX"
	@echo "make execute CH=NAME       run chapters/NAME.ipynb and store its outputs;"
	@echo "                           without CH every chapter"
	@echo "make lab                   JupyterLab on the chapters"
	@echo "make serve PORT=8000       the book on this machine's port"
	@echo "make bench                 the solvers beside the peers: tables and figures of"
	@echo "                           'How fast is it?'; leave the machine alone meanwhile"
	@echo "make lock                  requirements.txt from requirements.in, the book's and"
	@echo "                           the benchmarks'; UPGRADE=1 takes the newest releases"
	@echo "make retarget REPO=a/b     write a fork's address everywhere"
	@echo "make clean                 remove what was built; clean-all: .venv too"
	@echo "PYTHON=python3.12          the Python to make .venv with"
	@echo "TORCH_INDEX=URL            take torch there, without CUDA packages"

environment:
	@for python in $(pythons); do \
		$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
			2>/dev/null && exec $$python tools/environment.py $(torch_index); \
	done; \
	echo "environment: Python 3.11, 3.12 or 3.13 is needed, and" \
		"$(or $(PYTHON),python3) --version says" \
		"'`$(or $(PYTHON),python3) --version 2>&1 | tail -n 1`':" \
		"install one, or name it with make PYTHON=" >&2; \
	exit 1

book: environment
	@$(bin)/jupyter-book build -q . >/dev/null
	@echo "Open $(CURDIR)/_build/html/index.html"

test: environment
	@$(bin)/python tools/check.py

test-other-cpu: environment
	@ATEN_CPU_CAPABILITY=default $(bin)/python tools/check.py notebooks

execute: environment
	@$(bin)/python tools/execute.py $(if $(CH),"$$CH")

lab: environment
	@$(bin)/jupyter lab chapters

serve: book
	@$(bin)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

bench: environment
	@$(bin)/python benchmarks/peer_environment.py
	@TF_CPP_MIN_LOG_LEVEL=3 .venv-bench/bin/python benchmarks/run.py $(if $(ROUNDS),--rounds $(ROUNDS))

compile = $(bin)/uv pip compile -q --universal --python-version 3.11 --no-header \
	--no-emit-index-url $(if $(UPGRADE),--upgrade)

lock: environment
	@$(compile) -o requirements.txt requirements.in
	@$(compile) --fork-strategy fewest -c requirements.txt \
		--overrides benchmarks/overrides.txt \
		-o benchmarks/requirements.txt benchmarks/requirements.in

retarget:
	@$(or $(PYTHON),python3) tools/retarget.py "$$REPO"

clean:
	rm -rf _build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find chapters src tests tools benchmarks _ext -name __pycache__ -prune -exec rm -rf {} +
	find chapters -name .ipynb_checkpoints -prune -exec rm -rf {} +

clean-all: clean
	rm -rf .venv .venv-bench src/*.egg-info
