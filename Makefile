# The tasks of this repository; `make` lists them.
.PHONY: help test slow docs lint types tiny rebuild-tiny bench gpu-check torture fuzz random-runs mutation wheels release metrics gates families

help:           ## this list
	@grep -E '^[a-z-]+: +##' $(MAKEFILE_LIST) | sed 's/: *## /\t/' | expand -t 16

test:           ## everything that CI runs (11 minutes on two cores)
	uv run pytest

slow:           ## the tests that take minutes; run before a release
	uv run pytest -m slow

docs:           ## build the documentation site into site/
	uv run tools/docs build

lint:           ## ruff
	uv run ruff check . && uv run ruff format --check .

types:          ## basedpyright
	uv run basedpyright

families:       ## every family by every method; writes the tables of docs/reference/families.md
	uv run pytest tests/end_to_end/test_families.py -m "slow or not slow" -o junit_family=legacy --junitxml=site/families.xml
	uv run tools/docs families site/families.xml

gates:          ## lint, format and types, as the test run checks them
	uv run pytest -n 0 tests/test_gates.py

tiny:           ## distil the shipped tiny teacher
	uv run apps/train --config configs/tiny/dmd2.yaml

rebuild-tiny:   ## make the tiny Wan, its data and its judge anew (half an hour)
	uv run tools/tiny_wan

bench:          ## what things cost, as ratios with their spread; make bench ARGS="--against FILE"
	uv run tools/bench $(ARGS)

gpu-check:      ## what only a GPU can tell, on one of them (8 minutes); ARGS=--cpu: whether it runs
	uv run tools/gpu_check $(ARGS)

random-runs:    ## draw 200 run files, run what is accepted, compare with stopped runs (an hour)
	uv run python tools/random_runs.py

mutation:       ## change the source in 150 places, and see what tests notice (an hour)
	uv run tools/mutation_test

torture:        ## kill runs, ranks, exports and trajectories, and fill disks; compare their ends (an hour)
	uv run tools/torture

fuzz:           ## 2,000 mutations of every kind of file that is read (make fuzz SEED=7)
	uv run tools/fuzz_files --mutations 2000 --seed $(or $(SEED),0)

wheels:         ## build every package, check the files, install the wheels in a fresh environment
	uv run python tools/check_wheels.py

release:        ## prepare a release: make release PACKAGE=distill-trainer BUMP=minor ARGS=--dry-run
	uv run python tools/release.py $(PACKAGE) --bump $(BUMP) $(ARGS)

metrics:        ## measure the code, beside that of another checkout: make metrics AGAINST=../other
	uv run python tools/code_metrics.py $(if $(AGAINST),--against $(AGAINST))
