"""The callback that writes credit maps: when, what, and what it leaves as it was."""

import contextlib
import copy
import types

import pytest
import torch
from tiny_models import tiny_model
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK
from trl.experimental.sdft import SDFTTrainer
from trl.experimental.sdpo import SDPOTrainer
from trl_pairs import TEACHERS, VOCAB, make, perturb

from fused_sd.credit import CreditMap, html_page
from fused_sd.integrations.trl import FusedSDFTTrainer, FusedSDPOTrainer, credit_reports
from fused_sd.integrations.trl.credit_maps import CreditMapCallback

pytestmark = [
    # PEFT and TRL read names that transformers is about to rename
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # PEFT, of LoRA on the head
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    # a loader without a GPU
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    model = tiny_model(vocab=VOCAB, max_position_embeddings=512, tie_word_embeddings=False)
    model.save_pretrained(folder)
    return folder


FEEDBACK = {"include_environment_feedback": True, "use_successful_as_teacher": False}


def trained(home, tmp_path, *, cls=FusedSDPOTrainer, steps=5, more=(), spy=None, **options):
    """A trainer that has trained with maps, and what was in the folder after each step."""
    is_sdpo = issubclass(cls, SDPOTrainer)
    settings = {"max_steps": steps, "output_dir": str(tmp_path), "learning_rate": 1e-2}
    trainer = make(cls, home, **settings, **(FEEDBACK if is_sdpo else {}), **dict(more))
    callback = CreditMapCallback(trainer, **{"every": 2, **options})
    if spy is not None:
        trainer.add_callback(spy(trainer))
    trainer.add_callback(callback)
    trainer.train()
    return trainer


def written(folder):
    return sorted(path.name for path in folder.iterdir())


def read(tmp_path, step):
    return CreditMap.from_json((tmp_path / "credit_maps" / f"step_{step:06d}.json").read_text())


@pytest.mark.parametrize("cls", [FusedSDPOTrainer, SDPOTrainer, FusedSDFTTrainer, SDFTTrainer])
def test_maps_are_written_at_their_steps_and_at_no_others(home, tmp_path, cls):
    trained(home, tmp_path, cls=cls)
    assert written(tmp_path / "credit_maps") == [
        f"step_{step:06d}.{kind}" for step in (0, 2, 4) for kind in ("html", "json")
    ]
    shown = read(tmp_path, 2)
    assert shown.title == "Credit map, step 2"
    assert 1 <= len(shown.rows) <= 4
    page = (tmp_path / "credit_maps" / "step_000002.html").read_text()
    assert page == html_page(shown)


class Spy(TrainerCallback):
    """Looks before the map is made: batch, logits of both sides by the stock forward, and modes."""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, []

    def on_generation_batch_built(self, args, state, **kwargs):
        model, inputs = self.trainer.model, self.trainer._buffered_inputs[0]
        length = inputs["completion_ids"].size(1)
        student_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        student_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        was = [part.training for part in model.modules()]
        model.eval()
        with torch.no_grad():
            own = model(input_ids=student_ids, attention_mask=student_mask).logits
            with self.trainer._get_teacher_context_for_self_distillation():
                other = self.trainer.teacher_model(
                    input_ids=inputs["teacher_input_ids"],
                    attention_mask=inputs["teacher_attention_mask"],
                ).logits
        for part, training in zip(model.modules(), was):
            part.training = training
        logits = [side[:, -length - 1 : -1].double().log_softmax(-1) for side in (own, other)]
        self.seen.append((state.global_step, inputs, *logits))


@pytest.mark.parametrize("kind", ["live", "base", "lora base", "lora ema"])
def test_the_numbers_are_those_of_the_stock_forward(home, tmp_path, kind):
    spies = []
    trained(
        home,
        tmp_path,
        steps=3,
        more=TEACHERS[kind],
        spy=lambda trainer: spies.append(Spy(trainer)) or spies[0],
        num_sequences=2,
    )
    found = {step: entry for step, *entry in spies[0].seen}
    for step in (0, 2):
        inputs, log_s, log_t = found[step]
        shown = read(tmp_path, step)
        assert len(shown.rows) == 2
        for n, row in enumerate(shown.rows):
            keep = inputs["completion_mask"][n].bool()
            ids = inputs["completion_ids"][n][keep]
            assert [token.token_id for token in row.tokens] == ids.tolist()
            for name, side in (("student_log_prob", log_s), ("teacher_log_prob", log_t)):
                expected = side[n][keep].gather(-1, ids[:, None])[:, 0].tolist()
                assert [getattr(t, name) for t in row.tokens] == pytest.approx(expected, abs=1e-4)
            kl = (log_t[n].exp() * (log_t[n] - log_s[n])).sum(-1)[keep].tolist()
            assert [token.forward_kl for token in row.tokens] == pytest.approx(kl, abs=1e-4)
            reward = float(inputs["rewards"][n])
            assert row.caption == f"step {step}, rollout {n}, reward {reward:g}"
            assert "It is" in row.teacher_prompt
            assert "It is" not in row.student_prompt
            assert row.student_prompt in ("Solve 2+2.", "Add 3 to 4.")
            assert all(len(token.teacher_top) == 3 for token in row.tokens)


def test_only_rollouts_with_a_signal_are_shown(home, tmp_path):
    # one of two rollouts succeeds, and has no other success to learn from
    more = {"include_environment_feedback": False, "use_successful_as_teacher": True}
    settings = {"max_steps": 1, "output_dir": str(tmp_path)}
    trainer = make(FusedSDPOTrainer, home, **settings, **more)
    trainer.add_callback(CreditMapCallback(trainer))
    trainer.train()
    captions = [row.caption for row in read(tmp_path, 0).rows]
    assert captions == ["step 0, rollout 0, reward 0"]


def test_nothing_is_written_where_no_rollout_has_a_signal(home, tmp_path):
    more = {"include_environment_feedback": False, "use_successful_as_teacher": False}
    settings = {"max_steps": 1, "output_dir": str(tmp_path)}
    trainer = make(FusedSDPOTrainer, home, **settings, **more)
    trainer.add_callback(CreditMapCallback(trainer))
    trainer.train()
    assert not (tmp_path / "credit_maps").exists()


def test_modes_and_gradients_are_as_they_were(home, tmp_path):
    settings = {"max_steps": 1, "output_dir": str(tmp_path)}
    trainer = make(FusedSDPOTrainer, home, **settings, **FEEDBACK)
    callback = CreditMapCallback(trainer)
    trainer.train()
    trainer.model.train()
    trainer.model.model.norm.eval()
    trainer.model.zero_grad()
    before = [part.training for part in trainer.model.modules()]
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state = types.SimpleNamespace(global_step=50, is_world_process_zero=True)
    callback.on_generation_batch_built(args=trainer.args, state=state)
    assert written(tmp_path / "credit_maps") == ["step_000050.html", "step_000050.json"]
    assert [part.training for part in trainer.model.modules()] == before
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    callback.on_generation_batch_built(args=trainer.args, state=state)
    state.global_step = 99
    callback.on_generation_batch_built(args=trainer.args, state=state)
    assert len(written(tmp_path / "credit_maps")) == 2
    # rollouts of several steps: the next batch may come late
    state.global_step = 103
    callback.on_generation_batch_built(args=trainer.args, state=state)
    assert len(written(tmp_path / "credit_maps")) == 4
    # other processes take part and write nothing
    state.global_step, state.is_world_process_zero = 150, False
    callback.on_generation_batch_built(args=trainer.args, state=state)
    assert len(written(tmp_path / "credit_maps")) == 4


def test_a_trainer_with_a_teacher_of_its_own_is_asked_for_it(home, tmp_path):
    trainer = make(FusedSDPOTrainer, home, max_steps=1, output_dir=str(tmp_path), **FEEDBACK)
    callback = CreditMapCallback(trainer)
    trainer.train()
    other = copy.deepcopy(trainer.model)
    perturb(types.SimpleNamespace(model=other), 0.1)
    entered = []

    @contextlib.contextmanager
    def acting():
        entered.append(True)
        yield other

    trainer.teacher = types.SimpleNamespace(acting=acting)
    state = types.SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_generation_batch_built(args=trainer.args, state=state)
    assert entered == [True]
    inputs = trainer._buffered_inputs[0]
    length = inputs["completion_ids"].size(1)
    with torch.no_grad():
        logits = other.eval()(
            input_ids=inputs["teacher_input_ids"], attention_mask=inputs["teacher_attention_mask"]
        ).logits[:, -length - 1 : -1]
    first = read(tmp_path, 0).rows[0].tokens[0]
    expected = logits.log_softmax(-1)[0, 0, first.token_id]
    assert first.teacher_log_prob == pytest.approx(float(expected), abs=1e-4)


def test_training_is_the_same_with_maps(home, tmp_path):
    losses = []
    for every in (1, 1000):
        trainer = trained(home, tmp_path / str(every), steps=3, every=every)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert all(losses[0])
    assert losses[0] == losses[1]


def test_maps_are_written_under_bf16_autocast(home, tmp_path):
    trained(home, tmp_path, steps=1, more={"bf16": True})
    tokens = [token for row in read(tmp_path, 0).rows for token in row.tokens]
    assert tokens
    assert all(token.student_log_prob < 0 < token.student_entropy for token in tokens)


def test_folder_value_and_picture_are_chosen(home, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "elsewhere"
    trained(home, tmp_path, steps=1, folder=folder, value="student_entropy", png=True)
    assert written(folder) == [f"step_000000.{kind}" for kind in ("html", "json", "png")]
    assert 'id="by-student_entropy" checked' in (folder / "step_000000.html").read_text()
    assert (folder / "step_000000.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "credit_maps").exists()


def tracker(name):
    """A tracker's callback, not set up: its package need not be here."""
    kind = INTEGRATION_TO_CALLBACK[name]
    return kind.__new__(kind)


def test_maps_go_where_the_trainer_reports(home, tmp_path, monkeypatch):
    trainer = make(FusedSDPOTrainer, home, max_steps=1, output_dir=str(tmp_path), **FEEDBACK)
    callback = CreditMapCallback(trainer, png=True)
    trainer.train()
    sent = []
    monkeypatch.setitem(credit_reports.REPORTERS, "wandb", sent.append)
    state = types.SimpleNamespace(global_step=50, is_world_process_zero=True)
    callback.on_generation_batch_built(args=trainer.args, state=state)
    assert sent == []  # report_to is "none"
    trainer.add_callback(tracker("wandb"))  # by hand, as report_to would
    trainer.add_callback(tracker("codecarbon"))
    state.global_step = 100
    callback.on_generation_batch_built(args=trainer.args, state=state)
    (report,) = sent
    assert report.page == (tmp_path / "credit_maps" / "step_000100.html").read_text()
    assert (report.value, report.png, report.step) == ("delta", True, 100)
    assert report.callbacks is trainer.callback_handler.callbacks


def test_trackers_that_get_no_maps_are_named_when_training_begins(recwarn):
    names = ("wandb", "codecarbon", "dagshub", "comet_ml")  # DagsHub's callback is MLflow's
    handler = types.SimpleNamespace(callbacks=[object(), *map(tracker, names)])
    callback = CreditMapCallback(types.SimpleNamespace(callback_handler=handler))
    args = types.SimpleNamespace()
    state = types.SimpleNamespace(is_world_process_zero=False)
    callback.on_train_begin(args, state, None)
    assert not recwarn.list
    state.is_world_process_zero = True
    with pytest.warns(UserWarning, match="wandb, not to codecarbon, comet_ml; read them in"):
        callback.on_train_begin(args, state, None)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"every": 0}, "every must be an integer of at least 1"),
        ({"num_sequences": 0}, "num_sequences must be an integer of at least 1"),
        ({"value": "advantage"}, "value must be one of"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        CreditMapCallback(None, **options)
