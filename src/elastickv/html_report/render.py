"""The page as HTML: one file, no script, nothing fetched."""

from typing import Any

from elastickv.errors import printable
from elastickv.html_report.charts.style import themed
from elastickv.html_report.content import Content
from elastickv.html_report.downloads import Download


def render(content: Content, svgs: dict[str, str], downloads: list[Download], *, printed: bool = False) -> str:
    """Return the page.

    Parameters
    ----------
    svgs : of each chart, by its name.
    downloads : what the page holds as files.
    printed : laid out for paper: light, everything open, a section begins on a page where it fits no more.
    """
    return _filled("page.html.j2", content, svgs, downloads, printed)


def render_fragment(content: Content, svgs: dict[str, str]) -> str:
    """Return what a notebook shows: the same without head, theme and downloads."""
    return _filled("fragment.html.j2", content, svgs, [], False)


def _filled(name: str, content: Content, svgs: dict[str, str], downloads: list[Download], printed: bool) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from elastickv.version import __version__

    environment = Environment(
        loader=PackageLoader("elastickv.html_report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_seen,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Matplotlib has escaped the texts that it was given.
    pictures: dict[str, Any] = {name: Markup(themed(svg)) for name, svg in svgs.items()}
    return environment.get_template(name).render(
        content=content, pictures=pictures, downloads=downloads, printed=printed, version=__version__
    )


def _seen(value: Any) -> Any:
    """Return a text with what can't be seen in it shown; markup of ours as it is."""
    return printable(value) if type(value) is str else value
