"""Several sessions in one batch get what each would have got alone."""

import asyncio
from dataclasses import replace

import pytest
import torch
from served import DEEP, LINEAR, build

from titans.generate import stream
from titans.inspect import watch
from titans.serve.batch import phase, row, stack
from titans.serve.engine import Engine, Work
from titans.serve.metrics import Metrics

KINDS = [(v, m) for v in ("lmm", "mac", "mag", "mal") for m in (LINEAR, DEEP)]
KINDS += [("sliding", LINEAR), ("transformer", LINEAR), ("rwkv7", LINEAR)]


def texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator) for n in lengths]


def assert_states_equal(a, b, tolerance=1e-12):
    assert phase(a) == phase(b)
    assert a.position == b.position
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(
            tensor, b.tensors()[name], rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize(("variant", "memory"), KINDS)
def test_a_batch_equals_its_rows_alone(variant, memory) -> None:
    """Rows that have read differently many tokens, both before and beyond the window."""
    model = build(variant, memory).double()
    lengths = (3, 3) if variant == "transformer" else (3, 11, 19)  # whose caches must be as long
    with torch.no_grad():
        alone = [model(text[None])[1] for text in texts(lengths)]
        assert len({phase(state) for state in alone}) == 1
        more = torch.stack(texts([13] * len(alone), seed=1))
        logits, after = model(more, stack(alone))
        for index, state in enumerate(alone):
            own_logits, own = model(more[index : index + 1], state)
            torch.testing.assert_close(logits[index], own_logits[0], rtol=1e-11, atol=1e-11)
            assert_states_equal(row(after, index, own.position), own)


def test_states_at_different_places_of_a_chunk_do_not_mix() -> None:
    model = build("mac", DEEP)
    with torch.no_grad():
        phases = [phase(model(text[None])[1]) for text in texts((8, 9, 12, 16))]
    assert phases[0] == phases[3]
    assert len({*phases}) == 3


def test_a_row_does_not_keep_the_batch_alive() -> None:
    model = build()
    state = row(stack([model.init_state(1)] * 3), 1, 0)
    for tensor in state.tensors().values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


class Running:
    """An engine of this event loop, and what it computed."""

    def __init__(self, rows=32):
        self.sizes: list[int] = []
        self.engine = Engine(Metrics(), rows)
        self.engine.metrics.computed = lambda items, seconds: self.sizes.append(len(items))

    async def __aenter__(self):
        self.engine.start()
        return self

    async def __aexit__(self, *_):
        await asyncio.to_thread(self.engine.stop)

    async def read(self, model, tokens, piece, observed=False):
        state, logits, steps = model.init_state(1).detach(), None, []
        for part in tokens.split(piece):
            step = await self.engine.forward(model, part, state, logits, observed)
            state, logits = step.state, step.logits
            steps.append(step)
        return steps


def test_the_engine_gives_what_the_library_gives_and_batches() -> None:
    model = build("mag", DEEP).double()
    sources = texts((24, 24, 24, 16))

    async def run():
        async with Running() as running:
            reads = (running.read(model, text, 8, observed=True) for text in sources)
            return await asyncio.gather(*reads), running.sizes

    found, sizes = asyncio.run(run())
    assert max(sizes) == 4
    assert sum(sizes) == 11
    assert len(sizes) <= 6  # three rounds in step, give or take the start
    for text, steps in zip(sources, found, strict=True):
        for step, own in zip(steps, watch(model, text, piece=8), strict=True):
            torch.testing.assert_close(step.nll, own.nll[0], rtol=1e-10, atol=1e-10, equal_nan=True)
            for name in ("surprise", "learning_rate", "momentum", "decay", "moved", "tokens"):
                got, expected = getattr(step.observation, name), getattr(own, name)
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=name)
            assert_states_equal(step.state, own.state, 1e-10)


def test_an_item_cancelled_while_it_is_taken_does_not_end_the_engine() -> None:
    """The event loop cancels without the engine's lock."""

    class Cancelled(asyncio.Future):
        looks = 0

        def cancelled(self) -> bool:
            self.looks += 1
            return self.looks > 1

    model, (text,) = build(), texts((8,))

    async def run():
        async with Running() as running:
            state = model.init_state(1)
            work = Work(
                model=model,
                tokens=text[None],
                state=state,
                logits=None,
                observed=False,
                write=True,
                kind=(),
                future=Cancelled(),
            )
            with running.engine.changed:
                running.engine.queue.append(work)
                running.engine.changed.notify()
            return await asyncio.wait_for(running.engine.forward(model, text, state), 30)

    assert asyncio.run(run()).state.position == 8


def test_alone_it_is_the_library_bit_for_bit() -> None:
    model, (text,) = build(), texts((50,))

    async def run():
        async with Running() as running:
            return await running.read(model, text, 16)

    for step, own in zip(asyncio.run(run()), stream(model, text, piece=16), strict=True):
        assert torch.equal(step.logits, own.logits[0])
        for name, tensor in own.state.tensors().items():
            assert torch.equal(step.state.tensors()[name], tensor)


def test_a_batch_is_not_larger_than_asked_for() -> None:
    model = build()

    async def run():
        async with Running(rows=2) as running:
            await asyncio.gather(*(running.read(model, text, 8) for text in texts([16] * 5)))
            return running.sizes

    sizes = asyncio.run(run())
    assert max(sizes) == 2
    assert sum(sizes) == 10


def test_one_bad_piece_does_not_take_the_others_with_it() -> None:
    """A state that breaks inside the computation, beside one that does not."""
    model = build()
    good = model.init_state(1).detach()
    mixer = good.blocks[0]
    broken = replace(mixer.attention, prefix_keys=mixer.attention.prefix_keys[:, :1])
    bad = replace(good, blocks=(replace(mixer, attention=broken), *good.blocks[1:]))
    text = texts((8,))[0]

    async def run():
        async with Running() as running:
            engine = running.engine
            blocked = asyncio.create_task(engine.call(lambda: __import__("time").sleep(0.05)))
            await asyncio.sleep(0.01)
            both = [engine.forward(model, text, state) for state in (good, bad)]
            for item in engine.queue:
                object.__setattr__(item, "kind", "same")
            results = await asyncio.gather(*both, return_exceptions=True)
            await blocked
            return results

    good_step, error = asyncio.run(run())
    torch.testing.assert_close(good_step.logits, model(text[None], good)[0][0, -1].detach())
    assert isinstance(error, Exception)


def test_what_the_model_does_not_know_is_refused_before_it_is_queued() -> None:
    model, other = build(), build("mag")

    async def run():
        async with Running() as running:
            with pytest.raises(ValueError, match="token 257 is outside the vocabulary of 257"):
                await running.engine.forward(model, [257], model.init_state(1))
            with pytest.raises(ValueError, match="belongs to another model"):
                await running.engine.forward(model, [1], other.init_state(1))
            with pytest.raises(ValueError, match="tokens are empty"):
                await running.engine.forward(model, [], model.init_state(1))

    asyncio.run(run())


def test_stopping_answers_whoever_waits() -> None:
    model = build()

    async def run():
        running = Running()
        async with running:
            slow = asyncio.create_task(running.engine.call(lambda: __import__("time").sleep(0.2)))
            await asyncio.sleep(0.05)
            waiting = asyncio.create_task(running.engine.forward(model, [1], model.init_state(1)))
            await asyncio.sleep(0.05)
        await slow
        with pytest.raises(RuntimeError, match="stopping"):
            await waiting
        with pytest.raises(RuntimeError, match="stopping"):
            await running.engine.forward(model, [1], model.init_state(1))

    asyncio.run(run())
