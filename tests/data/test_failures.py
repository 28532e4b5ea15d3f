"Failures as people bring them: a list from a registry, a folder of folders; what is taken, and what is refused in one line."
import numpy as np
import pytest
import torch
from PIL import Image

from archrepair import RepairData
from archrepair.core.errors import ArchrepairError, NoFailures
from archrepair.data.datasets import load_dataset
from archrepair.data.failures import load_failures
from archrepair.data.images import ImageSet

CLASSES = ("cat", "dog", "7")


@pytest.fixture
def like() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    return ImageSet(pixels, [0, 1, 2, 0, 1, 2], CLASSES, "like")


@pytest.fixture
def photos(tmp_path, like):
    for i in range(4):
        Image.fromarray(like.images[i].numpy()).save(tmp_path / f"{i}.png")
    return tmp_path


def listed(folder, *rows: str, head: str = "path,label,predicted", encoding: str = "utf-8"):
    path = folder / "failures.csv"
    path.write_bytes("\r\n".join([head, *rows, ""]).encode(encoding))
    return path


# --- lists


def test_only_rows_that_are_wrong_are_failures(photos, like):
    found = load_failures(listed(photos, "0.png,cat,dog", "1.png,dog,dog", "2.png,7,"), like)
    assert torch.equal(found.images, like.images[[0, 2]]) and found.labels.tolist() == [0, 2]
    assert found.classes == CLASSES and found.size == 8


def test_a_name_is_a_name_before_it_is_a_number(photos, like):
    assert load_failures(listed(photos, "0.png,1", "1.png,7", "2.png,2", head="path,label"), like).labels.tolist() == [1, 2, 2]


def test_spreadsheets_and_their_habits(photos, like):
    rows = '" 1.png ", dog ,cat,0.9', "", ",,,", '"0.png",cat,,'
    path = listed(photos, *rows, head="Path,LABEL,predicted,confidence", encoding="utf-8-sig")
    assert load_failures(path, like).labels.tolist() == [1, 0]


