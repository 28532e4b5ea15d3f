"""Networks from elsewhere: their names, their published weights, and code that runs only where it is trusted."""
import hashlib
import http.server
import threading
from functools import partial

import pytest
import torch
from torch import nn

import archrepair.networks.sources as sources
from archrepair.core.errors import ArchrepairError
from archrepair.data.images import Normalize
from archrepair.networks.external import brings_weights, build
from archrepair.networks.models import create_model, outline
from archrepair.networks.sources import CHECKPOINTS, hub_network, own_normalization, published_file

# --- names with settings


@pytest.mark.parametrize("name", ["cifar-resnet20:weights=published", "torchvision:squeezenet1_1:normalize=none"])
def test_a_name_with_settings_builds_and_sketches_the_network(name):
    plain = create_model(name.rpartition(":")[0], 10)
    assert create_model(name, 10).state_dict().keys() == plain.state_dict().keys() == outline(name).state_dict().keys()


# --- published weights


@pytest.fixture
def published(tmp_path, home, monkeypatch):
    "A repository in a folder, with weights of cifar-resnet20, whose digest is known."
    folder = tmp_path / "repository"
    folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        network = create_model("cifar-resnet20", 10, seed=7)
    torch.save({"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, folder / "net.th")
    digest = hashlib.sha256((folder / "net.th").read_bytes()).hexdigest()
    monkeypatch.setattr(sources, "CHECKPOINTS", {"cifar-resnet20": ("net.th", digest)})
    monkeypatch.setattr(sources, "REPOSITORY", folder.as_uri())
    return folder


def test_published_weights_are_fetched_once_and_checked(published, home):
    path = published_file("cifar-resnet20")
    assert path == home / "data" / "weights" / "net.th" and path.read_bytes() == (published / "net.th").read_bytes()
    (published / "net.th").unlink()
    assert published_file("cifar-resnet20") == path and [file.name for file in path.parent.iterdir()] == ["net.th"]
    network = create_model("cifar-resnet20", 10, pretrained=True)
    assert torch.equal(network.linear.weight, create_model("cifar-resnet20", 10, seed=7).linear.weight)


def test_published_weights_come_over_http(published, home, monkeypatch):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(published))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *a: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(sources, "REPOSITORY", f"http://127.0.0.1:{server.server_port}")
        assert published_file("cifar-resnet20").read_bytes() == (published / "net.th").read_bytes()
        monkeypatch.setattr(sources, "REPOSITORY", f"http://127.0.0.1:{server.server_port}/elsewhere")
        published_file("cifar-resnet20").unlink()
        with pytest.raises(ArchrepairError, match=r"cannot fetch http://.*/elsewhere/net.th \(HTTP Error 404.*put it at .*net.th"):
            published_file("cifar-resnet20")
        server.shutdown()


@pytest.mark.parametrize("where", ["repository", "cache"])
def test_a_file_that_is_not_the_published_one_is_never_read(published, home, where, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("was read"))
    cached = home / "data" / "weights" / "net.th"
    if where == "cache":
        cached.parent.mkdir(parents=True)
    (published / "net.th" if where == "repository" else cached).write_bytes(b"something else")
    remedy = "try again, or give a file: --weights FILE" if where == "repository" else "remove it, so that it is fetched again"
    with pytest.raises(ArchrepairError, match=rf"net.th is not the published file: its SHA-256 is \w+…, expected \w+…; {remedy}"):
        create_model("cifar-resnet20", 10, pretrained=True)
    assert cached.exists() == (where == "cache")


def test_without_a_network_connection_one_line_says_where_to_put_the_file(home, monkeypatch):
    monkeypatch.setattr(sources, "REPOSITORY", "http://127.0.0.1:9")
    with pytest.raises(ArchrepairError, match="cannot fetch .*: download it yourself and put it at ") as caught:
        published_file("cifar-resnet20")
    assert "\n" not in str(caught.value) and not list(home.rglob("*.th*"))


@pytest.mark.parametrize("name", ["cifar-resnet110", "resnet18", "mine:factory"])
def test_networks_without_published_weights_are_one_line(home, name):
    with pytest.raises(ArchrepairError, match="no published weights of .* are known; expected cifar-|which has no published weights"):
        create_model(name, 10, pretrained=True)


def test_every_digest_begins_as_its_file_name_says():
    assert all(digest[:8] in file and len(digest) == 64 for file, digest in CHECKPOINTS.values())


# --- torch.hub

HUB = '''
from pathlib import Path

import torch
from torch import nn

Path(__file__).with_name("ran").touch()
dependencies = ["torch"]


def named(num_classes=10, pretrained=False):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
    return network.requires_grad_(False).apply(lambda m: [p.fill_(0.5) for p in m.parameters()]) if pretrained else network


def other(n_classes):
    return named(n_classes)


def fixed():
    return named(7)


def loaded():
    torch.manual_seed(3)
    return named(10)


def broken(num_classes):
    raise ValueError("a bug\\nin two lines")


def text():
    return "no network"
'''


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "hubconf.py").write_text(HUB)
    return tmp_path / "repo"


