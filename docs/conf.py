"""Sphinx's settings for the pages that tools/docs.py prepares; nothing is executed and nothing is fetched."""

project, author, copyright = "clip_lab", "clip_lab contributors", "clip_lab contributors, Apache-2.0"
extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "clip_lab"
html_copy_source = False
html_show_sphinx = False
_FONTS = 'ui-sans-serif, system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'
_LOOK = {"font-stack": _FONTS, "font-stack--monospace": 'ui-monospace, SFMono-Regular, Consolas, "DejaVu Sans Mono", monospace'}
html_theme_options = {"light_css_variables": _LOOK | {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"}, "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
                      "navigation_with_keys": True}
html_css_files = ["pages.css"]
html_static_path = ["_static"]
# Outputs of notebooks hold tables as HTML with their own ids; a text that is cut for a preview is none of Sphinx's business.
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure", "myst.header"]
