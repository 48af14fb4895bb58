"""Keys and values of a running batch, kept beside the pages while it is the same batch."""

from __future__ import annotations

from neuron.engine.attention.attention_cpu import GatherAttention, decode_buckets

from tests.neuron.engine.attention.harness import PAGE, Sequence, World


def test_decodes_go_on_for_longer_than_the_workspace_was_made_for() -> None:
    world = World()
    sequences = [world.sequence(length) for length in (3, 5, 1)]
    for _ in range(60):
        world.step([(sequence, 1) for sequence in sequences], num_decodes=3)


def test_the_batch_changes_while_it_decodes() -> None:
    """Sequences leave, join, change places and are replaced by others of the same length."""
    world = World()
    a, b, c, d = (world.sequence(length) for length in (6, 6, 9, 40))
    for members in ([a, b], [a, b], [b, a], [a], [a, b], [a, b, c], [a, c], [d, a, c], [d, a, c], [d, a], [c, d, a]):
        world.step([(sequence, 1) for sequence in members], num_decodes=len(members))


def test_a_sequence_that_inherits_pages_and_length_of_another_is_not_taken_for_it() -> None:
    """The same prompt again, right after the first request ended, on the very pages that it gave back."""
    world = World()
    first = world.sequence(6)
    world.step([(first, 1)], num_decodes=1)
    world.step([(first, 1)], num_decodes=1)
    pages = list(first.pages)
    second = Sequence(pages=pages[:2])
    world.step([(second, 8)])  # as a prefill of its own: one token more than a continuation would have had
    world.step([(second, 1)], num_decodes=1)


def test_a_step_that_is_repeated_after_a_failure_gives_the_same_result() -> None:
    world = World()
    sequences = [world.sequence(length) for length in (6, 11)]
    for _ in range(3):
        world.step([(sequence, 1) for sequence in sequences], num_decodes=2)
    for sequence in sequences:  # the engine forgets the step and plans it again, perhaps with other tokens
        sequence.keys.pop()
        sequence.values.pop()
    world.step([(sequence, 1) for sequence in sequences], num_decodes=2)


def test_a_windowed_layer_that_missed_a_step_of_its_workspace_is_gathered_anew() -> None:
    """A long prompt makes the window matter for one step: the windowed layer leaves the workspace and comes back."""
    world = World()
    full_layer, windowed_layer = world.kv_layer, world.kv_layer.clone()
    decoding = Sequence()
    backend = world.backend
    mirror = World()
    mirror.kv_layer, mirror.free, mirror.backend = windowed_layer, world.free, backend

    def step(work: list[tuple[Sequence, int]], num_decodes: int) -> None:
        # Both layers see the same step: the first through `world`, the second with the same sequences and a window.
        lengths = [len(sequence.keys) for sequence, _ in work]
        generator_state = world.generator.get_state()
        world.step(work, num_decodes=num_decodes)
        for (sequence, _), length in zip(work, lengths, strict=True):
            del sequence.keys[length:], sequence.values[length:]
        mirror.generator.set_state(generator_state)
        prepare, backend.prepare = backend.prepare, lambda batch: None  # type: ignore[method-assign]
        try:
            mirror.step(work, num_decodes=num_decodes, windows=(32,))
        finally:
            backend.prepare = prepare  # type: ignore[method-assign]

    assert full_layer is not windowed_layer
    step([(decoding, 8)], 0)
    step([(decoding, 1)], 1)
    step([(decoding, 1)], 1)
    step([(decoding, 1), (Sequence(), 50)], 1)
    step([(decoding, 1)], 1)
    step([(decoding, 1)], 1)


def test_a_workspace_that_would_double_the_cache_is_not_made() -> None:
    world = World(num_pages=12)
    sequences = [world.sequence(length) for length in (14, 14)]
    for _ in range(3):
        world.step([(sequence, 1) for sequence in sequences], num_decodes=2)
    assert not world.backend._workspaces


def test_workspaces_of_several_buckets_take_half_of_the_cache_together() -> None:
    """Which is what an estimate of memory counts for them. Each alone would have fitted."""
    world = World(num_pages=100)
    sequences = [world.sequence(length) for length in (1, 2, 40, 90, 170)]
    half = 100 * PAGE // 2
    for _ in range(12):
        world.step([(sequence, 1) for sequence in sequences], num_decodes=len(sequences))
        assert isinstance(world.backend, GatherAttention)
        made = [workspace.num_slots for workspace in world.backend._workspaces.values()]
        assert made and all(slots <= half for slots in made) and sum(made) <= half
    assert len(made) < len(decode_buckets([-(-len(sequence.keys) // PAGE) for sequence in sequences]))
