"""What figures with points and curves share: colours and markers that colour-blind readers can tell apart."""

# Okabe and Ito, "Color universal design" (2008), without its yellow, which is too pale on white; and a grey.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#808080"]
MARKERS = "osD^vXP<>"  # nine for eight colours: the first 72 pairs differ, and neighbours differ in both


def style(number: int) -> dict[str, str]:
    """Return the colour and the marker of the `number`th class or curve."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
