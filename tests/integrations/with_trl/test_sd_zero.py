"""SD-Zero's second phase: what the teacher reads, token by token, with tools and images too."""

import os

import pytest
import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import official
import trl
from chatml import chatml_tokenizer
from closeness import TOLERANCE, assert_close
from datasets import Dataset
from method_pairs import GROUP, loss_and_gradients, make, sample, states
from tiny_models import tiny_model
from tiny_vlm import FAMILIES, image, tiny_vlm
from transformers import Olmo2Config, Olmo2ForCausalLM
from trl_pairs import CHECKPOINTING, TOKENIZER

from fused_sd.integrations.trl import SDZeroConfig, SDZeroTrainer
from fused_sd.integrations.trl.collect import collect_traces
from fused_sd.integrations.trl.fused_grpo import model_inputs
from fused_sd.integrations.trl.revise import TraceConfig
from fused_sd.integrations.trl.srt import SRTConfig, SRTTrainer

END = TOKENIZER.eos_token_id
RIGHT = "Let me rephrase the above solution."
WRONG = "Wait, this response is wrong. Let me correct it."
OLMO_WRONG = "Wrong. I need to redo all."
NO_THOUGHT = {"enable_thinking": False}


def ids(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def script(trainer, *turns):
    """Let the trainer say what is written: in each turn a completion for each prompt."""
    left = list(turns)

    def generate(prompt_ids, *_, **__):
        said = left.pop(0)
        assert len(said) == len(prompt_ids)
        return [list(tokens) for tokens in said], None

    trainer._generate_single_turn = generate
    return trainer


def read(inputs, side="teacher_"):
    """The tokens of each row without padding."""
    if side:
        pairs = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
    else:
        pairs = inputs["prompt_ids"], inputs["prompt_mask"]
    return [row[mask.bool()].tolist() for row, mask in zip(*pairs, strict=True)]


def test_the_first_copy_is_the_whole_response_with_its_end_if_it_has_one(tmp_path):
    said = [[*ids("It is 4"), END], [*ids("4"), END], ids("It is"), [END]]
    trainer = script(make("SDZero", tmp_path), said)
    inputs = sample(trainer)
    prompt = ids("Solve 2 + 2.")
    for n, row in enumerate(read(inputs)):
        phrase = ids(f"\n\n{RIGHT if n % 2 else WRONG}\n\n")  # every second rollout is right
        assert row == [*prompt, *said[n], *phrase, *said[n]]
    assert inputs["loss_mask"].sum(1).tolist() == [len(tokens) for tokens in said]


def test_the_first_copy_can_be_shown_without_its_end(tmp_path):
    """As phase 1's traces show it; the second copy, which is scored, keeps its end."""
    said = [[*ids("It is 4"), END], [*ids("4"), END], ids("It is"), [END]]
    trainer = script(make("SDZero", tmp_path, keep_response_end=False), said)
    inputs = sample(trainer)
    for n, row in enumerate(read(inputs)):
        phrase = ids(f"\n\n{RIGHT if n % 2 else WRONG}\n\n")
        bare = [token for token in said[n] if token != END]
        assert row == [*ids("Solve 2 + 2."), *bare, *phrase, *said[n]]
    assert inputs["loss_mask"].sum(1).tolist() == [len(tokens) for tokens in said]


def test_whether_the_end_is_shown_is_true_or_false(tmp_path):
    with pytest.raises(ValueError, match="keep_response_end must be True or False, got 'no'"):
        SDZeroConfig(str(tmp_path), use_cpu=True, bf16=False, keep_response_end="no")


@pytest.mark.parametrize("spare, kept", [(7, 3), (8, 4), (9, 4), (14, 7), (15, 7)])
def test_prompt_phrase_and_two_copies_have_the_limit_together(tmp_path, spare, kept):
    """The official rule: allowed = (limit - |x| - |phrase|) // 2, for student and teacher."""
    response = [*range(10, 16), END]  # 7 tokens
    prompt, phrase = ids("Solve 2 + 2."), ids("\n\nNo.\n\n")
    settings = {"correct_phrase": "No.", "wrong_phrase": "No.", "max_completion_length": 8}
    limit = len(prompt) + len(phrase) + spare
    trainer = script(make("SDZero", tmp_path, max_reprompt_len=limit, **settings), [response] * 4)
    inputs = sample(trainer)
    for row in read(inputs):
        assert row == [*prompt, *response[:kept], *phrase, *response]
        assert len(prompt) + len(phrase) + 2 * kept <= limit
    assert inputs["loss_mask"].tolist() == [[1] * kept + [0] * (7 - kept)] * GROUP


def test_without_space_or_without_a_verdict_there_is_nothing_to_learn(tmp_path):
    prompt, phrase = ids("Solve 2 + 2."), ids(f"\n\n{WRONG}\n\n")
    trainer = make("SDZero", tmp_path, max_reprompt_len=len(prompt) + len(phrase) + 1)
    said = [[*ids("4"), END]] * GROUP
    inputs = sample(script(trainer, said))
    assert inputs["loss_mask"][0].sum() == 0
    assert inputs["self_distillation_mask"][0] == 0

    def undecided(prompts, **_):
        return [None, 0.0, 1.0, None]

    unknown = script(make("SDZero", tmp_path, reward_funcs=undecided), said)
    assert sample(unknown)["self_distillation_mask"].tolist() == [0, 1, 1, 0]


def test_the_phrases_are_those_of_the_models_family_and_explicit_ones_win(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Olmo2Config(vocab_size=len(TOKENIZER), num_attention_heads=2, **sizes)
    olmo = Olmo2ForCausalLM(config).double()
    trainer = make("SDZero", tmp_path, student=olmo)
    assert trainer.phrases == (RIGHT, OLMO_WRONG)
    said = [[*ids("4"), END]] * GROUP
    (row, *_) = read(sample(script(trainer, said)))
    assert row == [*ids("Solve 2 + 2."), *said[0], *ids(f"\n\n{OLMO_WRONG}\n\n"), *said[0]]
    assert make("SDZero", tmp_path).phrases == (RIGHT, WRONG)
    given = make("SDZero", tmp_path, student=olmo, wrong_phrase="No.")
    assert given.phrases == (RIGHT, "No.")


def test_the_settings_are_those_of_the_official_script(tmp_path):
    args = SDZeroConfig(str(tmp_path), use_cpu=True, bf16=False)
    expected = {
        "learning_rate": 5e-6,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 20,
        "weight_decay": 0.01,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "max_completion_length": 8192,
        "max_reprompt_len": 32768,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "num_generations": 1,
        "distillation_topk": 64,
        "forward_weight": 0.5,
        "success_reward_threshold": 0.5,
        "teacher_model_kind": "base",
        "loss_type": "dapo",
        "vllm_importance_sampling_correction": False,
    }
    assert {name: getattr(args, name) for name in expected} == expected


# Both phases together


def reward(prompts, completions, **_):
    return [float(said[-1]["content"].endswith("4")) for said in completions]


def test_phase_2_asks_as_phase_1_has_trained(tmp_path):
    words = chatml_tokenizer()
    end = words.eos_token_id
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "2+2?"}]}] * 4)

    def say(prompts):
        is_revision = ["Wait" in words.decode(prompt) for prompt in prompts]
        return [[*ids("So 4" if later else "It is 5", words), end] for later in is_revision]

    config = TraceConfig(1, 1, chat_template_kwargs=NO_THOUGHT)
    traces, _ = collect_traces(say, dataset, reward, words, tmp_path / "t.jsonl", config=config)
    trace = traces[0]
    torch.manual_seed(0)
    args = SRTConfig(str(tmp_path / "srt"), use_cpu=True, bf16=False, max_steps=1, report_to="none")
    model = tiny_model(vocab=len(words), max_position_embeddings=512)
    phase_1 = SRTTrainer(model, args, traces, processing_class=words)
    phase_1.train()
    phase_1.save_model(str(tmp_path / "reviser"))

    def phase_2(**settings):
        given = {"per_device_train_batch_size": 4, "max_completion_length": 8, "use_cpu": True}
        return SDZeroTrainer(
            str(tmp_path / "reviser"),
            reward,
            SDZeroConfig(str(tmp_path / "out"), bf16=False, report_to="none", **given, **settings),
            dataset,
        )

    trainer = phase_2()
    initial = [*trace.initial_ids, end]
    inputs = sample(script(trainer, [initial] * 4))
    assert words.decode(trace.prompt_ids).endswith("<think>\n\n</think>\n\n")
    assert read(inputs, "") == [list(trace.prompt_ids)] * 4
    # the response's end apart, the tokens of phase 1 up to the revision; then the response again
    assert read(inputs) == [[*trace.prompt_ids, *initial, *trace.verdict_ids, *initial]] * 4
    assert (
        trainer.chat_template_kwargs
        == phase_2(chat_template_kwargs=NO_THOUGHT).chat_template_kwargs
    )
    with pytest.raises(ValueError, match="chat_template_kwargs must be those that the model was"):
        phase_2(chat_template_kwargs={"enable_thinking": True})


