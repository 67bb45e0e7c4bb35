"""Formulas become MathML, which browsers show by themselves; a broken one stops the build."""

import html
import re
from typing import Any

import latex2mathml.converter

# What pymdownx.arithmatex leaves of `$...$` and `$$...$$`.
FORMULA = re.compile(
    r'(\(?)<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\2>([),.:;?]*)', re.DOTALL
)
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
# Browsers subtract with every minus but the first of a row. It is a sign behind these: ( [ , = ~,
# the integral, less or equal, greater or equal.
SIGN = re.compile(
    r"(<mo\b[^>]*>(?:\[|&#x0(?:0028|002C|003D|223C|222B|2264|2265);)</mo>)<mo>&#x02212;</mo>"
)
# Infinity is no operator, and has no space around it.
INFINITY = re.compile(r"<mo>(&#x0221E;)</mo>")
# Pygments' class of what is not in the language of a block of code.
NOT_CODE = re.compile(r'<span class="err">.*?</span>')


def mathml(formula: str, *, display: bool = False) -> str:
    """`formula`, in LaTeX, as MathML."""
    mode = "block" if display else "inline"
    converted = latex2mathml.converter.convert(formula.strip(), display=mode)
    for beside in (BEFORE_FUNCTION, BEHIND_FUNCTION):
        converted = beside.sub(rf"\1{SPACE}", converted)
    converted = converted.replace(TILDE, RELATION)
    converted = INFINITY.sub(r"<mi>\1</mi>", converted)
    converted = SIGN.sub(r'\1<mo form="prefix">&#x02212;</mo>', converted)
    return BOLD.sub(lambda match: f"<mn>{match[1].translate(BOLD_DIGITS)}</mn>", converted)


def mistakes(page: str) -> list[str]:
    """The pieces of a page's HTML that a converter or a highlighter did not understand."""
    return [match[0] for pattern in (UNCONVERTED, NOT_CODE) for match in pattern.finditer(page)]


def in_text(match: re.Match[str]) -> str:
    """A formula, which no line break parts from the brackets and the punctuation beside it."""
    before, _, kind, formula, behind = match.groups()
    converted = before + mathml(html.unescape(formula), display=kind == "[") + behind
    return f'<span class="formula">{converted}</span>' if before or behind else converted


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """The page with its formulas as MathML.

    Raises:
      ValueError: a formula or a block of code came out broken.
    """
    content = FORMULA.sub(in_text, content)
    if found := mistakes(content):
        raise ValueError(f"{page.file.src_uri} has what was not understood: {found}")
    return content
