"""Evidence for the claims of the method, at the scale of two CPU cores: runs, rules, page.

    python -m claims run          # do the missing runs, in two processes of one thread each
    python -m claims page         # write docs/claims.md and the table in README.md
    python -m claims quick        # the same pipeline on the digits, in seconds

The runs are experiments of `poise.studies.comparison`, like those of `poise compare`. In reading
order:

- `design`: the runs.
- `measure`: figures of a run.
- `figures`: means, pairs, intervals.
- `rules`: when a claim holds. Written before the runs.
- `statements`: the claims of the paper.
- `questions`: our own claims.
- `page`: docs/claims.md.
"""
