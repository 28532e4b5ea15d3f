"""A network that must come back as it was."""
import copy

import torch

SAME = ("strides", "modes", "requires", "grads", "hooks")


def state_of(model: torch.nn.Module) -> dict:
    "A copy of everything that must not change when a function only looks at a network."
    return {"state": copy.deepcopy(model.state_dict()), "strides": {k: v.stride() for k, v in model.state_dict().items()},
            "modes": [m.training for m in model.modules()],
            "requires": [p.requires_grad for p in model.parameters()], "grads": [p.grad is None for p in model.parameters()],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]}


def assert_same_state(before: dict, model: torch.nn.Module) -> None:
    after = state_of(model)
    assert before["state"].keys() == after["state"].keys()
    changed = [k for k, v in before["state"].items() if not torch.equal(v, after["state"][k])]
    assert not changed, f"changed: {changed}"
    assert [before[k] for k in SAME] == [after[k] for k in SAME]


def same_state(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    "Have two networks equal parameters and buffers, to the last bit?"
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())
