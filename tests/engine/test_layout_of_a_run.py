"""How many tokens a chunk and a group hold, by the memory there is."""

import pytest
from cases import make_case

import fused_sd
from fused_sd.engine import operator
from fused_sd.engine.layout import (
    GPU_BUDGET,
    Layout,
    Room,
    RunSize,
    choose_layout,
    room_beside,
    workspace_bytes,
)

HEAD = 4 * 151936 * 4096  # bytes of the fp32 gradient of Qwen3-8B's head
SIZE = RunSize(151936, 2, 4, 2, True, HEAD)


def test_a_group_grows_until_the_workspaces_are_as_large_as_dweight():
    room = room_beside(60 * 2**30)
    chosen = choose_layout(SIZE, 10**6, room)
    assert chosen == (512, 5632)
    assert workspace_bytes(SIZE, chosen) <= HEAD
    assert workspace_bytes(SIZE, Layout(512, 6144)) > HEAD
    frozen = SIZE._replace(dweight_bytes=0)
    assert choose_layout(frozen, 10**6, room) == (512, 2048)
    assert workspace_bytes(frozen, Layout(512, 2048)) <= GPU_BUDGET


def test_an_eighth_of_the_free_memory_bounds_a_group():
    room = room_beside(14 * 2**30)
    chosen = choose_layout(SIZE, 10**6, room)
    assert 2048 < chosen.group < 5632
    assert workspace_bytes(SIZE, chosen) <= room.all
    assert choose_layout(SIZE, 10**6, room_beside(8 * 2**30)) == (512, 2048)
    assert choose_layout(SIZE, 10**6, room_beside(-1)) == (1, 4)


@pytest.mark.parametrize("num_tokens", [0, 1, 100, 3000])
def test_a_group_is_no_longer_than_the_run(num_tokens):
    chosen = choose_layout(SIZE, num_tokens, room_beside(60 * 2**30))
    assert chosen == (min(512, max(1, num_tokens)), max(1, num_tokens))


def test_memory_is_asked_for_before_the_device_is_waited_for(monkeypatch):
    asked = []
    ask, keep = operator.room_on, operator.KeptTokens
    monkeypatch.setattr(operator, "room_on", lambda *a: asked.append("memory") or ask(*a))
    monkeypatch.setattr(operator, "KeptTokens", lambda *a: asked.append("tokens") or keep(*a))
    case = make_case()
    fused_sd.cross_entropy_loss(
        case.hidden, case.head, case.token_ids, token_weights=case.token_weights, reduction="sum"
    )
    assert asked == ["memory", "tokens"]


def test_a_given_chunk_and_ranks_have_the_shortest_group():
    assert choose_layout(SIZE, 10**6, room_beside(60 * 2**30), 256) == (256, 1024)
    assert choose_layout(SIZE, 10**6, Room(GPU_BUDGET, 0)) == (512, 2048)


def test_wide_operands_keep_gradients_where_the_logits_are():
    size = SIZE._replace(operand_bytes=4)
    chosen = choose_layout(size, 10**6, room_beside(60 * 2**30))
    assert chosen.group > 2 * chosen.chunk
    assert workspace_bytes(size, chosen) <= HEAD


def test_a_group_takes_what_logits_of_a_chunk_leave_to_the_last_byte():
    """Two sides' logits of 10 tokens take 80 numbers of 4 bytes a column, 30 dlogits 60."""
    size = RunSize(15, 2, 4, 2, True, 16 * (80 + 60))
    room = Room(GPU_BUDGET, 10**9)

    def group(more):
        wide = size._replace(dweight_bytes=size.dweight_bytes + more)
        return choose_layout(wide, 10**6, room._replace(workspaces=16 * (80 + 2 * 40))).group

    assert choose_layout(size, 10**6, room._replace(workspaces=16 * 160)).chunk == 10
    assert group(0) == 40  # of at least four chunks
    assert group(16 * 40) == group(16 * 40 - 1) + 10 == 50
