"""Cutting a network and keeping what enters a block: exact, or not done at all."""
import copy
import os

import pytest
import torch
from torch import nn

from archrepair.blocks import (Whole, _key, block_names, cache_features, draw_view, freeze, get_block, image_features, replace_block, split,
                               spread_views)
from archrepair.data import ImageSet, Normalize
from archrepair.errors import ArchrepairError
from archrepair.models import MODELS, create_model

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 32, 32, generator=DRAW)


def randomise(module: nn.Module, seed: int) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
    return module.eval()


@pytest.fixture(scope="module")
def networks():
    return {name: create_model(name, 10, width=0.125 if name == "densenet121" else 0.0625, stem_stride=2) for name in MODELS}


# --- names


@pytest.mark.parametrize(("name", "expected"), [
    ("vgg16", [f"features.block{i}" for i in range(1, 6)]), ("efficientnet_b0", [f"features.{i}" for i in range(1, 8)]),
    *((f"resnet{d}", [f"layer{i}" for i in range(1, 5)]) for d in (18, 50, 101)),
])
def test_blocks_of_table_2(networks, name, expected):
    assert block_names(networks[name]) == expected


def test_densenet_has_a_block_for_every_two_convolutions(networks):
    model = networks["densenet121"]
    names = block_names(model)
    assert len(names) == 6 + 12 + 24 + 16 and names[0] == "features.denseblock1.denselayer1" and names[-1].endswith("denseblock4.denselayer16")
    assert all(sum(isinstance(m, nn.Conv2d) for m in model.get_submodule(n).modules()) == 2 for n in names)


def test_blocks_of_a_network_we_do_not_know():
    conv = lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
    assert block_names(nn.Sequential(conv(), nn.ReLU(), conv(), nn.Flatten(), nn.Linear(3, 2))) == ["0", "2"]
    with pytest.raises(ArchrepairError, match="found no blocks in Sequential"):
        block_names(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))


@pytest.mark.parametrize("name", ["layer5", "", "layer1.9", "fc.x"])
def test_unknown_block(networks, name):
    for act in (get_block, split):
        with pytest.raises(ArchrepairError, match="unknown block .*layer1, layer2, layer3, layer4"):
            act(networks["resnet18"], name)


# --- cutting

CUTS = [(name, i) for name, n in (("vgg16", 5), ("resnet18", 4), ("resnet50", 4), ("resnet101", 4), ("efficientnet_b0", 7)) for i in range(n)]
CUTS += [("densenet121", i) for i in (0, 5, 6, 30, 41, 42, 57)]  # first, and on both sides of the transitions


@pytest.mark.parametrize(("name", "position"), CUTS)
def test_the_cut_is_exact(networks, name, position):
    model = networks[name]
    block = block_names(model)[position]
    cut = split(model, block)
    other = randomise(copy.deepcopy(cut.block), position)
    with torch.inference_mode():
        features = cut.features(X)
        kept = features.clone()
        assert cut.prefix is not None and torch.equal(cut.tail()(features), model(X))
        changed = cut.tail(other)(features)
        assert torch.equal(changed, replace_block(model, block, other)(X)) and not torch.equal(changed, model(X))
        assert torch.equal(features, kept), "the tail writes into its input"


