"""Test where responses are found in two sequences, and how wrong positions are reported."""

import dataclasses

import pytest
import torch

from fused_sd import token_log_probs
from fused_sd.teaching.align import Alignment, align_responses, check_alignment
from fused_sd.teaching.shift import detect_shift

PAD = 0


def rows(sequences, side="right", width=None):
    """Return ids, attention mask and response mask (B, L) of sequences.

    A sequence is a list of parts, a part a list of ids; every second part is the response.
    """
    flat = [[token for part in parts for token in part] for parts in sequences]
    own = [[at % 2 for at, part in enumerate(parts) for _ in part] for parts in sequences]
    width = width or max(map(len, flat), default=0)
    ids = torch.full((len(flat), width), PAD)
    mask, response = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (tokens, marks) in enumerate(zip(flat, own)):
        start = width - len(tokens) if side == "left" else 0
        at = slice(start, start + len(tokens))
        ids[row, at], response[row, at] = torch.tensor(tokens), torch.tensor(marks)
        mask[row, at] = 1
    return ids, mask, response


def packed(sequences):
    """Return the same in one packed row with some padding, and the sequences' numbers."""
    parts = [rows([sequence]) for sequence in sequences]
    padding = torch.full((1, 3), PAD)
    ids, mask, response = (
        torch.cat([*(part[at] for part in parts), padding], 1) for at in range(3)
    )
    lengths = torch.tensor([part[0].shape[1] for part in parts] + [3])
    numbers = torch.arange(len(lengths)).repeat_interleave(lengths)[None]
    return ids, mask, response, numbers


def turns(seed, *lengths):
    """Return parts of random ids; a small vocabulary often makes neighbours equal."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 4, (n,), generator=generator).tolist() for n in lengths]


# prompt, response, (tool output, response, ...); the teacher has the same tail behind its prompt
STUDENTS = [turns(0, 3, 4), turns(1, 1, 1), turns(2, 2, 3, 2, 5), turns(3, 5, 2, 4, 1, 1, 2)]
TEACHERS = [[turns(10 + at, 7 - at)[0], *parts[1:]] for at, parts in enumerate(STUDENTS)]


def expected(students, teachers):
    """Return triples: sequence, and the predicting states' offsets in both sides' sequences."""
    triples = []
    for number, (student, teacher) in enumerate(zip(students, teachers)):
        here, there = 0, 0
        for at, (part, other) in enumerate(zip(student, teacher)):
            if at % 2:
                triples += [(number, here + k - 1, there + k - 1) for k in range(len(part))]
            here, there = here + len(part), there + len(other)
    return triples


def starts(mask):
    """Return the place of each row's first token."""
    return mask.argmax(1) + torch.arange(len(mask)) * mask.shape[1]


def assert_is(found, students, teachers, student_starts, teacher_starts):
    triples = expected(students, teachers)
    here = [int(student_starts[number]) + at for number, at, _ in triples]
    there = [int(teacher_starts[number]) + at for number, _, at in triples]
    assert found.student_positions.tolist() == here
    assert found.teacher_positions.tolist() == there
    tokens = [token for parts in students for part in parts[1::2] for token in part]
    assert found.token_ids.tolist() == tokens
    assert found.weights.tolist() == [1.0] * len(tokens)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("teacher_side", ["left", "right"])
@pytest.mark.parametrize("student_side", ["left", "right"])
def test_responses_are_found_in_padded_rows(student_side, teacher_side, given):
    ids, mask, response = rows(STUDENTS, student_side)
    teacher_ids, teacher_mask, teacher_response = rows(TEACHERS, teacher_side, 20)
    batch = ids, mask, teacher_ids, teacher_mask
    found = align_responses(
        *batch,
        student_response_mask=response,
        teacher_response_mask=teacher_response if given else None,
    )
    assert_is(found, STUDENTS, TEACHERS, starts(mask), starts(teacher_mask))
    check_alignment(found, *batch)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("pack_student, pack_teacher", [(True, True), (True, False), (False, True)])
