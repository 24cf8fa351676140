"""bert_mlm: which pieces are masked, what is summed and divided, bad data, and killed runs."""

import copy
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from projects import call, load_project, train, train_until
from transformers import (
    AlbertConfig,
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    DistilBertConfig,
    RobertaConfig,
    pipeline,
)

PROJECT = load_project("bert_mlm")
data, model = PROJECT.data, PROJECT.model
TINY = [
    "--dataset", "sample", "--device", "cpu", "--most_tweets", "80",
    "--data_dir", tempfile.mkdtemp(prefix="bert_mlm-"),
    "--pretrain_characters", "20000", "--pretrain_epochs", "2", "--vocabulary", "400",
    "--layers", "1", "--width", "16", "--epochs", "2", "--batch_size", "16",
]  # fmt: skip
TEXTS = [
    "The quick brown fox jumps over the lazy dog near the old bridge.",
    "Send blankets!",
    "The bridge is closed and the dog waits on the other side of the river, says a man.",
    "ok",
    "Nobody jumps over the river #bridge @user 12",
    "Unbelievable foxiness",
]


@pytest.fixture(scope="module")
def tokenizer():
    return model.word_pieces(TEXTS[:5] * 3, 300, 64)


def new_model(config_class, tokenizer, **options):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if config_class is DistilBertConfig:
        size = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    elif config_class is AlbertConfig:
        size["embedding_size"] = 8
    size |= {"intermediate_size": 32} if config_class is not DistilBertConfig else {}
    config = config_class(vocab_size=len(tokenizer), pad_token_id=0, **size, **options)
    return AutoModelForMaskedLM.from_config(config).eval()


def masked_texts(tokenizer, probability: float = 0.4, **options) -> list[dict]:
    masking = model.Masking(tokenizer, probability, **({"whole_words": False} | options))
    return masking.fixed(model.encode(tokenizer, TEXTS, 64), seed=3)


# --- masking ----------------------------------------------------------------------------------


def many_masks(tokenizer, **options) -> tuple[list[dict], dict]:
    masking = model.Masking(tokenizer, 0.3, **({"whole_words": False} | options))
    texts = model.encode(tokenizer, [*TEXTS, "snow 雪 snow"], 64)
    torch.manual_seed(0)
    batches = [masking(texts) for _ in range(400)]
    return texts, {name: torch.stack([b[name] for b in batches]) for name in batches[0]}


def test_special_and_padding_pieces_are_never_masked(tokenizer):
    texts, batch = many_masks(tokenizer)
    for row, text in enumerate(texts):
        special = [p in tokenizer.all_special_ids for p in text["input_ids"]]
        special += [True] * (batch["labels"].shape[2] - len(special))
        chosen = (batch["labels"][:, row] != model.IGNORE).any(0)
        assert not chosen[torch.tensor(special)].any()
        assert chosen[~torch.tensor(special)].all()
    assert tokenizer.unk_token_id in texts[-1]["input_ids"]  # and it was among the special ones


def test_masks_are_80_10_10_of_the_whole_vocabulary(tokenizer):
    texts, batch = many_masks(tokenizer)
    original = [F.pad(torch.tensor(t["input_ids"]), (0, 64)) for t in texts]
    original = torch.stack([row[: batch["labels"].shape[2]] for row in original]).expand(
        400, -1, -1
    )
    chosen = batch["labels"] != model.IGNORE
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    hidden, shown = batch["input_ids"][chosen], original[chosen]
    to_mask = hidden == tokenizer.mask_token_id
    changed = hidden[~to_mask & (hidden != shown)]
    places = int(batch["attention_mask"].sum()) - 400 * 15  # less [CLS], [SEP] of seven, one [UNK]
    assert float(chosen.sum()) / places == pytest.approx(0.3, abs=0.01)
    assert float(to_mask.float().mean()) == pytest.approx(0.8, abs=0.02)
    assert len(changed) / len(hidden) == pytest.approx(0.1, abs=0.02)
    assert len(changed.unique()) > 0.9 * len(tokenizer)


