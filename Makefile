# `make demo` or `make test` is all that a fresh clone needs: each first installs what it needs itself.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-done
DEMO   := $(VENV)/.demo-done
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
SUITE  ?= full

# What builds the package and what the demo imports; then the rest, which the tests need.
FIRST  := setuptools wheel ninja torch triton numpy transformers pillow scikit-learn matplotlib
TOOLS  := setuptools wheel ninja build ruff mypy clang-format
NEEDS  := torch triton numpy pytest pytest-xdist hypothesis expecttest matplotlib transformers diffusers accelerate peft \
	pillow scikit-learn scipy onnx onnxscript onnxruntime executorch cuda-bindings
SOURCE := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.cpp csrc/*/*/*.h)
CUDA   := $(wildcard csrc/cuda/*/*.cu csrc/cuda/*/*.cuh)
PTX    := $(wildcard tests/ptx/machine/*)

# gcc's run-time libraries of the sanitizers, which have to be in the process before Python's allocator is.
SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
SANITIZED ?= $(filter-out %_triton.py, $(wildcard tests/ops/test_*.py)) tests/test_concurrency.py

.PHONY: setup demo test check bench docs lint format audit ptx candidates gpu neon sanitize cuda hub wheel release-check matrix clean

# The demo's is a part of it: no other packages, and kernels for the best instruction set of this processor alone.
setup: $(STAMP)

$(DEMO): pyproject.toml setup.py constraints.txt $(SOURCE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(FIRST)
	MVKERNELS_SKIP_CUDA=1 MVKERNELS_BUILD_ISAS=native $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-build-isolation \
		--no-deps -e .
	touch $@

$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TOOLS) $(NEEDS)
	$(PIP) --no-deps torchvision timm kernels
	MVKERNELS_SKIP_CUDA=1 $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-build-isolation \
		--no-deps -e .
	touch $@

demo: $(if $(wildcard $(STAMP)),$(STAMP),$(DEMO))
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -n auto -m "not interpreter"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto -m interpreter

# For while you work: lint, types, and one test of each file, that marked `core` or else the first quick one.
check: lint
	$(BIN)/python -m pytest -n auto -m "not interpreter" --one-a-file

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCE) $(CUDA) $(PTX) tests/cuda/driver.c
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCE) $(CUDA) $(PTX) tests/cuda/driver.c

bench: setup
	$(BIN)/python benchmarks/patch_attention.py --suite $(SUITE)
	$(BIN)/python benchmarks/window_attention.py --suite $(SUITE)
	$(BIN)/python benchmarks/patch_transformer_layer.py --suite $(SUITE)
	$(BIN)/python benchmarks/mobile_to_former.py --suite $(SUITE)
	$(BIN)/python benchmarks/former_to_mobile.py --suite $(SUITE)
	$(BIN)/python benchmarks/relu_linear_attention.py --suite $(SUITE)
	$(BIN)/python benchmarks/multiscale_linear_attention.py --suite $(SUITE)
	$(BIN)/python benchmarks/inverted_residual.py --suite $(SUITE)
	$(BIN)/python benchmarks/conv3x3.py --suite $(SUITE)
	$(BIN)/python benchmarks/pointwise.py --suite $(SUITE)
	$(BIN)/python benchmarks/swapped.py --runtimes freezing
	$(BIN)/python benchmarks/models.py
	$(BIN)/python benchmarks/threads.py
	if command -v perf; then $(BIN)/python benchmarks/parts.py; fi
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/numerics.py
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python benchmarks/pages.py

docs: setup
	$(BIN)/python -c "import mkdocs, mkdocstrings, material" 2>/dev/null || \
		$(PIP) 'mkdocs<2' mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python -m pytest tests/test_site.py

audit: setup
	$(BIN)/python benchmarks/audit.py --processes 2
	$(BIN)/python benchmarks/predict.py --processes 2

# The compiled kernels, executed here: half an hour on 2 cores.
ptx: setup
	$(BIN)/python benchmarks/ptx.py

# What `mvkernels tune` tries, by what the compiled kernels do: an hour on 2 cores.
candidates: setup
	$(BIN)/python benchmarks/candidates.py

gpu: setup
	$(BIN)/python benchmarks/gpu.py --minutes 9.5

# The C++ kernels for ARM: their tests in emulation, their machine code. Needs g++-aarch64-linux-gnu and qemu-user.
neon: setup
	$(BIN)/python -m release.neon

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, beside a copy of the tests: the checkout's own
# extension stays as it is. Leaks are Python's own and not looked for.
sanitize: setup
	rm -rf build/sanitize && mkdir -p build/sanitize/lib
	MVKERNELS_REQUIRE_EXT=1 MVKERNELS_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined \
		-fno-omit-frame-pointer -O1 -g1" $(BIN)/python setup.py --quiet build --build-temp build/sanitize/objects \
		--build-lib build/sanitize/lib
	cp -r tests pyproject.toml build/sanitize/lib
	cd build/sanitize/lib && LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(abspath $(BIN))/python -m pytest -x -q -m "not interpreter" \
		-k "not compile and not export" $(SANITIZED)

# The kernels in CUDA C++, for the package to ship: needs nvcc, and neither a GPU nor a set-up.
cuda:
	$(PYTHON) csrc/cuda/compile.py

# The ops in Triton and PyTorch for Hugging Face's `kernels` library, into dist/hub: needs no set-up.
hub:
	$(PYTHON) -m release.hub

wheel: setup
	MVKERNELS_BUILD_ISAS=all MVKERNELS_REQUIRE_CUDA=1 MVKERNELS_SKIP_EXECUTORCH=1 $(BIN)/python -m build --no-isolation

# Builds from what is committed, in a clone, and checks what would be published: the source, the wheel as auditwheel
# names it for this machine's glibc, and the pure one, which is built from the source. The CUDA kernels are compiled once.
RELEASE := $(abspath build/release)

release-check: setup
	$(BIN)/python -m release.check
	rm -rf $(RELEASE)/source $(RELEASE)/built $(RELEASE)/dist $(RELEASE)/unpacked $(RELEASE)/wheel
	mkdir -p $(RELEASE)/dist $(RELEASE)/unpacked && git clone --quiet . $(RELEASE)/source
	test -x $(RELEASE)/tools/bin/python || $(PYTHON) -m venv $(RELEASE)/tools
	$(RELEASE)/tools/bin/python -m pip --disable-pip-version-check install --quiet -r release/requirements.txt
	cd $(RELEASE)/source && MVKERNELS_BUILD_ISAS=all MVKERNELS_REQUIRE_EXT=1 MVKERNELS_REQUIRE_CUDA=1 MVKERNELS_SKIP_EXECUTORCH=1 \
		$(abspath $(BIN))/python -m build --no-isolation --outdir $(RELEASE)/built
	PATH="$(RELEASE)/tools/bin:$$PATH" $(RELEASE)/tools/bin/python -m auditwheel repair --exclude libtorch_cpu.so \
		--wheel-dir $(RELEASE)/dist $(RELEASE)/built/*.whl
	cp $(RELEASE)/built/*.tar.gz $(RELEASE)/dist
	tar -xzf $(RELEASE)/dist/*.tar.gz --directory $(RELEASE)/unpacked --strip-components 1
	$(BIN)/python -m zipfile --extract $(RELEASE)/built/*.whl $(RELEASE)/wheel
	cp -r $(RELEASE)/wheel/mvkernels/cuda/data $(RELEASE)/unpacked/mvkernels/cuda
	MVKERNELS_SKIP_EXT=1 MVKERNELS_REQUIRE_CUDA=1 \
		$(BIN)/python -m build --no-isolation --wheel --outdir $(RELEASE)/dist $(RELEASE)/unpacked
	$(RELEASE)/tools/bin/python -m release.check --python $(abspath $(BIN))/python --write $(RELEASE)/dist/*

# Installs the wheel that was checked beside several versions of Python and torch, and runs tests on it.
matrix:
	$(BIN)/python -m release.matrix build/release/dist/*-abi3-*.whl $(MATRIX)

clean:
	rm -rf build dist *.egg-info mvkernels/*.so demo-output benchmarks/out .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMP) $(DEMO)
