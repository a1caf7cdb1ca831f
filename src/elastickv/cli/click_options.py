"""Click options made from the dataclasses of options: types, defaults and help stand there, spellings here."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from elastickv.benchmark.model_options import USUAL_DTYPE as USUAL_DTYPE_HELP
from elastickv.benchmark.options import OptionInfo, defaults_of, options_of, types_of

# Where the flag is not the option's name with hyphens.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "context": ("--context", "--seq"),
    "graphs": ("--no-graphs",),
    "paired": ("--paired-baseline",),
    "seq": ("--seq", "--context"),
    "time_limit_s": ("--time-limit",),
    "until_ci_percent": ("--until-ci",),
}
_PATH = click.Path(path_type=Path)
_Decorator = Callable[[Any], Any]

# Options that several commands with a model share.
RECIPE: _Decorator = click.option("--recipe", help="Instead of --compress: a recipe's text such as int4,pages=1/4, or a file.")
CALIBRATION: _Decorator = click.option(
    "--calibration", type=_PATH, help="File of `elastickv calibrate`.  [default: none, uniform]"
)
USUAL_DTYPE: _Decorator = click.option(
    "--dtype", help=f"Load the weights as fp32, fp16 or bf16.  [default: {USUAL_DTYPE_HELP}]"
)
USUAL_DEVICE: _Decorator = click.option(
    "--device", help="Where the model runs: cpu or cuda.  [default: cuda where there is one]"
)
FLOAT32_DTYPE: _Decorator = click.option(
    "--dtype", default="fp32", show_default=True, help="Load the model's weights as fp32, fp16 or bf16."
)
CPU_DEVICE: _Decorator = click.option("--device", default="cpu", show_default=True, help="Where the model runs: cpu or cuda.")


class UnicodeText(click.ParamType):  # type: ignore[type-arg]
    """A text of UTF-8, whatever encoding the locale names: Python escapes the bytes of an argument that it cannot decode."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text of an argument; fail where its bytes are not UTF-8."""
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            try:
                return os.fsencode(value).decode("utf-8")
            except UnicodeError:
                self.fail(f"it is not valid Unicode (character {error.start + 1}): give a text in UTF-8", param, ctx)
        return value


def hyphenated(name: str) -> str:
    """Return an option's name as we spell it: the original wrote some with underscores."""
    return name.replace("_", "-")


def decorated(callback: Callable[..., Any], options: Iterable[_Decorator]) -> Callable[..., Any]:
    """Return `callback` with options that are listed in this order."""
    for each in reversed(list(options)):
        callback = each(callback)
    return callback


def options_from(table: type, notes: dict[str, str] | None = None, several: Iterable[str] = ()) -> dict[str, _Decorator]:
    """Return an option of the command line for each of a dataclass.

    An option that is not typed is None, or False for a flag: the dataclass fills its default in.

    Parameters
    ----------
    notes : what the help adds to the default of an option, such as the default of another kind of run.
    several : names of options that are texts here, since each takes lists and ranges.
    """
    notes, types, defaults = notes or {}, types_of(table), defaults_of(table)
    return {
        name: _option(name, info, types[name], defaults[name], notes.get(name), name in several)
        for name, info in options_of(table).items()
    }


def spellings(name: str) -> tuple[str, ...]:
    """Return the flags of an option, the first one as messages write it."""
    return SPELLINGS.get(name, (f"--{hyphenated(name)}",))


def _option(name: str, info: OptionInfo, kind: type, default: Any, note: str | None, several: bool) -> _Decorator:
    flags = spellings(name)
    if kind is bool:
        return click.option(*flags, name, is_flag=True, flag_value=not default, default=None, help=info.help)
    shown = info.default_help if default is None else f"{default:g}" if kind is float else str(default)
    if note is not None:
        shown = note if shown is None else f"{shown}; {note}"
    text = info.help if shown is None else f"{info.help}  [default: {shown}]"
    if name == "peers":
        return click.option(*flags, name, is_flag=False, flag_value="all", help=text)
    return click.option(*flags, name, type=click.STRING if several else _PATH if kind is Path else kind, help=text)
