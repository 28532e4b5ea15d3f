"""SENSEI: variants, genetic operators, the queue, selective augmentation, training on the worst."""
import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archrepair.baselines.parts.augmented import PADDINGS, Images, to_float
from archrepair.baselines.parts.common import Problem
from archrepair.baselines.sensei import (
    GENES,
    REACH,
    STEPS,
    Confusions,
    Search,
    Sensei,
    cross,
    matrices,
    most_different,
    mutate,
    random_chromosomes,
    repeated,
    variants,
)
from archrepair.core.errors import ArchrepairError
from archrepair.corruptions.randomness import image_keys
from archrepair.data.scenario import RepairData
from support.states import assert_same_state, state_of
from support.textures import smooth_pictures

EVERY = torch.ones(7, dtype=torch.bool)
REACHES = torch.tensor(REACH)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    "Chromosomes, int8 shape×7."
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(-r, r + 1, shape, generator=generator) for r in REACH], -1).to(torch.int8)


@pytest.fixture
def little(problem):
    data = problem.scenario.data
    few = lambda part, k: part.select(torch.arange(min(k, len(part))))
    parts = few(data.failures, 12), few(data.train, 40), few(data.val, 24), data.transform, few(data.val_failures, 4), data.failure_rate
    return Problem(problem.network, RepairData(*parts))


def search_of(problem: Problem, network: nn.Module | None = None, **changes) -> Search:
    return Search(network or problem.network(), Images(problem), problem.data.transform, Sensei(**changes), meter=problem.meter)


def losses_of(search: Search, position: int, chromosomes: torch.Tensor) -> torch.Tensor:
    "Of an image's variants, by an independent pass."
    network, image = copy.deepcopy(search.network).eval(), search.images.batch(torch.tensor([position]))
    with torch.no_grad():
        logits = torch.cat([network(search.transform(variants(image, c[None, None])[0])) for c in chromosomes])
    return nn.functional.cross_entropy(logits, search.images.labels[position].expand(len(logits)), reduction="none")


# --- variants


@pytest.mark.parametrize("size", [8, 32, 64, 224])
@pytest.mark.parametrize("padding", PADDINGS)
def test_chromosome_0_gives_the_image_back(size, padding):
    images = smooth_pictures(2, size)
    found = variants(images, torch.zeros(2, 3, 7, dtype=torch.int8), padding)
    assert found.dtype == torch.uint8 and torch.equal(found, images[:, None].expand(2, 3, size, size, 3))


@given(st.integers(0, 10_000), st.sampled_from([8, 32, 63]))
@settings(max_examples=30, deadline=None)
def test_the_matrix_undoes_the_moves_in_their_order(seed, size):
    "A point that is turned, shifted, slanted and zoomed is sent back to where it was."
    chromosome = drawn(seed=seed)
    turn, dx, dy, shear, zoom, *_ = (g * s for g, s in zip(chromosome.tolist(), STEPS))
    x, y = torch.rand(2, generator=torch.Generator().manual_seed(seed)).mul(size).tolist()
    angle = math.radians(turn)
    u, v = math.cos(angle) * x - math.sin(angle) * y + dx * size, math.sin(angle) * x + math.cos(angle) * y + dy * size
    u, v = (1 + zoom) * (u + shear * v), (1 + zoom) * v
    back = matrices(chromosome, size, size) @ torch.tensor([u, v, 1.0])
    assert torch.allclose(back, torch.tensor([x, y]), atol=1e-3)


