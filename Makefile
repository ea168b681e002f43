# Everything is built inside this folder. `make test` is what continuous integration runs.
SHELL := bash
comma := ,
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Zennit 1.x asks for Python >= 3.11.11; an older one gets Zennit 0.5. Both lines are supported and tested.
# A Python counts when it runs (a pyenv shim may not), is new enough and can make environments.
first_python = $(shell for p in $(1); do \
	"$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < ($(2)))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
PYTHON ?= $(call first_python,python3 python3.11 python3.12 python3.13,3$(comma)11)
PYTHON_OLDEST ?= $(call first_python,python3.11 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.11*/bin/python,3$(comma)11)
PYTHON_NEWEST ?= $(call first_python,python3.14 python3.13 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[43]*/bin/python,3$(comma)13)
PYTHON_ZENNIT1 ?= $(call first_python,python3.12 python3.13 python3.14 python3.11 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/python,3$(comma)11$(comma)11)

# The second environment carries the Zennit line that .venv does not.
ZENNIT = $(shell .venv/bin/python -c 'from importlib.metadata import version; print(version("zennit"))')
OTHER = $(if $(filter 0.%,$(ZENNIT)),.venv-zennit1,.venv-zennit0)
OTHER_PYTHON = $(if $(filter .venv-zennit0,$(OTHER)),.venv/bin/python,$(PYTHON_ZENNIT1))

# The test workers share the cores; further threads in each would only compete with them. Tests start many processes, so bytecode is kept.
WORKERS ?= 2
pytest = OMP_NUM_THREADS=1 MPLBACKEND=Agg PYTHONDONTWRITEBYTECODE= $(1)/bin/python -m pytest -n $(WORKERS)
fast = -m "not slow and not medium" --examples 3
# What is neither fast nor depends on Zennit runs with one version of Zennit only.
second = -m "zennit or not (slow or medium)" --examples 5

define versions
import platform; from importlib.metadata import version; \
print("Python", platform.python_version(), *(f"- {name} {version(name)}" for name in ("torch", "zennit", "captum")))
endef

# torch and torchvision come as builds for CUDA, or for the CPU alone: 2.13.0+cpu. Linux without an NVIDIA card takes the
# latter where an index offers both; TORCH_INDEX names one more index. The pins that an environment follows lie inside it.
TORCH_INDEX ?=
is_without_nvidia = [ "$$(uname -sm)" = "Linux x86_64" ] && [ ! -e /proc/driver/nvidia ] && ! command -v nvidia-smi >/dev/null
pip_install = $(1)/bin/python -m pip install -q $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")
define choose_torch
	@cp $(CONSTRAINTS) $(@D)/constraints.txt
	@if $(is_without_nvidia) && grep -q '^torch=' $(CONSTRAINTS); then \
		sed -E 's/^(torch|torchvision)=+(.*)/\1===\2+cpu/' $(CONSTRAINTS) > $(@D)/constraints-cpu.txt; \
		if $(call pip_install,$(@D)) --no-deps torchvision torch -c $(@D)/constraints-cpu.txt 2> $(@D)/cpu.log; then \
			mv $(@D)/constraints-cpu.txt $(@D)/constraints.txt; \
		else $(@D)/bin/python -c 'from importlib.metadata import version; version("torch")' 2>/dev/null || printf '%s\n' \
			'No CPU build of torch is offered: downloading the CUDA build, about 3 GB (5.5 GB on disk), though there is no NVIDIA card.' \
			"To avoid this: make $(MAKECMDGOALS) TORCH_INDEX=<address of PyTorch's package index of CPU builds>"; \
		fi; \
	fi
endef

CONSTRAINTS = constraints.txt
NAMED = PYTHON
# $(call install,Python,requirements)
define install
	@test -n "$(1)" || { echo "Found no Python >= 3.11 that runs and has venv. Name one: make $(NAMED)=/path/to/python" >&2; exit 1; }
	@echo "Installing into $(@D) with $(1); the first time this downloads torch and takes minutes."
	@$(@D)/bin/python -c '' 2>/dev/null || "$(1)" -m venv --clear $(@D)
	$(choose_torch)
	$(call pip_install,$(@D)) $(2) -c $(@D)/constraints.txt
	@touch $@
endef

# Packages that this one is tested with, each with the versions that its pins need, on top of .venv.
HOSTS ?= captum07 captum08 crp quantus grad_cam lxt torch_geometric ray transformers transformers4 hooked large

.PHONY: demo test test-fast test-planned test-oldest test-newest test-hosts lint bench real special-cases faithfulness references \
	hugging-face graph-networks docs package coverage clean

demo: .venv/.stamp
	.venv/bin/nrm-plugin demo

test: lint
	@set -o pipefail; $(call pytest,.venv) | tee .venv/pytest.log
	@set -e -o pipefail; if [ -z "$(OTHER_PYTHON)" ]; then \
		stars='***********************************************************************'; \
		printf '%s\n' '' "$$stars" "$$stars" \
			'WARNING: ONE OF TWO RUNS WAS LEFT OUT: Zennit 1.x was not tested.' \
			"Only Zennit $(ZENNIT) was. Zennit 1.x needs a Python >= 3.11.11, and none was" \
			'found on PATH or under ~/.pyenv. Name one to test both lines:' \
			'    make test PYTHON_ZENNIT1=/path/to/python' "$$stars" "$$stars" '' >&2; \
	else \
		$(MAKE) --no-print-directory $(OTHER)/.stamp; \
		$(call pytest,$(OTHER)) $(second) | tee $(OTHER)/pytest.log; \
	fi
	@set -e; for env in .venv $(if $(OTHER_PYTHON),$(OTHER)); do $$env/bin/python -c '$(versions)'; tail -n 1 $$env/pytest.log; done

test-fast: .venv/.stamp
	$(call pytest,.venv) $(fast) -x -q

# The tests of recordings, each answered by a plan that was made on other values; takes half an hour.
test-planned: .venv/.stamp
	$(call pytest,.venv) -m "not slow" -q --planned tests/test_untouched.py tests/test_conservation.py tests/test_graph_networks.py \
		tests/test_layouts_of_nets.py tests/test_relative.py tests/measure tests/recording tests/kernels tests/events

test-hosts: .venv/.stamp $(HOSTS:%=.venv/hosts/%.stamp)
	@set -e; for host in $(HOSTS); do echo "== $$host"; file=$$host; case $$host in captum*) file=captum;; transformers*) file=transformers;; esac; \
		PYTHONPATH=.venv/hosts/$$host $(call pytest,.venv) -q tests/hosts/test_$$file.py; done

