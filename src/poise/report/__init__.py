"""Runs -> one HTML page that needs nothing else: no network, no second file.

In reading order: `records` (folders -> what is known of each run), `words` (numbers and sentences), `tables`, `curves` and
`latents` (figures), `models` (what only the trained model can show: images and the diagnosis), `pictures` (images into the
page), `sections` (the parts of the page), `page` (the whole). page.css and page.js lie beside them.
"""

from poise.report.page import write_report

__all__ = ["write_report"]