def test_moves_are_torchvisions_one_at_a_time():
    from torchvision.transforms.functional import InterpolationMode, affine

    image, plain = smooth_pictures(1), {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    cases = {"rotation": (4, {"angle": 24.0}), "shift_x": (-2, {"translate": [-2, 0]}), "shift_y": (3, {"translate": [0, 3]}),
             "shear": (5, {"shear": [-math.degrees(math.atan(0.1)), 0.0]}), "zoom": (-4, {"scale": 0.92})}
    for gene, (steps, change) in cases.items():
        chromosome = torch.tensor([steps if name == gene else 0 for name in GENES])
        expected = affine(to_float(image), **{**plain, **change}, interpolation=InterpolationMode.BILINEAR)
        assert float((to_float(variants(image, chromosome[None, None])[0]) - expected).abs().max()) <= 0.51, gene


def test_brightness_comes_before_contrast_and_both_are_clipped():
    image = torch.tensor([[0, 100, 250]]).view(1, 1, 3, 1).expand(1, 3, 3, 3).to(torch.uint8)
    chromosomes = torch.tensor([[0, 0, 0, 0, 0, 5, 0], [0, 0, 0, 0, 0, 0, -2], [0, 0, 0, 0, 0, 5, 2], [0, 0, 0, 0, 0, -8, 4]])
    found = variants(image, chromosomes[None])[0, :, 1, :, 0]
    assert found.tolist() == [[20, 120, 255], [0, 90, 225], [22, 132, 255], [0, 82, 255]]


def test_variants_do_not_depend_on_the_batch():
    images, genes = smooth_pictures(5), drawn(5, 4)
    for i in range(5):
        for j in range(4):
            assert torch.equal(variants(images, genes)[i, j], variants(images[i:i + 1], genes[i:i + 1, j:j + 1])[0, 0])


def test_padding():
    image = torch.full((1, 8, 8, 3), 200, dtype=torch.uint8)
    moved = torch.tensor([5, 3, 0, 0, 0, 0, 0])[None, None]
    assert int(variants(image, moved)[0, 0].min()) == 0
    assert all(variants(image, moved, padding).eq(200).all() for padding in ("border", "reflection"))


# --- operators


@pytest.mark.parametrize("active", [EVERY, torch.tensor([True] * 4 + [False] * 3), torch.tensor([True] + [False] * 6)])
def test_random_chromosomes_are_uniform_over_what_is_active(active):
    found = random_chromosomes(image_keys("draw", torch.arange(1500)), 8, active).long()
    assert found.shape == (1500, 8, 7) and not found[..., ~active].any()
    for gene in active.nonzero().squeeze(1).tolist():
        shares = torch.bincount(found[..., gene].flatten() + REACH[gene]) / found[..., gene].numel()
        assert len(shares) == 2 * REACH[gene] + 1 and (shares * len(shares) - 1).abs().max() < 0.15


@pytest.mark.parametrize(("names", "most"), [(tuple(GENES), 4), (tuple(GENES)[:4], 2), (("zoom",), 1)])
def test_mutants(names, most):
    active = torch.tensor([name in names for name in GENES])
    parents, doubled = drawn(400) * active, torch.arange(400) % 2 == 0
    mutants = mutate(parents, 6, image_keys("mutants", torch.arange(400)), active, doubled)
    old = parents[:, None].expand_as(mutants).long()
    difference = mutants.long() - old
    assert (mutants.abs() <= REACHES).all() and not difference[..., ~active].any()
    counts = (difference != 0).sum(-1)
    assert int(counts.max()) == most
    step = torch.where(doubled[:, None, None] & torch.tensor([n in ("rotation", "shear") for n in GENES]), 2, 1)
    at_end = mutants.long().abs() == REACHES
    assert ((difference.abs() == step) | (difference == 0) | (mutants == -old) | at_end).all()
    inner = (old.abs() + step <= REACHES) & (old.abs() > 1)  # neither clipped nor a sign that looks like a step
    for share in ((difference == step), (difference == -step), (mutants == -old)):
        changed = inner & (difference != 0)
        assert changed.any() and abs(float(share[changed].float().mean()) - 1 / 3) < 0.06


def test_children_have_genes_of_both():
    one, other = drawn(300), drawn(300, seed=1)
    children = cross(one, other, 6, image_keys("children", torch.arange(300)))
    first = children == one[:, None]
    assert (first | (children == other[:, None])).all()
    differ = (one != other)[:, None].expand_as(first)
    assert abs(float(first[differ].float().mean()) - 0.5) < 0.02


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_most_different_and_repeated_by_hand(seed):
    queue = drawn(3, 4, seed=seed) % 3  # few values, or nothing would repeat
    distance = lambda a, b: sum(abs(i - j) / (2 * r) for i, j, r in zip(a.tolist(), b.tolist(), REACH))
    for members, mate in zip(queue, most_different(queue)):
        assert distance(members[0], mate) == pytest.approx(max(distance(members[0], other) for other in members))
    several = (drawn(3, 8, seed=seed) % 2)[..., :] * torch.tensor([1, 1, 0, 0, 0, 0, 0], dtype=torch.int8)
    assert repeated(several).tolist() == [[c in row[:i] for i, c in enumerate(row)] for row in several.tolist()]


# --- the search


def test_offspring_hold_the_image_itself_and_nobody_twice(little):
    search = search_of(little)
    queue, keys = search.queue.clone(), search.keys(torch.arange(52))
    queue[::2, 0] = random_chromosomes(keys[::2], 1, EVERY, 99)[:, 0]  # the image itself is gone from every other queue
    for loss in (torch.ones(52), torch.full((52,), math.nan)):
        population = torch.cat([queue, search.offspring(queue, loss, keys)], 1)
        assert population.shape == (52, 10, 7) and not repeated(population).any()
        assert ((population == 0).all(-1).sum(1) == 1).all()


def test_a_coin_decides_between_mutants_and_children(little):
    queue, shares = drawn(52, 4, seed=5), {}
    for mutation in (0.0, 0.6, 1.0):
        search = search_of(little, mutation=mutation)
        found = search.offspring(queue, torch.ones(52), search.keys(torch.arange(52)))[:, 1:]  # the first is the image itself
        of_both = ((found == queue[:, :1]) | (found == most_different(queue)[:, None])).all(-1)
        shares[mutation] = float(of_both.float().mean())
    assert shares[0.0] > 0.9 and shares[1.0] < 0.2 and shares[1.0] + 0.1 < shares[0.6] < shares[0.0] - 0.3


def test_a_visit_keeps_the_worst_of_all_ten(little, quiet_stream):
    search = search_of(little, threshold=0.0)
    positions = torch.arange(52)
    search.choose(positions)
    before, keys = search.queue.clone(), search.keys(positions)
    now = search.loss[:, 0]
    offspring = search.offspring(before, now, keys)
    chosen = search.choose(positions)
    assert torch.equal(chosen, search.queue[:, 0])
    assert (search.loss.diff(dim=1) <= 0).all()
    for i in range(0, 52, 5):
        everyone = torch.cat([before[i], offspring[i]])
        losses = losses_of(search, i, everyone)
        best = losses.argsort(descending=True, stable=True)[:4]
        assert torch.allclose(search.loss[i], losses[best], rtol=1e-3, atol=1e-5)
        if losses.sort().values.diff().min() > 1e-4:
            assert torch.equal(search.queue[i], everyone[best])


def test_what_is_trained_on_is_no_easier_than_the_image(little):
    "At the time it is chosen, even after the network has changed and learned what is in the queue."
    search = search_of(little, threshold=0.0)
    positions = torch.arange(52)
    optimizer = torch.optim.SGD(search.network.parameters(), lr=0.02)
    for _ in range(3):
        chosen = search.choose(positions)
        itself = torch.cat([losses_of(search, i, torch.zeros(1, 7, dtype=torch.int8)) for i in range(0, 52, 3)])
        found = torch.cat([losses_of(search, i, chosen[i][None]) for i in range(0, 52, 3)])
        assert (found >= itself * (1 - 1e-3) - 1e-5).all()
        search.network.train()
        pictures = variants(search.images.batch(positions), chosen[:, None])[:, 0]
        nn.functional.cross_entropy(search.network(search.transform(pictures)), search.images.labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_search_leaves_the_network_alone(little):
    network = little.network()
    network.train()
    network.layer2.eval()
    before = state_of(network)
    search_of(little, network).choose(torch.arange(30))
    assert_same_state(before, network)


def test_robust_images_are_not_searched(little):
    "With a threshold in the widest gap between two losses, so that there are images on both sides of it."
    losses = torch.cat([losses_of(search_of(little), i, torch.zeros(1, 7, dtype=torch.int8)) for i in range(52)])
    ranking = losses.sort().values
    gap = int(ranking.diff().argmax())
    threshold = float(ranking[gap:gap + 2].mean())
    search = search_of(little, threshold=threshold)
    forwards = little.meter.forwards
    chosen = search.choose(torch.arange(52))
    robust = losses < threshold
    assert int(robust.sum()) == gap + 1 and torch.equal(search.loss[:, 0].isnan(), robust)
    assert not chosen[robust].any() and search.visits.eq(1).all()
    assert little.meter.forwards - forwards == 52 + 9 * int((~robust).sum())
    search.close(1)
    entry = search.epochs[0]
    assert entry["seen"] == 52 and entry["searched"] == pytest.approx(float((~robust).float().mean()), abs=1e-4)
    assert entry["worst"] >= entry["itself"] == pytest.approx(float(losses[~robust].mean()), rel=1e-3)


@pytest.mark.parametrize("population", [10, 5])
def test_small_pieces_are_the_whole(little, population, monkeypatch):
    "Memory is bounded by searching a batch in pieces; an image at the edge of one is treated like any other."
    whole, pieces = search_of(little, population=population), search_of(little, population=population)
    whole.choose(torch.arange(20))
    for some in torch.arange(20).split(7):
        pieces.choose(some)
    assert torch.allclose(whole.loss[:20], pieces.loss[:20], rtol=1e-3, atol=1e-5, equal_nan=True)
    assert (whole.queue[:20] == pieces.queue[:20]).all(-1).float().mean() > 0.95  # ties apart


def test_few_genes_still_make_a_population(little):
    search = search_of(little, genes=("shift_x",), threshold=0.0)
    search.choose(torch.arange(20))
    assert not search.queue[:20, :, [0, 2, 3, 4, 5, 6]].any() and search.loss[:20].isfinite().all()


def test_confusions_are_counted_by_pairs():
    confusions, labels, answers = Confusions(2), torch.tensor([1, 1, 1, 1, 2, 3]), torch.tensor([7, 7, 7, 1, 7, 3])
    assert confusions.ranks(labels, answers).tolist() == [0, 0, 1, 0, 0, 0]
    assert confusions.ranks(labels[:1], answers[:1]).tolist() == [1]
    assert Confusions(None).ranks(labels, answers).tolist() == [0] * 6


def test_a_confusion_that_is_too_common_trains_the_second_worst(little):
    "As if every class had been mistaken for every other already: whose worst variant is wrong is trained on the second."
    search, positions = search_of(little, max_confusions=1, threshold=0.0), torch.arange(52)
    search.confusions.counts.update((label, answer) for label in range(10) for answer in range(10))
    chosen = search.choose(positions)
    answers = search.score(search.images.batch(positions), search.queue[:, :1], search.images.labels)[1][:, 0]
    wrong = answers != search.images.labels
    assert torch.equal(chosen, torch.where(wrong[:, None], search.queue[:, 1], search.queue[:, 0]))
    search.close(1)
    assert not search.confusions.counts, "every epoch counts anew"


def test_a_search_goes_on_where_it_was(little):
    one = search_of(little)
    one.choose(torch.arange(52))
    one.close(1)
    two = search_of(little)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for search in (one, two):
        search.choose(torch.arange(0, 52, 2))
    assert torch.equal(one.queue, two.queue) and torch.equal(one.visits, two.visits) and one.epochs == two.epochs
    assert torch.equal(one.loss.nan_to_num(-1), two.loss.nan_to_num(-1))


def test_a_search_goes_on_in_the_middle_of_an_epoch(little, tmp_path):
    "Through the file of a checkpoint; what the epoch has counted so far is counted on."
    one, two = (search_of(little, max_confusions=1, threshold=0.0) for _ in range(2))
    one.choose(torch.arange(0, 52, 2))
    torch.save(one.state_dict(), tmp_path / "c.pt")
    two.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True))
    chosen = [search.choose(torch.arange(1, 52, 2)) for search in (one, two)]
    for search in (one, two):
        search.close(1)
    assert torch.equal(*chosen) and one.epochs == two.epochs and one.epochs[0]["seen"] == 52


