import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tumorjax.rehearsal import collectives

P = PartitionSpec


def compiled(function, *shapes, mesh=None, specs=None):
    mesh = mesh or Mesh(np.array(jax.devices()[:8]), ("x",))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=specs or P("x"), out_specs=P(), check_vma=False
    )
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(mapped).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
    ("function", "kind", "results", "sent"),
    [
        # A shard is [2, 3] float32: 24 bytes.
        (lambda x: lax.psum(x, "x"), "all-reduce", 24, 2 * 7 / 8 * 24),
        (lambda x: lax.all_gather(x, "x", tiled=True), "all-gather", 192, 7 / 8 * 192),
        (
            lambda x: lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
            "collective-permute",
            24,
            24,
        ),
    ],
)
def test_kind_bytes_and_group_of_one_collective(function, kind, results, sent):
    found = collectives.parse(compiled(function, (16, 3)), 8)
    assert [(one.kind, one.bytes, one.times) for one in found] == [(kind, results, 1)]
    assert collectives.totals(found) == {
        kind: {"count": 1, "bytes": results, "sent": pytest.approx(sent)}
    }
    if kind != "collective-permute":
        assert found[0].group == 8


def test_groups_are_those_of_the_axis():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("cell", "data"))
    text = compiled(lambda x: lax.psum(x, "data"), (8, 4), mesh=mesh, specs=P(("cell", "data")))
    (one,) = collectives.parse(text, 8)
    assert (one.group, one.bytes) == (4, 16)
    assert one.sent == pytest.approx(2 * 3 / 4 * 16)


def test_a_loop_of_known_length_counts_its_turns():
    def body(x):
        return lax.fori_loop(0, 5, lambda i, x: lax.psum(x, "x") * 0.5 + i, x)

    found = collectives.parse(compiled(body, (8, 3)), 8)
    assert sum(one.times for one in found) == 5
    assert not any(one.unknown_loop for one in found)


def test_a_loop_of_unknown_length_is_named():
    def body(x):
        return lax.while_loop(lambda x: x.sum() < 100, lambda x: lax.psum(x, "x") + 1, x)

    found = collectives.parse(compiled(body, (8, 3)), 8)
    assert len(found) == 1
    assert found[0].unknown_loop


def test_asynchronous_pairs_count_once_and_with_their_results():
    text = """HloModule m

%async (p: f32[4]) -> f32[32] {
  %p = f32[4]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(f32[4]{0} %p), replica_groups=[2,8]<=[16], dimensions={0}
}

ENTRY %main (a: bf16[2,3]) -> bf16[16,3] {
  %a = bf16[2,3]{1,0} parameter(0)
  %s = (bf16[2,3]{1,0}, bf16[16,3]{1,0}) all-gather-start(bf16[2,3]{1,0} %a), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %c = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(f32[5]{0} %b), source_target_pairs={{0,1},{1,0}}
  %w = ((f32[4]{0}), f32[32]{0}) async-start(f32[4]{0} %q), calls=%async
  ROOT %d = bf16[16,3]{1,0} all-gather-done((bf16[2,3]{1,0}, bf16[16,3]{1,0}) %s)
}
"""  # noqa: E501
    found = {one.bytes: (one.kind, one.group) for one in collectives.parse(text, 16)}
    assert found == {
        96: ("all-gather", 8),
        20: ("collective-permute", 2),
        128: ("all-gather", 8),
    }


def test_gathered_volumes_are_told_from_gathered_weights():
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",))

    def lowered(shape):
        sharded = NamedSharding(mesh, P(None, "x"))
        copy = jax.jit(
            lambda x: x * 2, in_shardings=sharded, out_shardings=NamedSharding(mesh, P())
        )
        text = copy.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()
        return collectives.parse(text, 8)

    volume, kernel = (1, 16, 8, 8, 4), (3, 8, 3, 4, 8)
    size = {int(np.prod(kernel))}
    assert len(collectives.gathered_activations(lowered(volume), size)) == 1
    assert collectives.gathered_activations(lowered(kernel), size) == []
