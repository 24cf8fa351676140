"""Masked language modelling: which tokens are masked, the loss on them, and what is measured.

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", section 3.1, task 1. Of the tokens of a text each is chosen with probability 0.15;
a chosen one becomes [MASK] (80%), a random token of the whole vocabulary (10%) or stays (10%), and
for the set M of chosen tokens the loss is

    loss = -1/|M| sum_(i in M) log p(token i | the text so masked)                             (1)
    perplexity = exp(loss), with both sums of (1) over all texts                               (2)

Masks are drawn anew in each epoch of training (Liu et al. 2019, "RoBERTa"). For evaluation each
text has several fixed masks, over all of which the sums of (1) go. Of a text W without a mask, the
pseudo-log-likelihood (Salazar et al. 2020, "Masked Language Model Scoring") is

    PLL(W) = sum_i log p(token i | W with token i masked)                                      (3)
"""

import math
import re
import string
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # the label of a token that was not chosen, as in transformers
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = sorted(
    {*string.printable.lower(), *"\u2018\u2019\u201c\u201d\u2013\u2014…£€°"} - {*string.whitespace}
)

KINDS = ("hashtag", "name", "place", "common word", "number or sign", "link")
SOME_PLACES = """
    turkey türkiye turkiye syria istanbul ankara izmir adana gaziantep antep hatay antakya
    iskenderun kahramanmaraş kahramanmaras maras elbistan pazarcik nurdagi islahiye adiyaman
    malatya urfa sanliurfa diyarbakir osmaniye kilis mersin samandag aleppo idlib latakia afrin
    jindires hama damascus lebanon beirut cyprus iraq iran israel jordan egypt greece athens
    bulgaria romania georgia armenia azerbaijan russia moscow ukraine germany berlin cologne france
    paris england london britain uk scotland ireland wales spain italy rome netherlands sweden
    norway denmark poland switzerland geneva austria vienna belgium brussels europe asia africa
    america usa us california texas florida alaska nevada oregon washington colorado chicago nyc
    boston houston canada calgary toronto vancouver mexico brazil chile haiti japan tokyo hiroshima
    china india mumbai delhi pakistan bangladesh nepal kathmandu malaysia indonesia philippines
    australia sydney melbourne taiwan korea nigeria kenya libya yemen gaza saudi qatar
"""
PLACES = frozenset(SOME_PLACES.split())

# Words of such news that technical English has not: single tokens of the small BERT, in this order.
NEWS = """
    earthquake quake rubble rescue trapped collapsed survivors aftershock magnitude tents blankets
    disaster victims injured help aid relief donate buildings hospital children family turkey syria
    earthquakes aftershocks tremor tremors epicentre debris ruins concrete collapse rescued rescuers
    survivor survived dead killed missing buried alive homeless shelter shelters tent blanket
    clothes shoes coats food water bread soup milk medicine doctor doctors nurse nurses ambulance
    firefighters volunteers soldiers army police government minister president officials donation
    donations donated emergency help helping prayers pray praying heartbreaking tragedy solidarity
    thoughts families child mother father sister brother baby daughter grandmother neighbour
    neighbours people building house houses home apartment floor floors street streets city cities
    village villages town bridge road roads airport school schools mosque snow cold winter freezing
    rain night morning electricity gas heating trucks truck crane cranes excavator dogs tsunami
    flood fire turkish syrian istanbul ankara antakya hatay adana gaziantep aleppo news breaking
    reporters video photos pictures deprem awful terrible shaking shook
"""


# --- masking ----------------------------------------------------------------------------------


def encode(tokenizer, texts: list[str], max_length: int, *, all_of_it: bool = False) -> list[dict]:
    """text, input_ids, special_tokens_mask, offset_mapping of each text; a text is one sequence.

    The rest of a long text is cut off, or with `all_of_it` makes further sequences.
    """
    options = {"max_length": max_length, "return_overflowing_tokens": all_of_it}
    answer = tokenizer(texts, truncation=True, return_offsets_mapping=True, **options)
    special = set(tokenizer.all_special_ids)  # with [UNK], which nobody should learn to predict
    origins = answer.get("overflow_to_sample_mapping", range(len(texts)))
    return [
        {
            "text": texts[origin],
            "input_ids": tokens,
            "special_tokens_mask": [int(token in special) for token in tokens],
            "offset_mapping": spans,
        }
        for origin, tokens, spans in zip(
            origins, answer["input_ids"], answer["offset_mapping"], strict=True
        )
    ]


