"""What every contender of `serve.py` is given: seeded models in the form that it serves, and requests.

The language model writes a known chain of words, so whoever answers must write the same, as long as it was asked to.
"""

import random
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from eval_work import Size as Shape
from eval_work import word, words, write_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

LABELS = ("calm", "glad", "sad", "angry")
# Words of banking77's questions: (share of all, fewest, most). Mean 12.
QUESTIONS = ((5, 2, 5), (20, 5, 7), (25, 7, 10), (25, 10, 13), (20, 13, 29), (5, 29, 43))


class Size(NamedTuple):
    """Of the models and of what is asked of them."""

    hidden: int
    layers: int
    vocabulary: int
    prompt: tuple[int, int]  # words
    answer: tuple[int, int]  # tokens
    encoder_hidden: int
    encoder_layers: int
    longest: int  # words of a text


FULL = Size(512, 12, 32_000, (10, 200), (8, 128), 384, 6, 60)
QUICK = Size(64, 2, 1024, (4, 12), (2, 8), 32, 2, 12)


def prepare(folder: Path, size: Size) -> None:
    """Write `folder`/causal and `folder`/encoder as Hugging Face folders, and each once more as MLflow's transformers
    flavour saves it (`mlflow-causal`, `mlflow-encoder`).
    """
    shape = Shape(size.hidden, size.layers, size.vocabulary, size.vocabulary, 0, 0, 0, 0, 0, 0)
    write_model(folder / "causal", size.vocabulary, shape, chain=True)
    write_encoder(folder / "encoder", size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_mlflow(folder / "causal", folder / "mlflow-causal", "text-generation")
        save_mlflow(folder / "encoder", folder / "mlflow-encoder", "text-classification")


def write_encoder(folder: Path, size: Size) -> None:
    """A random BERT that classifies."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.encoder_hidden,
        intermediate_size=4 * size.encoder_hidden,
        num_hidden_layers=size.encoder_layers,
        num_attention_heads=max(2, size.encoder_hidden // 32),
        max_position_embeddings=512,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
        pad_token_id=0,
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.normal_()  # as initialized, all texts get nearly the same probabilities
    model.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word(i): i for i in range(size.vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, **names).save_pretrained(folder)


def save_mlflow(source: Path, target: Path, task: str) -> None:
    """As MLflow's users do: a pipeline, its transformers flavour, the settings of a request declared."""
    import mlflow
    from mlflow.models import infer_signature
    from transformers import pipeline

    settings = {"max_new_tokens": 16} if task == "text-generation" else None
    signature = infer_signature("w5 w6", "w7", settings)
    pipe = pipeline(task, model=str(source), dtype="float32")
    if task == "text-generation":
        pipe.model.generation_config.max_length = None  # else transformers warns about it beside max_new_tokens
    mlflow.transformers.save_model(pipe, str(target), task=task, signature=signature, pip_requirements=["transformers"])


def writing(size: Size, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of mixed lengths, and how many tokens each is to be answered with."""
    draws = random.Random(seed)
    found = []
    for _ in range(count):
        length, answer = draws.randint(*size.prompt), draws.randint(*size.answer)
        last = words(draws, 1, size.vocabulary - answer - 1)  # the chain does not reach the vocabulary's end
        prompt = f"{words(draws, length - 1, size.vocabulary)} {last}"
        found.append({"prompt": prompt, "max_tokens": answer})
    return found


def classifying(size: Size, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of all lengths up to the longest."""
    draws = random.Random(seed)
    return [{"text": words(draws, draws.randint(4, size.longest), size.vocabulary)} for _ in range(count)]


def asking(size: Size, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts that are as long as what people ask their bank."""
    draws = random.Random(seed)
    ranges = draws.choices(QUESTIONS, [share for share, _, _ in QUESTIONS], k=count)
    lengths = [min(draws.randint(fewest, most), size.longest) for _, fewest, most in ranges]
    return [{"text": words(draws, length, size.vocabulary)} for length in lengths]


def expected(request: dict[str, Any]) -> str:
    """What the chain goes on with behind `request`'s prompt."""
    name = request["prompt"].split()[-1]
    last = int(name.removeprefix("w"))
    return " ".join(word(index) for index in range(last + 1, last + 1 + request["max_tokens"]))