# Tools


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number.
        b: the second number.
    """
    return a + b


def tool_tokenizer():
    words = chatml_tokenizer()
    special = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    words.add_tokens(special)
    words.chat_template = trl.chat_template_utils.qwen3_chat_template
    return words


def test_the_first_copy_holds_tool_results_and_only_own_tokens_have_loss(tmp_path):
    words = tool_tokenizer()
    end = words.eos_token_id
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
    asks, answers, stops = [[*ids(text, words), end] for text in (call, "It is 4", "It is 5")]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "2+2?"}]}] * 4)
    config = SDZeroConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_completion_length=200,
        max_reprompt_len=2000,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    torch.manual_seed(0)
    trainer = SDZeroTrainer(
        tiny_model(vocab=len(words), max_position_embeddings=2048).double(),
        reward,
        config,
        dataset,
        processing_class=words,
        tools=[add],
    )
    trainer.current_gradient_accumulation_steps = 1
    # the third rollout asks for nothing, the fourth is cut off behind the tool's result
    script(trainer, [asks, asks, stops, asks], [answers, stops, answers[:-2]])
    inputs = sample(trainer)
    result = ids(
        "\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n",
        words,
    )
    said = [
        [(asks, 1), (result, 0), (answers, 1)],
        [(asks, 1), (result, 0), (stops, 1)],
        [(stops, 1)],
        [(asks, 1), (result, 0), (answers[:-2], 1)],
    ]
    prompts = read(inputs, "")
    for n, (row, parts) in enumerate(zip(read(inputs), said, strict=True)):
        whole = [token for tokens, _ in parts for token in tokens]
        phrase = ids(f"\n\n{RIGHT if n == 0 else WRONG}\n\n", words)
        assert row == [*prompts[n], *whole, *phrase, *whole]
        own = [flag for tokens, flag in parts for _ in tokens]
        assert inputs["loss_mask"][n].tolist() == own + [0] * (
            len(inputs["loss_mask"][n]) - len(own)
        )
    loss, gradients = loss_and_gradients(trainer, inputs)
    plain = tiny_copy(trainer)
    batch = states(plain, inputs, "student")
    reference = official.sd_zero(batch, top_k=64, num_tokens=float(batch.mask.sum()))
    reference.backward()
    assert_close(loss, reference.detach(), torch.float64, "loss")
    for name, parameter in plain.named_parameters():
        assert_close(gradients[name], parameter.grad, torch.float64, name)


def tiny_copy(trainer):
    """The trainer's model without what has been attached to it."""
    plain = type(trainer.model)(trainer.model.config).double().eval()
    plain.load_state_dict(trainer.model.state_dict())
    return plain


