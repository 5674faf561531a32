"""The network that computes the weights of chains: what it reads, its exact gradient, and the command with it."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from betty.configs import Config
from safetensors import safe_open

from reweighting.bilevel.evidence import SlopeEvidence
from reweighting.bilevel.hypergradients import make_hypergradient
from reweighting.bilevel.instance_net import HIDDEN, InstanceNet, known_features, loss_features
from reweighting.bilevel.losses import STEP_LOSSES
from reweighting.bilevel.problems import DomainReweighting, PRMFineTuning
from reweighting.config.training import TrainingConfig
from reweighting.data.chains import Chain
from reweighting.errors import UserError
from reweighting.main import main
from reweighting.modeling.collate import Batch
from reweighting.training.build import make_meta_optimizer
from reweighting.training.checkpoints import checkpoints, load_checkpoint
from reweighting.training.engine import ReweightingEngine
from reweighting.training.signals import Stopped
from tests.bilevel.test_problems import ACCUMULATION, DOMAINS, LR, UNROLL, Fixture, plain_meta_loss
from tests.runs import StopAtStep, flags, same_results, weights
from tests.tiny import tiny_backbone
from tests.training.test_last_step import fail_at_call

DOMAIN_OF = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def random_net(times_domain: bool, seed: int = 1) -> InstanceNet:
    """A network in float64 whose output is not 0, of eight chains."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.randn(8, 3, generator=generator)
    net = InstanceNet(DOMAINS, DOMAIN_OF, times_domain, known, seed).double()
    for parameter in net.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return net


def micro_batch(chain_ids: list[int], errors: list[list[float]]) -> tuple[Batch, torch.Tensor]:
    values = torch.tensor(errors, dtype=torch.float64)
    return SimpleNamespace(chain_ids=torch.tensor(chain_ids), target_mask=torch.ones_like(values).bool()), values


def test_what_is_known_of_a_chain():
    chains = [
        Chain("?", ("ab", "cdef"), targets=(0.5, math.nan), domain=0),
        Chain("?", ("a" * 20,), targets=(0.0,), domain=0),
        Chain("?", ("abc",) * 4, targets=(0.25, 1.0, math.nan, 0.5), domain=0),
    ]
    quarter = -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)
    plain = np.array(
        [
            [1.0, math.log(2), math.log(7)],
            [0.0, 0.0, math.log(21)],
            [(quarter + 1) / 3, math.log(4), math.log(13)],
        ]
    )
    np.testing.assert_allclose(known_features(chains), (plain - plain.mean(0)) / plain.std(0), rtol=1e-6)
    assert known_features(chains[:1] * 3).tolist() == [[0, 0, 0]] * 3


def test_losses_of_a_chain():
    errors = torch.tensor([[0.25, 1.0, 0.0], [0.01, 9.0, 9.0]])
    labeled = torch.tensor([[True, True, True], [True, False, False]])
    torch.testing.assert_close(loss_features(errors, labeled), torch.tensor([[0.0, 1.0, -1.0], [-0.8, -0.8, -0.8]]))


@pytest.mark.parametrize("times_domain", [False, True])
def test_weights_are_scaled_as_the_tables(times_domain):
    net = random_net(times_domain)
    net.of_chains(*micro_batch([0, 1, 5], [[0.2, 0.4], [0.1, 0.9], [0.3, 0.3]]))
    net.begin_window()
    found = net.by_domain().detach()
    wanted = net.domain_weights().detach() if times_domain else net.by_domain() / net.by_domain().mean()
    torch.testing.assert_close(found, wanted.detach())
    assert net().std() > 0.05 and (net() > 0).all()
    assert (InstanceNet(DOMAINS, DOMAIN_OF, times_domain, torch.randn(8, 3), 1)() == 1).all()


def test_the_first_losses_in_a_window_hold_until_its_end():
    net = random_net(False)
    first = net.of_chains(*micro_batch([3, 6, 3], [[0.2], [0.4], [0.9]]))
    assert first[0] == pytest.approx(first[2].item())  # a small domain's batch repeats a chain
    again = net.of_chains(*micro_batch([6, 3], [[0.7], [0.7]]))
    torch.testing.assert_close(again, first[[1, 0]])
    torch.testing.assert_close(net().detach()[[3, 6]], first[:2])
    nothing = net.of_chains(*micro_batch([4], [[math.nan]]))
    assert nothing.isfinite().all() and not net.met[4] and not net.seen[4]
    net.begin_window()
    torch.testing.assert_close(net.losses[4], net.losses[[3, 6]].mean(0))  # never met: an average one
    assert (net.of_chains(*micro_batch([6], [[0.7]])) - again[0]).abs() > 1e-3


