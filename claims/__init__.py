"""The evidence for what the method is said to do, at the scale of two CPU cores: runs, rules, and the page made of both.

    python -m claims run          # what is not done yet; two processes of one thread each
    python -m claims page         # docs/claims.md, and the table in README.md, from results/claims
    python -m claims quick        # the same pipeline on the digits, seconds

The runs are experiments of `poise.studies.comparison`, as those of `poise compare` are. In reading order: `design` (which runs
there are), `measure` (figures of a run), `figures` (means, pairs, intervals), `rules` (when a claim holds: written before the
runs), `statements` (the paper's claims), `questions` (our own), `page`.
"""