# Images


def plain_loss(model, inputs, top_k):
    """The definition, by plain PyTorch: mixed KL over the teacher's top-k, mean over the tokens."""
    length = inputs["completion_ids"].size(1)

    def log_probs(prefix, ids, mask, chosen=None):
        more = model_inputs(inputs, prefix)
        logits = model(input_ids=ids, attention_mask=mask, **more).logits[:, -length - 1 : -1]
        chosen = logits.topk(top_k, -1).indices if chosen is None else chosen
        return logits.gather(-1, chosen).log_softmax(-1), chosen

    with torch.no_grad():
        teacher, chosen = log_probs(
            "teacher_", inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
        )
    student, _ = log_probs(
        "",
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        chosen,
    )
    mixed = 0.5 * teacher.exp() * (teacher - student) + 0.5 * student.exp() * (student - teacher)
    return (mixed.sum(-1) * inputs["loss_mask"]).sum() / inputs["loss_mask"].sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_images_learns_as_plain_pytorch_does(family, tmp_path):
    model, processor = tiny_vlm(family)
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "What is it?"}],
                "images": [image(n, 16 * (1 + n % 2))] * (1 + n % 2),
            }
            for n in range(4)
        ]
    )
    config = SDZeroConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_completion_length=8,
        distillation_topk=5,
        use_cpu=True,
        bf16=False,
        report_to="none",
        **{CHECKPOINTING: False},
    )

    def every_second(prompts, **_):
        return [float(n % 2) for n in range(len(prompts))]

    trainer = SDZeroTrainer(model, every_second, config, dataset, processing_class=processor)
    trainer.current_gradient_accumulation_steps = 1
    words = processor.tokenizer
    texts = "It is red.", "It", "Red, or is it?", "What"
    said = [[*ids(text, words)[:7], words.eos_token_id] for text in texts]
    inputs = sample(script(trainer, said), rows=range(4))
    prompts = read(inputs, "")
    for n, row in enumerate(read(inputs)):
        phrase = ids(f"\n\n{RIGHT if n % 2 else WRONG}\n\n", words)
        assert row == [*prompts[n], *said[n], *phrase, *said[n]]
    loss, gradients = loss_and_gradients(trainer, inputs)
    plain, _ = tiny_vlm(family)
    reference = plain_loss(plain, inputs, 5)
    reference.backward()
    # Gemma 3 normalises in fp32, whose rounding depends on where a row is padded
    dtype = torch.float32 if family == "Gemma3" else torch.float64
    assert_close(loss, reference.detach(), dtype, "loss")
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys()
    assert any("visual" in name or "vision" in name for name in wanted)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():  # some are 0 but for rounding
        error = float((gradients[name] - gradient).abs().max())
        assert error <= TOLERANCE[dtype] * largest, name
