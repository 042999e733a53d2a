"""The world is what it says: identical from a seed, in range, centered, moving as told."""

from itertools import islice

import numpy as np
import pytest

from effjax.bundled import glyphs


def rng(seed=0):
    return np.random.default_rng(seed)


def ink_boxes(images):
    """First and last inked row and column of each image: [B, 4]."""
    inked = (images > -1).any(-1)
    rows, columns = inked.any(2), inked.any(1)
    ends = [
        np.stack([x.argmax(1), x.shape[1] - 1 - x[:, ::-1].argmax(1)], 1) for x in (rows, columns)
    ]
    return np.concatenate(ends, 1)


def test_fonts_are_disjoint_and_enough():
    groups = (glyphs.FONTS, glyphs.JUDGE_FONTS, glyphs.HELD_OUT_FONTS)
    assert len(glyphs.CLASSES) == len(set(glyphs.CLASSES)) == 36
    assert len(glyphs.FONTS) >= 6
    assert len(glyphs.HELD_OUT_FONTS) >= 2
    assert len({font for group in groups for font in group}) == sum(map(len, groups))


def test_batch_has_its_shape_range_and_seed():
    images, labels = glyphs.batch(rng(), 64)
    assert images.shape == (64, 32, 32, 1)
    assert (images.dtype, labels.dtype) == (np.float32, np.int32)
    assert images.min() == -1
    assert (images.max((1, 2, 3)) > 0.9).all()
    again = glyphs.batch(rng(), 64)
    assert all(map(np.array_equal, (images, labels), again))
    assert not np.array_equal(images, glyphs.batch(rng(1), 64)[0])
    assert glyphs.batch(rng(), 0)[0].shape == (0, 32, 32, 1)


def test_batches_resume_anywhere():
    whole = list(islice(glyphs.batches(3, 4), 5))
    resumed = list(islice(glyphs.batches(3, 4, start=3), 2))
    for (images, labels), (images_again, labels_again) in zip(whole[3:], resumed, strict=True):
        assert np.array_equal(images, images_again)
        assert np.array_equal(labels, labels_again)
    assert not np.array_equal(whole[0][0], whole[1][0])


def test_every_font_draws_every_class_differently():
    fonts = glyphs.FONTS + glyphs.JUDGE_FONTS + glyphs.HELD_OUT_FONTS
    ink = glyphs._atlas(fonts, 21, 32, 2)
    gap = np.abs(ink[:, :, None] - ink[:, None]).sum((-1, -2))  # [font, class, class], pixels
    assert (gap + 100 * np.eye(36) > 10).all()
    across_fonts = ink.reshape(len(fonts), -1)
    assert len(np.unique(across_fonts, axis=0)) == len(fonts)


def test_capitals_of_one_font_share_one_size():
    for font in glyphs.FONTS + glyphs.HELD_OUT_FONTS:
        ink = glyphs._atlas((font,), 21, 32, 2)[0]
        heights = dict(zip(glyphs.CLASSES, ink.max(2).astype(bool).sum(1), strict=True))
        widths = dict(zip(glyphs.CLASSES, ink.max(1).astype(bool).sum(1), strict=True))
        assert {heights[name] for name in "EFHIKLTXZ"} <= {20, 21, 22}
        if font in glyphs.FONTS:
            assert widths["O"] >= widths["0"] + 3


def test_jitter_reaches_two_pixels_and_no_more():
    images, labels = glyphs.batch(rng(), 2000, ("DejaVuSans",))
    boxes = ink_boxes(images[labels == glyphs.CLASSES.index("H")])
    for first, last in (boxes[:, :2].T, boxes[:, 2:].T):
        assert len(np.unique(last - first)) == 1  # never cut off
        centered = (glyphs.SIDE - (last - first + 1)) // 2
        assert set(first - centered) == {-2, -1, 0, 1, 2}


def test_widest_glyphs_stay_whole():
    fonts = glyphs.FONTS + glyphs.JUDGE_FONTS + glyphs.HELD_OUT_FONTS
    ink = glyphs._atlas(fonts, 21, 32, 2)  # 36 x 36: the ink and a margin of four pixels
    assert np.count_nonzero(ink[:, :, 4:-4, 4:-4]) == np.count_nonzero(ink)


@pytest.mark.parametrize("fonts", [(), ("Comic Sans",)])
def test_unknown_fonts_are_named(fonts):
    with pytest.raises(ValueError, match=r"no fonts given|'Comic Sans'.*DejaVuSans"):
        glyphs.batch(rng(), 1, fonts)