def test_responses_are_found_in_packed_rows(pack_student, pack_teacher, given):
    sides = []
    for sequences, pack in ((STUDENTS, pack_student), (TEACHERS, pack_teacher)):
        if pack:
            lengths = torch.tensor([0] + [sum(map(len, parts)) for parts in sequences])
            sides.append((*packed(sequences), lengths.cumsum(0)))
        else:
            ids, mask, response = rows(sequences, "left")
            sides.append((ids, mask, response, None, starts(mask)))
    (ids, mask, response, numbers, first), (t_ids, t_mask, t_response, t_numbers, t_first) = sides
    order = {"student_sequence_ids": numbers, "teacher_sequence_ids": t_numbers}
    found = align_responses(
        *(ids, mask, t_ids, t_mask),
        student_response_mask=response,
        teacher_response_mask=t_response if given else None,
        **order,
    )
    assert_is(found, STUDENTS, TEACHERS, first, t_first)
    check_alignment(found, ids, mask, t_ids, t_mask, **order)


def test_prompts_padded_left_before_responses_padded_right():
    """Trainers concatenate like this, which puts padding between prompt and response."""
    prompt, prompt_mask, _ = rows([[part[0]] for part in STUDENTS], "left")
    teacher_prompt, teacher_prompt_mask, _ = rows([[part[0]] for part in TEACHERS], "right")
    response, response_mask, _ = rows([[part[1]] for part in STUDENTS], "right")
    batch = (
        torch.cat([prompt, response], 1),
        torch.cat([prompt_mask, response_mask], 1),
        torch.cat([teacher_prompt, response], 1),
        torch.cat([teacher_prompt_mask, response_mask], 1),
    )
    marks = torch.cat([torch.zeros_like(prompt), response_mask], 1)
    found = align_responses(*batch, student_response_mask=marks)
    check_alignment(found, *batch)
    width, own = batch[0].shape[1], response_mask.nonzero()
    places = own[:, 0] * width + prompt.shape[1] + own[:, 1] - 1
    assert found.student_positions.tolist() == places.tolist()
    # the first token is predicted by the prompt's last, wherever the padding put it
    first = found.teacher_positions[own[:, 1] == 0]
    last = teacher_prompt_mask.sum(1) - 1 + torch.arange(len(prompt)) * batch[2].shape[1]
    assert first.tolist() == last.tolist()


def test_the_masks_values_are_the_weights():
    ids, mask, response = rows(STUDENTS)
    values = response * torch.rand(response.shape)
    values[0, 4] = 0
    found = align_responses(ids, mask, ids, mask, student_response_mask=values)
    assert torch.equal(found.weights, values[values != 0])
    assert torch.equal(found.token_ids, ids[values != 0])
    assert torch.equal(found.teacher_positions, found.student_positions)


def test_a_row_without_a_response_has_no_tokens():
    sequences = [STUDENTS[0], [[1, 2, 3]], STUDENTS[2]]
    ids, mask, response = rows(sequences, "left")
    teacher = [TEACHERS[0], [[2, 2]], TEACHERS[2]]
    teacher_ids, teacher_mask, _ = rows(teacher)
    found = align_responses(ids, mask, teacher_ids, teacher_mask, student_response_mask=response)
    assert_is(found, sequences, teacher, starts(mask), starts(teacher_mask))
    # a row without any token has none either
    mask[1] = teacher_mask[1] = 0
    again = align_responses(ids, mask, teacher_ids, teacher_mask, student_response_mask=response)
    assert torch.equal(again.teacher_positions, found.teacher_positions)


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (2, 0), (2, 4)])
def test_no_tokens_at_all(shape):
    ids = torch.zeros(shape, dtype=torch.long)
    batch = ids, ids, ids, ids
    for given in (None, ids):
        found = align_responses(*batch, student_response_mask=ids, teacher_response_mask=given)
        for value in dataclasses.astuple(found):
            assert value.shape == (0,)
        check_alignment(found, *batch)
    hidden, head = torch.zeros(0, 3), torch.ones(7, 3)
    assert detect_shift(hidden, head, hidden, head, found).shift == 0


def batch_of(students=STUDENTS, teachers=TEACHERS):
    ids, mask, response = rows(students, "left")
    teacher_ids, teacher_mask, teacher_response = rows(teachers, "left")
    return [ids, mask, teacher_ids, teacher_mask], response, teacher_response


