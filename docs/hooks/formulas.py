"""Formulas become MathML, which browsers show by themselves; a broken one stops the build."""

import html
import re
from typing import Any

import latex2mathml.converter

# What pymdownx.arithmatex leaves of `$...$` and `$$...$$`.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
# The converter passes on what it does not know: `&` of an unknown environment, unknown commands.
UNCONVERTED = re.compile(r"<m[inos]\b[^>]*>(?:&(?:amp;)?|[^<]*\\[^<]*)</m[inos]>")
# Browsers know no `mathvariant` but "normal" (MathML Core): a bold digit is a character of its own.
BOLD = re.compile(r'<mn mathvariant="bold">(\d+)</mn>')
BOLD_DIGITS = {ord("0") + digit: 0x1D7CE + digit for digit in range(10)}
# The converter takes functions for identifiers, which have no space beside another one.
FUNCTION = r"<mi>(?:cos|exp|log|sin)</mi>"
BEFORE_FUNCTION = re.compile(rf"(</m(?:i|n|sub|sup|subsup)>)(?={FUNCTION})")
BEHIND_FUNCTION = re.compile(rf"({FUNCTION})(?=<(?!/|mo|m\w+><mo))")
SPACE = '<mspace width="0.17em" />'
# So has a tilde that is an identifier, while the relation has space on both sides.
TILDE, RELATION = "<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>"
# Pygments' class of what is not in the language of a block of code.
NOT_CODE = re.compile(r'<span class="err">.*?</span>')


def mathml(formula: str, *, display: bool = False) -> str:
    """`formula`, in LaTeX, as MathML."""
    mode = "block" if display else "inline"
    converted = latex2mathml.converter.convert(formula.strip(), display=mode)
    for beside in (BEFORE_FUNCTION, BEHIND_FUNCTION):
        converted = beside.sub(rf"\1{SPACE}", converted)
    converted = converted.replace(TILDE, RELATION)
    return BOLD.sub(lambda match: f"<mn>{match[1].translate(BOLD_DIGITS)}</mn>", converted)


def mistakes(page: str) -> list[str]:
    """The pieces of a page's HTML that a converter or a highlighter did not understand."""
    return [match[0] for pattern in (UNCONVERTED, NOT_CODE) for match in pattern.finditer(page)]


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """The page with its formulas as MathML.

    Raises:
      ValueError: a formula or a block of code came out broken.
    """
    content = FORMULA.sub(
        lambda match: mathml(html.unescape(match[3]), display=match[2] == "["), content
    )
    if found := mistakes(content):
        raise ValueError(f"{page.file.src_uri} has what was not understood: {found}")
    return content
