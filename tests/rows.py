"""Rows of the three JSON files, valid ones and what is said of others."""

import json

import pytest

from reweighting.data.load_rows import load_candidate_rows, load_meta_rows, load_training_rows
from reweighting.errors import UserError

LOADERS = {"training": load_training_rows, "meta": load_meta_rows, "candidate": load_candidate_rows}


def training(**changes):
    row = {"input": "How many?", "add": "Step 1: two", "image_path": None, "dataset": "A", "accuracy": 0.5}
    return row | changes


def meta(**changes):
    return {"true_false": True, "input": "How many?\nStep 1: two", "image_path": None} | changes


def candidate(**changes):
    return {"id": 7, "input": "How many?", "image_path": None, "candidates": ["two", "three"]} | changes


VALID = {
    "training": [training(), training(dataset="B")],
    "meta": [meta(), meta(true_false=False)],
    "candidate": [candidate()],
}


def write(rows, name="rows.json"):
    with open(name, "w", encoding="utf-8") as file:
        json.dump(rows, file)
    return name


def message(load, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    return str(caught.value)