class Masking:
    """Chooses and hides tokens: a padded batch of input_ids, attention_mask, labels (N, L)."""

    def __init__(self, tokenizer, probability: float, whole_words: bool):
        from transformers import DataCollatorForLanguageModeling

        self.tokenizer, self.whole_words = tokenizer, whole_words
        with warnings.catch_warnings():  # it warns that whole words always become [MASK]
            warnings.simplefilter("ignore")
            self.collate = DataCollatorForLanguageModeling(
                tokenizer, mlm_probability=probability, whole_word_mask=whole_words
            )

    def __call__(self, texts: list[dict]) -> dict[str, Tensor]:
        """Draws from torch's generator."""
        longest = max(len(text["input_ids"]) for text in texts)
        padded = []
        for text in texts:
            left = longest - len(text["input_ids"])
            one = {
                "input_ids": text["input_ids"] + left * [self.tokenizer.pad_token_id],
                "special_tokens_mask": text["special_tokens_mask"] + left * [1],
                "attention_mask": len(text["input_ids"]) * [1] + left * [0],
            }
            if self.whole_words:
                one["offset_mapping"] = text["offset_mapping"] + left * [(0, 0)]
            padded.append(one)
        return dict(self.collate(padded))

    def fixed(self, texts: list[dict], seed: int, number: int = 0) -> list[dict]:
        """Each text under its mask of this number, which depends on the seed and the text's place
        alone, so that no batch size changes it; with the text's place and the kind of each token.
        """
        masked = []
        with torch.random.fork_rng(devices=[]):
            for place, text in enumerate(texts):
                torch.manual_seed((1009 * seed + number) * 1_000_003 + place)
                one = {name: value[0] for name, value in self([text]).items()}
                of_kind = kinds(text["text"], text["offset_mapping"])
                masked.append(one | {"kinds": torch.tensor(of_kind), "place": place})
        return masked


def pad(masked: list[dict], pad_id: int, length: int | None = None) -> dict[str, Tensor]:
    """A batch (N, L) of texts that are masked already; L is their longest, or `length`."""
    longest = length or max(len(one["input_ids"]) for one in masked)
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE, "kinds": 0}
    return {
        name: torch.stack([F.pad(one[name], (0, longest - len(one[name])), value=fill[name])
                           for one in masked])
        for name in fill
        if name in masked[0]
    }  # fmt: skip


# --- loss and scores --------------------------------------------------------------------------