def plain_weights(net, params, chain, losses, before):
    """The weight of one chain at given parameters, written out; `before`: {chain: losses} at the window's start."""

    def number(one, three):
        inputs = torch.cat([three, net.known[one]])
        hidden = torch.tanh(params["hidden"] @ inputs + params["domain"][DOMAIN_OF[one]])
        return torch.log1p((params["output"] @ hidden).exp())

    def mean(domain):
        members = [one for one in range(8) if DOMAIN_OF[one] == domain]
        return sum(number(one, before[one]) for one in members) / len(members)

    own = number(chain, losses)
    if net.domain_weights is None:
        return own / (sum(mean(domain) for domain in range(3)) / 3)
    alpha = torch.log1p(params["domain_weights.alpha"].exp())
    return alpha[DOMAIN_OF[chain]] / alpha.mean() * own / mean(DOMAIN_OF[chain])


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("times_domain", [False, True], ids=["instance", "both"])
def test_its_gradient_is_that_of_the_unrolled_optimizer(tmp_path, times_domain, loss):
    """Autograd goes through the losses that the network reads, too; chains 0 and 3 are met twice in the window."""
    fixture, net, lr = Fixture(), random_net(times_domain), LR / 10  # what every method leaves out is of second order
    ids = [[0, 3, 6], [1, 4, 7], [2, 5, 2], [3, 0, 6]]
    numbered = [(domain % 3, replace(fixture.train[domain % 3][1], chain_ids=torch.tensor(one))) for domain, one in
                zip((0, 1, 2, 0), ids, strict=True)]  # fmt: skip
    model, before = fixture.model, net.losses.clone()
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    own = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    noted, current = {}, params
    for step in range(UNROLL):
        step_gradient = dict.fromkeys(current, 0)
        for _, batch in numbered[step * ACCUMULATION : (step + 1) * ACCUMULATION]:
            logits = torch.func.functional_call(model, current, (batch,))
            errors = STEP_LOSSES[loss](logits, batch)
            for row, chain in enumerate(batch.chain_ids.tolist()):
                labeled = errors[row][batch.target_mask[row]]
                roots = 2 * labeled.sqrt() - 1
                losses = noted.setdefault(chain, torch.stack([roots.mean(), roots.max(), roots[-1]]))
                weight = plain_weights(net, own, chain, losses, before)
                part = labeled.sum() / batch.num_labeled_steps / ACCUMULATION
                grads = torch.autograd.grad(part, list(current.values()), create_graph=True, materialize_grads=True)
                for name, grad in zip(current, grads, strict=True):  # the step itself takes the weight as a number
                    step_gradient[name] = step_gradient[name] + weight * grad
        current = {name: value - lr * step_gradient[name] for name, value in current.items()}
    exact = torch.autograd.grad(plain_meta_loss(model, current, fixture.meta[0]), list(own.values()))

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    hypergradient = make_hypergradient("jvp", model, optimizer, step_loss=STEP_LOSSES[loss], by_chain=True)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    lower = PRMFineTuning(
        Config(unroll_steps=UNROLL, gradient_accumulation=ACCUMULATION),
        model,
        optimizer,
        numbered.__getitem__,
        learning_rate=lambda step: lr,
        step_loss=STEP_LOSSES[loss],
        hypergradient=hypergradient,
    )
    upper = DomainReweighting(
        Config(),
        net,
        torch.optim.SGD(net.parameters(), lr=1.0),  # a step is the gradient
        fixture.meta.__getitem__,
        hypergradient=hypergradient,
        evidence=SlopeEvidence(len(DOMAINS), 8.0),
    )
    ReweightingEngine(lower, upper, DOMAINS, torch.device("cpu"), tmp_path, UNROLL, 100, {}).run()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), current[name].detach(), rtol=0, atol=1e-8)
    found = torch.cat([(start[name] - p.detach()).flatten() for name, p in net.named_parameters()])
    exact = torch.cat([one.flatten() for one in exact])
    cosine, ratio = torch.cosine_similarity(exact, found, dim=0), found.norm() / exact.norm()
    print(f"cosine {cosine:.6f}, ratio {ratio:.4f}")
    assert cosine >= 0.999 and 0.98 <= ratio <= 1.02
    assert found.norm() > 0


