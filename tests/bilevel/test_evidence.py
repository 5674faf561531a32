"""Slopes with their standard errors: the running statistics against plain ones, and how often a verdict is chance."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from reweighting.bilevel.evidence import SlopeEvidence

DOMAINS, WINDOWS = 10, 30


def evidence_of(hypergradients: np.ndarray, windows_per_pass: float = math.inf) -> SlopeEvidence:
    """The evidence of a series [n, K]."""
    evidence = SlopeEvidence(hypergradients.shape[1], windows_per_pass)
    for one in hypergradients:
        evidence.add(torch.tensor(one))
    return evidence


def false_verdicts(series: list[np.ndarray], windows_per_pass: float = math.inf) -> float:
    """Share of domains with a verdict in series without any effect."""
    verdicts = [one for made in series for one in evidence_of(made, windows_per_pass).slopes().verdicts]
    return sum(verdict != "cannot be told" for verdict in verdicts) / len(verdicts)


def test_running_statistics_equal_plain_ones():
    rng = np.random.default_rng(0)
    scales = rng.uniform(1, 30, WINDOWS)  # of the windows, which all count alike
    noise = rng.normal(size=(WINDOWS + 1, DOMAINS))
    made = (noise[1:] + 0.6 * noise[:-1] + rng.normal(size=DOMAINS)) * scales[:, None]
    evidence = SlopeEvidence(DOMAINS, 9.0)
    for one in made:
        evidence.add(torch.tensor(one, dtype=torch.float32))
    x = made.mean(1, keepdims=True) - made
    x /= np.sqrt((x**2).mean(1, keepdims=True))
    d = x - x.mean(0)
    rho = (d[1:] * d[:-1]).sum() / (d**2).sum()
    rho += (1 + 4 * rho) / WINDOWS
    assert 0.2 < rho < 0.7 and evidence.correlation() == pytest.approx(rho, abs=1e-5)
    independent = WINDOWS * (1 - rho) / (1 + rho)
    assert evidence.effective_windows() == pytest.approx(min(independent, 8.0), abs=1e-4)
    variance = x.var(0, ddof=1) + 2 * (x**2).mean(0) / (WINDOWS - 1)
    slopes, error = evidence.slopes(), np.sqrt(variance / min(independent, 8.0))
    np.testing.assert_allclose(slopes.mean, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(slopes.standard_error, error, rtol=1e-5)
    np.testing.assert_allclose(slopes.half_width, error * student.ppf(0.975, independent - 1), rtol=1e-5)


def test_a_verdict_is_chance_as_often_as_promised():
    """Noise that is independent, or correlated as in a model that moves: about 5 % of domains get a verdict."""
    rng = np.random.default_rng(1)
    for rho in (0.0, 0.5):
        series = []
        for _ in range(100):
            noise = [rng.normal(size=DOMAINS)]
            for _ in range(WINDOWS - 1):
                noise.append(rho * noise[-1] + math.sqrt(1 - rho**2) * rng.normal(size=DOMAINS))
            series.append(np.stack(noise))
        assert 0.02 <= false_verdicts(series) <= 0.075


def test_more_passes_over_the_meta_set_are_no_new_evidence():
    """Each answer pulls the domains its own way; a window averages an eighth of the answers, drawn anew each pass.

    No domain has an effect over all answers that there could be, so a verdict is false.
    """
    rng = np.random.default_rng(2)
    series, passes, batches, batch = [], 12, 8, 16
    for _ in range(100):
        answers = rng.normal(size=(batches * batch, DOMAINS))
        order = np.concatenate([rng.permutation(len(answers)) for _ in range(passes)])
        series.append(answers[order].reshape(passes * batches, batch, DOMAINS).mean(1))
    assert false_verdicts(series) > 0.3  # as if each window were a new sample
    assert 0.02 <= false_verdicts(series, batches) <= 0.075


@pytest.mark.parametrize("domains", [2, 3, 4])
@pytest.mark.parametrize("windows", [4, 6, 30])
def test_few_domains_agree_by_chance_no_more_often(domains, windows):
    """Of two domains, a window tells a sign only: four windows all agree in one series of eight."""
    rng = np.random.default_rng(6)
    assert false_verdicts([rng.normal(size=(windows, domains)) for _ in range(200)]) <= 0.075


def test_effects_are_found_with_their_sign():
    rng = np.random.default_rng(3)
    effect = np.array([-2.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0])  # on the meta loss
    verdicts = evidence_of(effect + rng.normal(size=(WINDOWS, DOMAINS)), 12.0).slopes().verdicts
    assert verdicts[:2] == ["helps", "helps"] and verdicts[-2:] == ["hurts", "hurts"]


@pytest.mark.parametrize(
    ("windows", "windows_per_pass", "scale"), [(3, 8.0, 1.0), (30, 1.0, 1.0), (30, 1 / 64, 1.0), (30, 8.0, 0.0)]
)
def test_nothing_is_told_from_nothing(windows, windows_per_pass, scale):
    """Too few windows, windows that all hold the whole meta set, one answer repeated, hypergradients of 0."""
    made = scale * (3 + np.random.default_rng(4).normal(size=(windows, DOMAINS)))
    evidence = evidence_of(made, windows_per_pass)
    assert set(evidence.slopes().verdicts) == {"cannot be told"}
    for one in evidence.slopes().by_domain([f"domain {i}" for i in range(DOMAINS)]).values():
        assert one["t"] is None and (one["interval"] in (None, [0.0, 0.0]))


def test_a_restored_evidence_goes_on_bit_for_bit():
    made = np.random.default_rng(5).normal(size=(9, DOMAINS))
    whole, part = evidence_of(made), evidence_of(made[:5])
    restored = SlopeEvidence(DOMAINS, math.inf)
    restored.load_state_dict(part.state_dict())
    for one in made[5:]:
        restored.add(torch.tensor(one))
    assert restored.count == whole.count == 9
    for name, value in whole.sums.items():
        assert torch.equal(value, restored.sums[name])
    with pytest.raises(ValueError, match="the evidence's total is torch.float64 of shape"):
        SlopeEvidence(DOMAINS + 1, math.inf).load_state_dict(part.state_dict())
