"""families/: what is asked of every family of models, with small random models of their real classes.

`test_cell` is the matrix of docs/models.md: family x (full, LoRA, frozen vision) x (train, resume, save and load,
parity), and of text-only families, which have no vision to freeze.
"""

import functools
import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, ProcessorMixin

from reweighting.config.training import TrainingConfig
from reweighting.data.chains import Chain
from reweighting.data.placeholders import without_placeholders
from reweighting.errors import UserError
from reweighting.main import build_engine
from reweighting.modeling.chain_checks import check_chains
from reweighting.modeling.collate import collate
from reweighting.modeling.families import FAMILIES, VISION_LANGUAGE, family_of, parameters_of
from reweighting.modeling.families.causal_lm import CausalLM
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.training.dry_run import same
from reweighting.training.preflight import check_data
from reweighting.training.resume import find_checkpoint, run_settings
from reweighting.training.run_data import read_run_data
from reweighting.training.signals import Stopped
from tests.runs import StopAtStep, without_times
from tests.tiny_families import TEXT_FAMILIES, TINY_FAMILIES, real_processor, tiny_family

TRAIN_MODES = {"full": ["--no_freeze_vision"], "lora": ["--lora_rank", "2"], "frozen": []}
TEXT_MODES = {"full": [], "lora": ["--lora_rank", "2"]}
BETWEEN = "Compare <image>\nwith <image>."
QUESTION, STEPS = "How many red cells?", ("Step 1: a\n\n- two", "Step 2: the second", "### Step 3: so 3")
PLACED = [
    BETWEEN,
    "<image> and <image> or\n<image>\n",
    "<image>\n<image> Which?",
    "Look: <image>",
    "a<image>b<image><image>",
]
SIZES = [
    (60, 40),
    (40, 60),
    (28, 28),
    (56, 56),
    (57, 200),
    (300, 100),
    (9, 7),
    (333, 250),
    (250, 333),
    (31, 500),
    (1, 1),
    (3, 900),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two domains of four chains and two questions with two answers, with no image, one, two or three."""
    folder = tmp_path_factory.mktemp("world")
    for name, (width, height) in enumerate(SIZES[:4]):
        picture(width, height, name).save(folder / f"{name}.png")
    images = ["0.png", None, ["1.png", "0.png"], ["2.png", "3.png", "1.png"]]
    questions = ["Question 0?", "Question 1?", "Is <image> in <image>?", "Question 3?"]
    train = [
        {"input": questions[n], "add": "\n".join(STEPS[: steps + 1]), "image_path": images[n], "dataset": domain,
         "accuracy": (n + steps) / 6}
        for domain in ("good", "bad") for n in range(4) for steps in (0, 2)
    ]  # fmt: skip
    meta = [
        {"true_false": right, "input": f"{n}?\nStep 1: {'yes' if right else 'no'}", "image_path": images[n]}
        for n in (0, 1) for right in (True, False)
    ]  # fmt: skip
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def picture(width: int, height: int, kind: int = 0) -> Image.Image:
    image = Image.new("RGB", (width, height), ("red", "green", "yellow", "gray")[kind % 4])
    image.paste("blue", (width // 2, 0, width, height // 2 + 1))
    return image


def arguments(family: str, way: str, world: Path) -> Namespace:
    """A run of 4 steps and two updates of the weights."""
    text_only = family in TEXT_FAMILIES
    flags = [*TEXT_MODES[way], "--ignore_images"] if text_only else TRAIN_MODES[way]
    return TrainingConfig.parse([
        "--train_json_file", str(world / "train.json"), "--meta_json_file", str(world / "meta.json"),
        "--reward_model", str(tiny_family(family)), "--iteration_num", "4", "--unroll_steps", "2", "--batch_size", "2",
        "--meta_batch_size", "4", "--meta_optimizer", "adamw", "--save_every_iterations", "4", "--lr", "0.01",
        "--resume", *flags,
    ])  # fmt: skip


class Cell:
    """A way to train a family, and the run of it that all its tests look at."""

    def __init__(self, family: str, way: str, world: Path, folder: Path):
        self.family, self.way, self.folder = family, way, folder
        self.config = arguments(family, way, world)
        self.data, self.settings = read_run_data(self.config), run_settings(self.config)
        self.engine = self.start("whole")
        self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.engine.run()

    def start(self, name: str):
        """The engine of a run in a folder of this name, at its start or at its last checkpoint."""
        folder = self.folder / name
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        _, state = find_checkpoint(self.config, self.settings, folder) or (None, None)
        return build_engine(self.config, self.settings, self.data, folder, state)

    @property
    def model(self) -> ProcessRewardModel:
        return self.engine.lower.module


@pytest.fixture(scope="module")
def cell(world, tmp_path_factory):
    """(family, way) -> its Cell, which is trained once."""
    return functools.cache(lambda family, way: Cell(family, way, world, tmp_path_factory.mktemp(f"{family}-{way}")))


def scores(model, chains, together=True):
    """Step logits of chains: in one batch, or each alone."""
    groups = [chains] if together else [[chain] for chain in chains]
    with torch.no_grad():
        model.eval()
        return [z for group in groups for z in model(collate([model.chain_tokenizer.encode(c) for c in group]))]


# ---------------------------------------------------------------- the matrix


def train(cell: Cell) -> None:
    """Losses are numbers, the weights move, and what is trained is what the way says."""
    history = without_times(cell.folder / "whole")
    assert [line["step"] for line in history] == [2, 4]
    assert all(0 < line[name] < 1 for line in history for name in ("train_loss", "meta_loss"))
    assert history[-1]["weights"]["good"] != history[-1]["weights"]["bad"]
    moved = {name for name, p in cell.model.named_parameters() if not torch.equal(p, cell.before[name])}
    family, base = cell.model.chain_tokenizer.family, cell.model.backbone
    if cell.way == "lora":
        language = "layers" if cell.family in TEXT_FAMILIES else family.lora_targets.split(r"\.")[1].rsplit("?")[-1]
        assert moved and all("lora_" in name or name.startswith("score_head") for name in moved)
        assert all(f".{language}." in name for name in moved if "lora_" in name)
        return
    seeing = {id(p) for p in parameters_of(base, family.vision_modules + family.projector_modules)}
    names = {name for name, p in base.named_parameters() if id(p) in seeing}
    assert bool(names) == family.reads_images and {name for name, p in base.named_parameters()} - names
    moved_names = {name.removeprefix("backbone.") for name in moved}
    assert bool(moved_names & names) == (cell.way == "full" and family.reads_images)
    assert moved_names - names - {"score_head.weight", "score_head.bias"}


def resume(cell: Cell) -> None:
    """A run that was stopped inside a window goes on to the same state, bit by bit."""
    with pytest.raises(Stopped):
        cell.start("cut").run(StopAtStep(3))
    continued = cell.start("cut")
    assert continued.global_step == 3
    continued.run()
    assert without_times(cell.folder / "cut") == without_times(cell.folder / "whole")
    states = [engine.state_dict() | {"seconds": 0} for engine in (continued, cell.engine)]
    assert same(*states)


def save_and_load(cell: Cell) -> None:
    """The saved model gives the same scores, to the bit."""
    chains = [*cell.data.train[:4], *cell.data.meta]
    loaded = ProcessRewardModel.from_pretrained(cell.folder / "whole" / "checkpoints" / "step-00000004" / "prm")
    for mine, theirs in zip(scores(cell.model, chains), scores(loaded, chains), strict=True):
        assert torch.equal(mine, theirs)
    trained, again = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (cell.model, loaded))
    assert trained == again


def parity(cell: Cell) -> None:
    """One pass over a chain equals one pass for each prefix, alone and in a batch, with no image, one, two and three; a
    tower whose features are remembered says what it says when it looks anew; and the images and their order matter."""
    model = cell.model
    folder = Path(cell.config.data.train_json_file[0]).parent
    a, b, c, d = (folder / f"{name}.png" for name in range(4))
    asked = [(QUESTION, (a,)), ("Why? " * 20, (b,)), (QUESTION, (d,)), (BETWEEN, (a, b)), (BETWEEN, (b, a)),
             (QUESTION, (c, a, b))]  # fmt: skip
    if not model.chain_tokenizer.family.reads_images:
        asked = [(without_placeholders(question), ()) for question, _ in asked]
    chains = [Chain(question, STEPS[: 2 + n % 2], images) for n, (question, images) in enumerate(asked, 1)]
    chains.append(Chain(QUESTION, STEPS[:2]))
    together = scores(model, chains)
    for chain, z in zip(chains, together, strict=True):
        prefixes = [Chain(chain.question, chain.steps[: n + 1], chain.images) for n in range(len(chain.steps))]
        for n, alone in enumerate(scores(model, prefixes, together=False)):
            assert (alone[-1] - z[n]).abs() <= 1e-5 * max(1, z[n].abs())
    if not model.chain_tokenizer.family.reads_images:
        return
    assert (together[0] - together[2]).abs().max() > 1e-3  # another image
    assert (together[3] - together[4])[:2].abs().max() > 1e-3  # the other way round
    with_image, without = scores(model, [chains[0], Chain(QUESTION, STEPS)])
    assert (with_image - without).abs().max() > 1e-3
    logits, _ = model.chain_logits(chains)
    tokenizer = model.chain_tokenizer
    assert (tokenizer.encode_image is not None) == (cell.way != "full")
    model.chain_tokenizer = tokenizer.with_image_encoder(None)
    looked = scores(model, chains)
    model.chain_tokenizer = tokenizer
    for row, z in enumerate(looked):
        assert (logits[row, : len(z)] - z).abs().max() <= 1e-5 * max(1, z.abs().max())


CHECKS = {"train": train, "resume": resume, "save and load": save_and_load, "parity": parity}
CELLS = [(family, way, check) for family in VISION_LANGUAGE for way in TRAIN_MODES for check in CHECKS]
CELLS += [(family, way, check) for family in TEXT_FAMILIES for way in TEXT_MODES for check in CHECKS]


@pytest.mark.parametrize("family, way, check", CELLS)
def test_cell(cell, family, way, check):
    CHECKS[check](cell(family, way))


def test_the_docs_list_exactly_the_cells_that_are_tested():
    page = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    section = re.search(r"^## What is tested\n(.*?)^## ", page, re.M | re.S).group(1)
    header, _, *rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    ways = {"full": "full", "LoRA": "lora", "frozen vision": "frozen"}
    listed = [
        (family, ways[way], check)
        for row in rows
        for family in re.findall(r"`(\w+)`", row[0])
        for way, checks in zip(header, row, strict=True)
        if way in ways
        for check in checks.split(", ")
        if checks != "no vision"
    ]
    assert sorted(listed) == sorted(CELLS)


# ---------------------------------------------------------------- the adapters


@pytest.fixture(scope="module")
def model_of():
    """family -> a model of it, as `--no_freeze_vision` would train it, in eval mode."""

    @functools.cache
    def make(family: str) -> ProcessRewardModel:
        torch.manual_seed(0)
        model = ProcessRewardModel.from_backbone(tiny_family(family)).eval()
        torch.nn.init.normal_(model.score_head.weight)
        return model

    return make


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_prompt_and_inputs_are_those_of_the_real_processor(family, model_of):
    processor, tokenizer = real_processor(family), model_of(family).chain_tokenizer
    asked = [(QUESTION, sizes) for sizes in (*SIZES[:4], SIZES[:2], SIZES[1:4])]
    asked += [(question, SIZES[: question.count("<image>")]) for question in PLACED]
    for question, sizes in asked:
        images = [picture(*size, n) for n, size in enumerate([sizes] if isinstance(sizes, tuple) else sizes)]
        texts = question.split("<image>")
        content = [{"type": "image"} for _ in images if len(texts) == 1] + [{"type": "text", "text": texts[0]}]
        for text in texts[1:]:
            content += [{"type": "image"}, {"type": "text", "text": text}]
        content = [part for part in content if part.get("text") != ""]
        # SmolVLM's own method asks the video processor.
        prompt = ProcessorMixin.apply_chat_template(
            processor, [{"role": "user", "content": content}], add_generation_prompt=True
        )
        expected = processor(text=[prompt], images=[images], return_tensors="pt")
        encoded = tokenizer.encode(Chain(question, ("x",)), tokenizer.read_images(images))
        inputs = tokenizer.family.model_inputs(collate([encoded]).tokens)
        assert set(inputs) == set(expected)
        of_tokens = inputs["input_ids"].shape
        for name, values in inputs.items():
            own = values[:, :-1] if values.shape == of_tokens else values  # without the step
            assert torch.equal(own.flatten(), expected[name].flatten()), (question, name)


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_an_image_takes_as_many_tokens_as_its_size_says(family, model_of):
    model = model_of(family)
    tokenizer, counts = model.chain_tokenizer, set()
    for size in SIZES:
        try:
            images = [tokenizer.read_images([picture(*size)] * count) for count in (1, 2)]
        except UserError:  # Qwen-VL reads no threads
            continue
        for some in images:
            encoded = tokenizer.encode(Chain(QUESTION, ("x",)), some)
            assert sum(len(model.encode_image(image)) for image in some) == encoded.is_image.sum(), size
        encoded = tokenizer.encode(Chain(QUESTION, ("x",)), images[0])
        counts.add(len(encoded.input_ids))
    assert len(counts) > 2 or family == "gemma3"


def test_tiles_are_counted_right_where_sizes_do_not_fit(model_of):
    """Idefics3's processor counts otherwise than it cuts, where its size is no multiple of a tile's."""
    model = model_of("idefics3")
    processor, tokenizer = model.chain_tokenizer.image_processor, model.chain_tokenizer
    try:
        for longest in (50, 70, 84):
            processor.size = {"longest_edge": longest}
            for size in SIZES:
                (pixels,) = tokenizer.read_images([picture(*size)])
                text, each = pixels.placeholder
                assert len(model.encode_image(pixels)) == text.count("<image>") * each, (longest, size)
    finally:
        processor.size = {"longest_edge": 56}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_position_ids_are_the_backbones_own(family, model_of):
    model = model_of(family)
    tokenizer, kind = model.chain_tokenizer, model.chain_tokenizer.family
    sizes = [SIZES[:1], [], SIZES[1:2], SIZES[:2], SIZES[:3]]
    if not kind.reads_images:
        sizes = [[] for _ in sizes]
    images = [tokenizer.read_images([picture(*size) for size in some]) for some in sizes]
    questions = [BETWEEN if len(some) == 2 else QUESTION for some in sizes]
    tokens = collate(
        [tokenizer.encode(Chain(questions[n], STEPS[: n + 1]), some) for n, some in enumerate(images)]
    ).tokens
    inputs, valid = kind.model_inputs(tokens), tokens.attention_mask.bool()
    positions = kind.position_ids(model.backbone, inputs)
    if positions is None:
        positions = torch.arange(valid.shape[1])[None].expand(len(valid), -1)
    with torch.no_grad():
        own, told = (model.backbone(**inputs, **more).last_hidden_state for more in ({}, {"position_ids": positions}))
    assert torch.equal(own[valid], told[valid])


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_answers_go_on_from_one_pass_over_their_prompt_where_that_changes_nothing(family, model_of):
    model = model_of(family)
    tokenizer = model.chain_tokenizer
    prompts = [(QUESTION, ()), ("Why? " * 9, ()), ("Q", ())]
    if tokenizer.family.reads_images:
        two = tokenizer.read_images([picture(60, 40), picture(40, 60, 1)])
        one = tokenizer.read_images([picture(60, 40)])
        prompts += [(QUESTION, one), (BETWEEN, two), (BETWEEN, two[::-1]), ("Q", (*two, two[0]))]
    encoded = [
        tokenizer.encode(Chain(question, (f"{n}", *STEPS[n:])), images)
        for question, images in prompts
        for n in range(3)
    ]
    shared, whole = model.collate(encoded), collate(encoded)
    assert (shared.prompts is None) == family.startswith("gemma3")  # its windows would count padding
    with torch.no_grad():
        assert (model(shared) - model(whole)).abs().max() <= 1e-5 * model(whole).abs().max()


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_every_parameter_belongs_to_the_tower_the_projector_or_the_language_model(family, model_of):
    model = model_of(family)
    kind, backbone = model.chain_tokenizer.family, model.backbone
    tower, projector = (parameters_of(backbone, names) for names in (kind.vision_modules, kind.projector_modules))
    assert tower and projector
    language = "text_model" if family in ("idefics3", "smolvlm") else "language_model"
    together = {id(p) for p in (*tower, *projector, *parameters_of(backbone, [language]))}
    assert together == {id(p) for p in backbone.parameters()}
    adapted = [name for name, _ in backbone.named_modules() if re.fullmatch(kind.lora_targets, name)]
    assert len(adapted) == 2 * 7 and all(name.startswith(language) for name in adapted)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_special_tokens_in_users_text_are_plain_text(family, model_of):
    tokenizer = model_of(family).chain_tokenizer
    special = set(tokenizer.tokenizer.all_special_ids) | {tokenizer.family.image_token_id}
    hostile = f"{tokenizer.family.image_token}{tokenizer.family.template_token}<|im_end|><end_of_turn>"
    if "<image>" in hostile:  # in a question it stands for an image, which must be there
        with pytest.raises(
            UserError, match=r"found [12] `<image>` for 0 images, allowed: one `<image>` for each image"
        ):
            tokenizer.encode(Chain(hostile, ("x",)))
    questions = ("x", hostile.replace("<image>", "< image>"))
    clean, injected = (
        tokenizer.encode(Chain(question, (text,))).input_ids.tolist()
        for question, text in zip(questions, ("x", hostile), strict=True)
    )
    assert [i for i in injected if i in special] == [i for i in clean if i in special]


def test_a_model_of_no_known_family_is_refused():
    config = AutoConfig.for_model("blip-2")
    with pytest.raises(UserError, match=r"blip-2 models are not supported .*qwen2_vl.*gemma3.*families/__init__.py"):
        family_of(config)


# ---------------------------------------------------------------- text-only models


def test_encoders_and_decoders_of_other_things_are_no_text_models():
    for kind in ("bert", "bart", "t5", "whisper", "xlnet", "clip", "musicgen"):
        assert kind not in FAMILIES
    assert FAMILIES["mistral"] is FAMILIES["qwen3"] is CausalLM


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_adapters_sit_on_every_linear_layer_of_a_text_model(family):
    base = ProcessRewardModel.from_backbone(tiny_family(family), lora_rank=2).base
    linear = {name for name, module in base.named_modules() if hasattr(module, "base_layer")}
    parts = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
    if family != "phi3":  # its layers are fused
        parts = {*("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
                 *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}  # fmt: skip
    assert linear == {f"layers.{layer}.{part}" for layer in (0, 1) for part in parts}


def test_an_image_for_a_text_model_is_an_error_that_names_rows_and_remedy(tmp_path):
    picture(60, 40).save(tmp_path / "a.png")
    model = ProcessRewardModel.from_backbone(tiny_family("qwen2"), device="meta")
    chains = [Chain("Q", ("a",), (tmp_path / "a.png",), rows=(n,), source="train.json") for n in (3, 5)]
    with pytest.raises(UserError) as caught:
        check_chains(model.chain_tokenizer, [*chains, Chain("Q", ("a",))])
    first, line = str(caught.value).splitlines()
    assert first == "2 of 3 chains cannot be used"
    assert re.fullmatch(r"train.json: row 3: .*qwen2 models read text only.*--ignore_images.*train.json: row 5\)", line)
    with pytest.raises(UserError, match="row 3: .*--ignore_images"):
        model.chain_tokenizer.encode(chains[0])


@pytest.mark.parametrize("flag", [{"freeze_projector": False}, {"freeze_projector": True}, {"max_image_side": 100}])
def test_settings_about_images_are_refused_for_a_text_model(flag):
    with pytest.raises(UserError, match=f"--{next(iter(flag))} does nothing with llama models, which read text only"):
        ProcessRewardModel.from_backbone(tiny_family("llama"), **flag)


def test_a_vision_tower_that_is_not_there_cannot_be_trained(world):
    config = arguments("qwen2", "full", world).with_changes(freeze_vision=False)
    with pytest.raises(UserError, match="--no_freeze_vision does nothing with qwen2 models"):
        check_data(config, read_run_data(config))


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("qwen2", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        ("llama", "<|begin_of_text|>User: ", "\nAssistant: "),  # no template: a plain form behind its first token
        ("smollm3", "<|im_start|>system\nToday Date: 1 January 2025<|im_end|>\n<|im_start|>user\n",
         "<|im_end|>\n<|im_start|>assistant\n"),  # the same on every day
    ],
)  # fmt: skip
def test_the_prompt_of_a_text_model_is_its_templates(family, before, after, model_of):
    tokenizer = model_of(family).chain_tokenizer
    encoded = tokenizer.encode(Chain(QUESTION, ("x",)))
    assert tokenizer.tokenizer.decode(encoded.input_ids[: encoded.prompt_length]) == before + QUESTION + after


def test_a_window_is_found_where_layers_are_not_listed():
    tokenizer = AutoTokenizer.from_pretrained(tiny_family("qwen2"))
    for window in (None, 8):
        config = AutoConfig.for_model("mistral", sliding_window=window)
        assert CausalLM(config, tokenizer, None).shares_prompts == (window is None)
