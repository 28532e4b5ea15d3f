"""What a training loop sees: views, features computed once or each time, and batches in a fixed order."""
import copy
import os

import pytest
import torch
from PIL import Image
from torch import nn

from archrepair.data import files
from archrepair.data.datasets import load_dataset
from archrepair.data.images import ImageSet, Normalize
from archrepair.core.layout import lay_out, layout_of
from archrepair.networks.blocks import split
from archrepair.networks.models import create_model
from archrepair.training.rows import Rows, _key, cache_features, draw_view, image_features, spread_views
from support.tables import table

TRANSFORM = Normalize((0.3, 0.3, 0.3), (0.3, 0.3, 0.3))


@pytest.fixture(scope="module")
def few(digits_test):
    return digits_test.select(torch.arange(20, 57))


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


def test_image_features(few):
    features = image_features(few, TRANSFORM, views=3)
    rows = torch.tensor([3, 1])
    for view in range(4):
        assert torch.equal(features.batch(rows, view), TRANSFORM(draw_view(few.images[rows], view % 3)))


# --- the cache


@pytest.fixture(scope="module")
def resnet():
    return create_model("resnet18", 10, width=0.0625, stem_stride=2)


@pytest.fixture(scope="module")
def cut(resnet):
    return split(resnet, "layer3")


def test_every_store_gives_the_same_rows(cut, few, tmp_path):
    stores = {store: cache_features(cut, few, TRANSFORM, views=2, batch_size=10, store=store, folder=tmp_path)
              for store in ("none", "device", "host", "file", "auto")}
    rows = torch.tensor([36, 0, 7, 7])
    for view in (0, 1, 2, 5):
        expected = cut.features(TRANSFORM(draw_view(few.images, view % 2)))[rows]
        for store, features in stores.items():
            batch = features.batch(rows, view)
            assert torch.allclose(batch, expected, atol=1e-6), store
            assert torch.equal(batch, stores["device"].batch(rows, view)) or store == "none"
            assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=layout_of(cut.model))
    assert stores["file"].where == "file" and stores["device"].bytes == 2 * 37 * cut.features(torch.zeros(1, 3, 32, 32)).numel() * 4
    assert torch.equal(stores["device"].labels, few.labels) and len(stores["host"]) == 37


def test_cached_features_lead_to_the_resnet_own_answers(resnet, cut, few):
    features = cache_features(cut, few, TRANSFORM)
    with torch.inference_mode():
        assert torch.equal(cut.tail()(features.batch(torch.arange(37))), resnet(lay_out(TRANSFORM(few.images), layout_of(resnet))))


def test_a_batch_may_be_written_to_without_harm(cut, few, tmp_path):
    for store in ("device", "file"):
        features = cache_features(cut, few, TRANSFORM, store=store, folder=tmp_path)
        first = features.batch(torch.arange(3)).clone()
        features.batch(torch.arange(3)).zero_()
        assert torch.equal(features.batch(torch.arange(3)), first)


def test_selected_rows_are_those_rows(cut, few):
    features = cache_features(cut, few, TRANSFORM, views=2)
    part = features.select(torch.tensor([30, 2, 11])).select(torch.tensor([2, 0]))
    assert torch.equal(part.batch(torch.tensor([0, 1]), 1), features.batch(torch.tensor([11, 30]), 1))
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
    features = first.batch(torch.arange(37)).clone()
    (name,) = os.listdir(tmp_path)
    assert name.endswith(".features") and os.path.getsize(tmp_path / name) == first.bytes and written >= 37
    again = make()
    assert sum(seen) - written <= 1, "the prefix ran again"
    assert torch.equal(again.batch(torch.arange(37)), features) and os.listdir(tmp_path) == [name]


def test_an_interrupted_file_is_not_taken_for_a_whole_one(cut, few, tmp_path):
    calls = iter(range(3))

    def stop(n):
        if next(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_features(cut, few, TRANSFORM, store="file", folder=tmp_path, batch_size=10, on_batch=stop)
    assert not list(tmp_path.glob("*.features"))
    features = cache_features(cut, few, TRANSFORM, store="file", folder=tmp_path)
    assert torch.equal(features.batch(torch.arange(37)), cache_features(cut, few, TRANSFORM).batch(torch.arange(37)))


class Silent:
    "A transform whose representation says nothing."

    def __init__(self, scale: float):
        self.scale = scale

    def __repr__(self) -> str:
        return "Silent()"

    def __call__(self, images):
        return Normalize()(images) * self.scale


def test_the_key_changes_with_everything_that_changes_the_features(resnet, cut, few, tmp_path):
    prefix, shape = cut.prefix, (4, 4, 4)
    stride = split(create_model("resnet18", 10, width=0.0625, stem_stride=1), "layer3").prefix
    later = split(resnet, "layer4").prefix
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
        (prefix, few, Silent(1), f32, 1, shape), (prefix, few, Silent(2), f32, 1, shape),
        (prefix, few, TRANSFORM, torch.bfloat16, 1, shape), (prefix, few, TRANSFORM, f32, 2, shape),
        (prefix, few, TRANSFORM, f32, 1, (4, 4, 8)))]
    assert len(set(keys)) == len(keys)
    twin = split(copy.deepcopy(resnet), "layer3").prefix
    assert _key(twin, few, Normalize((0.3, 0.3, 0.3), (0.3, 0.3, 0.3)), f32, 1, shape) == keys[0]


