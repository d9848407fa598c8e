.PHONY: quickstart test lint format

quickstart:
	bash scripts/quickstart.sh

test:
	bash scripts/test.sh

lint:
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

types:  # findings of before the check are in .basedpyright/baseline.json
	.venv/bin/basedpyright --pythonpath .venv/bin/python

format:
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .
