"""The command ``python -m fused_sd.integrations.verl doctor``."""

import argparse
import sys

from fused_sd.integrations.verl.doctor import doctor


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_sd.integrations.verl", description="fused_sd inside verl."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser(
        "doctor", help="check that verl uses fused_sd; exit with status 1 and say why if not"
    )
    parser.parse_args()
    return doctor()


if __name__ == "__main__":
    sys.exit(main())