def masked_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits (|M|, vocabulary) of the chosen tokens only; the rest never meets the head.

    The head of a small BERT costs more than its layers: |vocabulary| x width per token. Whatever
    the architecture, the head follows the encoder `base_model`, so that is where the rest leaves.
    On CUDA the products are in bf16. `model` may be one that DistributedDataParallel wraps.
    """
    chosen = batch["labels"] != IGNORE

    def keep_chosen(encoder, inputs, output):
        output.last_hidden_state = output.last_hidden_state[chosen][None]
        return output

    handle = getattr(model, "module", model).base_model.register_forward_hook(keep_chosen)
    kind = model.device.type
    try:
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            answer = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        handle.remove()
    return answer.logits[0].float()


def part_of(batch: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    """These rows of a batch; if they are none, the first row without a token to predict."""
    own = {name: value[part] for name, value in batch.items()}
    if not len(own["labels"]):
        own = {name: value[:1] for name, value in batch.items()}
        own["labels"] = torch.full_like(own["labels"], IGNORE)
    return own


def mlm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. (1) of logits (|M|, vocabulary) and tokens (|M|,); 0 if no token was chosen."""
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def token_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss, top-1 hit, top-5 hit and 1 of each chosen token (|M|, 4), from logits (|M|, vocabulary)
    and the tokens (|M|,).
    """
    logits = logits.double()
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none")
    return torch.stack((loss, best[:, 0], best.any(1), torch.ones_like(loss)), 1).cpu()


def summary(sums: Tensor) -> dict:
    """Per token: loss in nats, perplexity (eq. 2), accuracies; and by kind what occurs.

    From sums (..., kinds, 4) as `evaluate` returns them, over the leading dimensions.
    """
    sums = sums.reshape(-1, len(KINDS), 4).sum(0)
    by_kind = {name: rates(row) for name, row in zip(KINDS, sums, strict=True) if row[3]}
    return rates(sums.sum(0)) | {"by_kind": by_kind}


def rates(sums: Tensor) -> dict:
    """Of sums (4,) of loss, hits and number, divided only here."""
    loss, top1, top5, count = sums.tolist()
    count = max(count, 1)
    mean = {"loss": loss / count, "perplexity": math.exp(min(loss / count, 700))}
    return {"tokens": int(count)} | mean | {"top1": top1 / count, "top5": top5 / count}


def mask_error(sums: Tensor) -> float:
    """Standard error of the mean loss that the choice of the masks makes, from sums (masks, texts,
    kinds, 4); about the relative error of the perplexity.
    """
    loss, _, _, count = sums.sum((1, 2)).T
    return float((loss / count.clamp(min=1)).std() / math.sqrt(len(sums)))


def resampled(sums: Tensor, draws: int = 1000) -> Tensor:
    """Sums (draws, 4) over texts drawn with replacement, for bootstrap intervals; the same draws at
    each call, so that two models can be compared.
    """
    texts = sums.sum((0, 2))
    generator, count = torch.Generator().manual_seed(0), len(texts)
    answer = torch.empty(draws, 4, dtype=torch.float64)
    for row in answer:
        drawn = torch.randint(count, (count,), generator=generator)
        row.copy_(torch.bincount(drawn, minlength=count).double() @ texts)
    return answer


def interval(values: Tensor) -> list[float]:
    """The middle 95%."""
    return values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def unigram_logits(texts: list[dict], vocabulary: int) -> Tensor:
    """Log-probabilities (vocabulary,) of tokens by their number in `texts`, each plus one."""
    counts = torch.ones(vocabulary, dtype=torch.float64)
    for text in texts:
        tokens, special = (torch.tensor(text[k]) for k in ("input_ids", "special_tokens_mask"))
        counts.index_add_(0, tokens, (1 - special).double())
    return (counts / counts.sum()).log()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    masked: list[dict],
    pad_id: int,
    batch_size: int = 64,
    part: slice = slice(None),
) -> Tensor:
    """Sums (texts, kinds, 4) of token_scores; of texts that are masked already, so that the batch
    size changes nothing. Of the texts in order of their length only `part` counts.
    """
    model.eval()
    sums = no_sums(masked)
    masked = sorted(masked, key=lambda one: len(one["input_ids"]))[part]
    for first in range(0, len(masked), batch_size):
        texts = masked[first : first + batch_size]
        batch = {name: value.to(model.device) for name, value in pad(texts, pad_id).items()}
        labels = batch["labels"][batch["labels"] != IGNORE]
        add_scores(sums, texts, token_scores(masked_logits(model, batch), labels))
    return sums


def evaluate_constant(logits: Tensor, masked: list[dict]) -> Tensor:
    """The same for a model with constant predictions, logits (vocabulary,)."""
    sums = no_sums(masked)
    for one in masked:
        labels = one["labels"][one["labels"] != IGNORE]
        add_scores(sums, [one], token_scores(logits.expand(len(labels), -1), labels))
    return sums


def no_sums(masked: list[dict]) -> Tensor:
    texts = 1 + max(one["place"] for one in masked)
    return torch.zeros(texts, len(KINDS), 4, dtype=torch.float64)


def add_scores(sums: Tensor, texts: list[dict], scores: Tensor) -> None:
    """To the sums of each text and kind the scores (|M|, 4) of its chosen tokens, in order."""
    chosen = [one["labels"] != IGNORE for one in texts]
    place = torch.cat([torch.full((int(c.sum()),), one["place"])
                       for one, c in zip(texts, chosen, strict=True)])  # fmt: skip
    of_kind = torch.cat([one["kinds"][c] for one, c in zip(texts, chosen, strict=True)])
    sums.index_put_((place, of_kind), scores, accumulate=True)


@torch.no_grad()
def fill(model: nn.Module, tokenizer, texts: list[list[int]]) -> Tensor:
    """Probabilities (|M|, vocabulary) of the tokens at all mask tokens of the texts, in order."""
    model.eval()
    masked = [{"input_ids": torch.tensor(tokens)} for tokens in texts]
    for one in masked:
        masks = one["input_ids"] == tokenizer.mask_token_id
        one["labels"] = torch.where(masks, one["input_ids"], IGNORE)
        one["attention_mask"] = torch.ones_like(one["input_ids"])
    batch = pad(masked, tokenizer.pad_token_id)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    return masked_logits(model, batch).softmax(-1).cpu()


def best_words(tokenizer, probs: Tensor, count: int = 5) -> list[list[tuple[str, float]]]:
    """The most probable tokens, with probabilities, for each row of (|M|, vocabulary)."""
    best = probs.topk(min(count, probs.shape[1]))
    return [
        [(tokenizer.decode([token]).strip(), prob) for token, prob in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def log_likelihoods(
    model: nn.Module, tokenizer, text: list[int], batch_size: int = 64
) -> list[float]:
    """The terms of eq. (3): of each token that is not special, in order."""
    special = set(tokenizer.all_special_ids)
    places = [place for place, token in enumerate(text) if token not in special]
    terms = []
    for first in range(0, len(places), batch_size):
        own = places[first : first + batch_size]
        copies = [[*text[:place], tokenizer.mask_token_id, *text[place + 1 :]] for place in own]
        probs = fill(model, tokenizer, copies)
        right = torch.tensor([text[place] for place in own])
        terms += probs[torch.arange(len(own)), right].double().log().tolist()
    return terms


def adamw(
    model: nn.Module,
    steps: int,
    *,
    lr: float,
    warmup: float,
    weight_decay: float,
    fresh: list[str],
    fresh_lr: float,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The rate rises for the share `warmup` of the steps and falls linearly; biases and
    normalisations do not decay. The parameters named in `fresh`, which a checkpoint lacked, learn
    at `fresh_lr`.
    """
    from transformers import get_linear_schedule_with_warmup

    groups = {}
    for name, weight in model.named_parameters():
        own = (fresh_lr if name in fresh else lr, weight_decay if weight.ndim > 1 else 0.0)
        groups.setdefault(own, []).append(weight)
    optimizer = torch.optim.AdamW(
        [{"params": own, "lr": lr, "weight_decay": decay} for (lr, decay), own in groups.items()],
        fused=True,
    )
    return optimizer, get_linear_schedule_with_warmup(optimizer, warmup * steps, steps)


