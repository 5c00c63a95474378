"""Several models of one kind side by side, each with its own part of the item vectors.

A branch is a whole model: it has its own columns of the item table, its own parameters and its own
loss. The score of an item is the mean of the branches' scores, which is one inner product again:

    s(u, v) = 1/R sum_r q_u^r . x_v^r = R^-.5 (q_u^1 .. q_u^R) . R^-.5 (x_v^1 .. x_v^R)

so ranking, export and search indexes need not know about branches.

This is what the paper says of FAME's heads (section 4.2.3: the sub-embeddings of each head predict
the next item by themselves), for the whole model and not for its last block alone. Separate item
vectors and layers for each part are the multi-embedding of Guo et al. (ICML 2024, arXiv
2310.04400), who train all parts by one loss; here each is trained by itself, as in an ensemble
(arXiv 1612.01474). Of an ensemble of separate runs it differs in that the branches see the same
batches, and that the epoch is selected by their mean.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.batch import Batch
from fame_jax.losses import LossOptions
from fame_jax.models import surgery
from fame_jax.models.bsarec import CausalBSARec
from fame_jax.models.fame import FAME
from fame_jax.models.item_model import ItemModel
from fame_jax.models.options import Count, Width
from fame_jax.models.sasrec import SASRec
from fame_jax.models.tvrec import CausalTVRec

Array = jax.Array
Tree = Any


class Branches(nn.Module):
    """What models with branches share; a subclass inherits from the model of a branch after it.

    The options are those of a branch, with the same defaults, except for `width`, which all
    branches share: each has width / branches.

    The parameters are the item table, [V + 1, width], and under 'branches' the other parameters of
    a branch, each with a leading axis R.

    Attributes:
      branches: R, models side by side.
    """

    width: Width = 192
    branches: Count = 3

    # The class of a branch: with one query for a history, and item vectors by row of the table.
    branch: ClassVar[type[ItemModel]]

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuses bases in an order in which the methods of one branch would replace these."""
        super().__init_subclass__(**options)
        places = {base: place for place, base in enumerate(cls.__mro__)}
        if places.get(cls.branch, -1) < places[Branches]:
            raise TypeError(
                f'{cls.__name__} has to inherit from Branches and after it from its branch, '
                f'{cls.branch.__name__}'
            )

    def setup(self) -> None:
        ItemModel.setup(self)
        self.branch_params = self.param('branches', self.init_branches)

    @nn.nowrap
    def branch_module(self) -> ItemModel:
        """The module of one branch."""
        names = {field.name for field in dataclasses.fields(self.branch)} - {'parent', 'name'}
        fields = {name: getattr(self, name) for name in names}
        fields |= {'width': self.width // self.branches, 'text_width': 0}
        return self.branch(**fields, parent=None)

    @nn.nowrap
    def init_branches(self, key: Array) -> Tree:
        """Fresh parameters of all branches but their item tables; leaves [R, ...]."""
        module, token_11 = self.branch_module(), jnp.ones((1, 1), jnp.int32)

        def init(key: Array) -> Tree:
            params = module.init(key, token_11, token_11 * 0, token_11, method='forward')['params']
            return {name: leaf for name, leaf in params.items() if name != 'item_table'}

        return jax.vmap(init)(jax.random.split(key, self.branches))

    @nn.nowrap
    def split(self, x: Array) -> Array:
        """The branches' parts of vectors: [..., D] -> [R, ..., K]."""
        return jnp.moveaxis(x.reshape(*x.shape[:-1], self.branches, -1), -2, 0)

    @nn.nowrap
    def join(self, x_R: Array) -> Array:
        """One vector of the branches' parts: [R, ..., K] -> [..., D]."""
        x = jnp.moveaxis(x_R, 0, -2)
        return x.reshape(*x.shape[:-2], -1)

    @nn.nowrap
    def each_branch(self, function: Callable[..., Tree], params: Tree, *rest: Array) -> Tree:
        """function(a branch's parameters, its element of each array of `rest`), stacked over R.

        Devices that share the item table run one branch after another, since the loss on a mesh is
        not for `jax.vmap`.
        """
        table_RVK = self.split(params['item_table'])
        stacked = {**params['branches'], 'item_table': table_RVK}
        if self.mesh is None:
            return jax.vmap(function)(stacked, *rest)

        def take(r: int) -> Tree:
            return jax.tree.map(lambda leaf: leaf[r], (stacked, *rest))

        results = [function(*take(r)) for r in range(self.branches)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    def __call__(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, Any]:
        """As that of a branch, with the branches' queries side by side.

        The intermediates are those of a branch with a leading axis R.
        """
        module, rows = self.branch_module(), (tokens_BL, positions_BL, segments_BL)
        # No keys without dropout: an exported program has no use for them.
        keys = [jax.random.split(self.make_rng('dropout'), self.branches)] if train else []

        def encode(params: Tree, *keys: Array) -> tuple[Array, Any]:
            rngs = {'dropout': keys[0]} if keys else {}
            return module.apply({'params': params}, *rows, train=train, last=last, rngs=rngs)

        params = {'item_table': self.item_table, 'branches': self.branch_params}
        query_RBLK, intermediates = self.each_branch(encode, params, *keys)
        return self.join(query_RBLK) * self.share(), intermediates

    @nn.nowrap
    def share(self) -> float:
        """The factor of a branch's query, and of its item vectors, in those of the whole model.

        With R^-.5 on both sides the score is the mean of the branches' scores, and vectors of
        branches that have unit length are one of unit length.
        """
        return self.branches**-0.5

    def item_transform(self, row_VD: Array) -> Array:
        """The item vectors of rows of the table: those of the branches, side by side."""
        item_RVK = jax.vmap(self.branch_module().item_transform)(self.split(row_VD))
        return self.join(item_RVK) * self.share()

    @nn.nowrap
    def objective(
        self, params: dict, batch: Batch, key: Array, loss: LossOptions
    ) -> tuple[Array, Array, dict[str, Array]]:
        """The mean of the branches' objectives, each trained as if it were alone.

        Arguments and results are those of `ItemModel.objective`.
        """
        module = self.branch_module()

        def objective(params: Tree, key: Array) -> tuple[Array, Array, dict[str, Array]]:
            return module.objective(params, batch, key, loss)

        results = self.each_branch(objective, params, jax.random.split(key, self.branches))
        return jax.tree.map(lambda leaf_R: leaf_R.mean(axis=0), results)

    @nn.nowrap
    def facet_projections(self, params: Tree) -> Array:
        """The selectors of each branch's part of an item's vector, [R, D, K]: its view of an item.

        Args:
          params: the model's parameters.
        """
        del params
        return self.split(jnp.eye(self.width))

    @nn.nowrap
    def validate(self) -> None:
        """Each branch must have as many columns of the item table, and valid options.

        Raises:
          ValueError: in one line; also when the class of a branch has what branches cannot have.
        """
        super().validate()
        kind = self.branch
        obstacles = {
            'several queries for a history': kind.combine is not ItemModel.combine,
            'item vectors that depend on more than a row of the table': not kind.row_wise_items,
            'frozen parameters': bool(kind.frozen_params),
            'work before each epoch': kind.before_epoch is not None,
        }
        found = [name for name, is_there in obstacles.items() if is_there]
        if found:
            raise ValueError(f'branches={self.branches}: {kind.title} has {", ".join(found)}')
        if self.width % self.branches:
            raise ValueError(
                f'width={self.width} does not divide into branches={self.branches}; make the width '
                'a multiple of the branches'
            )
        try:
            self.branch_module().validate()
        except ValueError as error:
            raise ValueError(
                f'{error}; that width is of each of branches={self.branches}'
            ) from None


class BranchedSASRec(Branches, SASRec):
    """SASRecs side by side."""

    title: ClassVar[str] = 'SASRec, branched'
    branch: ClassVar[type[ItemModel]] = SASRec


class BranchedBSARec(Branches, CausalBSARec):
    """BSARecs in their causal form side by side."""

    title: ClassVar[str] = 'BSARec, causal, branched'
    branch: ClassVar[type[ItemModel]] = CausalBSARec


class BranchedTVRec(Branches, CausalTVRec):
    """TV-Recs in their causal form side by side."""

    title: ClassVar[str] = 'TV-Rec, causal, branched'
    branch: ClassVar[type[ItemModel]] = CausalTVRec


class BranchedFAME(Branches, FAME):
    """FAMEs side by side, with H heads each: head h of branch r is facet r H + h."""

    title: ClassVar[str] = 'FAME, branched'
    branch: ClassVar[type[ItemModel]] = FAME
    backbone: ClassVar[type[ItemModel]] = BranchedSASRec

    def intermediates(
        self, tokens_BL: Array, positions_BL: Array, segments_BL: Array
    ) -> dict[str, Array]:
        """As FAME's, of the heads of all branches; a head's own query is 0 outside its branch."""
        module, rows = self.branch_module(), (tokens_BL, positions_BL, segments_BL)

        def intermediates(params: Tree) -> dict[str, Array]:
            return module.apply({'params': params}, *rows, method='intermediates')

        params = {'item_table': self.item_table, 'branches': self.branch_params}
        parts = self.each_branch(intermediates, params)
        eye_RR = jnp.eye(self.branches) * self.share()
        head_RBHSK = jnp.einsum('RBHK,RS->RBHSK', parts['head_BHD'], eye_RR)
        parts['head_BHD'] = head_RBHSK.reshape(*head_RBHSK.shape[:-2], -1)
        return {
            name: jnp.concatenate(part_R, axis=2 if name == 'positions_BLHN' else 1)
            for name, part_R in parts.items()
        }

    @nn.nowrap
    def facet_projections(self, params: Tree) -> Array:
        """W_f of the heads of all branches, [R H, D, K]; 0 outside a head's branch."""
        facet_RHDK = params['branches']['facet_block']['facet']
        facet_RHSDK = jnp.einsum('RHDK,RS->RHSDK', facet_RHDK, jnp.eye(self.branches))
        return facet_RHSDK.reshape(-1, self.width, facet_RHDK.shape[-1])

    @nn.nowrap
    def surgery_plan(self, key: Array) -> surgery.Plan:
        """The plan of each branch; their experts have noise of their own.

        Args:
          key: consumed, for the experts' noise.
        """
        module = self.branch_module()
        plans = [module.surgery_plan(k) for k in jax.random.split(key, self.branches)]
        first = plans[0]

        def of_branches(path: str) -> Callable[[Array], Array]:
            return lambda leaf_R: jnp.stack(
                [plan.transform[path](leaf) for plan, leaf in zip(plans, leaf_R)]
            )

        def inside(path: str) -> str:
            return f'branches/{path}'

        return surgery.Plan(
            copy={inside(new): inside(old) for new, old in first.copy.items()},
            transform={inside(path): of_branches(path) for path in first.transform},
            fresh=inside(first.fresh),
            dropped=tuple(map(inside, first.dropped)),
        )
