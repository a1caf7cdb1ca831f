"""`python -m elastickv.lm_eval ARGUMENTS`: the command `lm_eval`, which then knows the model `elastickv`."""

import sys
from importlib.util import find_spec

from elastickv.errors import UsageError
from elastickv.transformers.model_loading import NEEDED, require


def main() -> None:
    """Run the harness; a wrong option of the model is one line on stderr and exit code 2, as in `elastickv`."""
    try:
        require(*NEEDED)
        if find_spec("lm_eval") is None:
            raise UsageError("lm_eval is not installed: pip install lm_eval")
        from lm_eval.__main__ import cli_evaluate

        import elastickv.lm_eval.elastic_lm  # noqa: F401 - importing it registers the model

        cli_evaluate()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
