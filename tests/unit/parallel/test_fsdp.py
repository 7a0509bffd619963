"""The fully sharded strategy on one rank, where a cut into one part is still a cut."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM

from ingot.errors import RecipeError
from ingot.model.adapters import attach_adapter, trainable_tensors
from ingot.model.pooling import MeanPoolClassifier
from ingot.parallel import fsdp
from ingot.parallel.layout import Layout
from ingot.parallel.sharded import MODEL, OPTIMIZER
from ingot.ranks import Ranks
from ingot.recipe import Adapter, Optim, Parallel

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(3, 23).view(2, 10)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes}))


def cut(
    model: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32, **section: object
) -> fsdp.FullySharded:
    settings = Parallel(strategy="fsdp", **section)
    return fsdp.shard(model, Layout(Ranks()), settings, Optim(lr=1e-2), torch.device(device), dtype)


def learn(sharded: fsdp.FullySharded, ids: torch.Tensor = IDS) -> float:
    """One optimizer step; returns the norm of its gradient."""
    with sharded.microbatch(last=True):
        sharded.backward(sharded.forward(input_ids=ids, use_cache=False).logits.float().square().mean())
    return sharded.step(1e-2, None)


def names(model: nn.Module) -> list[str]:
    return [type(block).__name__ for block in fsdp.blocks_of(model)]


def test_blocks_are_what_transformers_does_not_split() -> None:
    assert names(llama()) == ["LlamaDecoderLayer"] * 2
    assert names(attach_adapter(llama(), Adapter(rank=2), "language-modeling", 0)) == ["LlamaDecoderLayer"] * 2
    encoder = BertModel(BertConfig(**SMALL), add_pooling_layer=False)
    assert names(MeanPoolClassifier(encoder, 3)) == ["BertEmbeddings", "BertLayer", "BertLayer"]


def test_a_block_with_tied_weights_is_left_to_the_root() -> None:
    """Cut apart, the embedding and the head would go separate ways."""
    assert names(BertForMaskedLM(BertConfig(**SMALL))) == ["BertLayer", "BertLayer"]


def test_blocks_of_a_model_without_such_a_class_are_its_largest_list() -> None:
    small = nn.ModuleList([nn.Linear(2, 2)])
    large = nn.ModuleList([nn.ModuleDict({"parts": nn.ModuleList([nn.Linear(8, 8)])}) for _ in range(3)])
    assert fsdp.blocks_of(nn.ModuleDict({"a": small, "b": large})) == list(large)
    assert fsdp.blocks_of(nn.Linear(2, 2)) == []


def test_grid() -> None:
    ranks = Ranks(0, 8, 0, 4)
    assert fsdp.grid(Parallel(strategy="fsdp"), ranks) == (1, 8)
    assert fsdp.grid(Parallel(strategy="hsdp"), ranks) == (2, 4)
    assert fsdp.grid(Parallel(strategy="hsdp", shard_ranks=2), ranks) == (4, 2)
    with pytest.raises(RecipeError, match=r"parallel.shard_ranks = 3: must divide the 8 ranks"):
        fsdp.grid(Parallel(strategy="hsdp", shard_ranks=3), ranks)


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_every_trained_tensor_moves_in_two_steps(group: None, kind: str) -> None:
    """accelerate#3256: an optimizer that was made before the model was cut steps nothing."""
    sharded = cut(attach_adapter(llama(), Adapter(kind=kind, rank=2), "language-modeling", 0))
    before = {name: p.detach().full_tensor().clone() for name, p in trainable_tensors(sharded.plain)}
    for _ in range(2):  # of an adapter's two matrices one has no gradient in the first
        assert learn(sharded) > 0
    still = [
        name for name, p in trainable_tensors(sharded.plain) if torch.equal(p.detach().full_tensor(), before[name])
    ]
    assert still == []


def test_all_parameters_are_cut(group: None) -> None:
    sharded = cut(attach_adapter(llama().bfloat16(), Adapter(rank=2), "language-modeling", 0), dtype=torch.bfloat16)
    learn(sharded)
    assert all(isinstance(p, DTensor) for p in sharded.plain.parameters())
    assert {p.dtype for p in sharded.plain.parameters()} == {torch.float32, torch.bfloat16}
    assert not sharded.whole


def test_state_behind_an_evaluation_is_that_before_it(group: None) -> None:
    """A forward pass without a backward one leaves the root whole, with other tensors in its parameters' places."""
    sharded = cut(llama())
    learn(sharded)
    before = sharded.state()
    with torch.no_grad():
        sharded.forward(input_ids=IDS)
    after = sharded.state()
    assert {name.split("/")[0] + "/" for name in after} == {MODEL, OPTIMIZER}
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert isinstance(tensor, DTensor) == isinstance(before[name], DTensor), name
        assert torch.equal(*(t.full_tensor() if isinstance(t, DTensor) else t for t in (tensor, before[name]))), name
    assert after[f"{OPTIMIZER}model.embed_tokens.weight/step"].item() == 1