def test_another_seed_searches_elsewhere(little):
    one, two, three = search_of(little), search_of(little), search_of(little, seed=1)
    for search in (one, two, three):
        search.choose(torch.arange(52))
    assert torch.equal(one.queue, two.queue) and not torch.equal(one.queue, three.queue)


# --- the repair


def test_an_infinite_threshold_is_plain_training(little):
    method = Sensei(epochs=2, threshold=math.inf, precision="fp32", failure_views=2)
    found = method.repair(little.original, little.data)
    network, images = little.network(), Images(little, failure_views=2)
    method.train(little, network, images, lambda p, epoch: little.data.transform(images.batch(p)), method.recipe(little, 3))
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in found.candidates["repaired"].state_dict().items())
    assert all(entry["searched"] == 0 for entry in found.history["queue"]) and len(found.history["queue"]) == 2
    json.dumps(found.to_dict())


def test_a_visit_costs_at_most_thirteen_forwards(little):
    result = Sensei(epochs=1, threshold=0.0).repair(little.original, little.data)
    rows, seen = result.cost.backwards, result.history["queue"][0]["seen"]
    validated = 4 * (len(little.data.val) + len(little.data.val_failures))  # before, after the epoch, and both at the end
    assert rows == seen and result.cost.forwards == 11 * rows + validated
    assert Sensei(epochs=9, budget="cost").recipe(little, 13).epochs == 2


@pytest.mark.parametrize(("settings", "message"), [
    ({"elite": 1}, "elite is 1"), ({"elite": "x"}, "elite is 'x'"), ({"population": 4}, "population is 4; expected a whole number from 5"),
    ({"mutation": 1.5}, "mutation is 1.5"), ({"threshold": -1.0}, "threshold is -1.0"), ({"genes": ()}, "unknown gene ''"),
    ({"genes": ("rotate",)}, "unknown gene 'rotate': did you mean 'rotation'"),
    ({"padding": "zero"}, "unknown padding 'zero': did you mean 'zeros'"),
    ({"max_confusions": 0}, "max_confusions is 0"), ({"epochs": -1}, "epochs is -1")])
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ArchrepairError, match=message):
        Sensei(**settings)
