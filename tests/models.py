"""Small models that several test files train."""

from pathlib import Path

import torch
from torch import nn

import reality_stone as rs


class Bigram(nn.Module):
    """Predicts the next token from this one through a compressible layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        self.head = nn.Linear(64, 32)

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


def bigrams() -> tuple[Bigram, Bigram]:
    """A dense model and the same at 2 bits."""
    torch.manual_seed(0)
    dense, packed = Bigram().eval(), Bigram().eval()
    packed.load_state_dict(dense.state_dict())
    rs.compress(packed, bits=2, codec="uniform", progress=False)
    return dense, packed


SENTENCE = "it was the best of times it was the worst of times said an old sailor to his ship"
WORDS = SENTENCE.split()


def text(count: int) -> str:
    """Words of a small vocabulary in random order."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, len(WORDS), (count,), generator=generator).tolist()
    return " ".join(WORDS[i] for i in chosen)


def language_model(directory: Path) -> Path:
    """A tiny Llama with a tokenizer of whole words and a text, as a Hugging Face directory."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).half()
    model.save_pretrained(directory)
    vocabulary = {word: i for i, word in enumerate(["?", *sorted(set(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    (directory / "text.txt").write_text(text(2000))
    return directory


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Logits of the next token from this one, through residual blocks."""

    def __init__(self, blocks: int):
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(64, 32)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
