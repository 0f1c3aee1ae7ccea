"""The scenes the demo models learn from, and the judge that says what a picture shows."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

TRAINING = Path(__file__).resolve().parents[2] / "models" / "training"
sys.path.insert(0, str(TRAINING))

import scenes  # noqa: E402
from judge import UNKNOWN, judge, regions  # noqa: E402


@pytest.fixture(scope="module")
def drawn() -> list[tuple[scenes.Scene, np.ndarray]]:
    rng = np.random.default_rng(11)
    chosen = [scenes.sample(rng, kept_out=bool(index % 2)) for index in range(200)]
    return [(scene, scenes.draw(scene)) for scene in chosen]


def test_judge_reads_drawn_scenes(drawn):
    right = 0
    for scene, pixels in drawn:
        verdict = judge(Image.fromarray(pixels))
        right += (verdict.background, verdict.colour, verdict.shape, verdict.count) == (
            scene.background,
            scene.colour,
            scene.shape,
            scene.count,
        )
    assert right / len(drawn) >= 0.995


def test_judge_reads_every_shape_at_gan_size():
    for shape in scenes.SHAPES:
        placement = scenes.Placement(16, 16, 11, 0.0)
        alpha = scenes.coverage(shape, (placement,), 32)[:, :, None]
        pixels = np.rint(255 * (1 - alpha) * np.ones(3)).astype(np.uint8)
        verdict = judge(Image.fromarray(pixels))
        assert (verdict.background, verdict.colour, verdict.shape, verdict.count) == ("white", "black", shape, 1)


def test_judge_gives_no_shape_to_what_is_none():
    empty = judge(Image.new("RGB", (64, 64), scenes.PALETTE["blue"]))
    assert (empty.background, empty.shape, empty.count) == ("blue", UNKNOWN, 0)
    bar = Image.new("RGB", (64, 64), scenes.PALETTE["blue"])
    bar.paste(scenes.PALETTE["red"], (8, 28, 56, 36))
    verdict = judge(bar)
    assert (verdict.colour, verdict.shape, verdict.count) == ("red", UNKNOWN, 1)


def test_judge_does_not_accept_a_blob_as_a_star():
    star = scenes.Scene("white", "black", "star", "plain", 1, (scenes.Placement(32, 32, 17, 0.0),), "")
    sharp = Image.fromarray(scenes.draw(star))
    assert judge(sharp).shape == "star"
    assert judge(sharp.filter(ImageFilter.GaussianBlur(7))).shape != "star"


def test_regions_count_diagonal_neighbours_as_one():
    mask = np.zeros((6, 6), dtype=bool)
    mask[1, 1] = mask[2, 2] = True
    mask[5, 0] = True
    assert sorted(int(region.sum()) for region in regions(mask)) == [1, 2]


def test_held_out_triples_never_appear_in_training():
    rng = np.random.default_rng(3)
    seen = {(s.colour, s.shape, s.background) for s in (scenes.sample(rng) for _ in range(6000))}
    kept_out = set(scenes.triples(kept_out=True))
    assert 0.05 < len(kept_out) / (len(kept_out) + len(scenes.triples(kept_out=False))) < 0.2
    assert not seen & kept_out
    assert len(seen) == len(scenes.triples(kept_out=False))
    asked = {(s.colour, s.shape, s.background) for s in (scenes.sample(rng, kept_out=True) for _ in range(300))}
    assert asked <= kept_out


def test_every_colour_shape_and_background_is_learned_somewhere():
    training = scenes.triples(kept_out=False)
    for position, names in enumerate((scenes.COLOURS, scenes.SHAPES, scenes.COLOURS)):
        assert {triple[position] for triple in training} == set(names)


def test_objects_stay_inside_and_apart():
    rng = np.random.default_rng(4)
    for _ in range(3000):
        placed = scenes.sample(rng).placements
        for index, one in enumerate(placed):
            assert min(one.x, one.y) - one.radius >= 0.5
            assert max(one.x, one.y) + one.radius <= scenes.RESOLUTION - 0.5
            for other in placed[index + 1 :]:
                assert np.hypot(one.x - other.x, one.y - other.y) >= one.radius + other.radius + 1


def test_same_seed_same_scenes():
    one, other = (scenes.sample(np.random.default_rng(9)) for _ in range(2))
    assert one == other
    assert np.array_equal(scenes.draw(one), scenes.draw(other))


def test_captions_say_what_is_drawn():
    assert scenes.captions("orange", "cross", "red", "plain", 1)[0] == "an orange cross on a red background"
    assert scenes.captions("green", "star", "orange", "small", 2)[0] == "two small green stars on an orange background"
    assert "large red circle, blue background" in scenes.captions("red", "circle", "blue", "large", 1)
    rng = np.random.default_rng(5)
    for _ in range(500):
        scene = scenes.sample(rng)
        words = scene.caption.replace(",", " ,").split()
        assert set(words) <= set(scenes.EVERY_WORD)
        assert {scene.colour, scene.background} <= set(words)
        assert (scene.shape if scene.count == 1 else scenes.PLURALS[scene.shape]) in words


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    from caption_tokenizer import build_tokenizer

    return build_tokenizer(scenes.EVERY_WORD)


def test_each_caption_word_is_one_token(tokenizer):
    for word in scenes.EVERY_WORD:
        ids = tokenizer(word).input_ids
        assert len(ids) == 3, word
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len({tokenizer(word).input_ids[1] for word in scenes.EVERY_WORD}) == len(set(scenes.EVERY_WORD))


def test_unknown_words_fall_back_to_bytes_and_come_back(tokenizer):
    ids = tokenizer("an astronaut über zürich").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["an", "astronaut", "über", "zürich"]


def test_prompts_are_padded_and_cut_to_the_text_encoders_length(tokenizer):
    for prompt in ("", "a red circle", "red " * 100):
        ids = tokenizer(prompt, padding="max_length", truncation=True).input_ids
        assert len(ids) == tokenizer.model_max_length == 32
        assert tokenizer.eos_token_id in ids
