"""``python -m fused_sd.integrations.verl doctor``: whether verl uses fused_sd, and if not, why."""

import argparse
import sys

from fused_sd.integrations.verl.doctor import doctor


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_sd.integrations.verl", description="fused_sd inside verl."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("doctor", help="whether verl uses fused_sd, and if not, why; exit status 1")
    parser.parse_args()
    return doctor()


if __name__ == "__main__":
    sys.exit(main())
