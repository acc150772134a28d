"""What all plots look like: sizes, a palette that colour-blind readers can tell apart, in both colour schemes."""

from __future__ import annotations

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# role: (light, dark). Plots are drawn in the light colours, which stand for the roles: each may occur once.
SCHEMES = {
    "paper": ("#ffffff", "#16181c"),
    "ink": ("#1f2328", "#e8e8e6"),
    "soft": ("#59606a", "#a9b0ba"),
    "line": ("#c9ced6", "#3d434c"),
    # categories, after Okabe and Ito (2008), darker or lighter where the contrast with the paper asked for it
    "c0": ("#0067a5", "#5ab4ec"),
    "c1": ("#d05a00", "#ff9d57"),
    "c2": ("#00815f", "#3ccf9f"),
    "c3": ("#a04a86", "#e59ccb"),
    "c4": ("#8a6d00", "#e3c54d"),
    "c5": ("#747b85", "#9097a1"),
    # an ordered quantity: little stays near the paper, much is far from it, in both schemes
    "q0": ("#f2f7fc", "#1a2530"),
    "q1": ("#dfebf6", "#1d3245"),
    "q2": ("#c6dcee", "#20415c"),
    "q3": ("#a5c9e5", "#245375"),
    "q4": ("#7db1d8", "#2d6891"),
    "q5": ("#5295c8", "#3c80af"),
    "q6": ("#2f77b1", "#5b9ccb"),
    "q7": ("#185a94", "#8abde2"),
    "q8": ("#0a3d6e", "#cbe3f6"),
}
LIGHT = {role: pair[0] for role, pair in SCHEMES.items()}
INK, SOFT, LINE, PAPER = (LIGHT[role] for role in ("ink", "soft", "line", "paper"))
COLOURS = tuple(LIGHT[f"c{i}"] for i in range(6))
RAMP = tuple(LIGHT[f"q{i}"] for i in range(9))
MARKERS = ("o", "s", "^", "D", "v", "P")  # a second way to tell series apart
DASHES = ("-", "--", ":", "-.")
WIDTH = 5.6  # inches, of a plot that a phone shows whole

mpl.rcParams.update(
    {
        "svg.hashsalt": "qdeploy", "svg.fonttype": "none", "font.size": 10, "text.parse_math": False,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "axes.formatter.useoffset": False, "axes.titlesize": 10, "axes.titlelocation": "left",
        "grid.color": LINE, "grid.linewidth": 0.6, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT,
        "axes.titlecolor": INK, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK, "figure.facecolor": PAPER, "axes.facecolor": "none", "savefig.facecolor": PAPER,
        "legend.frameon": False, "hatch.linewidth": 0.6, "patch.edgecolor": PAPER,
    }
)  # fmt: skip


def css() -> str:
    """Both schemes as custom properties named --ROLE; paper is always light."""
    light, dark = (
        " ".join(f"--{role}: {pair[scheme]};" for role, pair in SCHEMES.items()) for scheme in range(2)
    )  # fmt: skip
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    )


def new_figure(width: float = WIDTH, height: float = 3.3) -> tuple[Figure, Axes]:
    """An empty plot, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def panels(count: int, width: float = WIDTH, height: float = 3.3) -> tuple[Figure, list[Axes]]:
    """`count` plots below each other, `height` inches each."""
    figure = Figure(figsize=(width, height * count), layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def legend(axes: Axes, columns: int = 3) -> None:
    """Above the plot, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.6)


def ramp(share: float) -> int:
    """Which colour of RAMP stands for `share`, from 0 to 1."""
    return min(len(RAMP) - 1, max(0, round(share * (len(RAMP) - 1))))


def ink_on(step: int) -> str:
    """The colour of text on RAMP[step] that can be read in both schemes."""
    return INK if step < 5 else PAPER
