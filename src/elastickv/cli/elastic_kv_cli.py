"""`elastic_kv_cli`: the original micro-benchmark's name and habits, for scripts written for it.

JSON by default, `results` before `inference_cycle`, the baseline always measured. Bad values exit 2 instead of being clamped.
Those scripts end a run after two minutes: on a slow machine fewer repetitions than requested are measured, and
`repetitions` in the JSON says how many.
"""

from elastickv.cli.bench import build_command
from elastickv.cli.error_handling import exit_with

TIME_LIMIT_S = 75.0

command = build_command(
    "elastic_kv_cli",
    "The paired elastic-KV micro-benchmark under its original name: JSON on stdout. It measures fewer repetitions than "
    "requested where its time limit is shorter.",
    "json",
    TIME_LIMIT_S,
)


def main() -> None:
    """Run `elastic_kv_cli`."""
    exit_with(command, "elastic_kv_cli")
