"""The claims of the paper, C1 to C9: refuting experiments, checks, tables."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from claims.design import (
    BALANCES,
    BASIC,
    COMPUTED,
    DIGITS,
    FASHION,
    FIXED,
    IMAGES,
    LEARNED,
    LENGTHS,
    MNIST,
    NOISELESS,
    NOISELESS_RENORMALISED,
    RENORMALISED,
    RIVALS,
    SECOND_STAGES,
    TWICE_LEARNED,
    second_stages,
)
from claims.figures import (
    ELBO,
    GAMMA2,
    KL,
    TEST_MSE,
    Evidence,
    Quantity,
    balanced_share,
    distance,
    explained,
    late_fall,
    of_page,
    quotients,
    rank_correlation,
    relative,
    speed_up,
)
from claims.rules import (
    FINE,
    PERCENT,
    PLAIN,
    SHARE,
    Check,
    Style,
    above,
    below,
    describe,
    less,
    near,
    no_worse,
)
from poise.studies.comparison.statistics import spread
from poise.studies.comparison.tables import show

Rows = list[list[str]]
MARGIN = 0.05  # "no worse" means worse by less than this share
LARGE = 0.2  # much variance lost by stage 2, of each latent's variance of about 1
ABOUT = 0.1  # tolerance of "about equal", as a share


NORMAL = distance("GEN-1", "pixels")  # samples from N(0, I)


@dataclass(frozen=True)
class Setting:
    """A data set for comparing balances, and the extractor of its distances."""

    experiment: str
    name: str
    extractor: str

    def distances(self) -> dict[str, Quantity]:
        """Return every distance of every set of images, by name."""
        return {f"FD-{e} of {of}": distance(of, e) for e in self.extractors for of in BASIC}

    @property
    def extractors(self) -> tuple[str, ...]:
        """Return this extractor and "pixels", which measured every run."""
        return (self.extractor,) if self.extractor == "pixels" else (self.extractor, "pixels")


MAIN = (MNIST, FASHION, DIGITS)
SETTINGS = (
    Setting(MNIST, "MNIST", "light"),
    Setting(FASHION, "Fashion-MNIST", "light"),
    Setting(DIGITS, "digits", "pixels"),
)


@dataclass(frozen=True)
class Statement:
    """A claim with its experiment, checks, tables and remark.

    Attributes:
        key: "C1".
        claim: the claim in a sentence.
        refutation: the experiment, and the results that would refute the claim.
        experiments: patterns of the experiments' names, as for `--only`.
        checks: checks that make the verdict.
        tables: pairs of caption and rows; the first row is the head.
        remark: further conditions, known before the runs unless dated.
    """

    key: str
    claim: str
    refutation: str
    experiments: tuple[str, ...]
    checks: tuple[Check, ...]
    tables: tuple[tuple[str, Rows], ...] = ()
    remark: str = ""


def statements(evidence: Evidence) -> list[Statement]:
    """Return the claims of the paper, C1 to C9."""
    made: tuple[Callable[[Evidence], Statement], ...] = (
        sooner,
        no_worse_in_the_end,
        balanced_throughout,
        kl_prevails,
        second_stage_is_better,
        renormalisation_helps,
        variance_lost_is_the_error,
        variance_law_is_one,
        better_than_rivals,
    )
    return [make(evidence) for make in made]


def stages() -> list[tuple[str, int]]:
    """Return the Fashion-MNIST experiments of one run stopped early, with their epochs."""
    return [*((f"{FASHION}-epochs-{n}", n) for n in LENGTHS), (FASHION, IMAGES.first.epochs or 0)]


def sooner(evidence: Evidence) -> Statement:
    """Return C1: images until an error or distance is reached."""
    parts = (0.25, 0.5, 1.0)
    checks, rows = [], [["", *(f"after {part:.0%} of its training" for part in parts)]]
    for setting in SETTINGS:
        pairs = evidence.pairs(setting.experiment, LEARNED, COMPUTED)
        gains = {part: [speed_up(slow, fast, part) for slow, fast in pairs] for part in parts}
        checks += [
            above(f"{setting.name}, MSE after {p:.0%}", values, 1) for p, values in gains.items()
        ]
        rows.append([setting.name, *(describe(values, PLAIN) for values in gains.values())])
    fashion = SETTINGS[1]
    distances = fashion.distances()
    lengths = [["epochs", "balance", "KL", *distances]]
    for experiment, epochs in stages():
        for label in (COMPUTED, LEARNED):
            cells = [mean_of(evidence, experiment, label, q) for q in (KL, *distances.values())]
            lengths.append([str(epochs), label, *cells])
        checks += [
            less(
                f"Fashion-MNIST after {epochs} epoch{'s' * (epochs > 1)}, {name}",
                evidence.ratios(experiment, COMPUTED, LEARNED, quantity),
            )
            for name, quantity in distances.items()
        ]
    return Statement(
        "C1",
        "A computed gamma2 reaches a given error and distance in fewer images than a learned one.",
        "Both balances have the same network, order and noise. The errors are the training MSE of "
        "the learned balance after a quarter, half and all of its training. A check fails if the "
        "computed balance needs as many images or more to reach them. A check also fails if a "
        "distance on Fashion-MNIST after equal numbers of epochs is not smaller.",
        (*MAIN, f"{FASHION}-epochs-*"),
        tuple(checks),
        (
            (
                "Ratio of images, `learned` to `computed`, to within 2 % of the MSE of `learned` "
                "(0: not reached)",
                rows,
            ),
            (
                "Fashion-MNIST by epochs of stage 1 (the same runs, stopped earlier)",
                lengths,
            ),
        ),
        "`learned` is as published: log gamma starts at 0 and has the network's learning rate. A "
        "lower training MSE alone says little, because a weaker KL lowers it too. So every "
        "distance of every set is checked. GEN-1 can be better under the learned balance: its "
        "gamma2 is still too large, so that its KL is smaller and its codes are nearer to N(0, "
        "I). A point of a curve is a hundredth of stage 1, so that seeds with equal ratios have "
        "an interval without width.",
    )


def no_worse_in_the_end(evidence: Evidence) -> Statement:
    """Return C2: final errors and distances."""
    checks, tables = [], []
    for setting in SETTINGS:
        quantities = _outcomes(setting)
        for name, quantity in quantities.items():
            ratios = evidence.ratios(setting.experiment, COMPUTED, LEARNED, quantity)
            checks.append(no_worse(f"{setting.name}, {name}", ratios, MARGIN))
        tables.append(
            (f"{setting.name}: mean ± standard deviation", balances_table(evidence, setting))
        )
        tables.append(
            (
                f"{setting.name}: relative to `computed`, paired",
                against_table(evidence, setting, COMPUTED, quantities),
            )
        )
    return Statement(
        "C2",
        "With a computed gamma2, final errors and distances are no worse than with a learned one.",
        "Measured at the end of training, with the same network and schedule. A check fails if "
        f"the test MSE or a distance is worse by more than {MARGIN:.0%}.",
        MAIN,
        tuple(checks),
        tuple(tables),
        "Stage 2 is the same for all labels, with a computed balance. If the gamma2 of `learned` "
        "has not reached its MSE by the end (gamma2 in the table), `learned` is still compared. "
        "`learned:rate=100` learns log gamma at 100 times the rate.",
    )


def _outcomes(setting: Setting) -> dict[str, Quantity]:
    return {"test MSE": TEST_MSE} | setting.distances()


def present(evidence: Evidence, experiment: str) -> list[str]:
    """Return the balances that have runs."""
    return [label for label in BALANCES if evidence.runs(experiment, label)]


def balances_table(evidence: Evidence, setting: Setting) -> Rows:
    """Return the table of errors, KL, gamma2, ELBO, latents and distances, a row per balance."""
    columns: dict[str, Quantity] = {
        "test MSE": TEST_MSE,
        "KL": KL,
        "gamma2": GAMMA2,
        "ELBO": ELBO,
        "active": of_page("latents.active_units"),
    }
    columns |= setting.distances()
    places = [(setting.experiment, label, label) for label in present(evidence, setting.experiment)]
    return table_of(evidence, "balance", places, columns)


def against_table(
    evidence: Evidence, setting: Setting, reference: str, quantities: dict[str, Quantity]
) -> Rows:
    """Return the table of relative differences from the reference, a row per other balance."""
    rows = [["balance", *quantities]]
    for label in (label for label in present(evidence, setting.experiment) if label != reference):
        ratios = [
            evidence.ratios(setting.experiment, label, reference, quantity)
            for quantity in quantities.values()
        ]
        rows.append(
            [label, *(describe([ratio - 1 for ratio in values], PERCENT) for values in ratios)]
        )
    return rows


def balanced_throughout(evidence: Evidence) -> Statement:
    """Return C3: balance throughout training."""
    checks = []
    for setting in SETTINGS:
        shares = evidence.values(
            setting.experiment, COMPUTED, lambda run: balanced_share(run, ABOUT)
        )
        checks.append(above(setting.name, shares.values(), 0.95, SHARE))
    columns: dict[str, tuple[Quantity, Style]] = {
        "within 10 %": (lambda run: balanced_share(run, 0.1), SHARE),
        "within 5 %": (lambda run: balanced_share(run, 0.05), SHARE),
        "within 10 %, from the first step": (
            lambda run: balanced_share(run, 0.1, settled=False),
            SHARE,
        ),
        "quadratic term / (D/2), test images": (of_page("reconstruction.quadratic_share"), FINE),
    }
    rows = [["", "balance", *columns]]
    for setting in SETTINGS:
        for label in present(evidence, setting.experiment):
            cells = [
                describe(list(evidence.values(setting.experiment, label, q).values()), style)
                for q, style in columns.values()
            ]
            rows.append([setting.name, label, *cells])
    return Statement(
        "C3",
        "The quadratic term of the loss stays near D/2 throughout.",
        "Measured is the share of stage 1's points with MSE / gamma2 within 10 % of 1. A point is "
        "the mean over about a hundredth of stage 1. The first 500 steps are left out, because the "
        "running average needs them to forget its start. A check fails if the share is under 95 %.",
        MAIN,
        tuple(checks),
        (("Share of points at balance, after 500 steps unless the column says otherwise", rows),),
        "`optimal` is at balance by construction. Its logged gamma2 is the average that evaluation "
        "uses.",
    )


def kl_prevails(evidence: Evidence) -> Statement:
    """Return C4: a constant gamma2 of 1."""
    checks = []
    for setting in SETTINGS:
        name, experiment = setting.name, setting.experiment
        checks += [
            below(
                f"{name}, KL over that of computed",
                evidence.ratios(experiment, FIXED, COMPUTED, KL),
                0.5,
            ),
            above(
                f"{name}, MSE over that of computed",
                evidence.ratios(experiment, FIXED, COMPUTED, TEST_MSE),
                2,
            ),
            below(
                f"{name}, fall of the MSE",
                evidence.values(experiment, FIXED, late_fall).values(),
                0.1,
                PERCENT,
            ),
        ]
    columns: dict[str, Quantity] = {
        "test MSE": TEST_MSE,
        "variance explained": explained,
        "fall of the training MSE, second half": late_fall,
        "KL": KL,
        "active latents": of_page("latents.active_units"),
        "quadratic term / (D/2)": of_page("reconstruction.quadratic_share"),
    }
    places = [
        (s.experiment, label, f"{s.name}, {label}")
        for s in SETTINGS
        for label in (FIXED, COMPUTED, LEARNED)
    ]
    return Statement(
        "C4",
        "With gamma2 = 1, the KL term dominates and the error stops falling.",
        "A check fails if gamma2 = 1 has more than half of the KL of `computed`, or less than "
        "twice its MSE, or an MSE that still falls by a tenth or more in the second half of stage "
        "1. The claim's words are the paper's. Checked is that the latents are used little; the "
        "KL itself is then small.",
        MAIN,
        tuple(checks),
        (("", table_of(evidence, "", places, columns)),),
        "[log.md](log.md) (MNIST: computed, learned and fixed balance) has the same experiment for "
        "a convolutional network, two epochs of MNIST, three seeds.",
    )


def second_stage_is_better(evidence: Evidence) -> Statement:
    """Return C5: second stage against N(0, I)."""
    checks, rows = [], [["", "balance", "GEN-1", "GEN-2", "GEN-2 relative to GEN-1"]]
    for setting in SETTINGS:
        for extractor in setting.extractors:
            one, two = distance("GEN-1", extractor), distance("GEN-2", extractor)
            change = evidence.values(setting.experiment, COMPUTED, relative(two, one))
            checks.append(below(f"{setting.name}, FD-{extractor}", change.values(), 0, PERCENT))
            for label in present(evidence, setting.experiment):
                means = [
                    mean_of(evidence, setting.experiment, label, quantity)
                    for quantity in (one, two)
                ]
                change = list(
                    evidence.values(setting.experiment, label, relative(two, one)).values()
                )
                rows.append(
                    [f"{setting.name}, FD-{extractor}", label, *means, describe(change, PERCENT)]
                )
    return Statement(
        "C5",
        "Second-stage latents (GEN-2) give better images than latents from N(0, I) (GEN-1).",
        "Both sets come from the same run with the same noise. A check fails if the distance of "
        "GEN-2 is not smaller. The checks are for the computed balance; the table has all "
        "balances.",
        MAIN,
        tuple(checks),
        (("", rows),),
    )


def renormalisation_helps(evidence: Evidence) -> Statement:
    """Return C6: renormalisation of second-stage latents."""
    ways = {NOISELESS: (NOISELESS_RENORMALISED, NOISELESS), "GEN-2": (RENORMALISED, "GEN-2")}
    places = [Setting(s.experiment, s.name, "pixels") for s in SETTINGS]
    places += [
        Setting(
            second_stages(*size), "digits, stage 2 of {:,} steps, width {}".format(*size), "pixels"
        )
        for size in SECOND_STAGES
    ]
    labelled = [(place, label) for place in places for label in present(evidence, place.experiment)]
    digits = [pair for pair in labelled if pair[0].experiment.startswith(DIGITS)]
    checks = []
    for how, (after, before) in ways.items():
        change = relative(distance(after, "pixels"), distance(before, "pixels"))
        for place, label in labelled:
            if evidence.mean(place.experiment, label, LOST) >= LARGE:
                values = evidence.values(place.experiment, label, change).values()
                checks.append(below(f"{how}: {place.name}, {label}", values, 0, PERCENT))
        correlations = _correlations(evidence, digits, LOST, change)
        checks.append(below(f"{how}: correlation over the digits' settings", correlations, 0, FINE))
    columns: dict[str, tuple[Quantity, Style]] = {"variance lost by stage 2": (LOST, FINE)} | {
        f"FD-pixels of {how}": (
            relative(distance(after, "pixels"), distance(before, "pixels")),
            PERCENT,
        )
        for how, (after, before) in ways.items()
    }
    ordered = sorted(labelled, key=lambda pair: evidence.mean(pair[0].experiment, pair[1], LOST))
    rows = [["", "balance", *columns]]
    for place, label in ordered:
        cells = [
            describe(list(evidence.values(place.experiment, label, q).values()), style)
            for q, style in columns.values()
        ]
        rows.append([place.name, label, *cells])
    return Statement(
        "C6",
        "Renormalising second-stage latents helps if the second stage lost much variance.",
        "Every run with a second stage is sampled with and without renormalisation, with the same "
        f"noise. A setting is checked if it lost {LARGE} or more of each latent's variance (about "
        "1), on average. A check fails if renormalisation does not lower the distance. A check "
        "also fails if the distance does not change more where more was lost: Spearman's "
        "correlation over the digits' settings, one for each seed, is below 0.",
        (*MAIN, f"{DIGITS}-second-*"),
        tuple(checks),
        (("Change of the distance by renormalisation; least lost variance first", rows),),
        "The release adds no noise to stage 2's latents. Noise restores the lost variance, so both "
        "ways are checked. The distance is FD-pixels, which was measured for every run. The "
        "released rule renormalises if the variance lost exceeds a quarter of stage 2's MSE (C7 "
        "has the ratio). Until 2026-11-27 one check took all runs together, which are not "
        "independent.",
    )


LOST = of_page("second_stage.variance_lost")


def _correlations(
    evidence: Evidence, places: Sequence[tuple[Setting, str]], one: Quantity, other: Quantity
) -> list[float]:
    """Return the rank correlation of two quantities over the settings, for each seed."""
    values = [
        [evidence.values(place.experiment, label, quantity) for quantity in (one, other)]
        for place, label in places
    ]
    seeds = sorted({seed for pair in values for seed in pair[0]})
    pairs = {
        seed: [(x[seed], y[seed]) for x, y in values if seed in x and seed in y] for seed in seeds
    }
    return [rank_correlation(*zip(*pairs[seed], strict=True)) for seed in seeds if pairs[seed]]


def variance_lost_is_the_error(evidence: Evidence) -> Statement:
    """Return C7: variance lost against MSE."""
    pages = {
        "pixels": "reconstruction.variance_lost_share",
        "latents": "second_stage.variance_lost_share",
    }
    checks, rows = [], [["", "balance", *(f"variance lost / MSE, {where}" for where in pages)]]
    for setting in SETTINGS:
        for where, page in pages.items():
            values = evidence.values(setting.experiment, COMPUTED, of_page(page))
            checks.append(near(f"{setting.name}, {where}", values.values(), 1, ABOUT, FINE))
        for label in present(evidence, setting.experiment):
            found = [
                list(evidence.values(setting.experiment, label, of_page(page)).values())
                for page in pages.values()
            ]
            rows.append([setting.name, label, *(describe(values, FINE) for values in found)])
    return Statement(
        "C7",
        "The variance lost by reconstructions is about their MSE, in pixels and in latents.",
        "Stage 1 is measured on test images, stage 2 on latents. Reconstructions are decoded from "
        "posterior samples. A check fails if the ratio is not within 10 % of 1. The equality is "
        "exact for a decoder that gives E[x|z] (`poise.metrics.reconstruction`).",
        MAIN,
        tuple(checks),
        (("", rows),),
    )


def variance_law_is_one(evidence: Evidence) -> Statement:
    """Return C8: the variance law of the latents."""
    pages = {"all latents": "latents.variance_law", "active latents": "latents.variance_law_active"}
    checks = []
    for setting in SETTINGS:
        for which, name in pages.items():
            law = evidence.values(setting.experiment, COMPUTED, of_page(name))
            checks.append(near(f"{setting.name}, {which}", law.values(), 1, ABOUT, FINE))
    columns = {
        "Var(mu) + E[s^2]": of_page("latents.variance_law"),
        "the same, active latents": of_page("latents.variance_law_active"),
        "Var(mu) + E[s]": of_page("claims.variance_law_released"),
        "stage 2": of_page("second_stage.variance_law"),
    }
    rows = [["", "balance", *columns]]
    for setting in SETTINGS:
        for label in present(evidence, setting.experiment):
            cells = [
                describe(list(evidence.values(setting.experiment, label, q).values()), FINE)
                for q in columns.values()
            ]
            rows.append([setting.name, label, *cells])
    return Statement(
        "C8",
        "Var(mu) + E[s^2] is about 1.",
        "Measured on the codes of training images, as the mean over all latents and over active "
        "ones. A check fails if it is not within 10 % of 1.",
        MAIN,
        tuple(checks),
        (("", rows),),
        "The law is exact at the optimum of a linear VAE: on an axis of variance v, "
        "s^2 = gamma2 / v and Var(mu) = 1 - gamma2 / v.",
    )


def better_than_rivals(evidence: Evidence) -> Statement:
    """Return C9: samples against those of other models."""
    generations = {label: _best_set(evidence, label) for label in RIVALS} | {TWICE_LEARNED: "GEN-2"}
    checks, rows = (
        [],
        [
            [
                "",
                "samples judged",
                "FD-light of them",
                "`computed` relative to it",
                "FD-light of REC",
                "FD-pixels",
                "test MSE",
            ]
        ],
    )
    rows.append([COMPUTED, "GEN-2", *_rival_cells(evidence, COMPUTED, "GEN-2", None)])
    for label in (TWICE_LEARNED, *RIVALS):
        of = generations[label]
        for extractor in SETTINGS[1].extractors:
            own = evidence.values(FASHION, COMPUTED, distance("GEN-2", extractor))
            theirs = evidence.values(FASHION, label, distance(of, extractor))
            checks.append(less(f"{label}, FD-{extractor}", quotients(own, theirs)))
        own, theirs = (
            evidence.values(FASHION, which, distance(judged, "light"))
            for which, judged in ((COMPUTED, "GEN-2"), (label, of))
        )
        rows.append([label, of, *_rival_cells(evidence, label, of, quotients(own, theirs))])
    for label, extractor in product(RIVALS, SETTINGS[1].extractors):
        mixture = distance("GEN-mixture", extractor)
        ratios = evidence.ratios(FASHION, COMPUTED, label, mixture)
        checks.append(less(f"{label}, both by a mixture, FD-{extractor}", ratios))
    rows.append([COMPUTED, "GEN-mixture", *_rival_cells(evidence, COMPUTED, "GEN-mixture", None)])
    return Statement(
        "C9",
        "Samples are better than those of the learned two-stage VAE and regularised autoencoders.",
        "One protocol: Fashion-MNIST, the same stage 1 (weights, order, schedule) for all. The "
        "two-stage VAE learns gamma in both stages. The others have one stage and are sampled "
        "from a mixture of ten Gaussians fitted to their codes. WAE-MMD is also sampled from N(0, "
        "I), and the set with the better mean FD-light counts. A check fails if a rival's "
        "distance is not larger than that of GEN-2 of `computed`. A check also fails if, with the "
        "same prior for both, it is not larger than that of the mixture of `computed`.",
        (FASHION,),
        tuple(checks),
        (("", rows),),
        "Stage 2 adds parameters that the rivals do not have (a mixture has fewer). The second "
        "comparison is therefore by mixtures only. Rivals have their published weights "
        "(`poise.objectives`; RAE-L2 those for MNIST), and were not tuned here.",
    )


def _best_set(evidence: Evidence, label: str) -> str:
    means = {
        of: evidence.mean(FASHION, label, distance(of, "light")) for of in ("GEN-mixture", "GEN-1")
    }
    return min(means, key=lambda of: means[of] if math.isfinite(means[of]) else math.inf)


def _rival_cells(evidence: Evidence, label: str, of: str, ratios: list[float] | None) -> list[str]:
    others = (distance("REC", "light"), distance(of, "pixels"), TEST_MSE)
    change = "" if ratios is None else describe([ratio - 1 for ratio in ratios], PERCENT)
    return [
        mean_of(evidence, FASHION, label, distance(of, "light")),
        change,
        *(mean_of(evidence, FASHION, label, q) for q in others),
    ]


def mean_of(evidence: Evidence, experiment: str, label: str, quantity: Quantity) -> str:
    return show(spread(list(evidence.values(experiment, label, quantity).values())))


def table_of(
    evidence: Evidence,
    corner: str,
    places: Iterable[tuple[str, str, str]],
    columns: dict[str, Quantity],
) -> Rows:
    """Return a table of n and mean ± standard deviation, a row per (experiment, label, name)."""
    rows = [[corner, "n", *columns]]
    for experiment, label, name in places:
        cells = [mean_of(evidence, experiment, label, quantity) for quantity in columns.values()]
        rows.append([name, str(len(evidence.runs(experiment, label))), *cells])
    return rows
