"""Configuration of Sphinx.

Sphinx with MyST and Furo, since all three are maintained, and since the docstrings are plain text
with equations, which a generator of this folder turns into markup. MkDocs 1 has had no release
since 2024, and Material for MkDocs has ended its development of features.
"""

import public_names
from areas import repository, source_url

from negmaml._core.version import __version__

project, version, release = "negmaml", __version__, __version__
author = copyright = "The negmaml authors"
extensions = ["myst_parser", "sphinx.ext.linkcode", "sphinx_copybutton", "names"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
nitpicky = True
# Types of other packages have no page here.
nitpick_ignore_regex = [(r"py:.*", r"(?!negmaml\.).*")]
python_maximum_signature_line_length = 68
toc_object_entries_show_parents = "hide"
smartquotes = False  # texts quote values of arguments
html_theme = "furo"
html_title = f"negmaml {__version__}"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
# Summaries of results are fetched from pages, which browsers refuse for local files.
html_show_search_summary = False
pygments_style, pygments_dark_style = "default", "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
html_theme_options = {"navigation_with_keys": False}
if repository():
    html_theme_options["footer_icons"] = [
        {"name": "Repository", "url": repository(), "html": "Repository", "class": ""}
    ]


def linkcode_resolve(domain, info):
    """The address of the source of an object of the reference."""
    found = public_names.source_of(f"{info['module']}.{info['fullname']}")
    return source_url(found[0], found[1:]) if found else None
