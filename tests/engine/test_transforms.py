"""PyTorch's ways to differentiate and to run a loss: each is right or refused, none silently 0."""

import copy
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import fused_sd

NUM_TOKENS, WIDTH, VOCAB = 4, 6, 19
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN, TEACHER = (torch.randn(NUM_TOKENS, WIDTH, generator=GENERATOR) for _ in range(2))
HEAD = torch.randn(VOCAB, WIDTH, generator=GENERATOR)
IDS = torch.randint(VOCAB, (NUM_TOKENS, 3), generator=GENERATOR)
LOG_PROBS = torch.randn(NUM_TOKENS, VOCAB, generator=GENERATOR).log_softmax(-1).gather(1, IDS)


def divergence(hidden, head, **options):
    return fused_sd.divergence_loss(
        hidden, head, TEACHER, HEAD, **{"reduction": "sum", **options}
    ).loss.sum()


LOSSES = {
    "dense": divergence,
    "again": lambda h, w: divergence(h, w, reduction="none"),
    "sparse": lambda h, w: divergence(h, w, gradient="sparse"),
    "certified again": lambda h, w: divergence(h, w, gradient="auto", reduction="none"),
    "entries": lambda h, w: divergence(
        h, w, support=fused_sd.StudentTopK(3), remainder="renormalize"
    ),
    "served": lambda h, w: (
        fused_sd.topk_divergence_loss(h, w, IDS, LOG_PROBS, reduction="sum").loss
    ),
    "cross entropy": lambda h, w: (
        fused_sd.cross_entropy_loss(h, w, IDS[:, 0], reduction="sum").loss
    ),
    "log-probs": lambda h, w: fused_sd.token_log_probs(h, w, IDS[:, 0]).log_probs.sum(),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def leaves():
    return HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()


def in_module(hidden):
    head = torch.nn.Linear(WIDTH, VOCAB, bias=False)
    return lambda loss: grad(
        lambda given: loss(hidden, functional_call(head, given, torch.eye(WIDTH)).T)
    )({"weight": HEAD})


TRANSFORMS = {
    "grad": lambda loss: grad(loss, argnums=(0, 1))(HIDDEN, HEAD),
    "vjp": lambda loss: vjp(loss, HIDDEN, HEAD)[1](torch.ones(())),
    "jacrev": lambda loss: jacrev(loss)(HIDDEN, HEAD),
    "jacfwd": lambda loss: jacfwd(loss)(HIDDEN, HEAD),
    "jvp": lambda loss: jvp(loss, (HIDDEN, HEAD), (HIDDEN, HEAD)),
    "hessian": lambda loss: hessian(loss)(HIDDEN, HEAD),
    "vmap": lambda loss: vmap(loss, in_dims=(0, None))(torch.stack([HIDDEN, HIDDEN]), HEAD),
    "vmap of grad": lambda loss: vmap(grad(loss), in_dims=(0, None))(HIDDEN[None], HEAD),
    "grad of a module": lambda loss: in_module(HIDDEN)(loss),
}


@every_loss
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_of_torch_func_is_refused(loss, transform):
    with pytest.raises(ValueError, match=r"differentiated by backward .* torch\.func"):
        transform(loss)


@every_loss
@pytest.mark.parametrize("at", [0, 1], ids=["hidden", "head"])
def test_forward_mode_is_refused(loss, at):
    given = [HIDDEN, HEAD]
    with forward_ad.dual_level():
        given[at] = forward_ad.make_dual(given[at], given[at])
        with pytest.raises(ValueError, match="a tensor with a forward-mode tangent"):
            loss(*given)


def test_forward_mode_of_a_constant_is_refused():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(TEACHER, TEACHER)
        with pytest.raises(ValueError, match="a tensor with a forward-mode tangent"):
            fused_sd.divergence_loss(HIDDEN, HEAD, dual, HEAD, reduction="sum")
        weights = forward_ad.make_dual(torch.ones(NUM_TOKENS), torch.ones(NUM_TOKENS))
        with pytest.raises(ValueError, match="a tensor with a forward-mode tangent"):
            divergence(HIDDEN, HEAD, token_weights=weights)
        assert divergence(HIDDEN, HEAD).isfinite()  # nothing has a tangent


@every_loss
def test_a_second_derivative_is_refused(loss):
    hidden, head = leaves()
    with pytest.raises(RuntimeError, match="must not be differentiated twice"):
        torch.autograd.grad(loss(hidden, head), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="must not be differentiated twice"):
        torch.autograd.functional.hessian(lambda h: loss(h, HEAD), HIDDEN)


@every_loss
def test_a_batch_of_gradients_is_refused(loss):
    hidden, head = leaves()
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.grad(loss(hidden, head), hidden, torch.ones(2), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.functional.jacobian(lambda h: loss(h, HEAD), HIDDEN, vectorize=True)


@every_loss
def test_reverse_mode_gives_the_same_gradient_every_way(loss):
    hidden, head = leaves()
    loss(hidden, head).backward()
    want = hidden.grad, head.grad
    found = {"jacobian": torch.autograd.functional.jacobian(loss, (HIDDEN, HEAD))}
    for reentrant in (False, True):
        given = leaves()
        checkpoint(loss, *given, use_reentrant=reentrant).backward()
        found[f"checkpoint {reentrant}"] = tuple(leaf.grad for leaf in given)
    given = leaves()
    with torch.autograd.graph.save_on_cpu():
        value = loss(*given)
    found["saved tensors' hooks"] = torch.autograd.grad(value, given)
    for name, got in found.items():
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, msg=name)


@every_loss
def test_nothing_has_a_gradient_where_none_is_asked_for(loss):
    want = loss(*leaves()).detach()
    with torch.no_grad():
        values = [loss(*leaves())]
    with torch.inference_mode():
        values.append(loss(HIDDEN, HEAD))
    values.append(loss(HIDDEN, HEAD))
    for value in values:
        assert not value.requires_grad
        torch.testing.assert_close(value, want)


@every_loss
def test_a_default_dtype_and_deterministic_algorithms_change_nothing(loss):
    def run():
        given = leaves()
        loss(*given).backward()
        return [leaf.grad for leaf in given]

    want = run()
    try:
        torch.use_deterministic_algorithms(True)
        found = [run()]
        torch.set_default_dtype(torch.float64)
        found.append(run())
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
    for got in found:
        torch.testing.assert_close(got, want)


@every_loss
def test_strides_change_nothing(loss):
    def run(hidden, head):
        hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
        loss(hidden, head).backward()
        return hidden.grad, head.grad

    columns_first = HIDDEN.T.contiguous().T, HEAD.T.contiguous().T
    torch.testing.assert_close(run(*columns_first), run(HIDDEN, HEAD))
    one_state = HIDDEN[:1].expand(NUM_TOKENS, WIDTH)
    torch.testing.assert_close(run(one_state, HEAD), run(one_state.contiguous(), HEAD))


@pytest.mark.parametrize(
    "setting",
    [
        fused_sd.Jsd(0.3),
        fused_sd.MixedKl(0.2),
        fused_sd.SkewKl(0.9),
        fused_sd.FULL_VOCABULARY,
        fused_sd.StudentTopK(3),
        fused_sd.TeacherNucleus(4, 0.9),
        fused_sd.TokenIds(IDS),
        fused_sd.Comparison(fused_sd.Jsd(0.5), fused_sd.UnionTopK(3)),
        fused_sd.ImportanceCap(LOG_PROBS[:, 0], 2.0),
        fused_sd.LMHead(HEAD, torch.zeros(VOCAB), softcap=30.0),
        fused_sd.Evidence(),
        fused_sd.Options(),
        fused_sd.SDPOLoss(alpha=0.5),
    ],
    ids=lambda setting: type(setting).__name__,
)
def test_settings_can_be_copied_and_sent(setting):
    for other in (copy.deepcopy(setting), copy.copy(setting), pickle.loads(pickle.dumps(setting))):
        assert type(other) is type(setting)
        assert repr(other) == repr(setting)