@pytest.mark.parametrize("given", [False, True])
def test_another_token_is_named(given):
    batch, response, teacher_response = batch_of()
    batch[2][2, -3] = 77
    token, length, width = int(batch[0][2, -3]), batch[0].shape[1], batch[2].shape[1]
    message = (
        rf"teacher_ids must hold token {token} as the student \(sequence 2, position {length - 3}\)"
        rf", got token 77 \(sequence 2, position {width - 3}\)"
    )
    masks = {"teacher_response_mask": teacher_response if given else None}
    with pytest.raises(ValueError, match=message):
        align_responses(*batch, student_response_mask=response, **masks)


@pytest.mark.parametrize("number", range(len(STUDENTS)))
def test_another_first_token_is_named(number):
    """No token that comes before the response is compared, and the first of the response is."""
    batch, response, _ = batch_of()
    at = int(batch[3][number].sum()) - sum(map(len, STUDENTS[number][1:]))
    place = batch[2].shape[1] - int(batch[3][number].sum()) + at
    batch[2][number, place] = 77
    with pytest.raises(ValueError, match=rf"got token 77 \(sequence {number}, position {place}\)"):
        align_responses(*batch, student_response_mask=response)


def test_another_tool_output_is_no_suffix_but_may_be_masked():
    teachers = [[list(part) for part in parts] for parts in TEACHERS]
    teachers[2][2] = [8, 9]
    batch, response, teacher_response = batch_of(teachers=teachers)
    with pytest.raises(ValueError, match=r"sequence 2.*got token 8"):
        align_responses(*batch, student_response_mask=response)
    found = align_responses(
        *batch, student_response_mask=response, teacher_response_mask=teacher_response
    )
    check_alignment(found, *batch)


def test_another_tool_output_is_named_behind_the_shortest_prompt_and_response():
    students = [[[1], [2], [3, 3], [4]]] * 2
    for number in range(2):
        teachers = [[[5, 6], [2], [3, 3], [4]] for _ in students]
        teachers[number][2] = [8, 3]
        batch, response, _ = batch_of(students, teachers)
        with pytest.raises(ValueError, match=rf"hold token 3 .* got token 8 \(sequence {number}"):
            align_responses(*batch, student_response_mask=response)


def test_a_teacher_that_is_cut_is_named():
    batch, response, _ = batch_of()
    batch[3][0, :-3] = 0
    with pytest.raises(ValueError, match=r"student's response, got 3 tokens in sequence 0"):
        align_responses(*batch, student_response_mask=response)
    batch, response, _ = batch_of()
    batch[3][2, :-4] = 0
    with pytest.raises(ValueError, match=r"student's response, got 4 tokens in sequence 2"):
        align_responses(*batch, student_response_mask=response)
    batch, response, _ = batch_of()
    batch[3][0, :-4] = 0
    batch[3][0, -4:] = 1
    with pytest.raises(ValueError, match=r"prompt before the response.*sequence 0, position"):
        align_responses(*batch, student_response_mask=response)


def test_response_masks_that_disagree_are_named():
    batch, response, teacher_response = batch_of()
    teacher_response[3, -1] = 0
    masks = {"student_response_mask": response, "teacher_response_mask": teacher_response}
    with pytest.raises(ValueError, match=r"mark the student's 5 tokens in sequence 3, got 4"):
        align_responses(*batch, **masks)
    teacher_response[3] = 0
    with pytest.raises(ValueError, match=r"mark the student's 5 tokens in sequence 3, got 0"):
        align_responses(*batch, **masks)
    response[0, 0] = 1
    with pytest.raises(ValueError, match="student_response_mask must be 0 where the attention"):
        align_responses(*batch, **masks)


@pytest.mark.parametrize("number", [0, 1])
def test_a_response_without_a_prompt_is_named(number):
    """The state before such a response would be another sequence's."""
    sequences = [STUDENTS[0]]
    sequences.insert(number, [[], [1, 2]])
    ids, mask, response = rows(sequences)
    message = rf"student_ids must hold a prompt.*sequence {number}, position 0"
    with pytest.raises(ValueError, match=message):
        align_responses(ids, mask, ids, mask, student_response_mask=response)


