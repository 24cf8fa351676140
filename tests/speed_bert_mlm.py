"""Training speed of bert_mlm's recipe and of the usual one, in turn, on the same masked tweets.

The usual one pads to max_length and has the head on every token, in fp32. Run it with
`python tests/speed_bert_mlm.py RUN` on the folder of a finished run, with nothing else running.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from bert_mlm.data import bucketed, load, load_pretrained
from bert_mlm.model import IGNORE, Masking, encode, masked_logits, mlm_loss, pad

LENGTH, BATCH = 64, 16


def ordinary_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As usually written: the head on every token, in fp32."""
    answer = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return answer.logits[batch["labels"] != IGNORE]


def pass_over(batches: list[dict], model: nn.Module, logits_of: Callable, optimizer) -> float:
    """Train on every batch once; the loss per chosen token."""
    total, count = 0.0, 0
    for batch in batches:
        labels = batch["labels"][batch["labels"] != IGNORE]
        loss = mlm_loss(logits_of(model, batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total + loss.detach().double() * len(labels), count + len(labels)
    return float(total) / count


def main() -> None:
    """The rate is 0 and dropout is off: both see the same weights and have the same loss."""
    model, tokenizer, _ = load_pretrained(str(Path(sys.argv[1]) / "model"), local=True)
    tweets = load(
        dataset="sample", csv_file=Path("none"), text_column="content", language="en",
        links="remove", names="word", most_tweets=10**6, data_dir=Path("none"), seed=0,
    )  # fmt: skip
    masking = Masking(tokenizer, 0.15, False)
    masked = masking.fixed(encode(tokenizer, tweets.train, LENGTH), 0)
    lengths = [len(one["input_ids"]) for one in masked]
    places = torch.arange(len(masked)).split(BATCH)
    recipes = {
        "usual": (places, LENGTH, ordinary_logits),
        "ours": (bucketed(lengths, BATCH), None, masked_logits),
    }
    batches = {
        name: [pad([masked[i] for i in group], tokenizer.pad_token_id, length) for group in groups]
        for name, (groups, length, _) in recipes.items()
    }
    optimizer = torch.optim.AdamW(model.eval().parameters(), lr=0.0, fused=True)
    seconds, losses = dict.fromkeys(recipes, math.inf), {}
    for _ in range(3):  # in turn, and the best of three: other work may share the machine
        for name, (*_, logits_of) in recipes.items():
            began = time.perf_counter()
            losses[name] = pass_over(batches[name], model, logits_of, optimizer)
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    for name, own in batches.items():
        padding = 1 - sum(lengths) / sum(batch["labels"].numel() for batch in own)
        speed = len(masked) / seconds[name]
        print(f"{name}: {speed:.0f} tweets/s, padding {padding:.3f}, loss {losses[name]:.6f}")
    print(f"{seconds['usual'] / seconds['ours']:.2f} times as fast")


if __name__ == "__main__":
    main()
