"""A compiler for CUDA devices that are not here, and what it tells of the programs it makes.

For a step, an evaluation and a loss as a run has them; see benchmarks/without_gpu.py.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import roofline, thunks
from benchmarks.moved import moved
from fame_jax import evaluate, losses, programs, sharding
from fame_jax.models.build import MODELS, build, build_objective, initial
from fame_jax.models.items import ItemModel
from fame_jax.run import Run

Record = dict[str, Any]
Shape = jax.ShapeDtypeStruct

# Of an H200 (SXM), NVIDIA's data sheet: dense, without sparsity. float32 is multiplied as tf32.
FLOPS = {'float32': 494.5e12, 'bfloat16': 989e12}
BANDWIDTH = 4.8e12
LAUNCH, READ = 2.5e-6, 10e-6  # seconds; assumed


class Compiler:
    """The devices that are compiled for."""

    def __init__(self, base: Run, target: str, devices: int, dump: Path):
        self.base, self.dump = base, dump
        jax.devices()  # the CPU's client comes first
        self.device = _topology(target, 1)[0]
        self.several = _topology(target, devices) if devices > 1 else ()

    def place(self, tree: Any, mesh: jax.sharding.Mesh | None = None) -> Any:
        """Shapes with the devices that have them."""
        one = jax.sharding.SingleDeviceSharding(self.device)
        places = sharding.placement(tree, mesh) if mesh else jax.tree.map(lambda _: one, tree)
        return jax.tree.map(lambda x, at: Shape(x.shape, x.dtype, sharding=at), tree, places)

    def mesh(self, data: int, model: int) -> jax.sharding.Mesh:
        """`sharding.make_mesh` of devices that are not here."""
        types = (jax.sharding.AxisType.Auto,) * 2
        names = sharding.DATA, sharding.MODEL
        devices = np.array(self.several[: data * model])
        return jax.make_mesh((data, model), names, axis_types=types, devices=devices)

    def step(self, model: str, run: Run, items: int, batch: Any, mesh: Any = None) -> Any:
        """The trainer's program for a block of steps."""
        config = run.config
        module = build(model, config, items, mesh)
        optimizer = programs.make_optimizer(
            config.learning_rate, config.adam_b2, config.weight_decay
        )
        objective = functools.partial(build_objective(model, config), module)
        impl = 'rbg' if config.random_bits == 'rbg' else None
        key = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
        params = jax.eval_shape(functools.partial(initial, module), jax.random.key(0))
        state = programs.State(Shape((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
        several = 1 if MODELS[model].layout == 'prefixes' else config.steps_per_dispatch
        program = programs.Program(programs.make_step(objective, optimizer), several, mesh)
        if mesh:
            # There is nothing to put the rows of a batch on: their shapes and places have to do.
            rows = jax.sharding.PartitionSpec(None, sharding.DATA)
            at = jax.sharding.NamedSharding(mesh, rows)
            program._place = lambda tree: jax.tree.map(
                lambda x: Shape(x.shape, x.dtype, sharding=at), tree
            )
        return program.compile(self.place(state, mesh), batch, self.place(key, mesh))

    def ranks(self, items: int) -> Any:
        """FAME's ranks of a chunk of users, of the longest histories."""
        config = self.base.config
        module = build('fame', config, items)
        params = jax.eval_shape(functools.partial(initial, module), jax.random.key(0))

        def encode(params: Any, *rows: jax.Array) -> jax.Array:
            return module.apply({'params': params}, *rows, last=True)[0]

        held = max(self.base.held['test'], key=lambda held: held.tokens_BL.shape)
        rows = self.place(tuple(held[:5]))
        item_VD = self.place(Shape((items + 1, config.width), jnp.float32))
        lowered = evaluate._rank_rows.lower(
            encode,
            ItemModel.combine,
            self.place(params),
            item_VD,
            rows,
            num_items=items,
            eval_items=0,
            mesh=None,
        )
        return lowered.compile()

    def loss(self, items: int, tokens: int, chunks: tuple[int, int]) -> Any:
        """The cross-entropy alone, with both gradients."""
        rows = [Shape((n, 64), jnp.float32) for n in (tokens, items + 1)]
        rows += [Shape((tokens,), jnp.int32), Shape((tokens,), jnp.float32)]

        def total(*data: jax.Array) -> jax.Array:
            told = {'chunk_tokens': chunks[0], 'chunk_items': chunks[1]}
            return losses.chunked_cross_entropy(*data, **told)[0]

        def alone(*data: jax.Array) -> Any:  # the dump goes by this name
            return jax.value_and_grad(total, argnums=(0, 1))(*data)

        return jax.jit(alone).lower(*self.place(rows)).compile()

    def look(self, compiled: Any, dtype: str, rows: int) -> Record:
        """What is told of a compiled program; rows: of the table that a device has."""
        text, memory = compiled.as_text(), compiled.memory_analysis()
        root, turns = thunks.read(*thunks.dumped(self.dump)), thunks.program_turns(text)
        about = turns, thunks.products(text).__contains__, moved(text)
        step = thunks.step_of(root, turns)
        whole = thunks.count(root, *about)
        once = thunks.count(step, *about) if step else whole
        inside = list(thunks.walk(step or root))
        loops = [thunk for thunk in inside if thunk.kind == 'kWhile' and thunk is not step]
        flops = roofline.count(compiled).flops
        floor = max(flops / FLOPS[dtype], once.bytes / BANDWIDTH)
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return {
            **once._asdict(),
            'of_a_dispatch': (whole.kernels - once.kernels) if step else 0,
            'loops': len(loops),
            'unknown_loops': sum(not turns.get(loop.name) for loop in loops),
            'conditions': sum(thunk.kind == 'kConditional' for thunk in inside),
            'temporaries_bytes': memory.temp_size_in_bytes,
            'argument_bytes': memory.argument_size_in_bytes,
            'held_bytes': held - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
            'flops': flops,
            'floor_seconds': floor,
            'launch_seconds': LAUNCH * once.kernels,
            'predicted_seconds': floor + LAUNCH * once.kernels + READ * once.reads,
            **thunks.look(text, {thunk.name for thunk in inside}, rows),
        }


def _topology(target: str, devices: int) -> Sequence[Any]:
    from jax.experimental import topologies

    options = {'target_config': target, 'topology': f'1x{devices}x1'}
    return topologies.get_topology_desc(f'1x1x{devices}', platform='cuda', **options).devices