def test_no_part_of_the_work_is_done_twice(networks):
    "Prefix and suffix share no parameters, and with the block they are the whole network."
    model = networks["resnet18"]
    cut = split(model, "layer3")
    parts = [{id(p) for p in part.parameters()} for part in (cut.prefix, cut.block, cut.suffix)]
    assert not parts[0] & parts[1] and not parts[1] & parts[2] and not parts[0] & parts[2]
    assert len(set.union(*parts)) == len(list(model.parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_splitting_leaves_the_model_alone(networks, untouched, quiet_stream, training):
    model = copy.deepcopy(networks["resnet18"]).train(training)
    with untouched(model):
        cut = split(model, "layer2")
        assert not cut.model.training and not any(p.requires_grad for p in cut.model.parameters())
        assert not {id(p) for p in cut.model.parameters()} & {id(p) for p in model.parameters()}
        randomise(cut.block, 3)


def test_replace_block_shares_the_new_block_and_copies_the_rest(networks, untouched):
    model = networks["resnet18"]
    new = nn.Identity()
    with untouched(model):
        other = replace_block(model, "layer2", new)
        assert other.layer2 is new and other.layer1 is not model.layer1
        assert torch.equal(other.fc.weight, model.fc.weight) and other.fc.weight.data_ptr() != model.fc.weight.data_ptr()
        assert not isinstance(model.layer2, nn.Identity)
    nested = replace_block(model, "layer2.1.conv1", new)
    assert nested.layer2[1].conv1 is new and not isinstance(nested.layer2[0].conv1, nn.Identity)


class Toy(nn.Module):
    "A small network; `how` says what is odd about the way it uses its block."

    def __init__(self, how: str = "plain"):
        super().__init__()
        self.how = how
        self.stem, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 5)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.register_buffer("scale", torch.tensor(1.5))
        randomise(self, 5)

    def forward(self, x):
        n = x.shape[0] if self.how == "own size" else None
        y = self.stem(x)
        match self.how:
            case "plain": z = self.block(y * self.scale) * self.scale
            case "dropout": z = nn.functional.dropout(self.block(nn.functional.dropout(y, training=self.training)), training=self.training)
            case "inplace block": z = self.block(torch.relu_(y))
            case "skip": z = self.block(y) + y
            case "twice": z = self.block(self.block(y))
            case "branch": z = self.block(y if y.mean() > 0 else -y)
            case "part": z = self.block[0](self.block(y))
            case "weight": z = self.block(y) * self.block[0].weight.mean()
            case "own size": return self.head(self.block(y).mean((2, 3)).view(n, -1))
        return self.head(z.mean((2, 3)))


@pytest.mark.parametrize("how", ["plain", "dropout", "inplace block", "skip", "twice", "branch", "part", "weight", "own size"])
def test_odd_networks_are_cut_exactly_or_run_as_a_whole(how, untouched):
    model = Toy(how)
    with untouched(model):
        cut = split(model, "block")
        assert (cut.prefix is not None) == (how in ("plain", "dropout", "inplace block")), "cut" if cut.prefix else "not cut"
        other = randomise(copy.deepcopy(cut.block), 6)
        with torch.inference_mode():
            assert torch.equal(cut.tail()(cut.features(X)), model(X))
            assert torch.equal(cut.tail(other)(cut.features(X)), replace_block(model, "block", other)(X))


def test_a_whole_network_in_place_of_a_tail_still_trains_its_block_alone():
    tail = split(Toy("skip"), "block").tail()
    assert isinstance(tail, Whole) and tail.block is tail.model.block
    assert sum(1 for _ in tail.parameters()) == sum(1 for _ in Toy().parameters()), "the block must not be listed twice"
    twin = copy.deepcopy(tail)
    assert twin.block is twin.model.block and twin.block is not tail.block


def test_freeze():
    model = freeze(Toy().train())
    assert not model.training and not model.block.training and not any(p.requires_grad for p in model.parameters())


# --- views


def test_views_have_one_shape_and_are_all_different(digits_test):
    images = digits_test.images[:5].clone()
    views = [draw_view(images, v) for v in range(10)]
    assert all(v.shape == images.shape and v.dtype == torch.uint8 for v in views)
    assert not [(i, j) for i in range(10) for j in range(i) if torch.equal(views[i], views[j])]
    assert torch.equal(views[0], digits_test.images[:5]) and torch.equal(views[1], images.flip(2))
    assert all(torch.equal(v, draw_view(images, i)) for i, v in enumerate(views)) and torch.equal(images, digits_test.images[:5])
    assert not torch.equal(draw_view(images, 2, seed=1), views[2])


def test_shifts_are_by_two_pixels_at_most():
    image = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    image[0, 8, 5] = 255
    for view in range(2, 12):
        (y, x), = draw_view(image, view)[0, :, :, 0].nonzero().tolist()
        assert abs(y - 8) <= 2 and abs((15 - x if view % 2 else x) - 5) <= 2


def test_spread_views_keeps_labels_and_positions(digits_test):
    part = digits_test.select(torch.tensor([4, 9, 2]))
    more = spread_views(part, 3)
    assert len(more) == 9 and more.labels.tolist() == part.labels.tolist() * 3 and more.index.tolist() == [4, 9, 2] * 3
    for view in range(3):
        assert torch.equal(more.images[3 * view:3 * view + 3], draw_view(part.images, view))
    assert spread_views(part, 1) is part and len(spread_views(part.select(torch.arange(0)), 4)) == 0


# --- the cache


@pytest.fixture(scope="module")
def cut(networks):
    return split(networks["resnet18"], "layer3")


@pytest.fixture(scope="module")
def few(digits_test):
    return digits_test.select(torch.arange(20, 57))


TRANSFORM = Normalize((0.3, 0.3, 0.3), (0.3, 0.3, 0.3))


def test_every_store_gives_the_same_rows(cut, few, tmp_path):
    stores = {s: cache_features(cut, few, TRANSFORM, views=2, batch_size=10, store=s, folder=tmp_path) for s in ("none", "device", "host", "file", "auto")}
    rows = torch.tensor([36, 0, 7, 7])
    for view in (0, 1, 2, 5):
        expected = cut.features(TRANSFORM(draw_view(few.images, view % 2)))[rows]
        for store, kept in stores.items():
            batch = kept.batch(rows, view)
            assert torch.allclose(batch, expected, atol=1e-6), store
            assert torch.equal(batch, stores["device"].batch(rows, view)) or store == "none"
            assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=torch.channels_last)
    assert stores["file"].where == "file" and stores["device"].bytes == 2 * 37 * cut.features(X[:1]).numel() * 4
    assert torch.equal(stores["device"].labels, few.labels) and len(stores["host"]) == 37


