"""Code in the README and in the docs runs as printed; the site has a page for all there is."""

import importlib
import inspect
import pathlib
import re
import runpy
import sys
import types

import mktestdocs
import pygments.lexers
import pytest
from pygments.token import Token

from benchmarks import report

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
# As mkdocs loads it: by its path.
formulas = types.SimpleNamespace(**runpy.run_path(str(DOCS / "hooks" / "formulas.py")))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.py"))
SCRIPTS = [*NOTEBOOKS, *sorted((ROOT / "examples").glob("*.py"))]
# Columns of a line of code that the site and GitHub show without a scroll bar.
COLUMNS = 80
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)
PUBLIC = ["taylor_softmax"] + [
    f"taylor_softmax.{path.stem}"
    for path in sorted((ROOT / "taylor_softmax").glob("*.py"))
    if not path.stem.startswith("_")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page, capsys):
    """All of a page, one after the other, in one namespace."""
    mktestdocs.check_md_file(page, memory=True)


@pytest.mark.quick
def test_kernel_of_the_readme_is_what_it_claims(capsys):
    _, example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    namespace = {}
    exec(example, namespace)
    assert namespace["kernel"].nngp.shape == namespace["kernel"].ntk.shape == (3, 3)
    assert capsys.readouterr().out


@pytest.mark.quick
def test_a_block_that_fails_is_noticed(tmp_path):
    """Negative control."""
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        mktestdocs.check_md_file(page, memory=True)


def prose(page):
    """A page, or the Markdown of a notebook, without its code."""
    text = page.read_text()
    if page.suffix == ".py":
        cells = text.split("# %%")
        text = "".join(cell.replace("\n# ", "\n") for cell in cells if "[markdown]" in cell)
    return re.sub(r"`[^`]*`", "", FENCED.sub("", text))


@pytest.mark.quick
def test_formulas_come_out_whole():
    """No token of their MathML is `&` or an unknown command, which the converter passes on."""
    pages = {page: FORMULA.findall(prose(page)) for page in [*PAGES, *SCRIPTS]}
    assert sum(map(len, pages.values())) > 50
    for page, found in pages.items():
        for display, inline in found:
            converted = formulas.mathml(display or inline, display=bool(display))
            assert not formulas.mistakes(converted), (page.name, display or inline)


@pytest.mark.quick
def test_bold_digits_are_characters():
    assert formulas.mathml(r"\mathbf{1}\mathbf{1}^T").count("<mn>\U0001d7cf</mn>") == 2
    assert "<mn>1</mn>" in formulas.mathml("1")


@pytest.mark.quick
def test_functions_and_relations_have_space_around_them():
    def spaces(formula):
        return formulas.mathml(formula).count("<mspace")

    assert spaces(r"h \log t") == 2
    assert spaces(r"a_1 \log x_1 + \exp t") == 3
    assert spaces(r"-\log(t)") == spaces(r"\log \sum_j t_j") == spaces("l o g") == 0
    assert "<mo>&#x0223C;</mo>" in formulas.mathml(r"z \sim N(0, 1)")


@pytest.mark.quick
def test_a_sign_has_no_space_behind_it():
    """Unlike the minus of a difference. Infinity has none either: it is no operator."""
    for formula in (r"\exp(-t)", "[-1, 1]", "x = -y", r"(0, -\infty)", r"\int -f'"):
        assert formulas.mathml(formula).count('<mo form="prefix">&#x02212;</mo>') == 1, formula
    for formula in ("a - b", "(a) - b", "a_i - b", "|a| - b", "n! - 1", "-a"):
        assert "prefix" not in formulas.mathml(formula), formula
    assert "<mi>&#x0221E;</mi>" in formulas.mathml(r"\infty")


@pytest.mark.quick
def test_no_line_breaks_between_a_formula_and_its_punctuation():
    def converted(text):
        formula = r'<span class="arithmatex">\(m\)</span>'
        return formulas.on_page_content(text.replace("$m$", formula), page=None)

    m = formulas.mathml("m")
    assert converted("an $m$, even") == f'an <span class="formula">{m},</span> even'
    assert converted("($m$ is even)") == f'<span class="formula">({m}</span> is even)'
    assert converted("an even $m$ here") == f"an even {m} here"


@pytest.mark.quick
def test_what_comes_out_broken_is_noticed():
    """Negative control: an environment and a command that the converter does not know."""
    for broken in (r"\begin{aligned} a &= b \end{aligned}", r"\unheardof{x}"):
        assert formulas.mistakes(formulas.mathml(broken)), broken
    assert formulas.mistakes('<code><span class="err">$</span></code>')
    assert not formulas.mistakes(formulas.mathml(r"\begin{split} a &= \frac{b}{2} \end{split}"))


@pytest.mark.quick
def test_code_fits_its_column():
    for page in PAGES:
        text = page.read_text()
        code = [line for _, _, block in FENCED.findall(text) for line in block.splitlines()]
        # Markdown takes what is indented by four for code as well.
        code += re.findall(r"^    (.*)$", FENCED.sub("", text), re.MULTILINE)
        too_long = [line for line in code if len(line) > COLUMNS]
        assert not too_long, (page.name, too_long)
    for script in SCRIPTS:
        too_long = [line for line in script.read_text().splitlines() if len(line) > COLUMNS]
        assert not too_long, (script.name, too_long)


@pytest.mark.quick
def test_code_is_in_its_language():
    """Nothing in a block is what its highlighter marks as an error."""
    languages = set()
    for page in PAGES:
        for _, language, block in FENCED.findall(page.read_text()):
            assert language, (page.name, block)
            languages.add(language)
            lexer = pygments.lexers.get_lexer_by_name(language)
            tokens = [value for kind, value in lexer.get_tokens(block) if kind in Token.Error]
            assert not tokens, (page.name, tokens)
    assert {"python", "bash"} <= languages


