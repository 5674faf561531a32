"""Learn domain weights and a process reward model (PRM) from two JSON files.

    python reweighting/main.py --train_json_file data/train.json --meta_json_file data/meta.json --weights_path weights

Two levels are learned at once (DreamPRM, arXiv 2505.20241):

    lower   phi:    sum over domains k of  w_k * mean over step rows of domain k of (sigmoid(z) - p)^2  (--lower_loss)
    upper   alpha:  mean over whole answers of (sigmoid(A) - r)^2  of the PRM that the lower level arrives at

z is a step's logit, p its Monte Carlo accuracy, A the aggregate of an answer's step logits, r whether its final answer
is correct, and w = softplus(alpha) / mean(softplus(alpha)). `bilevel/problems.py` holds both losses.
"""

if __name__ == "__main__":  # a script: run this file as a module of the package
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from reweighting.entrypoint import run_command

    run_command("reweighting.main")

from functools import partial
from pathlib import Path
from typing import Any

import torch
from betty.configs import Config

from reweighting.bilevel.evidence import SlopeEvidence
from reweighting.bilevel.hypergradients import make_hypergradient
from reweighting.bilevel.losses import STEP_LOSSES
from reweighting.bilevel.problems import DomainReweighting, PRMFineTuning
from reweighting.config.training import TrainingConfig
from reweighting.devices import choose_device, choose_precision
from reweighting.distributed.collectives import check_same_on_all_ranks, process_group
from reweighting.training import build, loss_weights, preflight
from reweighting.training.batches import BatchSource
from reweighting.training.dry_run import dry_run
from reweighting.training.engine import ReweightingEngine
from reweighting.training.fixed_weights import make_fixed_weights
from reweighting.training.hypergradient_choice import resolve_hypergradient
from reweighting.training.labels import make_label_correction, make_step_labels
from reweighting.training.last_step import LESS_MEMORY as LESS_MEMORY
from reweighting.training.output_dir import lock_output_dir, prepare_output_dir
from reweighting.training.results import save_results
from reweighting.training.resume import find_checkpoint, run_inputs, run_settings
from reweighting.training.run_data import RunData, read_run_data
from reweighting.training.signals import StopSignals

AFTER_INTERRUPT = "the same command with --resume continues from the last checkpoint"


def main(argv: list[str]) -> None:
    """Run the command: flags, rows, the two levels, training, results. Raises UserError for what the user can fix."""
    config = TrainingConfig.parse(argv)
    with process_group(choose_device(config.run.device), config.run.distributed_timeout):
        data = preflight.check_data(config, read_run_data(config))  # all of them, before a weight is read
        with lock_output_dir(config.data.weights_path, run_inputs(config)) as folder:
            settings = run_settings(config)
            check_same_on_all_ranks(settings)
            if config.run.dry_run:
                return dry_run(config, settings, data, folder, build_engine)
            checkpoint, state = find_checkpoint(config, settings, folder) or (None, None)
            engine = build_engine(config, settings, data, folder, state)
            prepare_output_dir(config, folder, checkpoint)
            with StopSignals() as stop:
                engine.run(stop)
            save_results(engine, data, folder)


def build_engine(
    config: TrainingConfig, settings: dict[str, Any], data: RunData, folder: Path, state: dict[str, Any] | None = None
) -> ReweightingEngine:
    """Wire reward model, lower problem and upper problem into the engine that trains them.

    Args:
        config: the flags.
        settings: what each checkpoint remembers of the run, from `run_settings`.
        data: the chains of both levels.
        folder: where the run writes.
        state: a checkpoint's state to resume from; None at a start.
    """
    torch.manual_seed(config.run.seed)
    device = choose_device(config.run.device)
    precision = choose_precision(config.run.precision, device)
    preflight.check_possible(config, device, precision)
    fixed_weights = make_fixed_weights(config.lower, data)  # None where they are learned
    labels = make_step_labels(config, data)  # None where they stay as they are
    batches = BatchSource(config, data)
    model, layout = build.make_reward_model(config, device, precision)
    validation = build.make_validation(config, data, model, device, precision)
    optimizer = build.make_optimizer(config.lower, list(layout.trainable_parameters().values()))
    method = resolve_hypergradient(config, data, model, device, precision, state and state["settings"])
    step_loss = STEP_LOSSES[config.lower.lower_loss]
    hypergradient = None
    if method is not None:  # the weights are learned
        hypergradient = make_hypergradient(
            method,
            model,
            optimizer,
            layout=layout,
            precision=precision,
            step_loss=step_loss,
            by_chain=config.weighs_instances,
            labels=labels,
        )

    lower = PRMFineTuning(
        Config(
            unroll_steps=config.upper.unroll_steps,
            warmup_steps=config.upper.warmup_iterations * batches.micro_batches_per_step,
            gradient_accumulation=batches.micro_batches_per_step,
            precision=precision,
        ),
        model,
        optimizer,
        partial(batches.train, model),
        learning_rate=build.learning_rate_schedule(config.lower),
        step_loss=step_loss,
        hypergradient=hypergradient,
        fixed_weights=None if fixed_weights is None else fixed_weights.to(device),
        labels=labels,
        max_grad_norm=config.lower.max_grad_norm,
        layout=layout,
    )
    upper = None
    if hypergradient is not None:
        learned_weights = loss_weights.make_learned_weights(config, data).to(device)
        evidence = SlopeEvidence(len(data.domains), build.windows_per_meta_pass(config.upper, data))
        instance_evidence = loss_weights.make_instance_evidence(config, data)
        upper = DomainReweighting(
            Config(precision=precision),
            learned_weights,
            build.make_meta_optimizer(config.upper, learned_weights, evidence, instance_evidence),
            partial(batches.meta, model),
            hypergradient=hypergradient,
            evidence=evidence,
            instance_evidence=instance_evidence,
            label_correction=None if labels is None else make_label_correction(config.upper, labels.to(device)),
            aggregation=config.upper.aggregation_function,
            positive_rate=build.positive_rate(data) if config.upper.center_meta_scores else None,
            weight_bounds=build.weight_bounds(config.upper),
        )
    preflight.print_summary(config, data, model, device, precision)
    engine = ReweightingEngine(
        lower, upper, data.domains, device, folder, config.lower.iteration_num, config.run.save_every_iterations,
        settings | {"planned_hypergradient": method}, keep=config.run.keep_checkpoints,
        max_skipped_steps=config.run.max_skipped_steps, validation=validation, persistent=not config.run.dry_run,
    )  # fmt: skip
    if state is not None:
        engine.load_state_dict(state)
        print(f"resumed at step {engine.global_step}")
    return engine