def test_cached_features_lead_to_the_networks_own_answers(networks, cut, few):
    kept = cache_features(cut, few, TRANSFORM)
    with torch.inference_mode():
        assert torch.equal(cut.tail()(kept.batch(torch.arange(37))), networks["resnet18"](TRANSFORM(few.images)))


def test_a_batch_may_be_written_to_without_harm(cut, few, tmp_path):
    for store in ("device", "file"):
        kept = cache_features(cut, few, TRANSFORM, store=store, folder=tmp_path)
        first = kept.batch(torch.arange(3)).clone()
        kept.batch(torch.arange(3)).zero_()
        assert torch.equal(kept.batch(torch.arange(3)), first)


def test_selected_rows_are_those_rows(cut, few):
    kept = cache_features(cut, few, TRANSFORM, views=2)
    part = kept.select(torch.tensor([30, 2, 11])).select(torch.tensor([2, 0]))
    assert torch.equal(part.batch(torch.tensor([0, 1]), 1), kept.batch(torch.tensor([11, 30]), 1))
    assert part.labels.tolist() == few.labels[[11, 30]].tolist() and part.views == 2


def test_bfloat16_takes_half_the_room(cut, few, tmp_path):
    full, half = (cache_features(cut, few, TRANSFORM, dtype=d) for d in (torch.float32, torch.bfloat16))
    file = cache_features(cut, few, TRANSFORM, dtype=torch.bfloat16, store="file", folder=tmp_path)
    a, b = full.batch(torch.arange(37)), half.batch(torch.arange(37))
    assert half.bytes * 2 == full.bytes and b.dtype == torch.float32 and not torch.equal(a, b)
    assert (a - b).abs().max() < 0.05 * a.abs().max() and torch.equal(file.batch(torch.arange(37)), b)


def test_a_file_is_used_again_and_leaves_nothing_else(cut, few, tmp_path):
    seen = []
    make = lambda: cache_features(cut, few, TRANSFORM, store="file", folder=tmp_path, on_batch=seen.append)
    first = make()
    written = sum(seen)
    kept = first.batch(torch.arange(37)).clone()
    (name,) = os.listdir(tmp_path)
    assert name.endswith(".features") and os.path.getsize(tmp_path / name) == first.bytes and written >= 37
    again = make()
    assert sum(seen) - written <= 1, "the prefix ran again"
    assert torch.equal(again.batch(torch.arange(37)), kept) and os.listdir(tmp_path) == [name]


