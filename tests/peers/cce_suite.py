"""Cut Cross Entropy's own tests with its loss and with ours in its place.

    python tests/peers/cce_suite.py CHECKOUT [FILE ...] [--only EXPRESSION]

CHECKOUT is a checkout of apple/ml-cross-entropy, whose package runs from there.  Its tests ask for
CUDA: in the copy that runs they ask for the CPU, where of its implementations only torch_compile
can run.  With ours the tests of the default implementation run, against the references in them.
The exit status is 1 if a test fails with ours that passes with theirs, or fails for another reason.
"""

import sys
from pathlib import Path

import suites

FILES = ("tests/test_cce_loss_forward.py", "tests/test_cce_loss_backward.py")
ON_CPU = {
    "torch.cuda.is_available()": "True",
    "torch.cuda.manual_seed": "torch.manual_seed",
    '"cuda"': '"cpu"',
}


def prepared(checkout: Path, folder: Path) -> None:
    """Copy package and tests, and put the CPU in CUDA's place in the tests."""
    for name in ("cut_cross_entropy", "tests"):
        suites.copied(checkout, folder, name)
    for file in FILES:
        text = (folder / file).read_text(encoding="utf-8")
        for old, new in ON_CPU.items():
            text = text.replace(old, new)
        (folder / file).write_text(text, encoding="utf-8")


SUITE = suites.Suite(
    "Cut Cross Entropy",
    "cce_plugin",
    FILES,
    prepared,
    environment={"TORCHDYNAMO_DISABLE": "1"},
    only="not exact",
)

if __name__ == "__main__":
    sys.exit(suites.main(SUITE, __doc__))
