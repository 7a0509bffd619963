"""Fixtures of all tests: where things are, and a real tokenizer that is built here in a few milliseconds."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any import of the hub's packages: a test that would reach for the network fails at once instead of waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# pytest-xdist tells its workers a width, and a console that is made here would keep it.
os.environ.pop("COLUMNS", None)
# Before any import of Triton: its interpreter runs kernels where there is no GPU.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

CORPUS = [
    "Hello! How can I help you today? I would like to book a table for two people in the city centre.",
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital of France.",
    "system user assistant tool name arguments content\nThank you very much, goodbye.\n\n1 2 3 4 5 6 7 8 9 0",
]
# A line break behind a tag is written as an expression: Jinja eats a bare one.
MARKED_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}<|im_end|>{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_TEMPLATE = MARKED_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--within", type=float, metavar="SECONDS", help="skip tests that would begin later than this")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    within = item.config.getoption("--within")
    if within is not None and time.monotonic() - STARTED > within:
        pytest.skip(f"the {within:g} s of --within are over")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Encoded rows go into a folder of this session, and the processes that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INGOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir(repo_root: Path) -> Path:
    """Real data and models beside the checkout."""
    folder = repo_root.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("the real data sets (../shared/data) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def marked_template() -> str:
    return MARKED_TEMPLATE


@pytest.fixture(scope="session")
def plain_template() -> str:
    return PLAIN_TEMPLATE


@pytest.fixture(scope="session")
def _trained() -> Callable[[bool], Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    def train(trim_offsets: bool) -> Any:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(CORPUS, trainer)
        return core

    return train


@pytest.fixture
def make_tokenizer(_trained: Callable[[bool], Any]) -> Callable[..., Any]:
    """make_tokenizer(template=MARKED or PLAIN or None, trim_offsets=False, adds_bos=False, **special tokens)."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    def make(
        template: str | None = MARKED_TEMPLATE, *, trim_offsets: bool = False, adds_bos: bool = False, **names: Any
    ) -> Any:
        core = _trained(trim_offsets)
        if adds_bos:
            bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
            core.post_processor = bos
        specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **names}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **specials)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def tiny_tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """Byte-level BPE of 420 tokens, ChatML-like template with `{% generation %}` marks that writes one BOS."""
    return make_tokenizer()


@pytest.fixture
def plain_tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """`tiny_tokenizer` with the same template without `{% generation %}` marks."""
    return make_tokenizer(PLAIN_TEMPLATE)


@pytest.fixture
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A tiny random Llama with its tokenizer as a folder, as a user would have it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