def test_an_interrupted_file_is_not_taken_for_a_whole_one(cut, few, tmp_path):
    calls = iter(range(3))

    def stop(n):
        if next(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_features(cut, few, TRANSFORM, store="file", folder=tmp_path, batch_size=10, on_batch=stop)
    assert not list(tmp_path.glob("*.features"))
    kept = cache_features(cut, few, TRANSFORM, store="file", folder=tmp_path)
    assert torch.equal(kept.batch(torch.arange(37)), cache_features(cut, few, TRANSFORM).batch(torch.arange(37)))


class Silent:
    "A transform whose representation says nothing."

    def __init__(self, scale: float):
        self.scale = scale

    def __repr__(self) -> str:
        return "Silent()"

    def __call__(self, images):
        return Normalize()(images) * self.scale


def test_the_key_changes_with_everything_that_changes_the_features(networks, cut, few, tmp_path):
    prefix, shape = cut.prefix, (4, 4, 4)
    stride = split(create_model("resnet18", 10, width=0.0625, stem_stride=1), "layer3").prefix
    later = split(networks["resnet18"], "layer4").prefix
    weights, buffers, eps = (copy.deepcopy(prefix) for _ in range(3))
    next(weights.parameters()).data[0, 0, 0, 0] += 1e-3
    next(buffers.buffers())[0] += 1e-3
    next(m for m in eps.modules() if isinstance(m, nn.BatchNorm2d)).eps = 1e-2
    pixel = few.images.clone()
    pixel[5, 3, 3, 0] ^= 1
    same = ImageSet(pixel, few.labels, few.classes, few.name, few.index)
    f32 = torch.float32
    keys = [_key(*args) for args in (
        (prefix, few, TRANSFORM, f32, 1, shape), (weights, few, TRANSFORM, f32, 1, shape), (buffers, few, TRANSFORM, f32, 1, shape),
        (eps, few, TRANSFORM, f32, 1, shape), (stride, few, TRANSFORM, f32, 1, shape), (later, few, TRANSFORM, f32, 1, shape),
        (prefix, same, TRANSFORM, f32, 1, shape), (prefix, few.select(torch.arange(36)), TRANSFORM, f32, 1, shape),
        (prefix, few.select(torch.arange(36, -1, -1)), TRANSFORM, f32, 1, shape), (prefix, few, Normalize(), f32, 1, shape),
        (prefix, few, Silent(1), f32, 1, shape), (prefix, few, Silent(2), f32, 1, shape), (prefix, few, TRANSFORM, torch.bfloat16, 1, shape),
        (prefix, few, TRANSFORM, f32, 2, shape), (prefix, few, TRANSFORM, f32, 1, (4, 4, 8)))]
    assert len(set(keys)) == len(keys)
    twin = split(copy.deepcopy(networks["resnet18"]), "layer3").prefix
    assert _key(twin, few, Normalize((0.3, 0.3, 0.3), (0.3, 0.3, 0.3)), f32, 1, shape) == keys[0]


def test_files_that_were_replaced_are_read_again(cut, tmp_path, monkeypatch):
    from PIL import Image

    import archrepair.data as data

    monkeypatch.setattr(data, "_EAGER_BYTES", 0)
    (tmp_path / "a").mkdir()
    for i in range(10):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "a" / f"{i}.png")
    load = lambda: data.load_dataset(f"folder:{tmp_path}", "train")
    keys = {_key(cut.prefix, load(), TRANSFORM, torch.float32, 1, (1,)) for _ in range(2)}
    assert len(keys) == 1
    last = tmp_path / "a" / "9.png"
    for file in (tmp_path / "a").iterdir():
        os.utime(file, ns=(1, 1 if file != last else 2))
    assert len(keys | {_key(cut.prefix, load(), TRANSFORM, torch.float32, 1, (1,))}) == 2


def test_without_a_cut_images_are_the_features(few):
    cut = split(Toy("skip"), "block")
    kept = cache_features(cut, few, TRANSFORM, views=2)
    rows = torch.tensor([3, 1])
    assert kept.where == "recomputed" and torch.equal(kept.batch(rows, 1), TRANSFORM(few.images[rows].flip(2)))


def test_image_features(few):
    kept = image_features(few, TRANSFORM, views=3)
    rows = torch.tensor([3, 1])
    for view in range(4):
        assert torch.equal(kept.batch(rows, view), TRANSFORM(draw_view(few.images[rows], view % 3)))
