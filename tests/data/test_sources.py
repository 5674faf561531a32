"""sources.py: files, folders, globs, domains by name, mixtures, data sets of Hugging Face."""

import json
import os

import datasets
import pytest
from PIL import Image

from reweighting.config.reading import ReadingConfig
from reweighting.config.training import TrainingConfig
from reweighting.data.load_answers import LoadReport, iterate_answers
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source, expand, identity
from reweighting.errors import UserError
from reweighting.files import digest

ROW = {"question": "How many?", "steps": ["two"], "labels": [1]}


def write(name: str, *rows: dict) -> str:
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows or (ROW,))
    return name


def test_files_folders_and_globs(folder):
    for name in ("a.jsonl", "b.jsonl", "data/x.json", "data/deep/y.jsonl", "data/notes.txt", "data/.hidden.json"):
        write(name)
    assert [source.path for source in expand(["b.jsonl", "a.jsonl"])] == ["b.jsonl", "a.jsonl"]
    assert [source.path for source in expand(["*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    assert [source.path for source in expand(["data"])] == ["data/deep/y.jsonl", "data/x.json"]
    assert [source.path for source in expand(["data/**/*.jsonl"])] == ["data/deep/y.jsonl"]
    assert expand(["sums=a.jsonl", "hub:me/set:test"]) == [Source("a.jsonl", "sums"), Source("hub:me/set:test")]
    assert expand([f"file://{folder}/a.jsonl"]) == [Source(f"{folder}/a.jsonl")]
    write("odd=name.jsonl")
    assert expand(["odd=name.jsonl"]) == [Source("odd=name.jsonl")]  # a file of that name is there


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("https://x.org/a.json", "URLs are not read. Download the file"),
        ("hub:noslash", "allowed: hub:owner/name, hub:owner/name:split or hub:owner/name:config:split"),
        ("none*.jsonl", "no file has such a name"),
        ("empty", "no .json.gz, .jsonl.gz, .json, .jsonl, .parquet file in this folder"),
        ("", "found '', allowed: the name of a file"),
        ({"domain": "a"}, "an entry has no path"),
        ({"path": "a", "max_rows": 0}, "found a max_rows of 0"),
        ({"path": "a", "rows": 3}, "mixture: found rows: 3, allowed: path, domain, format"),
        ({"path": 3}, "mixture: found path: 3"),
        ({"path": "a", "domain": " "}, "mixture: found domain: ' ', allowed: text that is not blank"),
    ],
)
def test_what_stands_for_no_file(folder, given, said):
    (folder / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        expand([given])
    assert said in str(caught.value)


def test_a_file_is_named_once(folder):
    write("a.jsonl")
    for given in (["a.jsonl", "./a.jsonl"], ["a.jsonl", "*.jsonl"], ["d=a.jsonl", "d=a.jsonl"]):
        with pytest.raises(UserError, match="a.jsonl: is named twice"):
            expand(given)
    assert len(expand(["d=a.jsonl", "e=a.jsonl"])) == 2


def test_names_and_domains():
    assert Source("a/rows.jsonl.gz").name == "rows" and Source("a/rows.v2.json").name == "rows.v2"
    assert Source("hub:me/set:train").name == "me/set" and Source("saved/").name == "saved"
    assert Source("a", domain="d").domain_of({"x": 1}, "x") == "d"
    assert Source("a").domain_of({"x": {"y": 7}}, "x.y") == Source("a").domain_of({"x": {"y": "7"}}, "x.y") == "7"
    assert Source("a").domain_of({"x": 1}, "x.y") is None and Source("a").domain_of([], "x") is None


def test_a_mixture_in_a_config_file(folder):
    for name in ("a.jsonl", "b.jsonl"):
        write(name, *[ROW] * 5)
    mixture = [{"path": "*.jsonl", "max_rows": 2, "format": "canonical"}, {"path": "a.jsonl", "domain": "d"}]
    (folder / "config.json").write_text(json.dumps({"mixture": mixture, "baseline": True}))
    config = TrainingConfig.parse(["--config", "config.json"])
    sources = config.reading.sources(config.data.train_json_file, config.data.mixture)
    assert sources == [
        Source("a.jsonl", None, "canonical", 2),
        Source("b.jsonl", None, "canonical", 2),
        Source("a.jsonl", "d"),
    ]
    assert [len(list(source.rows())) for source in sources] == [2, 2, 5]
    assert TrainingConfig.parse(["--mixture", json.dumps(mixture), "--baseline"]).data.mixture == config.data.mixture
    with pytest.raises(UserError, match="--train_json_file is needed"):
        TrainingConfig.parse(["--baseline"])
    for wrong in ("{", '["a"]', "{}", "[]"):
        with pytest.raises(UserError, match="--mixture: allowed: a list of objects"):
            ReadingConfig().sources(None, wrong)


def test_the_identity_of_sources(folder):
    for name in ("a.jsonl", "b.jsonl"):
        write(name, ROW | {"id": name})
    one, both = expand(["a.jsonl"]), expand(["a.jsonl", "b.jsonl"])
    assert identity(one) == digest(folder / "a.jsonl")
    assert len({identity(one), identity(both), identity([Source("a.jsonl", "d")]), identity([Source("hub:a/b")])}) == 4
    with pytest.raises(UserError, match="none.jsonl: cannot be read"):
        identity([Source("none.jsonl")])


def test_a_folder_that_datasets_saved(folder):
    Image.new("RGB", (3, 2), "red").save("a.png")
    rows = [ROW | {"image": "a.png", "dataset": f"d{number}"} for number in range(3)]
    data = datasets.Dataset.from_list([{**row, "images": [row.pop("image")]} for row in rows])
    data = data.cast_column("images", datasets.List(datasets.Image()))
    data.map(lambda row: row).save_to_disk("saved/train")
    (source,) = expand(["saved/train"])
    answers = list(iterate_answers(source, None, ReadingOptions(), LoadReport()))
    assert [answer.domain for answer in answers] == ["d0", "d1", "d2"]
    assert all(Image.open(answer.images[0]).size == (3, 2) for answer in answers)
    datasets.DatasetDict({"train": data}).save_to_disk("dict")
    with pytest.raises(UserError, match="dict: holds the splits train. Name one of them, as dict/train."):
        list(expand(["dict"])[0].rows())


@pytest.mark.parametrize(
    ("name", "config", "split"),
    [("hub:me/set", None, "train"), ("hub:me/set:test", None, "test"), ("hub:me/set:main:test", "main", "test")],
)
def test_data_sets_of_the_hub_are_streamed(monkeypatch, name, config, split):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list([ROW]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (source,) = expand([name])
    (answer,) = iterate_answers(source, None, ReadingOptions(), LoadReport())
    assert (answer.steps, answer.domain, answer.source) == (("two",), "me/set", name)
    assert asked[-1] == (("me/set", config), {"split": split, "streaming": True})


def test_a_data_set_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: 1 / 0)
    with pytest.raises(
        UserError, match=r"hub:me/set: the data set cannot be read \(ZeroDivisionError: division by zer"
    ):
        list(Source("hub:me/set").rows())
