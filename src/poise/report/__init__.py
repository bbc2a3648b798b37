"""Write an HTML report of runs: one self-contained page that needs no network and no other file.

In reading order: `records` (read the files of each run), `words` (numbers and sentences), `cells`
(tables), `curves` and `latent_page` (figures), `models` (images and the diagnosis, which need the
trained model), `pictures` (encode images), `sections` (values of each section), `page` (the whole
page). The jinja2 templates, page.css and page.js are in templates/.
"""

from poise.report.page import write_report

__all__ = ["write_report"]