def test_names_are_those_of_one_rank(group: None) -> None:
    plain = [name for name, _ in trainable_tensors(llama())]
    assert [name for name, _ in trainable_tensors(cut(llama()).plain)] == plain


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("before", [0, 1])
def test_a_step_that_ran_out_of_memory_is_forgotten(group: None, before: int, where: str, waits: bool) -> None:
    """torch's reset leaves gradients of `before` and of blocks that were done, which would be learned from twice."""
    one, two = cut(llama()), cut(llama())
    two.waits = waits
    for _ in range(before):
        with two.microbatch(last=False):
            two.backward(two.forward(input_ids=IDS, use_cache=False).logits.square().mean())

    def raises(*_: object) -> None:
        raise MemoryError

    block = fsdp.blocks_of(two.plain)[0]
    hook = block.register_forward_hook(raises) if where == "forward" else block.register_full_backward_hook(raises)
    with pytest.raises(MemoryError), two.microbatch(last=False):
        two.backward(two.forward(input_ids=IDS, use_cache=False).logits.square().mean())
    hook.remove()
    two.drop()
    for _ in range(2):
        assert learn(two) == learn(one)


def test_gradients_of_few_adapters_wait_for_the_last_microbatch(group: None) -> None:
    few = cut(attach_adapter(llama(), Adapter(rank=1, targets=["q_proj"]), "language-modeling", 0))
    assert few.waits
    many = cut(llama())
    many.layout = Layout(Ranks(0, 2, 0, 2))
    seen = []
    for sharded in (few, many):
        sharded.waits = sharded is few
        with sharded.microbatch(last=False):
            sharded.forward(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        seen.append([p.grad is not None for _, p in trainable_tensors(sharded.plain)])
    assert not any(seen[0])
    assert all(seen[1])


def test_full_fine_tuning_does_not_wait(group: None) -> None:
    """Whole gradients on every rank would take more than cutting the parameters saved."""
    model = llama()
    layout = Layout(Ranks(0, 2, 0, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    assert not fsdp.FullySharded(model, layout, torch.float32, optimizer, torch.device("cpu")).waits


def test_the_weights_of_a_cut_model_are_asked_for_late(group: None) -> None:
    """`fill` sees a model that is cut, and the optimizer holds what `fill` put in."""
    model = llama().to("meta")
    seen = []
    values: dict[str, torch.Tensor] = {}

    def fill(given: nn.Module) -> None:
        seen.append(all(isinstance(p, DTensor) and p.is_meta for p in given.parameters()))
        given.to_empty(device="cpu")
        for name, parameter in given.named_parameters():
            parameter.detach().to_local().normal_(std=0.5)
            values[name] = parameter.detach().to_local().clone()
        for module in given.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, torch.ones_like(buffer), persistent=False)

    settings = Parallel(strategy="fsdp")
    sharded = fsdp.shard(
        model, Layout(Ranks()), settings, Optim(lr=1e-2), torch.device("cpu"), torch.float32, fill=fill
    )
    assert seen == [True]
    learn(sharded)
    now = {name: parameter.detach().to_local() for name, parameter in sharded.plain.named_parameters()}
    assert [name for name, value in values.items() if torch.equal(now[name], value)] == []


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["none", "parameters"])
@pytest.mark.parametrize("kind", ["none", "lora"])
def test_on_a_gpu(offload: str, kind: str) -> None:
    """Offloaded parameters, moments and their clipped gradient live in CPU memory, and learn the same."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        norms = []
        for device in ("cpu", "cuda"):
            model = attach_adapter(llama(), Adapter(kind=kind, rank=2), "language-modeling", 0)
            if device == "cpu":
                optimizer = torch.optim.AdamW([p for _, p in trainable_tensors(model)], lr=1e-2, weight_decay=0.0)
                for _ in range(3):
                    model(input_ids=IDS, use_cache=False).logits.float().square().mean().backward()
                    norm = torch.nn.utils.clip_grad_norm_([p for _, p in trainable_tensors(model)], math.inf)
                    norms.append([norm.item()])
                    optimizer.step()
                    optimizer.zero_grad()
                continue
            sharded = cut(model, device, offload=offload)
            for number in range(3):
                norms[number].append(learn(sharded, IDS.cuda()))
            where = {p.device.type for p in sharded.plain.parameters()}
            assert where == {"cpu" if offload == "parameters" else "cuda"}
            assert sharded.device.type == "cuda"
        for one, other in norms:
            assert other == pytest.approx(one, rel=1e-3)
    finally:
        dist.destroy_process_group()
