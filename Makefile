# Each target sets up what it needs: .venv, PyTorch if there is none, the build. A second call
# starts at once.
#   make test TORCH="torch==2.13.0 --index-url ..."    another PyTorch
#   make test PYTHON=python3.12                          another Python
SHELL  := /bin/bash
PYTHON ?= python3
TORCH  ?= torch==2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Bytecode is made of what is imported, then; of all that is installed it would take a minute.
unexport PYTHONDONTWRITEBYTECODE

BUILT   := .venv/.built
SOURCES := $(shell find csrc -type f)
RUN     := .venv/bin/python -m
INSTALL := $(RUN) pip install --no-compile

.PHONY: demo test bench bench-full bench-compare gpu lint fmt clean distclean

demo: $(BUILT)
	.venv/bin/saesteer demo

# A process a core that this one may use, up to 8, and a thread each: tests of threads ask for more.
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc || echo 4); echo $$((n < 8 ? n : 8)))
test: $(BUILT)
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --dist loadfile -rs

bench bench-full: $(BUILT)
	$(RUN) pytest bench -q --benchmark-columns=min,median,iqr $(if $(filter bench-full,$@),--full)

# REV= names the commit that HEAD is compared with.
bench-compare: $(BUILT)
	@test -n "$(REV)" || { echo "make bench-compare: name a commit with REV=" >&2; exit 1; }
	$(RUN) bench.compare "$(REV)"

# Builds, tests and measures on the GPU that is here, in at most nine minutes; OUT= names another
# folder than bench/results. Everything from the Python at hand, as it is: nothing is installed.
gpu:
	@$(PYTHON) -c "import torch; assert torch.cuda.is_available()" 2>/dev/null \
	  || { echo "make gpu: $(PYTHON) has no PyTorch that sees a CUDA device" >&2; exit 1; }
	$(PYTHON) -m bench.gpu $(if $(OUT),--out $(OUT))

LAID_OUT = $(filter %.h %.cpp %.cu %.cuh,$(SOURCES) $(shell find tests bench -type f))

lint: $(BUILT)
	$(RUN) ruff check
	$(RUN) ruff format --check
	.venv/bin/clang-format --dry-run -Werror $(LAID_OUT)

fmt: $(BUILT)
	$(RUN) ruff check --fix
	$(RUN) ruff format
	.venv/bin/clang-format -i $(LAID_OUT)

# What was built. The next target builds again, in the .venv that is there.
clean:
	rm -rf build dist *.egg-info saesteer_fast/*.so saesteer_fast/triton_kernels $(BUILT)
	find . -name .venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

# The environment too, and what `saesteer demo` and `saesteer mini build` have written here.
distclean: clean
	rm -rf .venv saesteer-demo saesteer-mini

# Debian's Python may come without ensurepip; its own pip then serves the environment.
.venv/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" \
	  || { echo "make: $(PYTHON) must be Python >= 3.10; name one with PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv --system-site-packages .venv \
	  || { $(PYTHON) -m venv --system-site-packages --without-pip --clear .venv \
	       && .venv/bin/python -m pip --version; } \
	  || { rm -rf .venv; echo "make: $(PYTHON) can make no environment with pip: install python3-venv" >&2; exit 1; }

# A PyTorch that is there stays: only none, or one older than 2.10, is replaced. An older pip takes
# twice the time, and serves where no other can be had.
$(BUILT): setup.py CMakeLists.txt pyproject.toml $(SOURCES) | .venv/bin/python
	$(INSTALL) -q "pip>=25" || true
	.venv/bin/python -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 10)" \
	  2>/dev/null || $(INSTALL) $(TORCH)
	$(INSTALL) -q "setuptools>=77" wheel cmake ninja
	$(INSTALL) -q --no-build-isolation -e ".[demo,test,lint]"
	@touch $@