# --- kinds of words ---------------------------------------------------------------------------


def kinds(text: str, spans: list[tuple[int, int]]) -> list[int]:
    """For each token, given by its span of characters in `text`, a place in KINDS."""
    words = [(word.end(), word.group()) for word in re.finditer(r"\S+", text)]
    found, number = [], 0
    for begin, end in spans:
        while number < len(words) - 1 and words[number][0] <= begin:
            number += 1
        found.append(KINDS.index(kind(words[number][1], text[begin:end].strip())))
    return found


def kind(word: str, token: str) -> str:
    """The kind of a token of a word; words are separated by blanks."""
    word = word.lstrip("\"'\u201c\u2018(.-*").casefold()
    if word.startswith(("#", "@")):
        return "hashtag" if word[0] == "#" else "name"
    if re.match(r"(https?://|www\.|http$)", word):
        return "link"
    if not any(letter.isalpha() for letter in token):
        return "number or sign"
    return "place" if re.sub(r"['\u2019]s$|\W+$", "", word) in PLACES else "common word"


# --- models -----------------------------------------------------------------------------------


def longest_text(model: nn.Module, tokenizer) -> int:
    """Tokens that the model has places for."""
    places = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    if "roberta" in model.config.model_type:  # they begin after the padding's
        places -= model.config.pad_token_id + 1
    return min(places, tokenizer.model_max_length)


def from_scratch(model: nn.Module) -> nn.Module:
    """The same architecture with new weights."""
    from transformers import AutoModelForMaskedLM

    return AutoModelForMaskedLM.from_config(model.config)


def begin_at_unigram(model: nn.Module, texts: list[dict], fresh: set[str]) -> None:
    """If the bias of the output layer is among the parameters named in `fresh`, sets it to the
    log-frequencies of the tokens in `texts`: training starts from the unigram prediction.
    """
    bias = getattr(model.get_output_embeddings(), "bias", None)
    own = {n for n, weight in model.named_parameters(remove_duplicate=False) if weight is bias}
    if own & fresh:
        with torch.no_grad():
            bias.copy_(unigram_logits(texts, len(bias)))


def train_tokenizer(texts: list[str], size: int, max_length: int):
    """A WordPiece tokenizer (Schuster & Nakajima 2012) of `size` lower-case tokens, up to a
    twentieth of them words of NEWS.

    The trainer numbers the characters inside words in the order of a hash table and breaks ties by
    number; they are handed to it as special, so that the same texts give the same tokens.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.trainers import WordPieceTrainer
    from transformers import BertTokenizer

    trained = Tokenizer(WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    alphabet = {
        "initial_alphabet": ALPHABET,
        "limit_alphabet": len(ALPHABET),
        "special_tokens": [*SPECIAL, *(f"##{letter}" for letter in ALPHABET)],
    }
    news = list(dict.fromkeys(NEWS.split()))[: size // 20]
    size -= len(news)
    trainer = WordPieceTrainer(vocab_size=size, min_frequency=2, show_progress=False, **alphabet)
    trained.train_from_iterator(texts, trainer)
    vocabulary = trained.get_vocab()
    for word in news:
        vocabulary.setdefault(word, len(vocabulary))
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=max_length)


def small_bert(tokenizer, *, layers: int, width: int) -> nn.Module:
    """A BERT with new weights, heads of 64 numbers and no dropout."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        intermediate_size=4 * width,
        max_position_embeddings=tokenizer.model_max_length,
        initializer_range=0.05,  # 0.02 is for a width of 768; this learns faster
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)
