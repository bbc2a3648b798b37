"""Runs -> one HTML page that needs nothing else: no network, no second file.

In reading order: `records` (folders -> what is known of each run), `words` (numbers and sentences),
`cells` (tables), `curves` and `latent_page` (figures), `models` (images and the diagnosis, which
need the trained model), `pictures` (images into the page), `sections` (values of each part of the
page), `page` (the whole). The jinja2 templates, page.css and page.js are in templates/.
"""

from poise.report.page import write_report

__all__ = ["write_report"]
