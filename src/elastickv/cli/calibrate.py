"""`elastickv calibrate`."""

from pathlib import Path

import click

from elastickv.cli.click_options import CPU_DEVICE, FLOAT32_DTYPE
from elastickv.evaluation.evaluation_options import CALIBRATION_TOKENS


@click.command("calibrate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--text", type=click.Path(path_type=Path), help="Text to read.  [default: a shipped one]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: MODEL.calibration.json]")
@click.option("--tokens", type=int, help=f"Tokens of the text to read.  [default: {CALIBRATION_TOKENS}, or all]")
@FLOAT32_DTYPE
@CPU_DEVICE
def command(model: str, text: Path | None, output: Path | None, tokens: int | None, dtype: str, device: str) -> int:
    """Measure what each KV head of MODEL loses at each fraction of its pages, for recipes to be solved from.

    MODEL is a local directory, a .gguf file or a hub id; shape:NAME has random weights and no quality to measure.
    """
    from elastickv.cli.output import show
    from elastickv.cli.progress import Bar
    from elastickv.errors import UsageError, printable
    from elastickv.results.files import check_writable, write_text
    from elastickv.transformers.model_loading import NEEDED, load_model, require

    require(*NEEDED)
    if tokens is not None and tokens < 1:
        raise UsageError(f"--tokens={tokens} is out of range: give a whole number from 1 up")
    target = output or Path(f"{Path(model).name.removesuffix('.gguf')}.calibration.json")
    check_writable(target)
    with Bar() as bar:
        bar.phase("importing PyTorch and Transformers")
        from elastickv.evaluation.calibrate import calibrate
        from elastickv.evaluation.loading_progress import loading_progress
        from elastickv.evaluation.texts import calibration_text, read_text

        source = calibration_text() if text is None else read_text(text)
        bar.phase("loading")
        with loading_progress(bar.progress):
            loaded = load_model(model, dtype, device)
        bar.phase("calibrating")
        result = calibrate(loaded, source, tokens or CALIBRATION_TOKENS, bar.progress)
    try:
        write_text(target, result.dumps())
    except UsageError:
        show(result.dumps())
        raise
    heads = f"{len(result.layers)} layers x {result.kv_heads} KV heads"
    click.echo(
        f"{printable(str(target))}: {heads} of {result.model} ({result.fingerprint}) on {result.tokens} tokens of {result.text}"
    )
    return 0
