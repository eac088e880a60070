"""Sphinx extension: links from names to the reference, and from the reference to the guides."""

import re
from typing import Any

import public_names
from areas import AREAS, title_of_page
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import desc, pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

from negmaml.cli.main import COMMANDS

NO_LINK = (nodes.reference, nodes.title, pending_xref)


class LinkNames(SphinxPostTransform):
    """Turn exact public names in code, such as `nm.fit`, into links to the reference."""

    default_priority = 5  # before Sphinx resolves references

    def run(self, **options: Any) -> None:
        names = public_names.aliases() | _local(self.env.docname)
        for literal in list(self.document.findall(nodes.literal)):
            if any(isinstance(above, NO_LINK) for above in _ancestors(literal)):
                continue
            text = literal.astext()
            if member := _member(text, literal):
                link = _name_link(member, self.env.docname)
            elif text in names:
                link = _name_link(names[text], self.env.docname)
            elif text.startswith("negmaml ") and text.split()[1:] in [[name] for name in COMMANDS]:
                link = _command_link(text.split()[1], self.app)
            else:
                continue
            literal.replace_self(link)
            link += literal
        for role in list(self.document.findall(lambda node: "guide-of" in _classes(node))):
            role.replace_self(_guide_link(role.astext(), self.app))


def _classes(node: nodes.Node) -> list[str]:
    return node.get("classes", []) if isinstance(node, nodes.inline) else []


def _ancestors(node: nodes.Node) -> Any:
    while node.parent is not None:
        node = node.parent
        yield node


def _member(text: str, literal: nodes.literal) -> str | None:
    """The full name of a member that the docstring of its class or of another member names."""
    described = {
        above[0]["ids"][0]
        for above in _ancestors(literal)
        if isinstance(above, desc) and above[0]["ids"]
    }
    classes = (entry for entry in public_names.entries() if entry.name in described)
    return next((f"{entry.name}.{text}" for entry in classes if text in entry.members), None)


def _local(docname: str) -> dict[str, str]:
    """Names that a page may use without a prefix: those of its area, in docstrings also `fit`."""
    areas = {area.module for area in AREAS[1:] if docname in (area.page, *area.guide_pages)}
    everywhere = {"negmaml"} if docname.startswith("reference/") else set()
    return public_names.local_aliases(everywhere) | public_names.local_aliases(areas)


def _name_link(name: str, docname: str) -> nodes.Node:
    return pending_xref(
        refdomain="py", reftype="obj", reftarget=name, refdoc=docname, refexplicit=True
    )


def _command_link(name: str, app: Any) -> nodes.Node:
    page, anchor = app.env.domains.standard_domain.anonlabels[f"command-{name}"]
    return make_refnode(app.builder, app.env.docname, page, anchor, [])


def _guide_link(name: str, app: Any) -> nodes.Node:
    entry = next(entry for entry in public_names.entries() if entry.name == name)
    page, anchor, title = app.env.guide_sections.get(name, (entry.area.guide, "", ""))
    text = title_of_page(page) + (f", {title}" if title else "")
    link = make_refnode(app.builder, app.env.docname, page, anchor, nodes.Text(text))
    return nodes.inline("", "Guide: ", link, classes=["guide-link"])


def find_sections(app: Any, env: Any) -> None:
    """Find the first section of its guide that has each public name in its code."""
    env.guide_sections = {}
    for area in AREAS:
        names = public_names.aliases() | public_names.local_aliases({area.module})
        here = {entry.name for entry in public_names.entries() if entry.area == area}
        for page in area.guide_pages:
            for code in env.get_doctree(page).findall(_is_code):
                for word in re.findall(r"[A-Za-z_][\w.]*", code.astext()):
                    if names.get(word) in here:
                        env.guide_sections.setdefault(names[word], (page, *_section(code)))


def _section(node: nodes.Node) -> tuple[str, str]:
    """The anchor and title of the section around a node, empty at the top of a page."""
    section = next(above for above in _ancestors(node) if isinstance(above, nodes.section))
    if isinstance(section.parent, nodes.document):
        return "", ""
    return section["ids"][0], section.next_node(nodes.title).astext()


def _is_code(node: nodes.Node) -> bool:
    return isinstance(node, (nodes.literal, nodes.literal_block))


def resolve_type(app: Any, env: Any, node: pending_xref, content: nodes.Node) -> nodes.Node | None:
    """Resolve names of classes in signatures, which Sphinx knows by their full names only."""
    home = public_names.aliases().get(node.get("reftarget", ""))
    if home is None or node.get("refdomain") != "py":
        return None
    domain = env.domains.python_domain
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, "obj", home, pending_xref(refdoc=node["refdoc"]), content
    )


def mathml(writer: Any, node: nodes.Node) -> None:
    """Write a formula as MathML, which browsers show without a script."""
    block = isinstance(node, nodes.math_block)
    formula = convert(node.astext(), display="block" if block else "inline")
    writer.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def _role(name: str) -> Any:
    def role(kind, raw, text, lineno, inliner, options=None, content=()):
        return [nodes.inline(raw, text, classes=[name])], []

    return role


def setup(app: Any) -> dict[str, bool]:
    app.add_role("param-name", _role("param-name"))
    app.add_role("guide-of", _role("guide-of"))
    app.add_post_transform(LinkNames)
    app.connect("env-updated", find_sections)
    app.connect("missing-reference", resolve_type)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
