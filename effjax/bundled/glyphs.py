"""A procedural world of glyphs: unlimited, free of licenses, and identical from a seed.

Everything is rendered from the TrueType fonts that ship inside matplotlib. Pixels are float32 in
[-1, 1], black (-1) being the ground, and images are NHWC. All randomness comes from the
`numpy.random.Generator` that the caller hands in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CLASSES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIDE = 32
"""Height and width of an image, in pixels."""

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
)
"""The upright faces the world is written in. In all of them `O` is clearly wider than `0`."""

JUDGE_FONTS = (
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
)
"""Slanted and monospaced faces for the judge alone, so that it reads shapes and not one style."""

HELD_OUT_FONTS = ("cmr10", "cmb10", "cmss10", "cmtt10")
"""Another family, Computer Modern: never trained on, it tells whether the judge can read."""

COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan")
PLACES = ("top left", "top right", "bottom left", "bottom right")

RGB = np.array(
    [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)], np.float32
)  # [color, channel]
_QUARTER = SIDE // 2
_SUPERSAMPLING = 8


@lru_cache
def font_file(font: str) -> Path:
    """The TrueType file of one of these fonts."""
    if font not in FONTS + JUDGE_FONTS + HELD_OUT_FONTS:
        allowed = ", ".join(FONTS + JUDGE_FONTS + HELD_OUT_FONTS)
        raise ValueError(f"unknown font {font!r}; use names from: {allowed}")
    import matplotlib  # slow to import, and only rendering needs it

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; install a matplotlib that bundles {font}")
    return path


@lru_cache
def _atlas(fonts: tuple[str, ...], cap_height: int, box: int, jitter: int) -> np.ndarray:
    """Ink in [0, 1] of every glyph, centered: [font, class, box + 2 * jitter, box + 2 * jitter].

    One font has one size, so that `0` and `O` differ by width. Glyphs are drawn large and averaged
    down, which leaves little to the hinting of one FreeType version; the few that are wider than
    the room that jitter leaves (`W` in bold faces) are condensed.
    """
    if not fonts:
        raise ValueError("no fonts given; use for instance glyphs.FONTS")
    room, side = box - 2 * jitter, box + 2 * jitter
    atlas = np.zeros((len(fonts), len(CLASSES), side, side), np.float32)
    for font_index, font in enumerate(fonts):
        file = str(font_file(font))
        # a font's size is its em: find the em that gives capitals the height we want
        _, top, _, bottom = ImageFont.truetype(file, 1000).getbbox("H")
        em = round(1000 * cap_height * _SUPERSAMPLING / (bottom - top))
        face = ImageFont.truetype(file, em)
        for class_index, character in enumerate(CLASSES):
            large = Image.new("L", (2 * em, 2 * em))
            ImageDraw.Draw(large).text((em // 2, em // 2), character, fill=255, font=face)
            large = large.crop(large.getbbox())
            width, height = (min(room, round(x / _SUPERSAMPLING)) for x in large.size)
            small = large.resize((width, height), Image.Resampling.BOX)
            y, x = (side - height) // 2, (side - width) // 2
            atlas[font_index, class_index, y : y + height, x : x + width] = np.asarray(small) / 255
    atlas.flags.writeable = False
    return atlas


def _stamps(
    rng: np.random.Generator, atlas: np.ndarray, labels: np.ndarray, jitter: int
) -> np.ndarray:
    """Ink [B, box, box] of `labels`, each in a random font and moved by up to `jitter` pixels."""
    size, box = len(labels), atlas.shape[-1] - 2 * jitter
    font = rng.integers(len(atlas), size=size)
    corner = rng.integers(2 * jitter + 1, size=(2, size))
    rows, columns = corner[:, :, None] + np.arange(box)
    per_image = (slice(None), None, None)
    return atlas[font[per_image], labels[per_image], rows[:, :, None], columns[:, None, :]]


def batch(
    rng: np.random.Generator, size: int, fonts: tuple[str, ...] = FONTS
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `size` class-labeled glyphs, white on black, centered up to a jitter of two pixels.

    Returns images float32 [B, 32, 32, 1] in [-1, 1] and labels int32 [B], indices into `CLASSES`.
    """
    labels = rng.integers(len(CLASSES), size=size, dtype=np.int32)
    ink = _stamps(rng, _atlas(tuple(fonts), cap_height=21, box=SIDE, jitter=2), labels, jitter=2)
    return 2 * ink[..., None] - 1, labels


