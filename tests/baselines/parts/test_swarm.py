"""Population search: the batched step is the plain loop's, the elite only gets better, and a killed search goes on exactly where it was."""
import copy
import json
import math
import zlib

import pytest
import torch

from archrepair.baselines.parts.swarm import constriction, differential_evolution, pso
from archrepair.core.errors import ArchrepairError

SEARCHES = {"pso": pso, "de": differential_evolution}


def stream(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(purpose.encode()))


def start(members=12, dimensions=3, seed=0):
    return torch.randn(members, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hill(x):
    "Highest, 0, at (1, 1, …)."
    return -(x - 1).square().sum(1) - 0.3 * (1 - (5 * (x - 1)).cos()).sum(1)


def test_constriction():
    assert constriction() == pytest.approx(0.7298437881, abs=1e-9)
    assert constriction(4.5) == 0.5
    for phi in (4.0, 1.0, math.nan):
        with pytest.raises(ArchrepairError, match="above 4"):
            constriction(phi)


@pytest.mark.parametrize("options", [{}, {"bounds": (-0.5, 0.8)}, {"min_step": 0.05, "max_step": torch.tensor([0.1, 0.2, 0.3])}])
def test_a_swarm_moves_as_a_loop_over_its_particles(options):
    x, steps = start(), 4
    found = pso(hill, x, stream, iterations=steps, inertia=0.6, cognitive=1.3, social=1.7, patience=None, **options)
    position, velocity = x.clone(), torch.zeros_like(x)
    best, value = x.clone(), hill(x)
    low, high = options.get("bounds", (-math.inf, math.inf))
    least, most = options.get("min_step", 0.0), options.get("max_step", torch.full((3,), math.inf))
    for i in range(1, steps + 1):
        draw = torch.rand(2, *x.shape, generator=stream(f"particle swarm {i}"), dtype=x.dtype)
        leader = best[value.argmax()].clone()
        for p in range(len(x)):
            for d in range(x.shape[1]):
                v = (0.6 * velocity[p, d] + 1.3 * draw[0, p, d] * (best[p, d] - position[p, d])
                     + 1.7 * draw[1, p, d] * (leader[d] - position[p, d]))
                velocity[p, d] = math.copysign(min(max(abs(v), least), most[d]), v)
                position[p, d] = min(max(position[p, d] + velocity[p, d], low), high)
        for p in range(len(x)):
            score = hill(position[p:p + 1])[0]
            if score > value[p]:
                best[p], value[p] = position[p].clone(), score
    assert torch.allclose(found.elite, best, atol=1e-12)
    assert found.fitness == pytest.approx(float(value.max()), abs=1e-12)


def test_differential_evolution_moves_as_a_loop_over_its_members():
    x, steps = start(), 4
    found = differential_evolution(hill, x, stream, iterations=steps, scale=(0.4, 0.9), crossover=0.6, bounds=(-1.0, 1.5), patience=None)
    members, value = x.clone(), hill(x)
    for i in range(1, steps + 1):
        generator = stream(f"differential evolution {i}")
        factor = 0.4 + 0.5 * float(torch.rand((), generator=generator))
        keys = torch.rand(12, 12, generator=generator)
        cross = torch.rand(12, 3, generator=generator) < 0.6
        forced = torch.randint(3, (12,), generator=generator)
        following, scores = members.clone(), value.clone()
        for p in range(12):
            a, b, c = sorted((q for q in range(12) if q != p), key=lambda q: keys[p, q])[:3]
            trial = members[p].clone()
            for d in range(3):
                if cross[p, d] or d == forced[p]:
                    trial[d] = min(max(members[a, d] + factor * (members[b, d] - members[c, d]), -1.0), 1.5)
            if (score := hill(trial[None])[0]) >= value[p]:
                following[p], scores[p] = trial, score
        members, value = following, scores
    assert torch.allclose(found.elite, members, atol=1e-12)
    assert found.fitness == pytest.approx(float(value.max()), abs=1e-12)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_elite_only_gets_better_and_finds_the_hill(name, quiet_stream):
    x = start(40)
    before = x.clone()
    found = SEARCHES[name](hill, x, stream, iterations=80, patience=None)
    best = [entry["best"] for entry in found.history]
    assert best == sorted(best) and best[0] == float(hill(x).max()) and len(best) == 81
    assert [entry["iteration"] for entry in found.history] == list(range(81))
    assert all(entry["mean"] <= entry["best"] for entry in found.history)
    assert found.fitness == best[-1] == float(hill(found.best[None])) > -0.01
    assert torch.equal(hill(found.elite).max(), hill(found.best[None])[0])
    assert torch.equal(x, before), "the population that came in was written to"


@pytest.mark.parametrize("name", SEARCHES)
def test_seeds(name):
    run = lambda first, purpose="": SEARCHES[name](hill, first, lambda what: stream(purpose + what), iterations=5)
    assert torch.equal(run(start()).elite, run(start()).elite)
    assert not torch.equal(run(start()).elite, run(start(), "other").elite)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_killed_search_goes_on_where_it_was(name):
    calls, states = [], []

    def objective(x):
        calls.append(len(x))
        return hill(x)

    def dying(**state):
        states.append(copy.deepcopy(state))
        if len(states) == 4:
            raise KeyboardInterrupt

    whole = SEARCHES[name](objective, start(), stream, iterations=9)
    once = len(calls)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        SEARCHES[name](objective, start(), stream, iterations=9, save=dying)
    again = SEARCHES[name](objective, start(), stream, iterations=9, resume=states[-1])
    assert len(calls) == once == 10
    assert torch.equal(again.elite, whole.elite) and again.history == whole.history and again.fitness == whole.fitness
    finished = SEARCHES[name](objective, start(), stream, iterations=4, resume=states[-1])
    assert len(calls) == once and len(finished.history) == 5


@pytest.mark.parametrize("name", SEARCHES)
def test_it_stops_where_nothing_is_gained(name):
    flat = lambda x: torch.ones(len(x))
    assert len(SEARCHES[name](flat, start(), stream, patience=3).history) == 4
    assert len(SEARCHES[name](flat, start(), stream, patience=None, iterations=20).history) == 21
    assert len(SEARCHES[name](flat, start(), stream, iterations=0).history) == 1
    creep = iter(range(1000))
    creeping = lambda x: torch.full((len(x),), 1 + 0.01 * next(creep), dtype=torch.float64)
    assert len(SEARCHES[name](creeping, start(), stream, patience=3, tolerance=0.1, iterations=30).history) == 4
    assert len(SEARCHES[name](creeping, start(), stream, patience=3, tolerance=0.0001, iterations=30).history) == 31


@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_no_number_never_wins(name):
    broken = lambda x: torch.where(x[:, 0] > 0, torch.nan, hill(x))
    found = SEARCHES[name](broken, start(), stream, iterations=10)
    assert math.isfinite(found.fitness) and found.best[0] <= 0
    hopeless = SEARCHES[name](lambda x: x[:, 0] * torch.nan, start(), stream, iterations=3, patience=None)
    assert hopeless.fitness == -math.inf and torch.isfinite(hopeless.best).all()


@pytest.mark.parametrize("name", SEARCHES)
def test_mistakes(name):
    for empty in (torch.zeros(0, 3), torch.zeros(5, 0), torch.zeros(5)):
        with pytest.raises(ArchrepairError, match="population"):
            SEARCHES[name](hill, empty, stream)
    with pytest.raises(ValueError, match="one value per member"):
        SEARCHES[name](lambda x: x, start(), stream)
    if name == "de":
        with pytest.raises(ArchrepairError, match="four members or more"):
            differential_evolution(hill, start(3), stream)


@pytest.mark.parametrize("name", SEARCHES)
def test_one_dimension_and_the_smallest_population(name):
    found = SEARCHES[name](hill, start(4, 1), stream, iterations=60, patience=None)
    assert found.fitness >= float(hill(start(4, 1)).max()) and found.best.shape == (1,)
    assert json.dumps(found.history)
