"""Speculative decoding in which a model is its own draft: the same weights under a sparser pattern.

    python -m examples.speculative_decoding --draft "LocalStride(64, 1, 4) | FirstBlocks(1)"

A round drafts a few tokens with the sparse model, one after the other, and verifies them with the model itself in one
step. Drafts after the first wrong one are taken back from both caches. The text is that of plain greedy decoding, token
by token; which drafts are right decides only how many rounds it takes. Source: Leviathan et al., arXiv 2211.17192.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from models import Transformer
from models.checkpoints.pretrained import Pretrained
from models.command_line import Parser, add_model_flags, load_model, run
from models.generation import generate
from models.sampling import Sampling
from s2jax import Pattern
from s2jax.patterns import parse_pattern


@dataclasses.dataclass
class Speculation:
    """The outcome of speculative decoding.

    Attributes:
        tokens: ids, up to one that ends a text, included.
        rounds: verifications by the model.
        drafted, accepted: tokens that were drafted, and those of them that were right.
    """

    tokens: list[int]
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


def speculate(
    pretrained: Pretrained, draft_pattern: Pattern, prompt: Sequence[int], max_new_tokens: int, drafts: int = 4
) -> Speculation:
    """Decodes greedily, `drafts` drafted tokens a round.

    Args:
        draft_pattern: who reads whom in the drafting model, in every layer that is not dense.
    """
    model = pretrained.model
    graph, state = nnx.split(model)
    sparse = dataclasses.replace(model.config, pattern=draft_pattern, dense_layers=())
    draft_graph, _ = nnx.split(nnx.eval_shape(lambda: Transformer(sparse, rngs=nnx.Rngs(0))))
    settings = {"max_length": len(prompt) + max_new_tokens + drafts + 1, "max_rollback": drafts}

    @jax.jit
    def begin(state, prompt):
        verifier, drafter = nnx.merge(graph, state), nnx.merge(draft_graph, state)
        logits, caches = verifier.prefill(prompt, verifier.create_caches(1, **settings))
        _, draft_caches = drafter.prefill(prompt, drafter.create_caches(1, **settings))
        return logits[:, -1].argmax(-1), caches, draft_caches

    @functools.partial(jax.jit, donate_argnums=(2, 3))
    def round_of(state, token, caches, draft_caches):
        verifier = nnx.merge(graph, state)

        def draft(carry, _):
            token, caches = carry
            logits, caches = nnx.merge(draft_graph, state).extend(token[:, None], caches)
            following = logits[:, -1].argmax(-1)
            return (following, caches), token

        # The last draft is fed, too, so that both caches hold the same tokens.
        (_, draft_caches), fed = jax.lax.scan(draft, (token, draft_caches), length=drafts + 1)
        fed = fed.swapaxes(0, 1)
        logits, caches = verifier.extend(fed, caches)
        chosen = logits.argmax(-1)
        right = (chosen[:, :-1] == fed[:, 1:]).astype(jnp.int32)
        accepted = jnp.cumprod(right, 1).sum(1)
        refused = drafts - accepted
        caches, draft_caches = (tuple(cache.rollback(refused) for cache in each) for each in (caches, draft_caches))
        return chosen[0], accepted[0], caches, draft_caches

    token, caches, draft_caches = begin(state, jnp.array([prompt]))
    found = Speculation([int(token[0])])
    while len(found.tokens) < max_new_tokens and found.tokens[-1] not in pretrained.eos_ids:
        chosen, accepted, caches, draft_caches = round_of(state, token, caches, draft_caches)
        new = chosen[: int(accepted) + 1]
        found.rounds, found.drafted = found.rounds + 1, found.drafted + drafts
        found.accepted += int(accepted)
        found.tokens += new.tolist()
        token = new[-1:]
    ends = [at for at, token in enumerate(found.tokens) if token in pretrained.eos_ids]
    found.tokens = found.tokens[: min([max_new_tokens, *(at + 1 for at in ends)])]
    return found


def _main(argv: list[str] | None) -> None:
    parser = Parser(prog="python -m examples.speculative_decoding", description=__doc__)
    add_model_flags(parser)
    parser.add_argument("--prompt", default="The history of the lighthouse begins", help="to continue")
    parser.add_argument("--draft", default="LocalStride(16, 2, 4) | FirstBlocks(1, 16)", help="pattern of the drafts")
    parser.add_argument("--drafts", type=int, default=4, help="tokens of a round; default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default %(default)s")
    given = parser.parse_args(argv)
    pattern, pretrained = parse_pattern(given.draft), load_model(given)
    assert pretrained.tokenizer is not None
    prompt = pretrained.encode(given.prompt)
    found = speculate(pretrained, pattern, prompt, given.max_new_tokens, given.drafts)
    start = time.perf_counter()
    plain = list(generate(pretrained, prompt, given.max_new_tokens, sampling=Sampling()))
    print(given.prompt + pretrained.tokenizer.decode(found.tokens))
    print(
        f"\n{len(found.tokens)} tokens in {found.rounds} rounds of {given.drafts} drafts; "
        f"{found.accepted / max(1, found.drafted):.0%} of {found.drafted} drafts were right"
    )
    print(f"plain greedy decoding: {'the same tokens' if plain == found.tokens else 'OTHER TOKENS'}, "
          f"in {time.perf_counter() - start:.1f} s with its compilation")  # fmt: skip
    if plain != found.tokens:
        raise FloatingPointError("rounding decided between two tokens of nearly equal logits: the texts differ")


if __name__ == "__main__":
    sys.exit(run("examples.speculative_decoding", _main, None))
