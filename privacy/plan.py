"""From the `privacy:` section to what runs: rate, lot, noise, and the words that go with every epsilon."""

from dataclasses import dataclass

from lora.errors import PrivacyError
from privacy.accounting import Event, calibrate, epsilon
from privacy.config import PrivacyConfig
from privacy.mechanism import Mechanism


@dataclass(frozen=True)
class PrivatePlan:
    """How one client trains privately over a whole run."""

    mechanism: Mechanism
    """Bounds and noise of a step."""
    rate: float
    """Probability with which an example is in a step's lot."""
    lot: float
    """Expected examples per lot, rate * population: the fixed denominator of every mean."""
    steps: int
    """Steps of the whole run that the noise was planned for."""
    budget: float | None
    """Epsilon that the client's ledger must not pass; None: no limit."""
    delta: float
    """Failure probability that goes with epsilon."""

    @property
    def epsilon(self) -> float:
        """Return what the planned steps cost together, at delta; the ledger may hold more from earlier runs."""
        return epsilon([self.event(self.steps)], delta=self.delta)

    def event(self, steps: int) -> Event:
        """Return what `steps` steps of the plan cost; charge it before the first of them draws."""
        return self.mechanism.event(rate=self.rate, steps=steps)


def plan_for(config: PrivacyConfig, *, population: int, lot: int, steps: int, trains_head: bool) -> PrivatePlan:
    """Plan a client of `population` examples: lots of `lot` expected examples, `steps` steps over the whole run.

    The noise multiplier is the given one, or the smallest that keeps all steps within `privacy.epsilon`.
    Raises PrivacyError when the section asks for no privacy, the client has no examples, or the budget cannot be met.
    """
    if not config.private:
        raise PrivacyError("no privacy was asked for; set privacy.epsilon or privacy.noise_multiplier")
    if population < 1 or lot < 1:
        raise PrivacyError(f"no lot of {lot} from {population} examples; both must be at least 1 (training.batch)")
    rate = min(1.0, lot / population)
    noise = _noise_multiplier(config, rate=rate, steps=steps)
    mechanism = Mechanism(config.clip, config.head_clip if trains_head else None, noise)
    return PrivatePlan(mechanism, rate, rate * population, steps, config.epsilon, config.delta)


def assumptions(config: PrivacyConfig) -> dict[str, str]:
    """Return what every reported epsilon rests on, as words for a report."""
    stated = {
        "unit": "example",
        "adjacency": "add/remove one",
        "sampling": "Poisson lots, drawn afresh for every step",
        "delta": f"{config.delta:g}",
        "adversary": "the server and everybody after it; other clients; whoever gets the adapter",
        "released": "every upload of every round",
        "public": "population sizes of the clients, the frame A (it depends on no data), who took part and when",
        "noise": "Gaussian in float32, from the operating system's generator; floating-point attacks are out of scope",
    }
    if config.test_seed is not None:
        stated["noise"] = f"test: seeded noise (test_seed={config.test_seed}), claims no privacy"
    return stated


def _noise_multiplier(config: PrivacyConfig, *, rate: float, steps: int) -> float:
    if config.noise_multiplier is None:
        if config.epsilon is None:
            raise PrivacyError("set privacy.epsilon or privacy.noise_multiplier")
        return calibrate(epsilon=config.epsilon, delta=config.delta, rate=rate, steps=steps)
    if config.epsilon is not None:
        _check_reach(config.noise_multiplier, config.epsilon, config.delta, rate=rate, steps=steps)
    return config.noise_multiplier


def _check_reach(noise: float, budget: float, delta: float, *, rate: float, steps: int) -> None:
    cost = epsilon([Event(rate, noise, steps)], delta=delta)
    if cost > budget:
        needed = calibrate(epsilon=budget, delta=delta, rate=rate, steps=steps)
        raise PrivacyError(
            f"an epsilon that the budget cannot reach: {steps} steps at rate {rate:.4g} cost epsilon {cost:.4g} at "
            f"delta {delta:g} with noise_multiplier={noise:g}, and privacy.epsilon={budget:g}; set noise_multiplier "
            f"to {needed:.4g} or more (or leave it out), or train for fewer steps"
        )