CELLS = {  # how a path may stand in a list of 0.png, as cat, in the folder FOLDER
    "blank after the comma": "0.png, cat", "blanks around": "  0.png  ,  cat  ", "quotes": '"0.png","cat"',
    "quotes after a blank": '0.png, "cat"', "comma in the name": '"a, b/0.png",cat', "comma after a blank": ' "a, b/0.png", cat',
    "here": "./0.png,cat", "absolute": "FOLDER/0.png,cat", "no such user": "~nobody-of-this-name/0.png,cat",
    "home": "~/0.png,cat", "home, backslash": "~\\sub\\0.png,cat", "backslash": "sub\\0.png,cat", "up": "sub/../0.png,cat",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("form", CELLS)
def test_a_path_in_every_form(photos, like, monkeypatch, form, encoding):
    for folder in ("a, b", "sub", "~nobody-of-this-name"):
        (photos / folder).mkdir()
        (photos / folder / "0.png").write_bytes((photos / "0.png").read_bytes())
    monkeypatch.setenv("HOME", str(photos))
    found = load_failures(listed(photos, CELLS[form].replace("FOLDER", str(photos)), head="path, label", encoding=encoding), like)
    assert torch.equal(found.images, like.images[[0]]) and found.labels.tolist() == [0]


def test_missing_files_are_counted(photos, like):
    rows = ["0.png,cat", "8.png,dog", "1.png,dog", "9.png,dog"]
    with pytest.raises(ArchrepairError, match=r"row 3, column path: there is no .*8.png \(2 of 4 files are missing\); expected") as caught:
        load_failures(listed(photos, *rows, head="path,label"), like)
    assert "\n" not in str(caught.value)


def test_paths_are_absolute_or_from_the_list(photos, like, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    (photos / "lists").mkdir()
    path = listed(photos / "lists", f"{photos / '0.png'},cat", "../1.png,dog", head="path,label")
    assert len(load_failures(str(path), like)) == 2


def test_repeated_rows_count_once(photos, like):
    assert len(load_failures(listed(photos, "0.png,cat,dog", "0.png,cat,7"), like)) == 1


def test_columns_may_stand_in_any_order(photos, like):
    assert load_failures(listed(photos, "dog,x,1.png", head="label,note,path"), like).labels.tolist() == [1]


@pytest.mark.parametrize("rows, head, says", [
    (["9.png,cat"], "path,label", r"row 2, column path: there is no .*9\.png"),
    (["0.png,cat", "1.png,dogg"], "path,label", r"row 3, column label: unknown class 'dogg': did you mean 'dog'\?"),
    (["0.png,3"], "path,label", "row 2, column label: unknown class '3'"),
    (["0.png,-1"], "path,label", "row 2, column label: unknown class '-1'"),
    (["0.png,²"], "path,label", "row 2, column label: unknown class '²'"),
    (["0.png,"], "path,label", "row 2, column label: unknown class ''"),
    ([",cat"], "path,label", "row 2, column path: nothing"),
    (["https://x/0.png,cat"], "path,label", "row 2, column path: https://x/0.png; expected the path"),
    ([".,cat"], "path,label", "row 2, column path: there is no"),
    (["0.png,cat,cow"], "path,label,predicted", "row 2, column predicted: unknown class 'cow'"),
    (["0.png,cat,dog", "0.png,dog,cat"], "path,label,predicted", r"row 3, column label: 0\.png is dog here and cat in row 2"),
    (["a,b.png,cat"], "path,label", "row 2 has 3 cells; expected 2.*quotes"),
    (["0.png"], "path,label", "row 2 has 1 cells; expected 2"),
    (["0.png,cat"], "file,label", r"has no column path \(file, label\)"),
    (["0.png,cat"], "path,truth", r"has no column label \(path, truth\)"),
    (['"0.png,cat'], "path,label", "cannot read .*failures.csv"),
])
def test_what_cannot_be_right_is_named_by_row_and_column(photos, like, rows, head, says):
    with pytest.raises(ArchrepairError, match=says) as caught:
        load_failures(listed(photos, *rows, head=head), like)
    assert "\n" not in str(caught.value) and "failures.csv" in str(caught.value)


def test_no_failures_in_a_list(photos, like):
    for rows in ([], ["0.png,cat,cat"]):
        with pytest.raises(NoFailures, match="failures.csv holds no failures"):
            load_failures(listed(photos, *rows), like)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00p", b"path,label\n0.png,c\xe4t\n", b"\x89PNG\r\n\x1a\n\x00"])
def test_files_that_are_no_lists(photos, like, content):
    (photos / "failures.csv").write_bytes(content)
    with pytest.raises(ArchrepairError, match="failures.csv") as caught:
        load_failures(photos / "failures.csv", like)
    assert "\n" not in str(caught.value)


def test_an_image_that_is_none_is_named(photos, like):
    (photos / "1.png").write_text("no image")
    with pytest.raises(ArchrepairError, match=r"cannot decode .*1\.png"):
        load_failures(listed(photos, "0.png,cat", "1.png,dog", head="path,label"), like)


def test_a_bomb_is_not_decoded(photos, like, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ArchrepairError, match=r"cannot decode .*0\.png"):
        load_failures(listed(photos, "0.png,cat", head="path,label"), like)


# --- folders


def test_a_folder_may_lack_classes_without_moving_the_others(tmp_path, like):
    for part, i in (("dog", 1), ("7", 2)):
        (tmp_path / part / "deeper").mkdir(parents=True)
        Image.fromarray(like.images[i].numpy()).save(tmp_path / part / "deeper" / "x.png")
    (tmp_path / ".cache").mkdir()
    found = load_failures(tmp_path, like)
    assert sorted(found.labels.tolist()) == [1, 2] and found.classes == CLASSES


def test_images_of_another_size_are_brought_to_that_of_the_training_images(tmp_path, like):
    (tmp_path / "dog").mkdir()
    Image.new("L", (30, 20), 200).save(tmp_path / "dog" / "x.jpg")
    found = load_failures(tmp_path, like)
    assert tuple(found.images.shape) == (1, 8, 8, 3) and abs(int(found.images.float().mean()) - 200) < 3


def test_folders_that_cannot_be_right(tmp_path, like):
    with pytest.raises(NoFailures, match="holds no failures"):
        load_failures(tmp_path, like)
    (tmp_path / "dogs").mkdir()
    with pytest.raises(ArchrepairError, match="dogs: unknown class 'dogs': did you mean 'dog'"):
        load_failures(tmp_path, like)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(ArchrepairError, match="x.png has no class; expected .*<class>/<image>"):
        load_failures(tmp_path, like)
    with pytest.raises(ArchrepairError, match="nowhere does not exist; give a CSV file"):
        load_failures(tmp_path / "nowhere", like)


# --- onward


def test_failures_and_training_images_fit_together(tmp_path):
    train = load_dataset("digits")
    for i in range(12):
        part = tmp_path / "bad" / train.classes[train.labels[i]]
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray(train.images[i].numpy()).save(part / f"{i}.png")
    data = RepairData.of(load_failures(tmp_path / "bad", train), train)
    assert len(data.failures) + len(data.val_failures) == 12 and data.failures.classes == train.classes


# --- as other machines write it


@pytest.mark.parametrize("cell", ["cat\\0.png", "cat/0.png", " cat/0.png ", "cat\\sub\\1.png", '"cat, old/2.png"', "~/cat/0.png"])
def test_paths_of_every_spelling(tmp_path, like, monkeypatch, cell):
    monkeypatch.setenv("HOME", str(tmp_path))
    for i, name in enumerate(("cat/0.png", "cat/sub/1.png", "cat, old/2.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(like.images[i].numpy()).save(tmp_path / name)
    expected = int(cell.replace("\\", "/").rpartition(".")[0][-1])
    failures = load_failures(listed(tmp_path, f"{cell},cat,dog"), like)
    assert torch.equal(failures.images, like.images[[expected]]) and failures.labels.tolist() == [0]


def test_hidden_files_are_no_failures(tmp_path, like):
    for name in ("cat/0.png", "cat/._0.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "__MACOSX/cat/0.png", ".git/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(like.images[0].numpy()).save(tmp_path / name)
    failures = load_failures(tmp_path, like)
    assert torch.equal(failures.images, like.images[:1]) and failures.labels.tolist() == [0]


def test_deep_failures_are_scaled_as_the_training_images_are(tmp_path, like):
    (tmp_path / "dog").mkdir()
    Image.fromarray(np.full((8, 8), 9000, np.uint16)).save(tmp_path / "dog" / "0.png")
    assert load_failures(tmp_path, like).images.unique().tolist() == [35]
    Image.fromarray(np.full((8, 8), -500, np.float32)).save(tmp_path / "dog" / "1.tif")
    with pytest.raises(ArchrepairError, match="what is white in like is not known; expected a range of 0 to 1, 255 or 65535") as caught:
        load_failures(tmp_path, like)
    assert "\n" not in str(caught.value)
