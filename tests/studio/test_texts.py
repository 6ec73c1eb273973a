"""The built-in texts: what they hide, the packaged model can be asked for."""

import torch

from titans.data.carrier import is_held_out
from titans.demo import asset
from titans.generate import Sampling, generate, stream
from titans.models.lm import load
from titans.studio.texts import built_in_texts


def test_names_and_codes_are_of_the_held_out_split_and_stand_in_the_text():
    for text in built_in_texts():
        assert text.text.isascii() is False  # « and »
        for fact in text.facts:
            assert text.text.count(fact.statement.decode()) == 1
            assert is_held_out(fact.name)
            assert is_held_out(fact.value)


def test_the_two_endings_give_one_name_two_codes():
    left, right = (text.facts[0] for text in built_in_texts() if text.id in ("left", "right"))
    assert left.name == right.name
    assert left.value != right.value


def test_the_packaged_model_recalls_every_fact_of_every_text():
    model = load(asset("demo.safetensors"))
    for text in built_in_texts():
        for reading in stream(model, torch.tensor(list(text.text.encode())), piece=1024):
            state = reading.state
        for fact in text.facts:
            greedy = Sampling(temperature=0.0)
            digits = generate(model, [list(fact.question)], 4, sampling=greedy, state=state)
            assert bytes(digits.tokens[0]).decode() == fact.value, (text.id, fact)


def test_the_texts_are_the_same_on_every_call():
    assert built_in_texts() == built_in_texts()