def test_captions_say_what_the_image_shows():
    images, captions, things = glyphs.captioned(rng(), 48)
    assert images.shape == (48, 32, 32, 3)
    assert images.dtype == np.float32
    channels = {"red": 0b001, "green": 0b010, "blue": 0b100}
    channels |= {"yellow": 0b011, "magenta": 0b101, "cyan": 0b110}
    for image, caption, (name, color, place) in zip(images, captions, things.names(), strict=True):
        assert caption == f"a {color} {name} at the {place}"
        inked = image > -1
        assert sum(bool(inked[..., c].any()) << c for c in range(3)) == channels[color]
        top, left = "top" in place, "left" in place
        rows, columns = slice(16 * (not top), 32 - 16 * top), slice(16 * (not left), 32 - 16 * left)
        assert inked[rows, columns].sum() == inked.sum()
    assert captions == glyphs.captioned(rng(), 48)[1]


@pytest.mark.parametrize("seed", range(6))
def test_one_moving_glyph_is_reproduced_by_its_velocity(seed):
    frames, motion = glyphs.video(rng(seed), 20, glyphs=1, segment_frames=5)
    assert frames.shape == (20, 32, 32, 1)
    for t in range(19):
        velocity = motion.velocities[0, t // 5]
        assert np.array_equal(np.roll(frames[t], velocity, (0, 1)), frames[t + 1])


def test_video_of_many_glyphs_moves_and_rests_as_told():
    seen = []
    for seed in range(10):
        frames, motion = glyphs.video(rng(seed), 16, glyphs=3)
        assert motion.velocities.shape == (3, 2, 2)
        assert np.abs(motion.velocities).max() <= 2
        assert motion.positions.min() >= 0
        assert motion.positions.max() <= 16
        steps = np.diff(motion.positions, axis=1)
        assert (steps == motion.velocities[:, np.arange(15) // 8]).all()
        covered = np.zeros(frames.shape[:3], bool)
        for path in motion.positions:
            for t, (y, x) in enumerate(path):
                covered[t, y : y + 16, x : x + 16] = True
        assert (frames[~covered] == -1).all()
        seen.append(motion.velocities.any(-1))
    assert 0.3 < np.mean(seen) < 0.9
    resting, motion = glyphs.video(rng(), 4, rest=1.0)
    assert not motion.velocities.any()
    assert (resting == resting[0]).all()
    moving = glyphs.video(rng(), 64, rest=0.0)[1]
    assert moving.velocities.any(-1).all()


@pytest.mark.parametrize(
    "options", [{"segment_frames": 9}, {"side": 16}, {"glyphs": 0}, {"rest": 1.5}]
)
def test_impossible_videos_are_refused(options):
    with pytest.raises(ValueError, match=r"segment_frames is|at least one"):
        glyphs.video(rng(), 8, **options)


def test_questions_are_answered_by_their_image():
    stream, kinds = rng(), set()
    for _ in range(60):
        image, asked, answer = glyphs.question(stream)
        assert image.shape == (32, 32, 3)
        quarters = image.reshape(2, 16, 2, 16, 3).transpose(0, 2, 1, 3, 4).reshape(4, -1, 3)
        lit = (quarters > -1).any(1)  # [place, channel]
        colors = {tuple(c) for c in lit if c.any()}
        kinds.add(asked.split(" ")[0] + asked.split(" ")[1])
        if asked.startswith("how many"):
            assert answer == str(len(colors))
        elif asked.startswith("is there"):
            wanted = glyphs.RGB[glyphs.COLORS.index(asked.split()[3])].astype(bool)
            assert (answer == "yes") == (tuple(wanted) in colors)
        elif asked.startswith("what is"):
            place = glyphs.PLACES.index(asked.removeprefix("what is at the ").removesuffix("?"))
            assert (answer == "nothing") == (not lit[place].any())
        elif asked.startswith("what color"):
            assert tuple(glyphs.RGB[glyphs.COLORS.index(answer)].astype(bool)) in colors
        else:
            assert lit[glyphs.PLACES.index(answer.removeprefix("at the "))].any()
    assert len(kinds) == 5


def test_text_is_ascii_of_the_length_asked_and_answers_follow():
    written = glyphs.text(rng(), 5000)
    assert len(written) == 5000
    assert written.isascii()
    assert written == glyphs.text(rng(), 5000)
    assert written[:100] == glyphs.text(rng(), 100)
    places = 0
    for line in written.splitlines()[:-1]:
        facts, _, answer = line.rpartition("? ")
        if "where is the " in facts:
            name = facts[-1]
            assert f" {name} is {answer}" in facts
            places += 1
    assert places > 5


def test_every_part_of_a_caption_occurs_in_both_parts_of_the_world():
    for held_out in (True, False, None):
        _, captions, things = glyphs.captioned(rng(), 2000, held_out=held_out)
        if held_out is not None:
            assert (things.held_out == held_out).all()
        for values, pool in (
            (things.labels, glyphs.CLASSES),
            (things.colors, glyphs.COLORS),
            (things.places, glyphs.PLACES),
        ):
            assert set(values) == set(range(len(pool)))
        assert captions == things.captions()
    first, second = (next(glyphs.captioned_batches(3, 8, start=5)) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]