# The oldest and the newest of every dependency that pyproject.toml lets in.
test-oldest test-newest: test-%: .venv-%/.stamp
	@.venv-$*/bin/python -c '$(versions)'
	$(call pytest,.venv-$*) -m "not slow" --examples 5 -q

lint: .venv/.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# make bench ARGS="--nets VGG16* --quick"; LXT brings the transformers that it supports. ARGS=--missing continues.
bench: .venv/.stamp .venv/hosts/crp.stamp .venv/hosts/lxt.stamp .venv/hosts/timm.stamp
	PYTHONPATH=.venv/hosts/crp .venv/bin/python -m benchmarks.speed
	PYTHONPATH=.venv/hosts/lxt:.venv/hosts/timm:.venv/hosts/dynamic_lrp .venv/bin/python -m benchmarks.cost $(ARGS)

# DynamicLRP is a repository without a package: make .venv/hosts/dynamic_lrp.stamp adds its column to make bench.
.venv/hosts/dynamic_lrp.stamp: .venv/.stamp
	rm -rf .venv/hosts/dynamic_lrp .venv/hosts/dynamic_lrp.clone
	git clone -q https://github.com/keeinlev/dynamicLRP .venv/hosts/dynamic_lrp.clone
	git -C .venv/hosts/dynamic_lrp.clone checkout -q 0535f39e24c9b0a7e29c8d391dc2c8b490e95b22
	.venv/bin/pip install -q --no-deps --target .venv/hosts/dynamic_lrp einops
	cp -r .venv/hosts/dynamic_lrp.clone/src/lrp_engine .venv/hosts/dynamic_lrp
	touch $@

