"""Checks of the outputs on a rank's rows of the head, against the whole vocabulary.

Imported only inside the two processes.
"""

from types import SimpleNamespace

import megatron_models as models
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron_worker import OBJECTIVES, Layout, difference, lay_out, topk_config
from verl.trainer.distillation.megatron.losses import _VocabParallelKLDivergence

from fused_sd import reference
from fused_sd.integrations.verl.config import FusedSDLossConfig
from fused_sd.integrations.verl.megatron_output import OutputProcessor
from fused_sd.integrations.verl.token_outputs import token_outputs

NUM_TOKENS = 61  # of the padded vocabulary


def processor(objective: str, sequence_parallel: bool) -> dict[str, float]:
    """Call the processor as Megatron does, on two ranks; compare with the definitions.

    Without sequence parallelism each rank has all states and needs their whole gradient, which the
    loss sums over ranks.  With it each rank has a part, and Megatron sums as it scatters.
    """
    lay_out(Layout(tensor=2))
    rank, num_rows = dist.get_rank(), 8
    config = models.gpt(tensor_parallel=2, sequence_parallel=sequence_parallel).config
    torch.manual_seed(3)
    layer = ColumnParallelLinear(
        models.HIDDEN, models.VOCAB, config=config, init_method=torch.nn.init.normal_, bias=False
    )
    whole = torch.randn(models.VOCAB, models.HIDDEN, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(num_rows, 1, models.HIDDEN, dtype=torch.float64, requires_grad=True)
    layer.weight.data = whole.detach().chunk(2)[rank].clone()
    teacher = 3 * torch.randn(1, num_rows, NUM_TOKENS, dtype=torch.float64)
    log_t, ids = teacher.log_softmax(-1).topk(6)
    labels = torch.randint(NUM_TOKENS, (1, num_rows))
    needed = torch.ones(1, num_rows)
    needed[0, 2] = 0
    # verl pads with one id K times, each with probability 1
    ids[0, 2], log_t[0, 2] = 0, 0.0
    weights = torch.rand(3, num_rows, dtype=torch.float64)

    given = OBJECTIVES[objective]
    loss_config = (
        topk_config(True, None)
        if given is None
        else FusedSDLossConfig(use_task_rewards=True, topk=6, **given)
    )
    states = hidden.detach().chunk(2)[rank] if sequence_parallel else hidden.detach()
    states.requires_grad_()
    output = OutputProcessor(
        lambda packed: packed,
        needed,
        NUM_TOKENS,
        entropy=True,
        loss_config=loss_config,
        teacher={"teacher_token_ids": ids.int(), "teacher_log_probs": log_t},
    )(
        hidden_states=states,
        output_layer=layer,
        output_weight=None,
        labels=labels,
        context=SimpleNamespace(temperature=0.7),
        config=config,
        scale_logits=lambda logits: logits * 0.9,
    )
    losses, _, _, log_probs = output.log_probs[0].unbind(-1)
    values = torch.stack([losses, log_probs, output.entropy[0]])
    (values * weights).sum().backward()

    choices = {"divergence": "forward_kl", **({"remainder": "drop"} if given is None else given)}
    student = reference.logits(hidden[:, 0], whole[:NUM_TOKENS], logit_scale=0.9, temperature=0.7)
    served = reference.served_teacher(ids[0], log_t[0], NUM_TOKENS)
    support = reference.given_ids(ids[0], NUM_TOKENS)
    expected = torch.stack(
        [
            reference.divergence(student, served, support=support, **choices),
            reference.token_log_prob(student, labels[0]),
            reference.entropy(student),
        ]
    )
    expected = torch.where(needed != 0, expected, 0)
    (expected * weights).sum().backward()
    dhidden = hidden.grad.chunk(2)[rank] if sequence_parallel else hidden.grad
    return {
        **{n: difference(*p) for n, *p in zip(("loss", "log_probs", "entropy"), values, expected)},
        "dhidden": difference(states.grad, dhidden),
        "dweight": difference(layer.weight.grad, whole.grad.chunk(2)[rank]),
    }


def oracle(floor: float | None) -> dict[str, float]:
    """Compare the library's forward KL over a teacher's top-k with verl's from a rank's logits.

    verl computes in float32 whatever dtype it gets.
    """
    lay_out(Layout(tensor=2))
    group, rank = parallel_state.get_tensor_model_parallel_group(), dist.get_rank()
    torch.manual_seed(5)
    whole = torch.randn(models.VOCAB, models.HIDDEN)
    states = torch.randn(1, 12, models.HIDDEN)
    log_t, ids = (3 * torch.randn(1, 12, models.VOCAB)).log_softmax(-1).topk(6)
    upstream = torch.rand(1, 12)
    found = []
    for ours in (False, True):
        hidden, weight = states.clone().requires_grad_(), whole.chunk(2)[rank].clone()
        weight.requires_grad_()
        if ours:
            terms = token_outputs(
                hidden,
                weight,
                ids[..., 0],
                loss_config=topk_config(False, floor),
                teacher_token_ids=ids,
                teacher_log_probs=log_t,
                log_probs=False,
                process_group=group,
                reduce_dhidden=False,
            )
            loss = terms["distillation_losses"]
            masses = terms["student_mass"], terms["teacher_mass"]
        else:
            loss, *masses = _VocabParallelKLDivergence.apply(
                hidden @ weight.t(), log_t, ids, floor
            )[:3]
        (loss * upstream).sum().backward()
        # each rank has its vocabulary entries' part of the states' gradient
        dist.all_reduce(hidden.grad)
        found.append((loss, *masses, hidden.grad, weight.grad))
    names = ("loss", "student_mass", "teacher_mass", "dhidden", "dweight")
    differences = {name: difference(b, a) for name, a, b in zip(names, *found)}
    if floor is not None:
        clamped = (states @ whole.t()).log_softmax(-1).gather(-1, ids) < floor
        assert 0 < int(clamped.sum()) < clamped.numel()
        # verl's masses are sums of clamped probabilities
        del differences["student_mass"], differences["teacher_mass"]
    return differences