def test_a_step_moves_a_number_as_far_as_one_of_the_table():
    needed = ["--train_json_file", "a", "--meta_json_file", "b", "--weights_for", "both"]
    config = TrainingConfig.parse([*needed, "--instance_weights_form", "net", "--meta_optimizer", "adamw"])
    net = random_net(True)
    optimizer = make_meta_optimizer(config.upper, net, None)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    own = dict(net.named_parameters())
    assert [id(p) for p in own.values()] == list(rates)  # the order that a checkpoint relies on
    assert rates[id(own["domain_weights.alpha"])] == 0.2
    assert {rates[id(own[name])] for name in ("hidden", "domain", "output")} == {0.2 / HIDDEN}


@pytest.fixture
def run(demo):
    """Flags of a run of 6 windows with the tiny backbone and a network."""
    net = ("--instance_weights_form", "net", "--iteration_num", "12", "--unroll_steps", "2", "--meta_batch_size", "4")
    return lambda output, *more: flags(demo, output, "--reward_model", str(tiny_backbone()), *net, *more)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("instance", "--precision", "bf16"), marks=pytest.mark.slow),  # slow on a processor
        ("both", "--warmup_iterations", "4"),
    ],
)
def test_a_run_learns_saves_and_resumes(run, demo, tmp_path, monkeypatch, more):
    """Cut inside a window: what it has noted of chains is in the checkpoint."""
    more = ("--weights_for", *more)
    main(run(tmp_path / "whole", *more))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("reweighting.main.StopSignals", lambda: StopAtStep(9))
        main(run(tmp_path / "cut", *more))
    state = load_checkpoint(checkpoints(tmp_path / "cut" / "checkpoints")[-1])
    assert state["step"] == 9 and state["problems"]["upper"]["observations"]["met"].any()
    main(run(tmp_path / "cut", *more, "--resume"))
    same_results(tmp_path / "whole", tmp_path / "cut")
    name = "instance_net.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    table = pyarrow.parquet.read_table(tmp_path / "whole" / "instance_weights.parquet").to_pydict()
    assert table == pyarrow.parquet.read_table(tmp_path / "cut" / "instance_weights.parquet").to_pydict()
    assert len(table["weight"]) == 40 and np.std(table["weight"]) > 0.01
    with safe_open(tmp_path / "whole" / name, "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        network = json.loads(file.metadata()["network"])
    assert network["domains"] == list(weights(tmp_path / "whole"))
    assert len(network["inputs"]) == found["hidden"].shape[1] == 6
    assert found["output"].abs().max() > 0 and found["domain"].shape == (10, HIDDEN)
    again = ("--reward_model", str(tiny_backbone()), "--iteration_num", "5")
    fixed = ("--instance_weights", str(tmp_path / "whole" / "instance_weights.parquet"))
    main(flags(demo, tmp_path / "again", *again, *fixed))


def test_an_unfinished_step_leaves_nothing_noted(run, tmp_path, monkeypatch):
    """An error in the second micro-batch of step 10, inside a window."""
    main(run(tmp_path / "whole", "--weights_for", "instance"))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        fail_at_call(patch, PRMFineTuning, "step_losses", 10 * 5, ZeroDivisionError)
        main(run(tmp_path / "cut", "--weights_for", "instance"))
    assert checkpoints(tmp_path / "cut" / "checkpoints")[-1].name == "step-00000009"
    main(run(tmp_path / "cut", "--weights_for", "instance", "--resume"))
    same_results(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--meta_optimizer", "calm"), "--instance_weights_form net is trained by gradient steps: use .* adamw"),
        (("--instance_activation", "relu"), "--instance_activation does nothing with --instance_weights_form net"),
        (("--weights_for", "domain"), "--instance_weights_form does nothing without --weights_for instance or both"),
        (("--baseline",), "does nothing with --baseline"),
    ],
)
def test_flags_that_contradict_each_other(run, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        main(run(tmp_path, "--weights_for", "both", *more))


def test_a_table_does_not_become_a_network(run, tmp_path):
    sizes = ("--weights_for", "both", "--iteration_num", "2", "--save_every_iterations", "2")
    main(run(tmp_path, *sizes))
    with pytest.raises(
        UserError, match="--weights_for both --instance_weights_form net.* this one .*--weights_for both"
    ):
        main(run(tmp_path, *sizes, "--instance_weights_form", "table", "--resume", "--allow_changed_settings"))
