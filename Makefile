# Two commands are all a newcomer needs: "make demo" and "make test".

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
NATIVE_TEST = $(BIN)/cmake -S cpp_bindings -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo
FOLDERS := package export runtime quant sample scripts tests benchmarks examples

.PHONY: help demo page test lint types unit native-test native-threads native-aarch64 native-format wheel bench fuzz soak load full full-size aarch64 clean

help:
	@echo "make demo   set up, convert the sample model, ask about an image"
	@echo "make page   the same, then a page in the browser to drop pictures on and ask about them"
	@echo "make test   set up, lint, check types, run all tests, try the installed wheel"
	@echo "make unit   the fast tests: all but those that export with GPTQ, build engines, kill and resume"
	@echo "make bench  speed of a conversation with the sample model"
	@echo "make fuzz   100,000 hostile inputs, under 20 minutes; MINUTES=5, INPUTS=1000, SURFACES=images,data, SEED=1, REPEAT=FILE"
	@echo "make soak   20 minutes of chats that stop, fork and fail, watched for memory and wrong answers; MINUTES=5"
	@echo "make load   1, 4 and 16 clients of the server, ten minutes, each answer checked; SECONDS=60"
	@echo "make full   what takes long: accuracy of every kind of bundle, each choice of the quantizer, full-size layers"
	@echo "make full-size   a whole model of 7B shapes: 25 GB in build/, about an hour"
	@echo "make aarch64   the wheel, cross-built, on an emulated aarch64 machine: 1.1 GB in build/, fifteen minutes; needs Debian's apt"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.export: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[cpu,export]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev,sample,hub]'
	@touch $@ $(VENV)/.export

bundles/sample/owl2.json: $(VENV)/.export sample/checkpoint/model.safetensors
	$(BIN)/owl2-export sample/checkpoint bundles/sample --overwrite

demo: bundles/sample/owl2.json
	$(BIN)/owl2 ask bundles/sample "Describe the picture." --image sample/pictures/scene3.png --stats

page: bundles/sample/owl2.json
	$(INSTALL) -e '.[cpu,export,serve]'
	$(BIN)/owl2 serve bundles/sample --open

test: lint types native-test
	$(BIN)/python -m pytest
	$(MAKE) wheel

lint: $(VENV)/.dev
	$(BIN)/ruff check $(FOLDERS)
	$(BIN)/ruff format --check $(FOLDERS)
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

# mypy follows imports through the installed package, which an editable install hides from it.
types: $(VENV)/.dev
	@mkdir -p build/typecheck/owl2
	@for folder in export runtime quant; do ln -sfn ../../../$$folder build/typecheck/owl2/$$folder; done
	@ln -sfn ../../../package/__init__.py build/typecheck/owl2/__init__.py
	$(BIN)/mypy -p owl2
	MYPYPATH=build/typecheck:sample:scripts:scripts/witness:benchmarks:tests $(BIN)/mypy --explicit-package-bases \
		sample scripts benchmarks tests

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

# The core's own tests, under the sanitizers for addresses and undefined behaviour.
native-test: $(VENV)/.dev
	$(NATIVE_TEST) -B build/native-test -DOWL2_SANITIZE=address,undefined
	$(BIN)/cmake --build build/native-test
	cd build/native-test && ../../$(BIN)/ctest --output-on-failure

# The same under the sanitizer for threads.
native-threads: $(VENV)/.dev
	$(NATIVE_TEST) -B build/native-threads -DOWL2_SANITIZE=thread
	$(BIN)/cmake --build build/native-threads
	cd build/native-threads && ../../$(BIN)/ctest --output-on-failure

# The same for aarch64, cross-built, in emulation: a processor without dot products, one with them, and one with all.
native-aarch64: $(VENV)/.dev
	$(NATIVE_TEST) -B build/native-aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	$(BIN)/cmake --build build/native-aarch64
	for cpu in cortex-a57 neoverse-n1 max; do for test in build/native-aarch64/tests/*_test; do \
		qemu-aarch64-static -cpu $$cpu $$test || exit 1; done; done

SOURCES = $(shell find cpp_bindings -name '*.cc' -o -name '*.h' -o -name '*.inl')
native-format: $(VENV)/.dev
	$(BIN)/clang-format -i $(SOURCES)

wheel: $(VENV)/.dev bundles/sample/owl2.json
	scripts/check-wheel $(BIN)/python bundles/sample

bench: $(VENV)/.dev bundles/sample/owl2.json
	$(BIN)/python scripts/bench_turns.py bundles/sample sample/pictures

FUZZ := $(if $(REPEAT),--repeat $(REPEAT),$(if $(MINUTES),--minutes $(MINUTES),--inputs $(or $(INPUTS),100000)))
fuzz: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ) $(if $(SURFACES),--surfaces $(SURFACES)) $(if $(SEED),--seed $(SEED))

soak: $(VENV)/.dev bundles/sample/owl2.json
	$(BIN)/python scripts/soak.py bundles/sample sample/pictures --minutes $(or $(MINUTES),20)

load: $(VENV)/.dev bundles/sample/owl2.json
	$(BIN)/python scripts/load_server.py bundles/sample sample/pictures --seconds $(or $(SECONDS),200)

full: $(VENV)/.dev native-threads
	PYTHON=$(BIN)/python scripts/measure-sample build/measure
	$(BIN)/python scripts/ablate.py build/measure --answers
	$(BIN)/python scripts/measure_layers.py build/measure --samples 16

full-size: $(VENV)/.dev
	$(BIN)/python scripts/measure_full.py build/measure --method rtn
	$(BIN)/python scripts/measure_full.py build/measure --kill 2 --samples 16

aarch64: $(VENV)/.dev bundles/sample/owl2.json
	$(BIN)/python scripts/check_wheels.py --extra cpu
	$(BIN)/python scripts/check_aarch64.py build/aarch64 bundles/sample

clean:
	rm -rf build bundles $(VENV)