def batches(
    seed: int, size: int, *, fonts: tuple[str, ...] = FONTS, start: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield `batch`es without end. Batch `i` depends on `(seed, i)` alone: `start` resumes."""
    while True:
        yield batch(np.random.default_rng([seed, start]), size, fonts)
        start += 1


@dataclass(frozen=True)
class Things:
    """Glyphs with color and place: int32 indices [N] into `CLASSES`, `COLORS` and `PLACES`."""

    labels: np.ndarray
    colors: np.ndarray
    places: np.ndarray

    @property
    def held_out(self) -> np.ndarray:
        """True, bool [N], for the eighth of all combinations that no model is trained on.

        Every class, color and place occurs in both parts.
        """
        return (self.labels + 3 * self.colors + self.places) % 8 == 0

    def names(self) -> list[tuple[str, str, str]]:
        """Spell each thing out as (class, color, place)."""
        indices = zip(self.labels, self.colors, self.places, strict=True)
        return [(CLASSES[label], COLORS[color], PLACES[place]) for label, color, place in indices]

    def captions(self) -> list[str]:
        """Say what each thing is, such as `a red A at the top left`."""
        return [f"a {color} {name} at the {place}" for name, color, place in self.names()]


def captioned(
    rng: np.random.Generator,
    size: int,
    *,
    fonts: tuple[str, ...] = FONTS,
    held_out: bool | None = None,
) -> tuple[np.ndarray, list[str], Things]:
    """Draw `size` images of one small colored glyph in one quarter of a black image.

    Args:
        held_out: only combinations that are `Things.held_out`, or only the others; all if None.

    Returns images float32 [B, 32, 32, 3], captions such as `a red A at the top left`, and what they
    say as `Things` with one entry per image.
    """
    labels, colors, places = np.indices((len(CLASSES), len(COLORS), len(PLACES))).reshape(3, -1)
    every = Things(*(x.astype(np.int32) for x in (labels, colors, places)))
    allowed = np.full(labels.shape, True) if held_out is None else every.held_out == held_out
    chosen = rng.choice(np.flatnonzero(allowed), size=size)
    things = Things(every.labels[chosen], every.colors[chosen], every.places[chosen])
    return _paint(rng, things, np.arange(size), size, fonts), things.captions(), things


def captioned_batches(
    seed: int, size: int, *, start: int = 0
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield images and captions that are not held out, without end; as `batches` does."""
    while True:
        images, captions, _ = captioned(np.random.default_rng([seed, start]), size, held_out=False)
        yield images, captions
        start += 1


def question(
    rng: np.random.Generator, *, fonts: tuple[str, ...] = FONTS
) -> tuple[np.ndarray, str, str]:
    """Draw one image of one to four things, and ask about it.

    Returns the image float32 [32, 32, 3], the question and its answer, both in lower case but for
    the capitals they speak of. Things differ in class, color and place, so answers are unique.
    """
    things = _still_life(rng)
    one_image = np.zeros_like(things.places)
    return _paint(rng, things, one_image, 1, fonts)[0], *_ask(rng, things)


def text(rng: np.random.Generator, length: int) -> str:
    """Write `length` ASCII characters: lines that describe a scene, ask about it and answer.

    Every answer follows from its own line, such as
    `a red A is at the top left. a blue 7 is at the bottom left. what color is the 7? blue.`
    """
    written = ""
    while len(written) < length:
        things = _still_life(rng)
        for name, color, place in things.names():
            written += f"a {color} {name} is at the {place}. "
        asked, answer = _ask(rng, things)
        written += f"{asked} {answer}.\n"
    return written[:length]


@dataclass(frozen=True)
class Motion:
    """How the glyphs of a video move.

    From frame `t` to frame `t + 1` glyph `g` moves by `velocities[g, t // segment_frames]` pixels
    (rows, columns). A velocity of (0, 0) is rest.
    """

    labels: np.ndarray  # int32 [G]
    velocities: np.ndarray  # int32 [G, segments, 2]
    positions: np.ndarray  # int32 [G, T, 2]: upper left corner of the glyph's 16 x 16 box
    segment_frames: int


def video(
    rng: np.random.Generator,
    frames: int,
    *,
    glyphs: int = 2,
    segment_frames: int = 8,
    rest: float = 0.4,
    side: int = SIDE,
    fonts: tuple[str, ...] = FONTS,
) -> tuple[np.ndarray, Motion]:
    """Film small white glyphs that move evenly for `segment_frames`, then take a new velocity.

    A glyph rests through a segment with probability `rest`; otherwise it moves by one or two pixels
    per frame along one axis or both, never leaving the picture. Where glyphs overlap the brighter
    pixel shows. Returns frames float32 [T, side, side, 1] and their `Motion`.
    """
    free = side - _QUARTER  # corners lie in 0..free
    longest = (free + 1) // 2  # from anywhere, so many steps of one pixel are possible one way
    if not 1 <= segment_frames <= longest:
        raise ValueError(
            f"segment_frames is {segment_frames}; for side {side} it must lie in 1..{longest}, so "
            "that a moving glyph always finds room: take shorter segments or a larger side"
        )
    if frames < 1 or glyphs < 1 or not 0 <= rest <= 1:
        raise ValueError(
            f"frames {frames}, glyphs {glyphs}, rest {rest}: at least one frame and one glyph are "
            "needed, and rest is a probability in [0, 1]"
        )
    labels = rng.integers(len(CLASSES), size=glyphs, dtype=np.int32)
    stamps = _stamps(rng, _small_atlas(fonts), labels, jitter=1)
    corner = rng.integers(free + 1, size=(glyphs, 2), dtype=np.int32)
    speeds = np.mgrid[-2:3, -2:3].reshape(2, -1).T.astype(np.int32)

    velocities = np.zeros((glyphs, -(-frames // segment_frames), 2), np.int32)
    positions = np.zeros((glyphs, frames, 2), np.int32)
    for t in range(frames):
        velocity = velocities[:, t // segment_frames]
        if t % segment_frames == 0:
            for glyph in np.flatnonzero(rng.random(glyphs) >= rest):
                goal = corner[glyph] + segment_frames * speeds
                possible = ((goal >= 0) & (goal <= free)).all(-1) & speeds.any(-1)
                velocity[glyph] = rng.choice(speeds[possible])
        positions[:, t] = corner
        corner = corner + velocity

    ink = np.zeros((frames, side, side, 1), np.float32)
    for stamp, path in zip(stamps, positions, strict=True):
        for frame, (y, x) in zip(ink, path, strict=True):
            box = frame[y : y + _QUARTER, x : x + _QUARTER, 0]
            np.maximum(box, stamp, out=box)
    return 2 * ink - 1, Motion(labels, velocities, positions, segment_frames)


def _small_atlas(fonts: tuple[str, ...]) -> np.ndarray:
    return _atlas(tuple(fonts), cap_height=11, box=_QUARTER, jitter=1)


def _paint(
    rng: np.random.Generator, things: Things, image: np.ndarray, images: int, fonts: tuple[str, ...]
) -> np.ndarray:
    """Paint thing `i` into image number `image[i]`: float32 [images, 32, 32, 3]."""
    ink = _stamps(rng, _small_atlas(fonts), things.labels, jitter=1)
    quarters = np.full((images, 2, _QUARTER, 2, _QUARTER, 3), -1, np.float32)
    row, column = np.divmod(things.places, 2)
    quarters[image, row, :, column] = 2 * ink[..., None] * RGB[things.colors][:, None, None] - 1
    return quarters.reshape(images, SIDE, SIDE, 3)


def _still_life(rng: np.random.Generator) -> Things:
    """Choose one to four things that share no class, no color and no place."""
    count = rng.integers(1, len(PLACES) + 1)
    pools = (CLASSES, COLORS, PLACES)
    return Things(*(rng.permutation(len(pool))[:count].astype(np.int32) for pool in pools))


def _ask(rng: np.random.Generator, things: Things) -> tuple[str, str]:
    """Ask one of five kinds of question about `things`; returns question and answer."""
    names = things.names()
    name, color, place = names[rng.integers(len(names))]
    match rng.integers(5):
        case 0:
            place = PLACES[rng.integers(len(PLACES))]
            found = [f"a {color} {name}" for name, color, where in names if where == place]
            return f"what is at the {place}?", found[0] if found else "nothing"
        case 1:
            return f"what color is the {name}?", color
        case 2:
            return f"where is the {name}?", f"at the {place}"
        case 3:
            return "how many glyphs are there?", str(len(names))
        case _:
            color = COLORS[rng.integers(len(COLORS))]
            there = color in [shown for _, shown, _ in names]
            return f"is there a {color} glyph?", "yes" if there else "no"
