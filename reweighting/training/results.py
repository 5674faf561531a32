"""What a run leaves: the reward model, the weights as JSON, a table of them, and figures."""

import json
import math
from pathlib import Path
from typing import Any

from reweighting.bilevel.calm_weights import CalmWeights
from reweighting.bilevel.evidence import CONFIDENCE, SlopeEvidence
from reweighting.bilevel.problems import DomainReweighting
from reweighting.distributed import collectives
from reweighting.files import atomic_write_dir, atomic_write_text
from reweighting.plots import draw_run, shown_name
from reweighting.terminal import printable
from reweighting.training.checkpoints import best_checkpoint
from reweighting.training.engine import ReweightingEngine
from reweighting.training.instance_results import save_instance_weights
from reweighting.training.labels import save_corrected_labels
from reweighting.training.run_data import RunData


def save_results(engine: ReweightingEngine, data: RunData, folder: Path) -> None:
    """Write `prm/`, the weights and `figures/`, and print the weights; every process calls it, rank 0 writes.

    Args:
        engine: the engine of the finished run.
        data: what it has read.
        folder: the output folder.

    Raises:
        UserError: if something cannot be written.
    """
    save_model = engine.model_saver()
    if not collectives.is_rank0():
        return
    atomic_write_dir(folder / "prm", save_model)
    weights = engine.weights()
    result = {"weights": weights, "step": engine.global_step, "settings": engine.settings}
    evidence = summarize_evidence(engine.upper, engine.domains) if engine.reweights else None
    if evidence is not None:
        result["evidence"] = evidence
    atomic_write_text(folder / "domain_weights.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    figures = draw_run(folder)
    if engine.reweights and (instances := engine.upper.instance_evidence) is not None:
        save_instance_weights(folder, data, engine.upper, instances)
    if engine.reweights and (correction := engine.upper.label_correction) is not None:
        save_corrected_labels(folder, data, correction)
    if evidence is not None:
        mean = sum(weights.values()) / len(weights)  # other than 1 only where an activation leaves it so
        print(f"\ndomain weights after {engine.global_step} steps, {engine.updates} updates (mean {mean:.3g}):")
        print(weights_table(weights, evidence["domains"]))
        print(f"\n{verdict_note(engine.upper.evidence)}")
    best = best_checkpoint(folder / "checkpoints", engine.score_name)
    if best is not None:
        print(f"\nbest checkpoint by {printable(engine.score_label)} ({best[1]:.4f}): {printable(best[0])}")
    print(printable(f"\nreward model in {folder / 'prm'}, figures: {', '.join(map(str, figures))}"))


def summarize_evidence(upper: DomainReweighting, domains: list[str]) -> dict[str, Any]:
    """Return what `domain_weights.json` says of how sure the weights are, see docs/uncertainty.md."""
    evidence = upper.evidence
    table = evidence.slopes().by_domain(domains)
    if isinstance(upper.optimizer, CalmWeights):
        intervals = upper.optimizer.weight_intervals()
        lowest, highest = upper.weight_bounds
        for number, domain in enumerate(domains):
            interval = None if intervals is None else [min(max(end, lowest), highest) for end in intervals[number]]
            table[domain]["weight_interval"] = interval
    return {
        "confidence": CONFIDENCE,
        "windows": evidence.count,
        "effective_windows": evidence.effective_windows(),
        "domains": table,
    }


def weights_table(weights: dict[str, float], evidence: dict[str, dict[str, Any]]) -> str:
    """Format the weights as lines of text with verdicts and bars, largest first.

    Args:
        weights: {domain: weight}.
        evidence: {domain: its `t` and `verdict`}, from `Slopes.by_domain`.
    """
    names = {domain: shown_name(domain) for domain in weights}
    width = max(map(len, names.values()))
    lines = []
    for name, weight in sorted(weights.items(), key=lambda item: (-item[1], item[0])):
        t, verdict = evidence[name]["t"], evidence[name]["verdict"]
        shown = " " * 8 if t is None else f"t {t:+6.1f}"
        lines.append(f"  {names[name]:<{width}}  {weight:5.2f}  {shown}  {verdict:<14}  {'█' * round(20 * weight)}")
    return "\n".join(lines)


def verdict_note(evidence: SlopeEvidence) -> str:
    """Say in a sentence how far the verdicts can be trusted."""
    if len(evidence.mean) == 1:
        return "There is a single domain: nothing to compare it with"
    if evidence.windows_per_pass <= 1:
        return (
            "Nothing can be told of a single domain: each update read the whole meta set. A --meta_batch_size of a "
            "seventh of the different meta answers tells more"
        )
    if not math.isfinite(evidence.slopes().standard_error.max()):
        return f"Nothing can be told of a single domain from {evidence.count} updates: train longer"
    return (
        "helps, hurts: more weight on the domain lowered or raised the meta loss, against the mean of all domains. "
        f"Of 20 domains that do neither, about {20 * (1 - CONFIDENCE):.0f} gets such a verdict by chance"
    )