def test_shapes_and_numbers_that_do_not_fit_are_refused():
    (ids, mask, *teacher), response, _ = batch_of()
    marks = {"student_response_mask": response}
    with pytest.raises(ValueError, match=r"student_ids must be \(B, L\), got \(4,\)"):
        align_responses(ids[:, 0], mask[:, 0], *teacher, **marks)
    with pytest.raises(ValueError, match="student_mask must be"):
        align_responses(ids, mask[:, 1:], *teacher, **marks)
    with pytest.raises(ValueError, match="student_response_mask must be"):
        align_responses(ids, mask, *teacher, student_response_mask=response[:, 1:])
    ids, mask, response, numbers = packed(STUDENTS)
    with pytest.raises(ValueError, match="student_sequence_ids must ascend"):
        align_responses(
            *(ids, mask, ids, mask),
            student_response_mask=response,
            student_sequence_ids=-numbers,
            teacher_sequence_ids=numbers,
        )


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("shift, advice", [(1, "one late: subtract 1"), (-1, "one early: add 1")])
def test_positions_off_by_one_are_named_with_their_remedy(side, shift, advice):
    sequences = [[[1, 2, 3, 4], [5, 6, 7], [8]], [[2, 3], [9, 8, 7], [6]]]
    ids, mask, response = rows(sequences, "left")
    batch = ids, mask, ids, mask
    right = align_responses(*batch, student_response_mask=response)
    name = f"{side}_positions"
    wrong = dataclasses.replace(right, **{name: getattr(right, name) + shift})
    message = (
        rf"alignment.{name}\[0\] must be followed by token 5, got (token|the).* after sequence 0, "
    )
    with pytest.raises(
        ValueError, match=message + rf"position {3 + shift}; all of them .*{advice}"
    ):
        check_alignment(wrong, *batch)


def test_one_wrong_position_padding_and_other_sequences_are_named():
    sequences = [[[1, 2, 3, 4], [5, 6, 7]], [[2, 3], [5, 6, 7]]]
    ids, mask, response = rows(sequences, "left")
    batch = ids, mask, ids, mask
    right = align_responses(*batch, student_response_mask=response)
    check_alignment(right, *batch, temperature=0.7, teacher_temperature=0.7)

    def wrong(**changes):
        return dataclasses.replace(right, **changes)

    ids_of = right.token_ids.clone()
    ids_of[4] = 1
    with pytest.raises(
        ValueError, match=r"student_positions\[4\] must be followed by token 1, got"
    ):
        check_alignment(wrong(token_ids=ids_of), *batch)
    places = right.teacher_positions.clone()
    places[3] = 7
    with pytest.raises(ValueError, match=r"teacher_positions\[3\] must be a token's, got 7"):
        check_alignment(wrong(teacher_positions=places), *batch)
    with pytest.raises(ValueError, match=r"lie in sequence 0 as the student's, got sequence 1"):
        check_alignment(wrong(teacher_positions=right.teacher_positions.roll(3)), *batch)
    with pytest.raises(ValueError, match="N values in each field"):
        check_alignment(wrong(teacher_positions=right.teacher_positions[1:]), *batch)
    with pytest.raises(ValueError, match=r"teacher_temperature must be the student's 0\.7, got 1"):
        check_alignment(right, *batch, temperature=0.7, teacher_temperature=1.0)


def test_the_last_token_of_a_sequence_predicts_nothing():
    """In a packed row it does not predict the first token of the next sequence."""
    ids, mask, _, numbers = packed([[[1, 2], [3]], [[4], [5]]])
    places = torch.tensor([2])
    claimed = Alignment(places, places, torch.tensor([4]), torch.ones(1))
    order = {"student_sequence_ids": numbers, "teacher_sequence_ids": numbers}
    with pytest.raises(ValueError, match=r"followed by token 4, got the end after sequence 0"):
        check_alignment(claimed, ids, mask, ids, mask, **order)


