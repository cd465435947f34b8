"""SD-Zero's first phase on sums: collect revision traces, then train on them.

python -m fused_sd.integrations.examples.sd_zero_phase1 --output sd-zero-srt

A run that was killed while it collected continues where it stopped.  The second phase,
``sd_zero_phase2``, starts from the saved model, and takes ``--thinking`` where this one did.
"""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from fused_sd.integrations.examples.arithmetic import questions, reward
from fused_sd.integrations.examples.start import LENGTHS, MODELS
from fused_sd.integrations.trl.collect import collect_traces
from fused_sd.integrations.trl.generators import transformers_generate
from fused_sd.integrations.trl.revise import TraceConfig
from fused_sd.integrations.trl.srt import SRTConfig, SRTTrainer
from fused_sd.integrations.trl.srt_stages import sequential_srt


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="SD-Zero, phase 1: self-revision training")
    parser.add_argument("--model", help="path or name")
    parser.add_argument("--thinking", action="store_true", help="take a model that thinks")
    parser.add_argument("--output", default="sd-zero-srt", help="folder of traces and model")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--digits", type=int, default=4, help="digits of each number in a sum")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--batch-size", type=int, default=32, help="prompts in one generation")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument(
        "--stages", action="store_true", help="train in two stages, as the official code does"
    )
    parser.add_argument(
        "--stage2-traces", type=int, default=100, help="traces of the revision stage"
    )
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)
    options.model = options.model or MODELS[options.thinking]
    options.max_new_tokens = options.max_new_tokens or LENGTHS[options.thinking]
    return options


def main(arguments: list[str] | None = None) -> None:
    """Collect traces, train on them and save the model."""
    options = parse(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    args = SRTConfig(
        output_dir=options.output,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        gradient_accumulation_steps=8,
        use_cpu=options.cpu,
        bf16=not options.cpu,
        save_strategy="no",
        report_to="none",
    )
    traces, _ = collect_traces(
        transformers_generate(
            model.to(args.device),
            tokenizer,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
        ),
        questions(options.questions, digits=options.digits),
        reward,
        tokenizer,
        Path(options.output) / "traces.jsonl",
        config=TraceConfig(
            chat_template_kwargs={"enable_thinking": options.thinking},
            source=f"{options.model}, {options.max_new_tokens} tokens",
        ),
        report=print,
    )
    if options.stages:
        trainer = sequential_srt(
            model,
            args,
            traces,
            num_revision_traces=options.stage2_traces,
            processing_class=tokenizer,
        )
    else:
        trainer = SRTTrainer(model, args, traces, processing_class=tokenizer)
        trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