def test_code_runs_only_where_it_is_trusted(hub):
    for make in (lambda: create_model(f"hub:{hub}:named", 10), lambda: outline(f"hub:{hub}:named")):
        with pytest.raises(ArchrepairError, match=r"runs the code of .*repo on this machine; if you trust it, say so: --trust") as caught:
            make()
        assert "\n" not in str(caught.value)
    assert not (hub / "ran").exists()
    assert create_model(f"hub:{hub}:named", 10, trust=True)[-1].out_features == 10 and (hub / "ran").exists()
    assert create_model(f"hub:{hub}:named:trust=yes", 10)[-1].out_features == 10


@pytest.mark.parametrize("entry", ["named", "other", "fixed"])
def test_entries_take_the_number_of_classes_by_either_name_or_not_at_all(hub, entry):
    network = create_model(f"hub:{hub}:{entry}", 7, trust=True)
    assert network[-1].out_features == 7
    assert torch.equal(network[0].weight, create_model(f"hub:{hub}:{entry}", 7, trust=True)[0].weight)


def test_published_weights_of_an_entry_and_an_entry_that_loads_its_own(hub):
    assert create_model(f"hub:{hub}:named", 10, trust=True, pretrained=True)[0].weight.eq(0.5).all()
    assert brings_weights(f"hub:{hub}:loaded", 10, trust=True) and not brings_weights(f"hub:{hub}:named", 10, trust=True)


@pytest.mark.parametrize(("entry", "pretrained", "message"), [
    ("nmed", False, "unknown entry of .*: did you mean 'named'"), ("broken", False, r"ValueError: a bug\); expected an entry that returns"),
    ("text", False, "returned str; expected a torch.nn.Module"), ("fixed", True, "publishes no weights: its entry has no argument"),
    ("not an entry", False, "names no network of torch.hub; expected hub:OWNER/REPO:ENTRY or hub:FOLDER:ENTRY"),
])
def test_what_goes_wrong_in_a_repository_is_one_line(hub, entry, pretrained, message):
    with pytest.raises(ArchrepairError, match=message) as caught:
        build(f"hub:{hub}:{entry}", 10, 32, trust=True, pretrained=pretrained)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["hub:repo:entry", "hub:owner/repo", "hub::entry", "hub:owner/repo/more:entry"])
def test_other_names_are_one_line(spec):
    with pytest.raises(ArchrepairError, match="names no network of torch.hub"):
        hub_network(spec, 10, trust=True)


def test_a_folder_without_hubconf_is_one_line(tmp_path):
    with pytest.raises(ArchrepairError, match="there is no hubconf.py in "):
        create_model(f"hub:{tmp_path}:net", 10, trust=True)


def test_a_repository_that_cannot_be_reached_is_one_line(monkeypatch):
    def load(repository, entry, **options):
        assert (repository, entry, options["trust_repo"]) == ("owner/repo:v1", "net", True)
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(torch.hub, "load", load)
    with pytest.raises(ArchrepairError, match="this needs a network connection once; or download the repository"):
        create_model("hub:owner/repo:v1:net", 10, trust=True)


# --- timm's


def test_networks_of_the_hugging_face_hub_come_with_their_weights(monkeypatch):
    import timm

    calls = []

    def create(name, **options):
        calls.append((name, options))
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, options.get("num_classes", 10)))

    monkeypatch.setattr(timm, "create_model", create)
    name = "timm:hf_hub:owner/net"
    create_model(name, 10)
    create_model(name, 7, pretrained=False)
    create_model("timm:resnet18", 10, pretrained=True)
    hub = [("hf_hub:owner/net", {"pretrained": True}), ("hf_hub:owner/net", {"num_classes": 7})]
    assert calls == [*hub, ("resnet18", {"pretrained": True})]
    assert brings_weights(name, 10) and not brings_weights("timm:resnet18", 10)
    with pytest.raises(ArchrepairError, match=r"gives outputs of shape \(10,\) for an image; expected 12 logits"):
        create_model(name, 12)

    def unreachable(name, **options):
        raise OSError("couldn't connect")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ArchrepairError, match=r"cannot fetch timm:hf_hub:owner/net with its weights \(couldn't connect\): this needs"):
        create_model(name, 10)


# --- the normalization that a network brings


class Configured(nn.Module):
    def __init__(self, **names):
        super().__init__()
        for name, value in names.items():
            setattr(self, name, value)


@pytest.mark.parametrize(("model", "name", "expected"), [
    (Configured(), "resnet18", None), (Configured(), "torchvision:resnet18", "imagenet"),
    (Configured(), "torchvision:vit_b_16", "imagenet"),
    (Configured(pretrained_cfg={"mean": (0.5,), "std": (0.25,)}), "", "0.5/0.25"),
    (Configured(default_cfg={"mean": [0.5] * 3, "std": [0.5] * 3}), "mine:net", "0.5/0.5"),
    (Configured(pretrained_cfg={"url": ""}), "", None),
])
def test_what_a_configuration_says(model, name, expected):
    own = own_normalization(model, name)
    assert (None if own is None else str(own)) == expected


def test_timms_networks_say_it_themselves_and_published_files_are_known_by_what_they_hold(published, tmp_path):
    assert own_normalization(create_model("timm:vit_tiny_patch16_224", 10, image_size=224)) == Normalize((0.5,), (0.5,))
    copy = tmp_path / "mine.pt"
    copy.write_bytes((published / "net.th").read_bytes())
    assert str(own_normalization(nn.Identity(), "cifar-resnet20", f"{copy}#state_dict")) == "imagenet"
    copy.write_bytes(b"mine")
    assert own_normalization(nn.Identity(), "cifar-resnet20", copy) is None
