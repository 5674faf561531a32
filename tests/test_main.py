"""The real command on a small demo world: what it leaves behind, repeats, resumes and refuses."""

import json

import pytest
from PIL import Image

from reweighting.errors import UserError
from reweighting.main import main
from reweighting.modeling.reward_model import ProcessRewardModel
from tests.forked import run
from tests.runs import ROOT, flags, history, weights, without_times

DOMAINS = 10


@pytest.fixture(scope="module")
def finished(demo, whole_figures, tmp_path_factory):
    """A finished run of the real command, and its output."""
    folder = tmp_path_factory.mktemp("run")
    done = run("main.py", *flags(demo, folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def test_what_a_run_leaves_behind(finished, demo):
    folder, stdout, stderr = finished
    lines = history(folder)
    assert [line["step"] for line in lines] == [5, 10]
    assert {"train_loss", "meta_loss", "weights", "rows_seen", "seconds"} <= lines[0].keys()
    assert lines[1]["rows_seen"] > lines[0]["rows_seen"] > 0
    saved = json.loads((folder / "domain_weights.json").read_text())
    assert saved["step"] == 10 and saved["settings"]["meta_batch_size"] == 4
    assert len(saved["weights"]) == DOMAINS
    assert sum(saved["weights"].values()) / DOMAINS == pytest.approx(1, abs=1e-5)
    assert len(set(saved["weights"].values())) > 1, "nothing was learned"
    evidence = saved["evidence"]
    assert evidence["windows"] == 2 and evidence["domains"].keys() == saved["weights"].keys()
    for domain, one in evidence["domains"].items():
        assert one["slope"] == pytest.approx(sum(line["slopes"][domain] for line in lines) / 2)
        assert one["verdict"] == "cannot be told" and one["interval"] is None
    assert "Nothing can be told of a single domain from 2 updates: train longer" in stdout
    assert sorted(path.name for path in (folder / "figures").iterdir()) == [
        "domain_weights.png",
        "losses.png",
        "slopes.png",
        "weights_over_time.png",
    ]
    for path in (folder / "figures").iterdir():
        assert min(Image.open(path).size) > 200
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000005", "step-00000010"]

    table = [line.split() for line in stdout.split("(mean 1):")[1].splitlines() if "█" in line]
    values = [float(row[1]) for row in table]
    assert len(table) == DOMAINS and values == sorted(values, reverse=True)
    assert all(f", {name} " in stderr for name in ("train", "meta", "low", "high"))  # piped: a line at the end
    assert "Traceback" not in stderr and "Warning" not in stderr

    rows = json.loads((demo / "test.json").read_text())
    model = ProcessRewardModel.from_pretrained(folder / "prm")
    scores = model.score(demo / rows[0]["image_path"], rows[0]["input"], rows[0]["candidates"][0])
    assert len(scores) == 5 and all(0 < score < 1 for score in scores)


def test_the_same_seed_gives_the_same_run_and_another_does_not(finished, demo, tmp_path):
    folder, _, _ = finished
    main(flags(demo, tmp_path / "again"))
    assert without_times(tmp_path / "again") == without_times(folder)
    assert weights(tmp_path / "again") == weights(folder)
    for file in ("model.safetensors", "score_head.safetensors"):
        assert (tmp_path / "again" / "prm" / file).read_bytes() == (folder / "prm" / file).read_bytes()
    main(flags(demo, tmp_path / "other", "--seed", "2"))
    assert weights(tmp_path / "other") != weights(folder)


def test_baseline_and_fixed_weights(demo, finished, tmp_path):
    main(flags(demo, tmp_path / "baseline", "--baseline"))
    assert set(weights(tmp_path / "baseline").values()) == {1.0}
    assert "meta_loss" not in history(tmp_path / "baseline")[0]
    fixed = finished[0] / "domain_weights.json"
    main(flags(demo, tmp_path / "fixed", "--domain_weights", str(fixed)))
    assert weights(tmp_path / "fixed") == pytest.approx(weights(finished[0]), abs=1e-5)
    assert without_times(tmp_path / "fixed")[0]["train_loss"] != without_times(tmp_path / "baseline")[0]["train_loss"]


@pytest.mark.parametrize(
    "more",
    [
        ("--no_freeze_vision", "--gradient_checkpointing", "--max_grad_norm", "0.5"),
        ("--hypergradient", "darts"),
        ("--hypergradient", "darts", "--scheduler", "step", "--scheduler_step_size", "3"),
        ("--gradient_accumulation", "3", "--aggregation_function", "min"),
    ],
    ids=lambda more: more[0].lstrip("-"),
)
def test_other_ways_to_train(demo, tmp_path, more):
    main(flags(demo, tmp_path, *more))
    assert len(set(weights(tmp_path).values())) > 1


def test_recipes_and_their_overrides(demo, tmp_path, monkeypatch):
    from reweighting.config.training import TrainingConfig

    published = TrainingConfig.parse(["--recipe", str(ROOT / "recipes" / "qwen2_vl_2b.yaml"), "--train_json_file", "t",
                                 "--meta_json_file", "m", "--lr", "1e-6"])  # fmt: skip
    assert published.model.reward_model == "Qwen/Qwen2-VL-2B-Instruct" and published.run.precision == "bf16"
    assert published.lower.weight_decay == 0 and published.upper.meta_weight_decay == 1e-3
    assert published.lower.lr == 1e-6 and published.lower.batch_size == 1
    for path in (ROOT / "recipes").iterdir():
        TrainingConfig.parse(["--recipe", str(path), "--train_json_file", "t", "--meta_json_file", "m"])
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"train_json_file": "t", "baseline": True, "gradient_accumulation": 4}))
    config = TrainingConfig.parse(["--recipe", str(recipe)])
    recipe.write_text(json.dumps({"train_json_file": "t", "meta_lr": 0.5, "seed": 9007199254740993}))
    fixed = TrainingConfig.parse(
        ["--recipe", str(recipe), "--baseline"]
    )  # what it says of the upper level is not wanted
    assert fixed.lower.baseline and fixed.run.seed == 9007199254740993
    with pytest.raises(UserError, match="--meta_lr does nothing with --baseline"):
        TrainingConfig.parse(["--recipe", str(recipe), "--baseline", "--meta_lr=0.1"])
    assert (
        config.lower.baseline is True
        and config.lower.gradiant_accumulation == 4
        and config.data.train_json_file == ["t"]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lrr": 1}, "lrr: there is no such flag"),
        ({"lr": "fast"}, "lr: found 'fast'"),
        ({"batch_size": 1.5}, "batch_size: found 1.5"),
        ({"baseline": "yes"}, "baseline: found 'yes'"),
        ({"lr": None}, "lr: found None"),
        ({"lr": True}, "lr: found True"),
        ({"iteration_num": 1e999}, "iteration_num: found inf"),
        ({"weights_path": ["a"]}, "weights_path: found"),
        ([1], "expected names and values"),
    ],
)
def test_bad_recipes(tmp_path, settings, message):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        main(["--recipe", str(recipe), "--train_json_file", "t", "--meta_json_file", "m"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lr", "0"), "--lr: found 0.0, allowed: a number of more than 0"),
        (("--lr", "nan"), "--lr: found nan"),
        (("--batch_size", "-1"), "--batch_size: found -1"),
        (("--iteration_num", "12"), "--iteration_num 12 is no multiple of --unroll_steps 5, .* use 10 or 15"),
        (("--iteration_num", "3"), "use 5"),
        (("--lora_rank", "2", "--no_freeze_vision"), "--no_freeze_vision does nothing without --train full"),
        (("--train", "head", "--lora_rank", "2"), "--lora_rank does nothing with --train head"),
        (("--lora_alpha", "8"), "--lora_alpha does nothing without adapters: use --train lora or dora"),
        (("--train", "head", "--no_freeze_projector"), "leave out --no_freeze_projector"),
        (("--train", "head", "--gradient_checkpointing"), "--gradient_checkpointing does nothing with --train head"),
        (("--train", "head", "--score_head", "token"), "nothing is trained"),
        (("--correct_token", "yes"), "--correct_token does nothing with --score_head linear"),
        (
            ("--score_head", "token", "--correct_token", "yes indeed"),
            "--correct_token 'yes indeed': .* must be one token",
        ),
        (("--load_in_4bit",), "--load_in_4bit: 4-bit weights cannot be trained"),
        (
            ("--load_in_4bit", "--train", "lora", "--device", "cpu"),
            "--load_in_4bit needs a CUDA GPU .the device is cpu",
        ),
        (("--attention", "flash_attention_2", "--device", "cpu"), "CUDA GPU .* and --precision bf16 .* flash-attn"),
        (("--baseline", "--meta_lr", "9"), "--meta_lr does nothing with --baseline"),
        (("--seed", "9" * 30), "--seed"),
        (("--device", "meta"), "--device meta"),
        (("--meta_lr", "1e39"), "--meta_lr: found 1e[+]39, allowed: a number of at most 1000"),
        (("--meta_optimizer", "calm", "--meta_lr", "1"), "--meta_lr does nothing without --meta_optimizer adamw"),
        (("--meta_range", "2"), "--meta_range does nothing without --meta_optimizer calm"),
        (("--min_weight", "1.1"), "--min_weight 1.1: weights have mean 1, so the lowest is a number from 0 to 1"),
        (("--max_weight", "0.9"), "--max_weight 0.9: weights have mean 1, so the highest is at least 1"),
        (("--baseline", "--min_weight", "0.5"), "--min_weight does nothing with --baseline"),
        (("--momentum", "0.5"), "--momentum does nothing without --optimizer sgd"),
        (("--unroll_steps", "2", "--gradiant_accumulation", "3"), "cannot hold each of the 10 domains once"),
        (("--device", "tpu9"), "--device tpu9"),
        (("--reward_model", "/nowhere/model"), "/nowhere/model"),
        (("--max_length", "60"), "60"),
        (("--image_root", "/nowhere"), "/nowhere"),
        (("--resume_from", "/nowhere"), "--resume_from /nowhere: expected a checkpoint"),
        (("--resume", "--resume_from", "x"), "leave out --resume"),
        (("--allow_changed_settings",), "does nothing without --resume"),
        (("--dry_run", "--resume"), "--dry_run starts at step 0"),
        (("--keep_checkpoints", "0"), "--keep_checkpoints: found 0"),
        (("--baseline", "--domain_weights", "x"), "leave out --domain_weights"),
        (("--domain_weights", "missing.json"), "missing.json"),
    ],
)
def test_flags_that_make_no_sense(demo, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        main(flags(demo, tmp_path, *more))
    assert not (tmp_path / "domain_weights.json").exists()


@pytest.mark.parametrize(
    ("flag", "choices"),
    [
        ("--train", "'full', 'lora', 'dora', 'head'"),
        ("--attention", "'sdpa', 'flash_attention_2', 'eager'"),
        ("--scheduler", "'constant', 'step', 'cosine'"),
        ("--aggregation_function", "'mean_logit'"),
        ("--hypergradient", "'auto', 'unrolled', 'jvp', 'finite_difference', 'darts'"),
    ],
)
def test_choices_are_listed(demo, tmp_path, capsys, flag, choices):
    with pytest.raises(SystemExit) as exit:
        main(flags(demo, tmp_path, flag, "none"))
    assert exit.value.code == 2
    assert f"invalid choice: 'none' (choose from {choices}" in capsys.readouterr().err


def test_a_too_long_row_is_named(demo, tmp_path):
    rows = json.loads((demo / "train.json").read_text())
    rows[7]["add"] += " and so on" * 3000
    (demo / "long.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"long.json: rows? .*\b7\b.*tokens, but the model takes 4096"):
        main(flags(demo, tmp_path, "--train_json_file", str(demo / "long.json")))


def one_class(rows):
    for row in rows:
        row["true_false"] = True


def one_domain(rows):
    for row in rows:
        row["dataset"] = "dice"


def missing_image(rows):
    rows[3]["image_path"] = "images/none.png"


def bad_accuracy(rows):
    rows[5]["accuracy"] = 1.5


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("train.json", bad_accuracy, ["row 5", "accuracy", "1.5", "0 to 1"]),
        ("train.json", one_domain, ["dice", "at least 2 domains"]),
        ("train.json", missing_image, ["row 3", "image_path", "images/none.png"]),
        ("meta.json", one_class, ["true_false"]),
    ],
)
def test_bad_data_ends_with_code_2_and_no_traceback(demo, tmp_path, name, spoil, words):
    spoilt = demo / f"spoilt_{name}"
    rows = json.loads((demo / name).read_text())
    spoil(rows)
    spoilt.write_text(json.dumps(rows))
    flag = "--train_json_file" if name == "train.json" else "--meta_json_file"
    done = run("main.py", *flags(demo, tmp_path / "never", flag, str(spoilt)))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in [str(spoilt), *words]:
        assert word in done.stderr
    assert not (tmp_path / "never").exists()


def test_an_unwritable_folder(demo, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--weights_path .* cannot be written"):
        main(flags(demo, tmp_path / "file"))


def test_unknown_flags_end_with_code_2():
    done = run("main.py", "--train_json_file", "x", "--learning_rate", "1")
    assert done.returncode == 2 and "--learning_rate" in done.stderr
