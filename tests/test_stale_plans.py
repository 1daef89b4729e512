"""What changes under an optimizer between steps is followed, or an error: never a stale address.

Each case changes something in a warpstep optimizer and in a torch.optim one, before the first step
and between later ones, and both step on; results must agree within the tolerance that is derived in
support/tolerance.py.
"""

import copy
import gc

import pytest
import torch

import warpstep
from support.cases import on_each_device
from support.parameters import new_params, params_of, random, set_grads
from support.tolerance import bound

LR = 0.01
SHAPES = [(5, 3), (), (17,), (4, 4), (4, 4), (0, 2)]
STEPS = 4


def tensors_of_state(optimizer):
    return [
        (state, key)
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    ]


# ---- changes between steps: each takes the optimizer and the number of the step to come


def replace_data(opt, step):
    for p in params_of(opt):
        p.data = p.data.clone()


def replace_data_with_other_values(opt, step):
    for i, p in enumerate(params_of(opt)):
        p.data = random(p.shape, 50 + 10 * step + i, p.device)


def transpose_in_place(opt, step):
    p = params_of(opt)[3]
    address = p.data_ptr()
    p.data = p.data.t()  # the same address and shape, another order
    assert p.data_ptr() == address


def give_gaps(opt, step):
    for p in params_of(opt)[2:4]:
        wide = torch.zeros(*p.shape, 2, device=p.device)
        wide[..., 1] = p.data
        p.data = wide[..., 1]


def swap_tensors(opt, step):
    p = params_of(opt)[0]
    p.grad = None
    torch.utils.swap_tensors(p, random(p.shape, 50 + step, p.device).requires_grad_())


def exchange_data(opt, step):
    a, b = params_of(opt)[0], random((5, 3), 50 + step, params_of(opt)[0].device)
    a.data, b.data = b.data, a.data
    del b
    gc.collect()


def move_storage(opt, step):
    p = params_of(opt)[2]
    values, storage = p.detach().clone(), p.untyped_storage()
    storage.resize_(0)
    keep = torch.empty(17, device=p.device)  # takes the place that was freed
    storage.resize_(17 * 4)
    p.data.copy_(values)
    opt.kept = keep


def clone_state_tensors(opt, step):
    """The optimizer_to idiom: moves every tensor under its name."""
    for state, key in tensors_of_state(opt):
        state[key].data = state[key].data.clone()


def replace_state_tensors(opt, step):
    for state, key in tensors_of_state(opt):
        state[key] = state[key].clone()


def replace_moment(opt, step):
    for state in opt.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"] * 2


def replace_moment_data(opt, step):
    for state in opt.state.values():
        state["exp_avg"].data = state["exp_avg"].data * 0.5


def write_moments_in_place(opt, step):
    for state in opt.state.values():
        state["exp_avg"].mul_(0.5)
        state["exp_avg_sq"].add_(1.0)


def exchange_names_of_moments(opt, step):
    for param, state in opt.state.items():
        names = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}
        exchanged = {names.get(name, name): tensor for name, tensor in state.items()}
        exchanged["exp_avg"].abs_()  # whichever of them is the second moment at the next step
        exchanged["exp_avg_sq"].abs_()
        opt.state[param] = exchanged


def replace_step(opt, step):
    for state in opt.state.values():
        state["step"] = state["step"] + 10


def replace_step_data(opt, step):
    for state in opt.state.values():
        state["step"].data = state["step"].data + 10


def write_step_in_place(opt, step):
    for state in opt.state.values():
        state["step"].fill_(3)


def exchange_moments_of_two(opt, step):
    first, last = (opt.state[params_of(opt)[i]] for i in (0, -1))
    if first and last and "exp_avg" in first:
        state = opt.state[params_of(opt)[3]]
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"].abs()


def replace_one_state(opt, step):
    p = params_of(opt)[1]
    if p in opt.state:
        opt.state[p] = {key: value.clone() for key, value in opt.state[p].items()}


def delete_one_state(opt, step):
    opt.state.pop(params_of(opt)[1], None)