def test_files_that_were_replaced_are_read_again(cut, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_EAGER_BYTES", 0)
    (tmp_path / "a").mkdir()
    for i in range(10):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "a" / f"{i}.png")
    load = lambda: load_dataset(f"folder:{tmp_path}", "train")
    keys = {_key(cut.prefix, load(), TRANSFORM, torch.float32, 1, (1,)) for _ in range(2)}
    assert len(keys) == 1
    last = tmp_path / "a" / "9.png"
    for file in (tmp_path / "a").iterdir():
        os.utime(file, ns=(1, 1 if file != last else 2))
    assert len(keys | {_key(cut.prefix, load(), TRANSFORM, torch.float32, 1, (1,))}) == 2


class Skip(nn.Module):
    "A network with a shortcut past its block, which therefore cannot be cut there."

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head((self.block(x) + x).mean((2, 3)))


def test_without_a_cut_images_are_the_features(few):
    cut = split(Skip(), "block")
    assert cut.prefix is None
    features = cache_features(cut, few, TRANSFORM, views=2)
    rows = torch.tensor([3, 1])
    assert features.where == "recomputed" and torch.equal(features.batch(rows, 1), TRANSFORM(few.images[rows].flip(2)))


# --- batches


def test_natural_batches_visit_every_row_once():
    rows = Rows([table(n=64), table(1, n=32)], failures=32)
    batches = rows.order(3, 16, None, 0)
    assert sorted(torch.cat(batches).tolist()) == list(range(96)) and {len(b) for b in batches} == {16}


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.1])
@pytest.mark.parametrize("failures", [3, 20, 90])
def test_balanced_batches_hold_their_share_of_failures(ratio, failures):
    rows = Rows([table(n=300), table(1, n=failures)], failures=failures)
    batches = rows.order(1, 40, ratio, 0)
    assert all(int((b >= 300).sum()) == round(40 * ratio) for b in batches)
    train = torch.cat([b[b < 300] for b in batches]).tolist()
    assert len(set(train)) == len(train) > 300 - 40
    drawn = torch.cat([b[b >= 300] for b in batches]).bincount(minlength=300 + failures)[300:]
    assert drawn.max() - drawn.min() <= 1, "failures are drawn equally often"


def test_a_handful_of_rows_at_the_end_is_dropped_but_never_everything():
    rows = Rows([table(n=70)])
    assert [len(b) for b in rows.order(0, 32, None, 0)] == [32, 32] and [len(b) for b in rows.order(0, 35, None, 0)] == [35, 35]
    assert [len(b) for b in rows.order(0, 46, None, 0)] == [46, 24] and [len(b) for b in rows.order(0, 500, None, 0)] == [70]


def test_the_order_depends_on_seed_and_epoch_alone():
    rows = Rows([table(n=64), table(1, n=32)], failures=32)
    for ratio in (None, 0.25):
        order = lambda epoch, seed, ratio=ratio: torch.cat(rows.order(epoch, 16, ratio, seed)).tolist()
        assert order(1, 0) == order(1, 0) and order(1, 0) != order(2, 0) and order(1, 0) != order(1, 1)
        assert [len(b) for b in rows.order(1, 16, ratio, 0)] == [len(b) for b in rows.order(9, 16, ratio, 5)]


def test_inputs_belong_to_their_rows():
    parts = [table(0, 10, views=2), table(1, 5), table(2, 7)]
    rows = Rows(parts)
    asked = torch.tensor([21, 3, 12, 0, 10, 14, 9, 15])
    for view in (0, 1):
        x, order = rows.inputs(asked, view)
        assert sorted(order.tolist()) == sorted(asked.tolist())
        for row, values in zip(order.tolist(), x):
            part, local = (0, row) if row < 10 else (1, row - 10) if row < 15 else (2, row - 15)
            assert torch.equal(values, parts[part].batch(torch.tensor([local]), view)[0]) and rows.labels[row] == parts[part].labels[local]