def statements(text):
    """Lines that assign something and are neither in a block of code nor indented."""
    return re.findall(r"^\w[\w, ]* = .*", FENCED.sub("", text), re.MULTILINE)


@pytest.mark.quick
@pytest.mark.parametrize("module", PUBLIC)
def test_code_of_docstrings_is_a_block(module):
    """A formatter takes the indentation away that is all that makes a block of it."""
    loaded = importlib.import_module(module)
    documented = [loaded, *(getattr(loaded, name) for name in loaded.__all__)]
    for each in documented:
        if getattr(each, "__module__", module).startswith("taylor_softmax"):
            assert not statements(inspect.getdoc(each) or ""), each


@pytest.mark.quick
def test_code_outside_a_block_is_noticed():
    assert statements("Text.\n\na, b = f(\n    1\n)\n")
    assert not statements("Text, `a = b`.\n\n```python\na = 1\n```\n\n    b = c\n")


@pytest.mark.quick
def test_readme_is_short():
    text = FENCED.sub("", re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text()))
    assert len(text.split()) <= 500


@pytest.mark.quick
def test_a_report_keeps_the_parts_that_are_not_asked_for(tmp_path, monkeypatch):
    parser = report.options("benchmarks.example", None)
    output = ["--output", str(tmp_path / "report.md")]

    def written(text, *options):
        parts = {name: lambda name=name: (f"## {name}", text) for name in ("one", "two-b")}
        monkeypatch.setattr(sys, "argv", ["example", *options])
        arguments = parser.parse_args([*options, *output])
        report.run("Example", "benchmarks.example", parts, arguments)
        return report.sections((tmp_path / "report.md").read_text())

    before = written("old")
    after = written("new", "--only", "two-b")
    assert list(after) == ["one", "two-b"]
    assert after["one"] == before["one"]
    assert "new" in after["two-b"]
    assert "old" not in after["two-b"]
    assert "`python -m benchmarks.example --only two-b`" in after["two-b"]


@pytest.mark.quick
def test_every_report_is_in_parts():
    """Those of accuracy, which has a program of its own, apart."""
    for path in (ROOT / "benchmarks" / "results").glob("*.md"):
        found = report.sections(path.read_text())
        assert path.stem in ("accuracy", "accuracy_gpu") or found, path
        assert all("Command: `python -m benchmarks." in section for section in found.values())


@pytest.mark.quick
def test_no_two_pages_have_one_name():
    """Neither in the navigation nor as a heading, which the search shows."""
    navigation = re.findall(r"^ +- (.*): \S+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(set(navigation)) == len(navigation) > 30
    sources = [*DOCS.rglob("*.md"), *(ROOT / "benchmarks" / "results").glob("*.md")]
    headings = [re.match(r"# (.*)", page.read_text()) for page in sources]
    headings += [re.search(r"^# # (.*)", path.read_text(), re.MULTILINE) for path in NOTEBOOKS]
    # A page that shows a report has the report's heading.
    names = [heading[1].lower() for heading in headings if heading]
    assert len(names) > 30
    assert len(set(names)) == len(names), sorted(names)


@pytest.mark.quick
def test_navigation_has_every_page():
    """Notebooks are scripts here, and pages of the site."""
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    notebooks = {f"notebooks/{path.stem}.md" for path in (DOCS / "notebooks").glob("*.py")}
    named = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(notebooks) == 3
    assert sorted(named) == sorted(pages | notebooks)


@pytest.mark.quick
def test_site_shows_every_report():
    reports = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    shown = {path.stem: path.read_text() for path in (DOCS / "reports").glob("*.md")}
    assert reports == set(shown)
    for name, text in shown.items():
        assert f'"benchmarks/results/{name}.md"' in text


@pytest.mark.quick
@pytest.mark.parametrize("module", PUBLIC)
def test_reference_has_every_public_name(module):
    """As a member that mkdocstrings documents, a page of its own, or a name of neural_tangents."""
    page = (DOCS / "reference" / f"{module.rpartition('.')[2]}.md").read_text()
    assert f"::: {module}\n" in page
    names = re.findall(r"^ {8}- (\w+)$", page, re.MULTILINE)
    mentioned = re.findall(r"`(\w+)`|\[(\w+)\]\(", page)
    names += [name for pair in mentioned for name in pair if name]
    public = importlib.import_module(module).__all__
    assert set(public) <= set(names)
    assert len(set(public)) == len(public)


def unknown_places(text):
    """Files that a text names and nobody has, and names that are not in the file behind them."""
    files = [
        path
        for folder in ("taylor_softmax", "derivations")
        for path in ROOT.glob(f"{folder}/**/*.py")
    ]

    def found(name):
        return [path for path in files if str(path).endswith(f"/{name}")]

    named = re.findall(r"`([\w/]+\.py)`", text)
    defined = re.findall(r"`(?:\w+\.)?(\w+)` \(`([\w/]+\.py)`\)", text)
    missing = [name for name in named if not found(name)]
    for name, file in defined:
        pattern = re.compile(rf"^ *(?:def|class) {name}\b", re.MULTILINE)
        if not any(pattern.search(path.read_text()) for path in found(file)):
            missing.append(name)
    assert len(defined) < len(named)
    return missing


@pytest.mark.quick
def test_the_map_names_what_there_is():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert not unknown_places(text)
    # Controls: a function that has another name, and a file.
    assert "covariances" in text
    assert unknown_places(text.replace("`covariances`", "`class_covariances`"))
    assert unknown_places(text.replace("`trace.py`", "`traces.py`"))