# The numbers of docs/real.md, docs/joint-relevance.md, docs/known-circuit.md and docs/text.md; continues after an interruption.
# make real ARGS=--quick measures a part in ten minutes; NRM_CACHE=<folder> selects another cache.
real: .venv/.stamp .venv/hosts/real.stamp .venv/hosts/lxt.stamp
	@.venv/bin/python -m benchmarks.real.reproduce $(ARGS)

special-cases: .venv/.stamp .venv/hosts/crp.stamp .venv/hosts/lxt.stamp
	PYTHONPATH=.venv/hosts/crp:.venv/hosts/lxt .venv/bin/python -m benchmarks.special_cases

# Benchmarks that compare with a package that is not a dependency.
references: .venv/.stamp .venv/hosts/crp.stamp
	PYTHONPATH=.venv/hosts/crp .venv/bin/python -m benchmarks.references

hugging-face: .venv/.stamp .venv/hosts/transformers.stamp
	PYTHONPATH=.venv/hosts/transformers .venv/bin/python -m benchmarks.hugging_face

graph-networks: .venv/.stamp .venv/hosts/torch_geometric.stamp
	PYTHONPATH=.venv/hosts/torch_geometric .venv/bin/python -m benchmarks.recurrent_and_graphs

faithfulness: .venv/.stamp .venv/hosts/crp.stamp .venv/hosts/quantus.stamp
	PYTHONPATH=.venv/hosts/crp:.venv/hosts/quantus .venv/bin/python -m benchmarks.faithfulness $(ARGS)

# Warnings are errors. Nothing is fetched, neither by the build nor by a page.
docs: .venv/.docs.stamp
	.venv/bin/python -m website.pages build/pages
	rm -rf build/site
	.venv/bin/python -m sphinx -W --keep-going -q -c website build/pages build/site
	.venv/bin/python -m website.check build/site

package: .venv/.release.stamp
	.venv/bin/python -m website.package dist

# Lines and branches of the package.
coverage: .venv/.stamp
	$(call pytest,.venv) -q --cov --cov-report=term-missing:skip-covered --cov-report=html:build/coverage

clean:
	rm -rf .venv .venv-zennit0 .venv-zennit1 .venv-oldest .venv-newest build dist nrm-demo .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.stamp: pyproject.toml constraints.txt src/nrm_plugin/__init__.py
	$(call install,$(PYTHON),-e ".[test$(comma)dev]")

.venv/.%.stamp: .venv/.stamp
	$(call pip_install,.venv) -e ".[$*]" -c .venv/constraints.txt
	@touch $@

# Without dependencies: zennit-crp asks for a Zennit that is too old, LXT and Quantus for much that no test needs.
.venv/hosts/%.stamp: tests/hosts/%.txt .venv/.stamp
	@rm -rf .venv/hosts/$*
	.venv/bin/python -m pip install -q --no-deps --target .venv/hosts/$* -r $<
	@touch $@

.venv-zennit1/.stamp: pyproject.toml constraints.txt
	$(call install,$(PYTHON_ZENNIT1),-e ".[test$(comma)dev]" "zennit>=1")

.venv-zennit0/.stamp: pyproject.toml constraints.txt
	$(call install,.venv/bin/python,-e ".[test$(comma)dev]" "zennit<1")

EXTRAS = graph,dataset,html,segments,statistics,prototypes,features,test

.venv-oldest/.stamp: NAMED = PYTHON_OLDEST
.venv-oldest/.stamp: CONSTRAINTS = constraints-oldest.txt
.venv-oldest/.stamp: pyproject.toml constraints-oldest.txt
	$(call install,$(PYTHON_OLDEST),-e ".[$(EXTRAS)]")

.venv-newest/.stamp: NAMED = PYTHON_NEWEST
.venv-newest/.stamp: CONSTRAINTS = /dev/null
.venv-newest/.stamp: pyproject.toml
	$(call install,$(PYTHON_NEWEST),--upgrade -e ".[$(EXTRAS)]")
