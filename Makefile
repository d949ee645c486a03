# Every target makes what it needs: .venv with the dependencies, and the C++ library.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
MAX_JOBS ?= 2
export MAX_JOBS

# Used where it is installed; never needed.
ifneq ($(wildcard /usr/lib/ccache),)
export PATH := /usr/lib/ccache:$(PATH)
endif

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
OBJECTS := build/objects
# --force: the outer build looks at .cpp files alone, ninja inside it knows the headers too.
BUILD = $(PY) setup.py --quiet build_ext --inplace --force --build-temp $(OBJECTS)
SOURCES := setup.py $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Three targets: A100, H100 with its own instructions, and code for what comes after it.
NVCC ?= nvcc
NVCC_FLAGS := -std=c++20 -O3 --fmad=false --expt-relaxed-constexpr -Werror all-warnings \
  -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a \
  -gencode arch=compute_90,code=compute_90
CUDA_OBJECTS := $(patsubst csrc/cuda/%.cu,build/cuda/%.o,$(wildcard csrc/cuda/*.cu))

# Versions of transformers, and the tests that touch it.
COMPAT := 5.17.0 5.23.0
COMPAT_TESTS := $(wildcard $(patsubst %,tests/test_%.py,\
  hf peft checkpoint models streaming shards minilm layers norms compile report_directory))

.PHONY: demo examples test compat bench lint wheel fuzz sanitize cuda emulated gpu check-nvcc build clean distclean check-tools

demo: $(BUILT)
	$(PY) examples/demo.py $(DEMO)

# The small budgets of CI; without options each example takes a minute or two.
examples: $(BUILT)
	$(PY) examples/swap_linear.py --steps 200
	$(PY) examples/compress_model.py --windows 8
	$(PY) examples/finetune_2bit.py --calibration 8 --training 16 --judging 4096
	$(PY) examples/lora_on_codes.py --calibration 8 --training 16 --judging 4096
	$(PY) examples/qat_digits.py --seeds 1
	$(PY) examples/code_descent.py --steps 8 --windows 16
	$(PY) examples/run_notebooks.py --quick
	$(PY) examples/mini_llama.py
	$(PY) examples/mini_gpt2.py
	$(PY) examples/hf_roundtrip.py --codec "uniform(bits=2)" --windows 16 --judging 4096

test: $(BUILT)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(MAX_JOBS) $(PYTEST)

# The plug-in under the oldest and the newest transformers that are supported, each in a venv of its
# own that finds everything else in $(VENV).
compat: $(COMPAT:%=compat-%)

compat-%: build/compat/%/.installed
	@echo "transformers $*:"
	@PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 build/compat/$*/bin/python -m pytest -n $(MAX_JOBS) \
	  $(COMPAT_TESTS) $(PYTEST)

# 5.17 needs the huggingface_hub of its time and what that needs.
.PRECIOUS: build/compat/%/.installed
build/compat/%/.installed: $(BUILT)
	rm -rf $(@D)
	$(PY) -m venv --without-pip $(@D)
	$(if $(filter 5.17.%,$*),$(PY) -m pip --python $(@D)/bin/python install --quiet "huggingface_hub<2")
	$(PY) -m pip --python $(@D)/bin/python install --quiet --no-deps transformers==$*
	$(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(@D)/place
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(cat $(@D)/place)/all.pth"
	$(@D)/bin/python -c 'import transformers as t; assert t.__version__ == "$*", t'
	@touch $@

bench: $(BUILT)
	$(PY) -m reality_stone bench $(BENCH)

lint: $(INSTALLED)
	$(PY) -m ruff check .

# The wheel for this Python, processor and torch, and the tests on it: in an environment of its own,
# from a copy of the tests without the package's sources beside it.
WHEEL_VENV := build/wheel-venv
wheel: $(BUILT)
	rm -rf dist build/wheel $(WHEEL_VENV)
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(WHEEL_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(WHEEL_VENV)/bin/python -m pip install --quiet "$$(ls dist/*.whl)[hf,peft,plot,test]"
	mkdir -p build/wheel && cp -r tests csrc examples benchmarks docs pyproject.toml README.md build/wheel
	cd build/wheel && OMP_NUM_THREADS=1 ../wheel-venv/bin/python -P -m pytest -n $(MAX_JOBS) $(PYTEST)
	@ls -l dist/*.whl

# Damaged files and manifests under a coverage-guided fuzzer, outside the tests: FUZZ seconds each.
FUZZ ?= 600
fuzz: $(BUILT)
	$(PY) -m pip install --quiet "atheris>=3"
	$(PY) tests/fuzz/run.py --seconds $(FUZZ)

sanitize: $(BUILT)
	PYTHON="$(CURDIR)/$(PY)" bash tests/sanitize.sh

# Compiles every kernel, which takes no GPU. The library takes them in where torch has CUDA.
cuda: $(CUDA_OBJECTS)

build/cuda/%.o: csrc/cuda/%.cu $(wildcard csrc/*.h csrc/codecs/*.h csrc/cuda/*.h csrc/cuda/*.cuh) \
    | check-nvcc
	@mkdir -p $(@D)
	@$(NVCC) $(NVCC_FLAGS) -c $< -o $@
	@echo "compiled $<"

# The same kernels and their bindings as C++, with the threads of a block as fibers, and their tests.
EMULATED := build/emulated
EMULATED_SOURCES := $(wildcard csrc/cuda/*.cu csrc/cuda/*.cpp) tests/emulation/emulation.cpp
EMULATED_OBJECTS := $(EMULATED_SOURCES:%=$(EMULATED)/%.o)
EMULATED_FLAGS := -std=c++20 -O1 -g0 -fPIC -fopenmp -ffp-contract=off -Wall -Wno-unknown-pragmas \
  -Wno-sign-compare -Itests/emulation -DRS_CUDA_LIBRARY=reality_stone_emulated,CPU
# Asked of torch once, and only here.
TORCH_FLAGS = $(eval TORCH_FLAGS := $(shell $(PY) -c 'from torch.utils import cpp_extension as c; \
  print(*("-isystem" + d for d in c.include_paths()))'))$(TORCH_FLAGS)
TORCH_LIBRARIES = $(eval TORCH_LIBRARIES := $(shell $(PY) -c 'from torch.utils import cpp_extension as c; \
  print(*("-L" + d for d in c.library_paths()))') -lc10 -ltorch -ltorch_cpu)$(TORCH_LIBRARIES)

emulated: $(EMULATED)/cuda.so
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(MAX_JOBS) tests/test_cuda*.py $(PYTEST)

# With what the CPU's library is made of, but for the registration of its ops.
$(EMULATED)/cuda.so: $(EMULATED_OBJECTS) $(EMULATED)/.host
	@$(CXX) -shared -fopenmp -o $@ $(EMULATED_OBJECTS) $$(find $(OBJECTS) -name '*.o' -not -name library.o \
	  -not -name python.o -not -path '*/csrc/cuda/*') $(TORCH_LIBRARIES)

# An install compiles elsewhere and leaves no objects.
$(EMULATED)/.host: $(SOURCES) | $(BUILT)
	@mkdir -p $(@D)
	@$(BUILD) > $(EMULATED)/host.log 2>&1 || { cat $(EMULATED)/host.log; exit 1; }
	@touch $@

$(EMULATED)/%.o: % $(wildcard csrc/*.h csrc/codecs/*.h csrc/cuda/*.h csrc/cuda/*.cuh tests/emulation/*.h) | $(BUILT)
	@mkdir -p $(@D)
	@$(CXX) -x c++ $(EMULATED_FLAGS) $(TORCH_FLAGS) -c $< -o $@
	@echo "emulated $<"

# All that wants a GPU, with the Python and the torch that are there: GPU="tests linear" for some of it.
gpu:
	@$(PYTHON) benchmarks/gpu.py $(GPU)

check-nvcc:
	@command -v $(NVCC) > /dev/null || { \
	  echo "make cuda needs nvcc, the compiler of the CUDA toolkit, and there is no $(NVCC)"; exit 1; }

build: $(BUILT)

$(INSTALLED): pyproject.toml
	@$(MAKE) --no-print-directory check-tools
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja numpy
	$(PY) -m pip install --quiet "$(TORCH)"
	@echo "compiling the C++ library and installing (a few minutes the first time)"
	$(PY) -m pip install --quiet --no-build-isolation -e ".[hf,plot,test]"
	@touch $(INSTALLED) $(BUILT)

# Installing has compiled the library: only sources newer than that compile again.
$(BUILT): $(INSTALLED) $(SOURCES)
	@if [ ! -e $@ ] || [ -n "$$(find $(SOURCES) -newer $@)" ]; then \
	  echo "compiling what has changed"; \
	  $(BUILD) > $(VENV)/build.log 2>&1 || \
	    { cat $(VENV)/build.log; exit 1; }; \
	fi
	@touch $@

check-tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Python 3.10 or newer is needed; $(PYTHON) is not. Try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module. On Debian: apt-get install python3-venv"; exit 1; }
	@test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || { \
	  echo "the headers of $(PYTHON) are missing. On Debian: apt-get install python3-dev"; exit 1; }
	@echo 'int main() {}' | $(CXX) -std=c++20 -fsyntax-only -x c++ - 2>/dev/null || { \
	  echo "a C++20 compiler is needed and $(CXX) is none: install g++ 11 or newer"; exit 1; }

clean:
	rm -rf build out *.egg-info reality_stone/_C*.so $(BUILT)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
