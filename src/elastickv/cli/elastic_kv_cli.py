"""`elastic_kv_cli`: the original micro-benchmark's name and habits, for scripts written for it.

JSON by default, `results` before `inference_cycle`, the baseline always measured. Bad values exit 2 instead of being clamped.
"""

from elastickv.cli.bench import build_command
from elastickv.cli.error_handling import exit_with

command = build_command(
    "elastic_kv_cli", "The paired elastic-KV micro-benchmark under its original name: JSON on stdout.", "json"
)


def main() -> None:
    """Run `elastic_kv_cli`."""
    exit_with(command, "elastic_kv_cli")