def test_training_masks_differ_from_epoch_to_epoch_and_fixed_ones_do_not(tokenizer):
    _, batch = many_masks(tokenizer)
    assert len({tuple(labels.flatten().tolist()) for labels in batch["labels"]}) > 390
    state = torch.get_rng_state()
    first, second = masked_texts(tokenizer), masked_texts(tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_fixed_mask_hangs_on_the_place_alone(tokenizer):
    masking = model.Masking(tokenizer, 0.4, False)
    texts = model.encode(tokenizer, TEXTS, 64)
    other = masking.fixed([texts[2], texts[1]], seed=3)  # another tweet before it
    assert torch.equal(other[1]["labels"], masked_texts(tokenizer)[1]["labels"])


def test_whole_words_are_masked_whole(tokenizer):
    texts, batch = many_masks(tokenizer, whole_words=True)
    inside = 0  # pieces that go on with the word before them
    for row, text in enumerate(texts[:6]):
        spans = text["offset_mapping"]
        chosen = batch["labels"][:, row] != model.IGNORE
        for place in range(2, len(spans) - 1):
            if spans[place][0] == spans[place - 1][1]:
                inside += 1
                assert torch.equal(chosen[:, place], chosen[:, place - 1])
    assert inside > 2
    chosen = batch["labels"] != model.IGNORE
    assert (batch["input_ids"][chosen] == tokenizer.mask_token_id).all()


# --- loss, perplexity, scores -----------------------------------------------------------------

ARCHITECTURES = [BertConfig, RobertaConfig, DistilBertConfig, AlbertConfig]


def ordinary_logits(net, batch):
    """As usually written: the head on every piece."""
    answer = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return answer.logits[batch["labels"] != model.IGNORE]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_on_chosen_pieces_equals_the_head_on_all(tokenizer, architecture):
    net = new_model(architecture, tokenizer)
    masked = masked_texts(tokenizer)
    long, short = model.pad(masked, 0, 64), model.pad(masked, 0)
    assert long["labels"].shape[1] == 64 > short["labels"].shape[1]
    labels = short["labels"][short["labels"] != model.IGNORE]
    gradients = []
    for logits in (model.masked_logits(net, short), ordinary_logits(net, long)):
        assert logits.shape == (len(labels), len(tokenizer))
        net.zero_grad()
        model.mlm_loss(logits, labels).backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    answer = net(long["input_ids"], attention_mask=long["attention_mask"], labels=long["labels"])
    assert model.mlm_loss(logits, labels).item() == pytest.approx(answer.loss.item(), rel=1e-5)
    assert len(gradients[0]) == len(gradients[1]) > 10
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_perplexity_is_that_of_all_pieces_whatever_the_batch_size(tokenizer):
    net, masked = new_model(BertConfig, tokenizer), masked_texts(tokenizer)
    for weight in net.parameters():
        weight.data *= 3  # far from uniform, so that means of batch means would differ
    losses = []
    for one in masked:  # one by one, no batch, no padding
        logits = net(one["input_ids"][None]).logits[0].double()
        chosen = one["labels"] != model.IGNORE
        losses += F.cross_entropy(logits[chosen], one["labels"][chosen], reduction="none").tolist()
    expected = math.exp(sum(losses) / len(losses))
    for batch_size in (1, 2, 5):
        answer = model.evaluate(net, masked, 0, batch_size).summary()
        assert answer["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert answer["pieces"] == len(losses)
        assert answer["loss"] == pytest.approx(math.log(expected), rel=1e-5)
        parts = answer["by_kind"].values()
        assert sum(part["pieces"] * part["loss"] for part in parts) == pytest.approx(sum(losses))


def test_a_text_without_a_mask_is_no_nan(tokenizer):
    net = new_model(BertConfig, tokenizer)
    masked = masked_texts(tokenizer, probability=1e-9)
    batch = model.pad(masked, 0)
    loss = model.mlm_loss(model.masked_logits(net, batch), torch.tensor([], dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    assert model.evaluate(net, masked, 0).summary()["loss"] == 0


def test_scores_by_hand():
    scores = model.Scores()
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2], [3.0, 2, 1, 0, -1, -2], [0.0, 0, 9, 0, 0, 0]])
    scores.add(logits, torch.tensor([0, 5, 2]), torch.tensor([0, 0, 3]))
    scores.add(logits[:1], torch.tensor([4]), torch.tensor([3]))
    answer = scores.summary()
    assert (answer["pieces"], answer["top1"], answer["top5"]) == (4, 0.5, 0.75)
    assert answer["by_kind"]["hashtag"]["top1"] == 0.5
    assert answer["by_kind"]["common word"]["top5"] == 1
    assert set(answer["by_kind"]) == {"hashtag", "common word"}


def test_the_unigram_baseline_counts_pieces(tokenizer):
    texts = model.encode(tokenizer, ["dog dog fox", "dog"], 64)
    probs = model.unigram_logits(texts, len(tokenizer)).exp()
    dog, fox = tokenizer.convert_tokens_to_ids(["dog", "fox"])
    total = 4 + len(tokenizer)
    assert float(probs[dog]) == pytest.approx(4 / total)
    assert float(probs[fox]) == pytest.approx(2 / total)
    assert float(probs[tokenizer.cls_token_id]) == pytest.approx(1 / total)
    assert float(probs.sum()) == pytest.approx(1)


def test_kinds_of_pieces():
    text = "\"#Quake hits Turkey's coast, @bob http 12"
    spans = [(0, 1), (1, 2), (2, 4), (4, 7), (8, 12), (13, 19), (20, 21), (22, 27), (27, 28),
             (29, 30), (30, 33), (34, 38), (39, 41), (0, 0)]  # fmt: skip
    names = [model.KINDS[number] for number in model.kinds(text, spans)]
    assert names[1:4] == ["hashtag"] * 3
    assert names[4:9] == ["common word", "place", "place", "common word", "number or sign"]
    assert names[9:13] == ["name", "name", "link", "number or sign"]


def test_the_same_texts_give_the_same_pieces():
    texts = data.general_english(20_000)
    vocabularies = [model.word_pieces(texts, 500, 64).get_vocab() for _ in range(4)]
    assert len(vocabularies[0]) == 500
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


# --- data -------------------------------------------------------------------------------------


def write_csv(path: Path, lines: list[str], header: str = "content,language") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def load(path: Path, **changes) -> data.Tweets:
    options = {
        "dataset": "csv", "csv_file": path, "text_column": "content", "language": "en",
        "links": "word", "names": "word", "most_tweets": 10**6,
        "data_dir": path.parent / "data", "seed": 0,
    }  # fmt: skip
    return data.load(**options | changes)


def test_retweets_leave_before_the_split(tmp_path):
    lines = [f"we felt quake number {number},en" for number in range(60)]
    lines += [f"RT @bob{n}: We felt  QUAKE number {n} https://t.co/{n},en" for n in range(60)]
    lines += [f"wir spürten Beben {number},de" for number in range(5)] + [",en"]
    tweets = load(write_csv(tmp_path / "a.csv", lines))
    parts = [set(tweets.train), set(tweets.val), set(tweets.test)]
    assert [len(part) for part in parts] == [39, 9, 12]
    assert len(set.union(*parts)) == 60 and "1 rows without text" in tweets.note
    assert load(tmp_path / "a.csv", language="any", text_column="content").test != tweets.test


def test_the_splits_hang_on_the_seed_and_not_on_the_order_of_authors(tmp_path):
    path = write_csv(tmp_path / "a.csv", [f"tweet of author number {n},en" for n in range(200)])
    one, same, other = load(path), load(path), load(path, seed=1)
    assert one == same and one.test != other.test
    few = load(path, most_tweets=40)
    numbers = [int(text.split()[-1]) for part in few[1:4] for text in part]
    assert len(numbers) == 40 and max(numbers) > 150 and min(numbers) < 50


@pytest.mark.parametrize(
    ("links", "names", "expected"),
    [
        ("keep", "keep", "hi @bob see https://t.co/x #a me@b.org"),
        ("word", "word", "hi @user see http #a me@b.org"),
        ("remove", "remove", "hi see #a me@b.org"),
    ],
)
def test_links_and_names(links, names, expected):
    assert data.normalise("hi  @bob see\nhttps://t.co/x #a me@b.org", links, names) == expected


def test_a_changed_csv_is_read_anew(tmp_path):
    path = write_csv(tmp_path / "a.csv", [f"tweet {n},en" for n in range(20)])
    load(path)
    write_csv(path, [f"changed tweet {n},en" for n in range(20)])
    assert all(text.startswith("changed") for text in load(path).train)


@pytest.mark.parametrize(
    ("header", "lines", "changes", "complaint"),
    [
        ("text,language", ["a,en"], {}, "no column 'content' among text, language"),
        ("content", ["a"], {}, "no column 'language' among content .--language any takes all"),
        ("content,language", ["a,en"] * 20, {}, "at least 10 different tweets, found 1"),
        ("content,language", ["a,de"] * 20, {}, "at least 10 different tweets, found 0"),
        ("content,language", ['"a,en'] * 3, {}, "not a csv"),
        ("content,content,language", ["a,b,en"] * 20, {}, "two columns 'content' among"),
    ],
)
def test_bad_csv_files_are_named(tmp_path, header, lines, changes, complaint):
    path = write_csv(tmp_path / "bad.csv", lines, header)
    with pytest.raises(data.DataError, match=f"bad.csv.*{complaint}"):
        load(path, **changes)


def test_a_csv_that_is_no_text_or_not_there_is_named(tmp_path):
    (tmp_path / "b.csv").write_bytes(b"content,language\n\xff\xfe\x00,en\n")
    with pytest.raises(data.DataError, match=r"b.csv: not a csv in UTF-8"):
        load(tmp_path / "b.csv")
    with pytest.raises(data.DataError, match=r"c.csv: there is no such file"):
        load(tmp_path / "c.csv")


def test_the_sample_has_enough_voices(tmp_path):
    import csv

    rows = list(csv.DictReader(data.SAMPLE.open(encoding="utf-8", newline="")))
    english = [row for row in rows if row["language"] == "en"]
    voices = [row["voice"] for row in english]
    assert len({row["content"] for row in english}) >= 400
    assert len(set(voices)) == 6 and min(map(voices.count, voices)) >= 65
    assert all(len(name) > 16 for row in rows for name in data.NAME.findall(row["content"]))


def test_every_text_is_in_one_batch_of_its_own_length():
    torch.manual_seed(0)
    lengths = torch.randint(3, 60, (1000,)).tolist()
    batches = data.bucketed(lengths, 16)
    assert sorted(place for batch in batches for place in batch) == list(range(1000))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert batches != data.bucketed(lengths, 16)


# --- models -----------------------------------------------------------------------------------


def test_a_checkpoint_without_a_head_is_told(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    net = new_model(BertConfig, tokenizer)
    net.save_pretrained(tmp_path)
    assert data.load_pretrained(str(tmp_path), local=True)[2] == []
    torch.manual_seed(0)
    BertModel(copy.deepcopy(net.config)).save_pretrained(tmp_path)
    missing = data.load_pretrained(str(tmp_path), local=True)[2]
    assert "cls.predictions.transform.dense.weight" in missing


# --- whole runs -------------------------------------------------------------------------------


def numbers_of(folder: Path) -> dict:
    report = json.loads((folder / "metrics.json").read_text())
    return report["metrics"] | report["headline"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return train("bert_mlm", *TINY, "--out_dir", tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("checkpoints", [1, 5, 8])  # in pretraining, in fine-tuning, in scratch
def test_a_killed_run_ends_like_an_unbroken_one(tmp_path, run_folder, checkpoints):
    flags = [*TINY, "--data_dir", tmp_path / "data", "--out_dir", tmp_path]
    train_until("bert_mlm", checkpoints, *flags)
    (folder,) = (path for path in tmp_path.iterdir() if path.name != "data")
    assert not (folder / "metrics.json").exists()
    assert numbers_of(train("bert_mlm", "--resume", folder)) == numbers_of(run_folder)
    assert (folder / "history.csv").read_text().count("\n") == 10  # a header; 3 stages of 3


def test_the_folder_loads_in_a_pipeline(run_folder):
    best = pipeline("fill-mask", str(run_folder / "model"))("we need [MASK] now")
    assert len(best) == 5 and best[0]["score"] > 0


def test_only_the_method(tmp_path):
    flags = [*TINY, "--compare", "false", "--seeds", "2", "--out_dir", tmp_path]
    folder = train("bert_mlm", *flags)
    numbers = numbers_of(folder)
    assert "scratch_perplexity_after" not in numbers and "scratch_minus_after" not in numbers
    assert (
        "scratch" not in numbers["test"] and "scratch" not in (folder / "history.csv").read_text()
    )
    assert len(numbers["test_loss_of_seeds"]["after"]) == 2
    assert (folder / "curves.png").exists() and (folder / "accuracy.png").exists()


def test_a_failed_start_leaves_no_folder(tmp_path):
    flags = ["--dataset", "csv", "--csv_file", "no.csv", "--out_dir", tmp_path]
    with pytest.raises(data.DataError, match=r"no.csv: there is no such file"):
        call(PROJECT.train, *flags)
    assert not list(tmp_path.iterdir())