def empty_one_state(opt, step):
    if params_of(opt)[1] in opt.state:
        opt.state[params_of(opt)[1]].clear()


def clear_state(opt, step):
    opt.state.clear()


def replace_whole_state(opt, step):
    state = copy.copy(opt.state)
    for p in state:
        state[p] = dict(state[p])
    opt.state = state


def reorder_state(opt, step):
    for p in reversed(list(opt.state)):
        opt.state[p] = opt.state.pop(p)


def move_one_state_to_another_parameter(opt, step):
    first, second = params_of(opt)[0], params_of(opt)[3]
    if first in opt.state:
        opt.state[second] = {
            key: value.clone() if key == "step" else torch.ones_like(second)
            for key, value in opt.state[first].items()
        }


def exchange_states_of_two(opt, step):
    """Each has the other's, and the states are in the order that they were in."""
    third, fourth = params_of(opt)[3:5]
    others = {third: fourth, fourth: third}
    states = [(others.get(param, param), state) for param, state in opt.state.items()]
    opt.state.clear()
    opt.state.update(states)


def load_own_state(opt, step):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def rewrite_groups(opt, step):
    params = params_of(opt)
    opt.param_groups[0]["params"] = params[:2]
    rest = {**opt.param_groups[0], "params": params[2:], "lr": LR / (step + 2)}
    opt.param_groups[1:] = [rest]


def replace_list(opt, step):
    opt.param_groups[0]["params"] = list(opt.param_groups[0]["params"])


def replace_list_by_tuple(opt, step):
    opt.param_groups[0]["params"] = tuple(opt.param_groups[0]["params"])


def reverse_list_in_place(opt, step):
    opt.param_groups[0]["params"].reverse()


def drop_a_parameter(opt, step):
    if step == 2:
        del opt.param_groups[0]["params"][1]


def append_a_parameter(opt, step):
    device = params_of(opt)[0].device
    opt.param_groups[0]["params"].append(random((3, 2), 80 + step, device).requires_grad_())


def append_a_group(opt, step):
    device = params_of(opt)[0].device
    new = random((3, 2), 80 + step, device).requires_grad_()
    opt.param_groups.append({**opt.param_groups[0], "params": [new], "weight_decay": 0.5})


def replace_a_parameter(opt, step):
    device = params_of(opt)[0].device
    opt.param_groups[0]["params"][3] = random((4, 4), 80 + step, device).requires_grad_()


def replace_groups_list(opt, step):
    opt.param_groups = [dict(group) for group in opt.param_groups]


def reverse_groups(opt, step):
    if len(opt.param_groups) == 1:
        rewrite_groups(opt, step)
    opt.param_groups.reverse()


def change_options(opt, step):
    group = opt.param_groups[0]
    group["lr"] = LR / (step + 1)
    group["betas"] = (0.8 - step / 10, 0.9 - step / 100)
    group["eps"] = 10.0**-step
    group["weight_decay"] = step / 10
    group["maximize"] = bool(step % 2)


def change_betas_to_list(opt, step):
    opt.param_groups[0]["betas"] = [0.8, 0.9]


def change_decay_kind(opt, step):
    opt.param_groups[0]["decoupled_weight_decay"] = bool(step % 2)


def change_lr_to_tensor(opt, step):
    opt.param_groups[0]["lr"] = torch.tensor(LR * step) if step % 2 else LR * step


def change_lr_tensor_in_place(opt, step):
    if step == 0:
        opt.param_groups[0]["lr"] = torch.tensor(LR)
    opt.param_groups[0]["lr"].mul_(0.5)


def turn_amsgrad_off(opt, step):
    if step == 0:
        opt.param_groups[0]["amsgrad"] = True
    if step == 2:
        opt.param_groups[0]["amsgrad"] = False


def replace_gradients(opt, step):
    """Accumulated into the same tensor, of which the memory is another."""
    for p in params_of(opt):
        if p.grad is not None:
            p.grad.data = torch.full_like(p.grad, 7.0)


