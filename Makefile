# make demo   train a Q-Former in two stages on the embedded Shapes world and answer questions; ends in a report
# make test   run the tests
# make check  lint and type-check
# make docs   the pages of docs/ as a site in build/docs, without network; read it by: python -m http.server -d build/docs
# make bench  time every row against LAVIS and transformers, results in results/bench (an hour; see benchmarks/README.md)
# make capfilt   what CapFilt brings back of what noisy captions cost on Shapes: six sets of captions, three seeds (hours)
# make reproduce   the whole table: both language models, the ablation, three seeds (an hour or two)
# make photographs   both stages on Flickr8k with three small pretrained models, in PHOTOS (hours; ARGS='--steps small': 20 minutes)
PYTHON ?= python3
PHOTOS ?= ../shared/flickr8k
BIN = .venv/bin

.PHONY: demo test check docs bench reproduce capfilt photographs clean

demo: .venv/installed
	$(BIN)/python examples/shapes/demo.py

reproduce: .venv/installed
	$(BIN)/python examples/shapes/reproduce.py

capfilt: .venv/installed
	$(BIN)/python examples/shapes/capfilt.py

photographs: .venv/installed
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[photographs]'
	$(BIN)/python examples/photographs/journey.py --photos $(PHOTOS) $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/installed
	set -e; for row in stage1_step stage1_cached "stage2_step opt" "stage2_step t5" vqa captioning rerank embed_folder startup; do \
		set -- $$row; $(BIN)/python benchmarks/$$1.py $$2 --json results/bench/$$1$$2.json; done

# The stamp is newer than what it was installed from, so a second run installs nothing.
.venv/installed: setup.cfg constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