@pytest.fixture(scope="module")
def model():
    """Train a tiny model to continue a repeating pattern."""
    pytest.importorskip("transformers")
    from tiny_models import tiny_model

    torch.manual_seed(0)
    model = tiny_model("Llama", vocab=12, spread=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids = patterns(16)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def patterns(count, length=18):
    """Return rows that repeat five random tokens."""
    motif = torch.rand(count, 10).argsort(1)[:, :5] + 1
    return motif.repeat(1, length // 5 + 1)[:, :length]


def two_contexts(model, shift=0):
    """Return states of one response behind two prompts, the teacher's taken ``shift`` late."""
    from fused_sd.integrations.transformers import Request, attach, hidden_states

    attach(model)
    ids = patterns(6)
    teacher_ids = torch.cat([ids[:, 4:9].flip(1), ids], 1)
    response = torch.zeros_like(ids)
    response[:, 7:16] = 1
    mask, teacher_mask = torch.ones_like(ids), torch.ones_like(teacher_ids)
    places = align_responses(ids, mask, teacher_ids, teacher_mask, student_response_mask=response)
    with torch.no_grad():
        request = Request(hidden_states)
        student = model(input_ids=ids, fused_sd=request).result.flatten(0, 1)
        teacher = model(input_ids=teacher_ids, fused_sd=request).result.flatten(0, 1)
    head = model.lm_head.weight
    late = teacher[places.teacher_positions + shift]
    return student[places.student_positions], head, late, head, places


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_states_off_by_one_show_in_the_evidence(model, shift):
    four = two_contexts(model, shift)
    evidence = detect_shift(*four)
    assert evidence.shift == shift
    best, others = evidence.gaps[1 + shift], [*evidence.gaps]
    others.pop(1 + shift)
    assert best < 0.5 * min(others), evidence.gaps
    if shift == 0:
        evidence.require()
    else:
        word = "late" if shift > 0 else "early"
        with pytest.raises(ValueError, match=rf"got states one position {word} \(mean gaps .* nat"):
            evidence.require()


def test_the_evidence_is_the_mean_gap_of_the_tokens_with_two_neighbours(model):
    student, head, teacher, _, places = two_contexts(model)
    gaps = {-1: [], 0: [], 1: []}
    log_s = (student @ head.T / 0.7).log_softmax(-1)
    log_t = (teacher @ head.T / 0.7).log_softmax(-1)
    for row in range(6):
        for at in range(9 * row + 1, 9 * row + 8):
            token = places.token_ids[at]
            for shift in gaps:
                gaps[shift].append(abs(log_t[at - shift, token] - log_s[at, token]))
    found = detect_shift(student, head, teacher, head, places, temperature=0.7).gaps
    wanted = [float(torch.stack(values).mean().detach()) for values in gaps.values()]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_short_responses_are_no_evidence(model):
    student, head, teacher, _, places = two_contexts(model, 1)
    for keep in ([0], [0, 9], [0, 1, 9, 10], [0, 2, 4]):
        at = torch.tensor(keep)
        fewer = Alignment(*(value[at] for value in vars(places).values()))
        evidence = detect_shift(student[at], head, teacher[at], head, fewer)
        assert evidence.shift == 0
        assert all(gap != gap for gap in evidence.gaps)
        evidence.require()


def test_aligned_states_give_the_models_log_probs(model):
    """States indexed by the positions predict the response's tokens, end to end."""
    student, head, teacher, _, places = two_contexts(model)
    for states in (student, teacher):
        log_probs = token_log_probs(states, head, places.token_ids).log_probs
        assert float(log_probs.detach().mean()) > -0.5  # it has learnt the pattern


def test_the_first_of_two_tokens_that_lie_in_other_sequences_is_named():
    sequences = [[[1, 2], [3]], [[1, 2], [3]], [[1, 2], [3]]]
    ids, mask, response = rows(sequences)
    right = align_responses(ids, mask, ids, mask, student_response_mask=response)
    swapped = dataclasses.replace(right, teacher_positions=right.teacher_positions[[0, 2, 1]])
    message = r"teacher_positions\[1\] must lie in sequence 1 as the student's, got sequence 2"
    with pytest.raises(ValueError, match=message):
        check_alignment(swapped, ids, mask, ids, mask)