CHANGES = [
    replace_data,
    replace_data_with_other_values,
    transpose_in_place,
    give_gaps,
    swap_tensors,
    exchange_data,
    move_storage,
    clone_state_tensors,
    replace_state_tensors,
    replace_moment,
    replace_moment_data,
    write_moments_in_place,
    exchange_names_of_moments,
    replace_step,
    replace_step_data,
    write_step_in_place,
    exchange_moments_of_two,
    replace_one_state,
    delete_one_state,
    empty_one_state,
    clear_state,
    replace_whole_state,
    reorder_state,
    move_one_state_to_another_parameter,
    exchange_states_of_two,
    load_own_state,
    rewrite_groups,
    replace_list,
    replace_list_by_tuple,
    reverse_list_in_place,
    drop_a_parameter,
    append_a_parameter,
    append_a_group,
    replace_a_parameter,
    replace_groups_list,
    reverse_groups,
    change_options,
    change_betas_to_list,
    change_decay_kind,
    change_lr_to_tensor,
    change_lr_tensor_in_place,
    turn_amsgrad_off,
]
WHEN = {
    "before-first": {0},
    "between-later": {2, 3},
    "always": set(range(STEPS)),
}


@on_each_device
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_change_is_followed(change, when, device):
    if change in (change_lr_tensor_in_place, turn_amsgrad_off) and when != "always":
        pytest.skip("a change with a story of its own")

    def run(cls, **options):
        optimizer = cls(new_params(SHAPES, device), lr=LR, **options)
        for step in range(STEPS):
            if step in WHEN[when]:
                change(optimizer, step)
            set_grads(params_of(optimizer), step)
            optimizer.step()
            # What was freed above is likely to be given to these.
            optimizer.debris = [torch.full((n,), 7.0, device=device) for n in (1, 4, 15, 16, 17)]
        return optimizer

    ours, theirs = run(warpstep.AdamW), run(torch.optim.AdamW, foreach=False)
    mine, others = params_of(ours), params_of(theirs)
    assert len(mine) == len(others) >= len(SHAPES) - 1
    for p, q in zip(mine, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(STEPS, LR, q))
        assert ours.state[p]["step"].item() == theirs.state[q]["step"].item()
    for tensor in ours.debris:
        assert torch.all(tensor == 7)


@on_each_device
@pytest.mark.parametrize("change", [replace_gradients], ids=lambda f: f.__name__)
def test_gradients_with_other_memory(change, device):
    def run(cls):
        optimizer = cls(new_params(SHAPES, device), lr=LR)
        set_grads(params_of(optimizer), 0)
        for step in range(STEPS):
            optimizer.step()
            change(optimizer, step)
        return params_of(optimizer)

    for p, q in zip(run(warpstep.AdamW), run(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(STEPS, LR, q))


@on_each_device
def test_hyper_parameters_that_were_wrong_for_a_step_are_read_again(device):
    """The same objects are put back, and the plan has survived the step that raised."""
    ours, theirs = (
        cls([{"params": [p]} for p in new_params(SHAPES, device)], lr=LR)
        for cls in (warpstep.AdamW, torch.optim.AdamW)
    )
    for optimizer in (ours, theirs):
        for step in range(3):
            set_grads(params_of(optimizer), step)
            if step == 2 and optimizer is ours:
                plan, (first, *_, last) = optimizer.plan, optimizer.param_groups
                lr, first["lr"], last["differentiable"] = first["lr"], "wrong", True
                tensors = [t for s in optimizer.state.values() for t in s.values()]
                tensors += params_of(optimizer)
                before = [t.detach().clone() for t in tensors]
                with pytest.raises(TypeError):  # torch's own step, which leaves half of it
                    optimizer.step()
                with torch.no_grad():
                    for tensor, was in zip(tensors, before, strict=True):
                        tensor.copy_(was)
                first["lr"], last["differentiable"] = lr, False
                assert optimizer.plan is plan
            optimizer.step()
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(3, LR, q))
