"""Liger's own tests with its losses and with ours in their place.

    python tests/peers/liger_suite.py CHECKOUT [FILE ...] [--only EXPRESSION]

CHECKOUT is a folder with Liger's package ``test``; it runs against the installed liger_kernel.
FILEs are relative to it; without any, those of FILES run, of them only shapes that a CPU runs in a
second.  Liger's fused_linear_jsd and fused_linear_cross_entropy are Triton kernels, whose tests
fail without a GPU; with ours they run, against the reference in each test.  A test that sets an
option that our losses do not have is skipped, and the reason is counted.  "without" counts tests
that pass and ask nothing of ours.  The exit status is 1 if a test fails with ours that passes with
Liger's, or fails for another reason.
"""

import sys

import suites

FILES = (
    "test/transformers/test_fused_linear_jsd.py",
    "test/transformers/test_fused_linear_cross_entropy.py",
    "test/chunked_loss/test_jsd_loss.py",
    "test/chunked_loss/test_grpo_loss.py",
)
SUITE = suites.Suite(
    "Liger",
    "liger_plugin",
    FILES,
    lambda checkout, folder: suites.copied(checkout, folder, "test"),
    environment={"TORCHDYNAMO_DISABLE": "1"},  # arithmetic, not what a compiler makes of it
    only="not 1024-4096",
)

if __name__ == "__main__":
    sys.exit(suites.main(SUITE, __doc__))
