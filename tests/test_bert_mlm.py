"""bert_mlm: which tokens are masked, what is summed and divided, bad data, and killed runs."""

import copy
import csv
import io
import itertools
import json
import math
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from projects import call, data_asked_for, load_project, tiny_run, train, train_until
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
    return model.train_tokenizer(TEXTS[:5] * 3, 300, 64)


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


def test_special_and_padding_tokens_are_never_masked(tokenizer):
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
        for name in ("input_ids", "labels", "kinds"):
            assert torch.equal(one[name], other[name])


def test_a_fixed_mask_depends_on_the_place_alone(tokenizer):
    masking = model.Masking(tokenizer, 0.4, False)
    texts = model.encode(tokenizer, TEXTS, 64)
    other = masking.fixed([texts[2], texts[1]], seed=3)  # another tweet before it
    assert torch.equal(other[1]["labels"], masked_texts(tokenizer)[1]["labels"])


def test_whole_words_are_masked_whole(tokenizer):
    texts, batch = many_masks(tokenizer, whole_words=True)
    inside = 0  # tokens that go on with the word before them
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
    """As usually written: the head on every token."""
    answer = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return answer.logits[batch["labels"] != model.IGNORE]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_on_chosen_tokens_equals_the_head_on_all(tokenizer, architecture):
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


def test_perplexity_is_that_of_all_tokens_whatever_the_batch_size(tokenizer):
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
        answer = model.summary(model.evaluate(net, masked, 0, batch_size))
        assert answer["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert answer["tokens"] == len(losses)
        assert answer["loss"] == pytest.approx(math.log(expected), rel=1e-5)
        parts = answer["by_kind"].values()
        assert sum(part["tokens"] * part["loss"] for part in parts) == pytest.approx(sum(losses))


def test_a_text_without_a_mask_is_no_nan(tokenizer):
    net = new_model(BertConfig, tokenizer)
    masked = masked_texts(tokenizer, probability=1e-9)
    batch = model.pad(masked, 0)
    loss = model.mlm_loss(model.masked_logits(net, batch), torch.tensor([], dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    assert model.summary(model.evaluate(net, masked, 0))["loss"] == 0


def test_scores_by_hand():
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2], [3.0, 2, 1, 0, -1, -2], [0.0, 0, 9, 0, 0, 0]])
    first = model.token_scores(logits, torch.tensor([0, 5, 2]))
    second = model.token_scores(logits[:1], torch.tensor([4]))
    texts = [
        {"labels": torch.tensor([-100, 0, 5, 2]), "kinds": torch.tensor([0, 0, 0, 3]), "place": 1},
        {"labels": torch.tensor([4]), "kinds": torch.tensor([3]), "place": 0},
    ]
    sums = model.no_sums(texts)
    model.add_scores(sums, texts, torch.cat((first, second)))
    answer = model.summary(sums)
    assert (answer["tokens"], answer["top1"], answer["top5"]) == (4, 0.5, 0.75)
    assert answer["by_kind"]["hashtag"]["top1"] == 0.5
    assert answer["by_kind"]["common word"]["top5"] == 1
    assert set(answer["by_kind"]) == {"hashtag", "common word"}
    assert sums[0].sum(0)[3] == 1 and sums[1].sum(0)[3] == 3


def test_the_error_of_the_masks_and_the_interval_over_texts_by_hand():
    torch.manual_seed(0)
    sums = torch.rand(5, 40, len(model.KINDS), 4, dtype=torch.float64)
    sums[..., 3] = 3.0
    losses = sums[..., 0].sum((1, 2)) / (40 * len(model.KINDS) * 3)
    assert model.mask_error(sums) == pytest.approx(float(losses.std()) / 5**0.5)
    loss, _, _, count = model.resampled(sums).T
    of_texts = sums[..., 0].sum((0, 2)) / sums[..., 3].sum((0, 2))
    assert float((loss / count).std()) == pytest.approx(float(of_texts.std()) / 40**0.5, rel=0.1)
    assert float((loss / count).mean()) == pytest.approx(float(of_texts.mean()), rel=0.01)
    assert torch.equal(model.resampled(sums), model.resampled(sums))
    assert model.interval(torch.arange(1001.0)) == pytest.approx([25, 975])


def test_fixed_masks_of_other_numbers_differ_and_hide_their_share(tokenizer):
    masking = model.Masking(tokenizer, 0.3, False)
    texts = model.encode(tokenizer, TEXTS, 64)
    masks = [masking.fixed(texts, 3, number) for number in range(200)]
    labels = [torch.cat([one["labels"] for one in mask]) for mask in masks]
    assert len({tuple(own.tolist()) for own in labels}) > 190
    places = sum(1 - flag for text in texts for flag in text["special_tokens_mask"])
    share = sum(int((own != model.IGNORE).sum()) for own in labels) / (200 * places)
    assert share == pytest.approx(0.3, abs=0.02)
    assert [one["place"] for one in masks[0]] == [*range(len(texts))]


def test_pseudo_log_likelihood_and_fillings_by_brute_force(tokenizer):
    net = new_model(BertConfig, tokenizer)
    (text,) = model.encode(tokenizer, TEXTS[4:5], 64)
    tokens, expected = text["input_ids"], []
    for place, special in enumerate(text["special_tokens_mask"]):
        if not special:
            hidden = torch.tensor([tokens])
            hidden[0, place] = tokenizer.mask_token_id
            logits = net(hidden).logits.detach()[0, place]
            expected.append(float(logits.log_softmax(-1)[tokens[place]]))
    terms = model.log_likelihoods(net, tokenizer, tokens, batch_size=3)
    assert terms == pytest.approx(expected, rel=1e-5)
    mask = tokenizer.mask_token_id
    gaps = [[*tokens[:2], mask, *tokens[3:]], [2, mask, 50, mask, 3]]
    probs = model.fill(net, tokenizer, gaps)
    assert torch.allclose(probs[0], net(torch.tensor(gaps[:1])).logits[0, 2].softmax(-1))
    assert torch.allclose(probs[1:], net(torch.tensor(gaps[1:])).logits[0, [1, 3]].softmax(-1))
    (best, *_), order = model.best_words(tokenizer, probs), probs[0].argsort(descending=True)
    assert [word for word, _ in best] == [tokenizer.decode([i]) for i in order[:5].tolist()]
    assert [prob for _, prob in best] == pytest.approx(probs[0][order[:5]].tolist())


def test_rates_by_part_decay_and_schedule(tokenizer):
    net = new_model(BertConfig, tokenizer)
    fresh = ["cls.predictions.transform.dense.weight", "cls.predictions.transform.dense.bias"]
    optimizer, schedule = model.adamw(
        net, 10, lr=0.1, warmup=0.2, weight_decay=0.5, fresh=fresh, fresh_lr=0.3
    )
    names = {id(weight): name for name, weight in net.named_parameters()}
    own = {names[id(w)]: group for group in optimizer.param_groups for w in group["params"]}
    assert own.keys() == set(names.values())
    for name, group in own.items():
        matrix = net.get_parameter(name).ndim > 1
        assert group["weight_decay"] == (0.5 if matrix else 0.0)
        assert group["initial_lr"] == (0.3 if name in fresh else 0.1)
    rates = []
    for _ in range(10):
        rates.append(own["cls.predictions.bias"]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.05] + [0.1 * (10 - n) / 8 for n in range(2, 10)])


def test_the_unigram_baseline_counts_tokens(tokenizer):
    texts = model.encode(tokenizer, ["dog dog fox", "dog"], 64)
    probs = model.unigram_logits(texts, len(tokenizer)).exp()
    dog, fox = tokenizer.convert_tokens_to_ids(["dog", "fox"])
    total = 4 + len(tokenizer)
    assert float(probs[dog]) == pytest.approx(4 / total)
    assert float(probs[fox]) == pytest.approx(2 / total)
    assert float(probs[tokenizer.cls_token_id]) == pytest.approx(1 / total)
    assert float(probs.sum()) == pytest.approx(1)


def test_a_fresh_output_bias_begins_at_the_unigram_prediction(tokenizer):
    texts = model.encode(tokenizer, ["dog dog fox", "dog"], 64)
    net = new_model(BertConfig, tokenizer)
    before = net.get_output_embeddings().bias.detach().clone()
    model.begin_at_unigram(net, texts, {"cls.predictions.transform.dense.bias"})
    assert torch.equal(net.get_output_embeddings().bias, before)  # the checkpoint had one
    model.begin_at_unigram(net, texts, {"cls.predictions.bias"})
    net.get_output_embeddings().weight.data.zero_()
    probs = net(torch.tensor([[1, 2]])).logits.softmax(-1)[0, 0]
    expected = model.unigram_logits(texts, len(tokenizer)).exp().float()
    assert torch.allclose(probs, expected)


def test_kinds_of_tokens():
    text = "\"#Quake hits Turkey's coast, @bob http 12"
    spans = [(0, 1), (1, 2), (2, 4), (4, 7), (8, 12), (13, 19), (20, 21), (22, 27), (27, 28),
             (29, 30), (30, 33), (34, 38), (39, 41), (0, 0)]  # fmt: skip
    names = [model.KINDS[number] for number in model.kinds(text, spans)]
    assert names[1:4] == ["hashtag"] * 3
    assert names[4:9] == ["common word", "place", "place", "common word", "number or sign"]
    assert names[9:13] == ["name", "name", "link", "number or sign"]


def test_the_same_texts_give_the_same_tokens():
    texts = data.general_english(20_000)
    vocabularies = [model.train_tokenizer(texts, 500, 64).get_vocab() for _ in range(4)]
    assert 490 <= len(vocabularies[0]) <= 500
    assert {"earthquake", "rubble"} < vocabularies[0].keys()
    assert sorted(vocabularies[0].values()) == [*range(len(vocabularies[0]))]
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


def test_retweets_are_removed_before_the_split(tmp_path):
    lines = [f"we felt quake number {number},en" for number in range(60)]
    lines += [f"RT @bob{n}: We felt  QUAKE number {n} https://t.co/{n},en" for n in range(60)]
    lines += [f"wir spürten Beben {number},de" for number in range(5)] + [",en"]
    tweets = load(write_csv(tmp_path / "a.csv", lines))
    parts = [set(tweets.train), set(tweets.val), set(tweets.test)]
    assert [len(part) for part in parts] == [39, 9, 12]
    assert len(set.union(*parts)) == 60 and "of 121 rows, 1 of them empty" in tweets.note
    assert load(tmp_path / "a.csv", language="any", text_column="content").test != tweets.test


def test_the_splits_depend_on_the_seed_and_not_on_the_order_of_authors(tmp_path):
    path = write_csv(tmp_path / "a.csv", [f"tweet of author number {n},en" for n in range(200)])
    one, same, other = load(path), load(path), load(path, seed=1)
    assert one == same and one.test != other.test
    few = load(path, most_tweets=40)
    numbers = [int(text.split()[-1]) for part in few[1:4] for text in part]
    assert len(numbers) == 40 and max(numbers) > 150 and min(numbers) < 50


def test_near_duplicates_stay_in_one_part(tmp_path):
    chain = [f"word{n}" for n in range(12)]
    texts = [" ".join(chain[n : n + 7]) for n in range(6)] + ["quite another text", "and one more"]
    groups = data.near_duplicates(["first of all", *texts])
    assert sorted(map(len, groups)) == [1, 1, 1, 6]
    assert ["first of all"] in groups and texts[:6] in groups
    for seed in range(5):
        copies = [f"{c} {c}1 {c}2 {c}3 {c}4 {c}5 {n}" for c in "uvwxyz" for n in range(4)]
        parts = data.split(data.near_duplicates([*copies, *map(str, range(40))]), 1000, seed)
        assert sum(map(len, parts)) == 64 and len(parts[0]) == pytest.approx(42, abs=3)
        for letter in "uvwxyz":
            assert sum(any(text[0] == letter for text in part) for part in parts) == 1
    lines = [f"the same six words stand here always {n},en" for n in range(20)]
    with pytest.raises(data.DataError, match="too much alike"):
        load(write_csv(tmp_path / "a.csv", lines))


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


def test_only_the_file_that_is_named_is_read_and_only_its_needed_columns(tmp_path):
    """`t[1].csv` is no pattern; a column that is not asked for may hold anything."""
    lines = [f"our tweet {n},," for n in range(300)] + ['the last one,x,"1,5"']
    path = write_csv(tmp_path / "t[1].csv", lines, header="content,note,number")
    write_csv(tmp_path / "t1.csv", ["wrong"] * 20)
    tweets = load(path, language="any")
    assert sum(map(len, tweets[1:4])) == 301 and tweets.name == "t[1]"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a BOM
    assert load(path, language="any")[1:4] == tweets[1:4]
    (tmp_path / "data").mkdir()
    path.rename(tmp_path / "data" / "t[1].csv")  # there, the name alone is enough
    assert load(path, language="any")[1:4] == tweets[1:4]


def test_text_stays_text_and_rows_that_do_not_fit_are_named(tmp_path):
    lines = [f"{n},en" for n in (1.5, "1e3", "NA", "null", "true")]
    lines += [f"tweet {n},en" for n in range(20)] + ["bad, comma,en", "also, bad,en"]
    tweets = load(write_csv(tmp_path / "a.csv", lines))
    assert {"1.5", "1e3", "NA", "null", "true"} < {t for part in tweets[1:4] for t in part}
    assert re.search(r"rows left out: 2, the first: .*a.csv: line 27 has 3 cells", tweets.note)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_are_separated_as_in_the_header(tmp_path, separator):
    lines = [f'"tweet {n},\nmore; and more"{separator} en' for n in range(20)]
    path = write_csv(tmp_path / "a.csv", lines, f"content {separator} language")
    texts = [text for part in load(path, language="any")[1:4] for text in part]
    assert len(texts) == 20 and {"tweet 0, more; and more"} < set(texts)


@pytest.mark.parametrize(
    ("header", "lines", "changes", "complaint"),
    [
        (
            "text,language",
            ["a,en"],
            {},
            "no column 'content' among: text, language .see --text_column",
        ),
        ("content", ["a"], {}, "no column 'language' among: content .--language any takes all"),
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


def test_a_csv_that_is_no_text_or_not_there_is_named(tmp_path, short_fields):
    (tmp_path / "w.csv").write_bytes("content,language\nschön,en\n".encode("cp1252"))
    with pytest.raises(data.DataError, match=r"w.csv: not a csv in UTF-8, after line"):
        load(tmp_path / "w.csv")
    (tmp_path / "long.csv").write_text('content,language\n"' + 140_000 * "x" + '",en\n')
    with pytest.raises(data.DataError, match=r"long.csv: .* field larger than"):
        load(tmp_path / "long.csv")
    (tmp_path / "b.csv").write_bytes(b"content,language\n\xff\xfe\x00,en\n")
    with pytest.raises(data.DataError, match=r"b.csv: not a csv in UTF-8"):
        load(tmp_path / "b.csv")
    with pytest.raises(data.DataError, match=r"c.csv: there is no such file"):
        load(tmp_path / "c.csv")


def test_the_sample_has_enough_voices(tmp_path):
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
    other = data.bucketed(lengths, 16)
    assert not {frozenset(batch) for batch in batches} & {frozenset(batch) for batch in other}
    longest = [max(lengths[i] for i in batch) for batch in batches]
    rises = sum(a <= b for a, b in itertools.pairwise(longest))
    assert rises < 0.75 * len(longest)  # in no order of length


def test_data_are_asked_for_by_the_seed(tmp_path):
    flags = [*TINY, "--seed", 7, "--out_dir", tmp_path]
    assert data_asked_for(PROJECT, *flags)["seed"] == 7


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


# --- the experiment ---------------------------------------------------------------------------

T = PROJECT.train
WORDS = "we need water tents bread and the help from all people near old bridge today now"


def some_texts(seed: int, count: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    words = WORDS.split()
    places = torch.randint(len(words), (count, 9), generator=generator)
    return [" ".join(words[place] for place in row) for row in places.tolist()]


def some_tweets() -> data.Tweets:
    return data.Tweets("made", some_texts(0, 40), some_texts(1, 12), some_texts(2, 14), "")


def settings(**changes) -> object:
    kinds = PROJECT.run.get_type_hints(T.Config, include_extras=True)
    flags = dict(zip((flag.strip("-") for flag in TINY[::2]), TINY[1::2], strict=True))
    flags |= {"epochs": "3", "patience": "3", "batch_size": "8", "scratch_lr": "1e-2"}
    flags |= {name: str(value) for name, value in changes.items()}
    return PROJECT.run.read_config(T.Config, kinds, None, flags)


@pytest.fixture(scope="module")
def start():
    tokenizer = model.train_tokenizer(some_texts(0, 60), 300, 64)
    torch.manual_seed(1)
    net = model.small_bert(tokenizer, layers=1, width=16)
    net.config.hidden_dropout_prob = 0.1
    masking = model.Masking(tokenizer, 0.3, False)
    return T.Start(net, tokenizer, masking, 5e-3, {"name": "small BERT", "missing": []})


def experiment(start, tweets, run: Path, monkeypatch, **changes):
    """T.compare on these tweets: the trial, and the rows by stage."""
    monkeypatch.setattr(T, "load_tweets", lambda config, seed: tweets)
    run.mkdir()
    fresh = start._replace(model=copy.deepcopy(start.model))
    return T.compare(fresh, settings(**changes), run, 0)


def outputs(trial) -> dict:
    """What may move when a part of the data is disturbed, each as text or numbers."""
    rows = [row for stage in trial.history.values() for row in stage]
    found = {
        "train_loss": [row.get("train_loss") for row in rows],
        "val_loss": [row["val_loss"] for row in rows],
        "val_unigram": trial.val_unigram,
    }
    for name, net in trial.models.items():
        found[f"weights {name}"] = PROJECT.run.fingerprint(net.state_dict())
    return found | {f"test {name}": own["loss"] for name, own in trial.scores.items()}


LEARNED = {"weights after", "weights scratch", "test after", "test scratch"}
MOVES = {  # the part of the data that is disturbed: what has to move; all else stays to the bit
    "train": {"train_loss", "val_loss", "val_unigram", "test unigram", *LEARNED},
    "val": {"val_loss", "val_unigram"},  # and which epoch is kept: see the test of it
    "test": {"test before", "test after", "test scratch", "test unigram"},
}


@pytest.mark.parametrize("part", MOVES)
def test_what_each_part_of_the_tweets_moves(start, tmp_path, monkeypatch, part):
    monkeypatch.setattr(T, "MASK_ERROR", math.inf)  # else the number of masks depends on all models
    epochs = {"epochs": 1} if part == "val" else {}  # which the last is, whatever validation says
    tweets = some_tweets()
    plain = outputs(experiment(start, tweets, tmp_path / "a", monkeypatch, **epochs))
    other = tweets._replace(**{part: some_texts(9, len(getattr(tweets, part)))})
    moved = outputs(experiment(start, other, tmp_path / "b", monkeypatch, **epochs))
    assert {name for name in plain if plain[name] != moved[name]} == MOVES[part]


FRESH_BIAS = {"cls.predictions.bias", "cls.predictions.decoder.bias"}


def test_stages_start_from_what_they_should_and_have_one_budget(start, tmp_path, monkeypatch):
    stages, weights = {}, {}

    def fit(net, stage, masking, config, run):
        stages[stage.name], weights[stage.name] = stage, copy.deepcopy(net.state_dict())
        assert net is not start.model
        net.get_output_embeddings().bias.data += 1
        return []

    monkeypatch.setattr(T, "fit", fit)
    lacking = start._replace(about=start.about | {"missing": ["cls.predictions.bias"]})
    trial = experiment(lacking, some_tweets(), tmp_path / "a", monkeypatch)
    tuned, scratch = stages["finetune-seed0"], stages["scratch-seed0"]
    budget = tuned._replace(name=scratch.name, lr=1e-2, fresh=())
    assert (tuned.lr, tuned.fresh) == (5e-3, ("cls.predictions.bias",))
    assert [text["text"] for text in tuned.train] == some_tweets().train
    assert (tuned.epochs, tuned.patience, tuned.batch_size, tuned.seed) == (3, 3, 8, 0)
    assert budget[:2] == scratch[:2] and budget[3:] == scratch[3:]
    assert len(scratch.val) == 4 * 12 and scratch.val is tuned.val
    given = {name: value.clone() for name, value in start.model.state_dict().items()}
    unigram = model.unigram_logits(tuned.train, len(start.tokenizer)).float()
    for name, value in given.items():
        own = unigram if name in FRESH_BIAS else value
        assert torch.equal(weights["finetune-seed0"][name], own)
        assert torch.equal(trial.models["before"].state_dict()[name], value)
    embedding = "bert.embeddings.word_embeddings.weight"
    assert not torch.allclose(weights["scratch-seed0"][embedding], given[embedding], atol=1e-2)
    other = experiment(lacking, some_tweets(), tmp_path / "b", monkeypatch)
    for name in ("after", "scratch"):
        for one, same in zip(*(t.models[name].parameters() for t in (trial, other)), strict=True):
            assert torch.equal(one, same)


def test_the_best_epoch_is_kept_and_patience_ends_a_stage(start, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 4.0, 9.0, 2.0, 1.0])
    seen = []

    def summary(sums):
        seen.append(copy.deepcopy(net.state_dict()))
        return {"loss": next(losses), "perplexity": 1.0, "top1": 0.0, "top5": 0.0}

    monkeypatch.setattr(T, "summary", summary)
    net = copy.deepcopy(start.model)
    texts = model.encode(start.tokenizer, some_texts(0, 20), 64)
    stage = T.Stage("s", texts, start.masking.fixed(texts, 0), 6, 2, 8, 1e-2, 0)
    rows = T.fit(net, stage, start.masking, settings(), tmp_path)
    assert [row["val_loss"] for row in rows] == [5.0, 3.0, 4.0, 4.0]
    assert "train_loss" not in rows[0] and all("train_loss" in row for row in rows[1:])
    for name, value in net.state_dict().items():
        assert torch.equal(value, seen[1][name])
    assert not torch.equal(
        net.get_input_embeddings().weight, seen[2]["bert.embeddings.word_embeddings.weight"]
    )


def test_the_estimated_time_leaves_out_the_first_step(start, monkeypatch, capsys):
    """In which a GPU loads its kernels: here it takes 100 s, each other step 2 s."""
    texts = model.encode(start.tokenizer, some_texts(0, 24), 64)
    stage = T.Stage("s", texts, [], 5, 9, 2, 1e-3, 0)
    net, options = copy.deepcopy(start.model), {"fresh": [], "fresh_lr": 1e-3}
    optimizer, schedule = model.adamw(net, 60, lr=1e-3, warmup=0.1, weight_decay=0.01, **options)
    seconds = []

    def slow_loss(*parts):
        seconds.append(2 if seconds else 100)
        return model.mlm_loss(*parts)

    monkeypatch.setattr(T, "mlm_loss", slow_loss)
    monkeypatch.setattr(T, "time", SimpleNamespace(perf_counter=lambda: sum(seconds)))
    batches = T.batches_of_pass(stage, 0)
    T.train_one_epoch(net, stage, batches, start.masking, optimizer, schedule, "s")
    assert len(batches) == 12
    assert capsys.readouterr().out == "s: 2 s a step, about 2 min for at most 60 steps\n"


def test_two_steps_by_hand(start, monkeypatch):
    """Warm-up, AdamW with decay, a rate for the fresh head, clipping, fresh masks."""
    tokenizer, masking = start.tokenizer, start.masking
    texts = model.encode(tokenizer, some_texts(0, 12), 64)
    fresh = ("cls.predictions.transform.dense.weight", "cls.predictions.bias")
    stage = T.Stage("s", texts, [], 2, 9, 6, 0.02, 0, fresh)
    net, plain = copy.deepcopy(start.model), copy.deepcopy(start.model)
    for one in (net, plain):
        one.get_output_embeddings().weight.data *= 6  # so that the gradient is clipped
    optimizer, schedule = model.adamw(
        net, 4, lr=0.02, warmup=0.25, weight_decay=0.3, fresh=list(fresh), fresh_lr=0.05
    )
    batches = T.batches_of_pass(stage, 0)
    torch.manual_seed(5)
    loss = T.train_one_epoch(net, stage, batches, masking, optimizer, schedule, "s")
    torch.manual_seed(5)
    moments, losses, tokens, norms = {}, 0.0, 0, []
    for step, chosen in enumerate(batches, start=1):
        batch = masking([texts[place] for place in chosen])
        kept = batch["labels"] != model.IGNORE
        logits = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[kept]
        mean = F.cross_entropy(logits, batch["labels"][kept])
        grads = torch.autograd.grad(mean, list(plain.parameters()))
        losses, tokens = losses + float(mean.detach()) * int(kept.sum()), tokens + int(kept.sum())
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))
        share = [0.0, 1.0][step - 1]  # of the peak: one step of warm-up out of four
        for (name, weight), grad in zip(plain.named_parameters(), grads, strict=True):
            grad = grad * min(1.0, 1.0 / (norms[-1] + 1e-6))
            lr = share * (0.05 if name in fresh else 0.02)
            m, v = moments.get(name, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            moments[name] = (m, v)
            weight.data *= 1 - lr * (0.3 if weight.ndim > 1 else 0.0)
            weight.data -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    assert max(norms) > 1
    assert loss == pytest.approx(losses / tokens, rel=1e-5)
    before = dict(start.model.named_parameters())
    for (name, weight), expected in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(weight, expected, atol=2e-4), name
    assert not torch.allclose(weight, before[name], atol=1e-3)


def test_the_settings_reach_the_optimizer(start, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(T, "train_one_epoch", lambda *parts: given.append(parts[4:6]) or 1.0)
    texts = model.encode(start.tokenizer, some_texts(0, 30), 64)
    masked = start.masking.fixed(texts, 0)
    stage = T.Stage("s", texts, masked, 2, 2, 4, 1e-3, 0, ("cls.predictions.bias",))
    config = settings(weight_decay=0.25, warmup=0.5, head_lr=0.7)
    T.fit(copy.deepcopy(start.model), stage, start.masking, config, tmp_path)
    optimizer, schedule = given[0]
    groups = {(group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert groups == {(1e-3, 0.25), (1e-3, 0.0), (0.7, 0.0)}
    shares = [schedule.lr_lambdas[0](step) for step in range(17)]  # two passes of eight steps
    assert shares == pytest.approx([min(step, 16 - step) / 8 for step in range(17)])


def test_training_has_dropout_and_evaluation_none(start, tmp_path, monkeypatch):
    modes = {"train": set(), "test": set()}
    net = copy.deepcopy(start.model)
    keep = model.masked_logits
    monkeypatch.setattr(
        T, "masked_logits", lambda m, b: modes["train"].add(m.training) or keep(m, b)
    )
    monkeypatch.setattr(
        model, "masked_logits", lambda m, b: modes["test"].add(m.training) or keep(m, b)
    )
    texts = model.encode(start.tokenizer, some_texts(0, 20), 64)
    stage = T.Stage("s", texts, start.masking.fixed(texts, 0), 2, 2, 8, 1e-2, 0)
    T.fit(net, stage, start.masking, settings(), tmp_path)
    assert modes == {"train": {True}, "test": {False}}


def test_a_pass_holds_every_text_once_in_an_order_of_its_own(start, tmp_path, monkeypatch):
    texts = model.encode(start.tokenizer, some_texts(0, 30), 64)
    stage = T.Stage("s", texts, start.masking.fixed(texts, 0), 2, 9, 4, 1e-3, 0)
    passes = [T.batches_of_pass(stage, number) for number in range(2)]
    assert passes[0] != passes[1] != T.batches_of_pass(stage._replace(seed=1), 1)
    seen, steps = [], []

    def train_one_epoch(net, stage, batches, *others):
        seen.append(sorted(place for batch in batches for place in batch))
        steps.append(len(batches))
        return 1.0

    monkeypatch.setattr(T, "train_one_epoch", train_one_epoch)
    T.fit(copy.deepcopy(start.model), stage, start.masking, settings(epoch_steps=3), tmp_path)
    assert steps == [3, 3, 2, 3, 3, 2]  # eight steps a pass
    for first in (0, 3):
        assert sorted(place for own in seen[first : first + 3] for place in own) == [*range(30)]


def test_masks_are_added_until_their_choice_no_longer_matters(start):
    texts = model.encode(start.tokenizer, some_texts(0, 6), 64)
    calls = {"sure": [], "unsure": []}

    def scorer(name, noise):
        def score(masked):
            calls[name].append([one["labels"].tolist() for one in masked])
            sums = torch.zeros(6, len(model.KINDS), 4, dtype=torch.float64)
            sums[:, 0, 0], sums[:, 0, 3] = 4 * (1 + noise * (len(calls[name]) % 2)), 4.0
            return sums

        return score

    scorers = {"sure": scorer("sure", 0.0), "unsure": scorer("unsure", 0.2)}
    sums = T.test_sums(scorers, texts, start.masking, 7, 10)
    # the loss is 1 or 1.2 in turn: a deviation of 0.1, so 0.1 / sqrt(n) < 0.02 from about 26 on
    assert len(sums["sure"]) == len(sums["unsure"]) == pytest.approx(26, abs=2)
    assert calls["sure"] == calls["unsure"]
    assert len({str(masks) for masks in calls["sure"]}) == len(calls["sure"])
    assert len(T.test_sums({"sure": scorers["sure"]}, texts, start.masking, 7, 10)["sure"]) == 10
    own = T.describe(sums["unsure"])
    assert own["loss"] == pytest.approx(1.1, abs=0.01) and own["masks"] == len(sums["sure"])
    assert own["perplexity_interval"] == pytest.approx(2 * [math.exp(own["loss"])])


def test_known_scores_come_out_under_the_right_names():
    """Two tokens of loss 1, 2, 3, 4 by arm, of which 0, 1, 1, 2 are hit."""
    sums = {}
    for number, name in enumerate(("before", "after", "scratch", "unigram"), start=1):
        sums[name] = torch.zeros(3, 5, len(model.KINDS), 4, dtype=torch.float64)
        sums[name][:, :, 1] = torch.tensor([2.0 * number, number // 2, 2, 2])
    scores = {name: T.describe(own) for name, own in sums.items()}
    gain = T.pretraining_gain(sums)
    assert gain == {"mean": 1.0, "interval": pytest.approx([1.0, 1.0])}
    trials = [T.Trial(some_tweets(), {}, scores, gain, 0.0, {}) for _ in range(2)]
    assert T.headline(trials) == pytest.approx(
        {
            "perplexity_before": math.exp(1),
            "perplexity_after": math.exp(2),
            "top1_before": 0.0,
            "top1_after": 0.5,
            "unigram_top1": 1.0,
            "scratch_perplexity_after": math.exp(3),
        }
    )


def test_what_pretraining_reads_and_keeps(tmp_path, monkeypatch):
    stages, kept = [], []
    monkeypatch.setattr(T, "general_english", lambda most: some_texts(4, 100)[: most // 100])
    monkeypatch.setattr(T, "keep", lambda net, *others: kept.append(net))

    def fit(net, stage, masking, config, run):
        stages.append((net, stage, masking, config))
        return []

    monkeypatch.setattr(T, "fit", fit)
    config = settings(pretrain_characters=10_000, pretrain_lr=0.01, pretrain_batch_size=7)
    T.pretrain(tmp_path / "small", config, tmp_path, torch.device("cpu"))
    ((net, stage, masking, _),) = stages
    train, held = (
        {one["text"] for one in texts} for texts in (stage.train, texts_of(stage, masking))
    )
    assert len(train) == 95 and len(stage.val) == 5 and not train & held
    assert masking.collate.mlm_probability == 0.3 and kept == [net]
    assert (stage.lr, stage.batch_size, stage.epochs, stage.fresh) == (0.01, 7, 2, ())


def texts_of(stage, masking) -> list[dict]:
    """The texts of masked validation texts, by putting the labels back."""
    found = []
    for one in stage.val:
        tokens = torch.where(one["labels"] != model.IGNORE, one["labels"], one["input_ids"])
        found.append({"text": masking.tokenizer.decode(tokens, skip_special_tokens=True)})
    return found


def test_what_fine_tuning_starts_from(tmp_path, run_folder, monkeypatch):
    """The small BERT that pretraining kept, with its own rate, dropout and masks."""
    config = settings(small_lr=0.7, lr=0.1, mask_probability=0.2, dropout=0.3)
    tweets = T.load_tweets(config, 0)
    found = T.starting_point(config, tmp_path / "run", torch.device("cpu"), tweets)
    kept = torch.load(run_folder / "pretrain.pt", weights_only=True)
    for name, value in found.model.state_dict().items():
        assert torch.equal(value, kept[name])
    assert found.lr == 0.7 and found.masking.collate.mlm_probability == 0.2
    assert found.model.config.hidden_dropout_prob == 0.3 and found.about["missing"] == []

    found.tokenizer.save_pretrained(tmp_path / "body")
    BertModel(copy.deepcopy(found.model.config)).save_pretrained(tmp_path / "body")
    config = settings(model=tmp_path / "body", small_lr=0.7, lr=0.1)
    found = T.starting_point(config, tmp_path / "other", torch.device("cpu"), tweets)
    assert found.lr == 0.1 and "cls.predictions.bias" in found.about["missing"]
    with pytest.raises(data.DataError, match=r"max_length: .* takes 64 tokens at most"):
        long = settings(model=tmp_path / "body", max_length=65)
        T.starting_point(long, tmp_path / "none", torch.device("cpu"), tweets)
    assert not (tmp_path / "none").exists()


def test_the_headline_is_recomputed_from_weights_and_tweets(run_folder):
    """In plain lines, from the files of the run: the same masks, the same tokens."""
    report = json.loads((run_folder / "metrics.json").read_text())
    config, test = settings(), report["metrics"]["test"]
    tweets = T.load_tweets(config, 0)
    (folder,) = Path(TINY[TINY.index("--data_dir") + 1]).glob("small-bert-*")
    net, tokenizer, _ = data.load_pretrained(str(folder), local=True)
    weights = {
        name: torch.load(run_folder / f"{stage}.pt", weights_only=True)
        for name, stage in [("after", "finetune-seed0"), ("scratch", "scratch-seed0")]
    }
    weights["before"] = copy.deepcopy(net.state_dict())
    masking = model.Masking(tokenizer, 0.15, False)
    texts = model.encode(tokenizer, tweets.test, 64)
    counts = torch.ones(len(tokenizer))
    for text in tweets.train:
        for token in tokenizer(text, truncation=True, max_length=64)["input_ids"]:
            counts[token] += token not in tokenizer.all_special_ids
    for name in ("before", "after", "scratch", "unigram"):
        if name in weights:
            net.load_state_dict(weights[name])
        net.eval()
        loss = hits = tokens = 0
        for number in range(test[name]["masks"]):
            for one in masking.fixed(texts, 1, number):
                chosen = one["labels"] != model.IGNORE
                with torch.no_grad():
                    logits = net(one["input_ids"][None]).logits[0][chosen]
                if name == "unigram":
                    logits = counts.log().expand(len(logits), -1)
                loss += float(
                    F.cross_entropy(logits.double(), one["labels"][chosen], reduction="sum")
                )
                hits += int((logits.argmax(1) == one["labels"][chosen]).sum())
                tokens += int(chosen.sum())
        assert test[name]["tokens"] == tokens
        assert test[name]["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        assert test[name]["top1"] == pytest.approx(hits / tokens, abs=1.5 / tokens)
        low, high = test[name]["perplexity_interval"]
        assert low < test[name]["perplexity"] < high
    assert 10 <= test["after"]["masks"] <= 100
    headline = report["headline"]
    for name in ("before", "after"):
        assert headline[f"perplexity_{name}"] == test[name]["perplexity"]
        assert headline[f"top1_{name}"] == test[name]["top1"]
    assert headline["unigram_top1"] == test["unigram"]["top1"]
    assert headline["scratch_perplexity_after"] == test["scratch"]["perplexity"]


def test_the_kept_weights_are_those_of_the_best_row(run_folder):
    with (run_folder / "history.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "finetune-seed0"]
    config = settings()
    net, tokenizer, _ = data.load_pretrained(str(run_folder / "model"), local=True)
    texts = model.encode(tokenizer, T.load_tweets(config, 0).val, 64)
    masking = model.Masking(tokenizer, 0.15, False)
    masked = [one for number in range(4) for one in masking.fixed(texts, 0, number)]
    loss = model.summary(model.evaluate(net, masked, tokenizer.pad_token_id))["loss"]
    assert loss == pytest.approx(min(float(row["val_loss"]) for row in rows), rel=1e-5)
    saved = torch.load(run_folder / "model.pt", weights_only=True)
    for name, value in net.state_dict().items():
        assert torch.equal(saved["weights"][name], value)


def test_the_gaps_of_the_picture(start):
    tweets = some_tweets()
    nets = {"before": start.model, "after": copy.deepcopy(start.model)}
    nets["after"].get_output_embeddings().bias.data[:] += torch.linspace(0, 3, len(start.tokenizer))
    trial = T.Trial(tweets, nets, {}, None, 0.0, {})
    gaps = T.fill_tweets(trial, start, settings())
    assert len(gaps) == len(tweets.test)
    for gap, text in zip(gaps, tweets.test, strict=True):
        assert gap["text"][0] + gap["word"] + gap["text"][1] == text and len(gap["word"]) > 3
        hidden = start.tokenizer(f"{gap['text'][0]}[MASK]{gap['text'][1]}", return_tensors="pt")
        place = int((hidden["input_ids"][0] == start.tokenizer.mask_token_id).nonzero())
        for name, net in nets.items():
            probs = net.eval()(**hidden).logits[0, place].detach().softmax(-1)
            right = start.tokenizer.convert_tokens_to_ids(gap["word"])
            assert gap["log_prob"][name] == pytest.approx(float(probs[right].log()), rel=1e-4)
            assert gap["best"][name][0][1] == pytest.approx(float(probs.max()), rel=1e-4)
    gaps[0]["best"]["after"] = [(gaps[0]["word"], 0.6), ("other", 0.4)]
    gaps[1]["best"]["after"] = [("other", 0.6), (gaps[1]["word"], 0.4)]
    for gap in gaps[2:]:
        gap["best"]["after"] = [("other", 1.0)]
    assert T.right_words(gaps, nets)["after"] == pytest.approx(1 / len(gaps))
    chosen = T.chosen_gaps(gaps, 0)
    gains = sorted(
        (gap["log_prob"]["after"] - gap["log_prob"]["before"] for gap in gaps), reverse=True
    )
    best = [gap["log_prob"]["after"] - gap["log_prob"]["before"] for gap in chosen["improved most"]]
    assert best == gains[:3] and len(chosen["at random"]) == 3
    assert all(gap not in chosen["improved most"] for gap in chosen["at random"])
    assert T.chosen_gaps(gaps[:2], 0)["at random"] == []


def test_right_words_are_counted_for_each_model():
    """Of three gaps the model before fills one with its word, the one after two."""
    words, after = ("Help", "water", "fire"), ("help", "water", "x")
    best = [{"before": [("help", 0.5)], "after": [(one, 0.5)]} for one in after]
    gaps = [{"word": word, "best": each} for word, each in zip(words, best, strict=True)]
    right = T.right_words(gaps, {"before": None, "after": None})
    assert right == {"words": 3, "before": pytest.approx(1 / 3), "after": pytest.approx(2 / 3)}
    assert T.right_words([], {"before": None}) == {"words": 0, "before": 0}


def test_plots_are_given_the_numbers_of_the_report(start, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(T, "try_plot", lambda plot, *rest: given.update({plot.__name__: rest}))
    trial = experiment(start, some_tweets(), tmp_path / "run", monkeypatch, epochs=1)
    gaps, prompts = T.fill_tweets(trial, start, settings()), T.fill_prompts(trial, start, 64)
    T.plot_results(trial, prompts, gaps, start, settings(), tmp_path)
    metrics = T.summarise([trial], start)
    assert given["plot_accuracy"][0] == metrics["test"]
    assert given["plot_curves"][0] == trial.history
    assert given["plot_curves"][2] == trial.val_unigram
    assert [*given["plot_gaps"][0]] == ["fixed prompts", "improved most", "at random"]
    assert metrics["tweets"] == {"train": 40, "val": 12, "test": 14}
    assert [row["best"].keys() for row in prompts] == [trial.models.keys()] * 3
    assert T.fill_prompts(trial, start, 4) == []


def test_a_sentence_of_long_words_fits_its_line():
    row = {"word": "a" * 3000, "text": ("b" * 3000, "c d " * 1000)}
    line = load_project("bert_mlm").plots.sentence(row)
    assert len(line) < 120 and f"____({'a' * 40})" in line


def test_pictures_survive_the_least_data(tmp_path):
    row = {
        "text": ["only $one$ ", ""],
        "word": "x_{$",
        "best": {"before": [("a", 1.0)], "after": []},
    }
    PROJECT.plots.plot_gaps({"at random": [row], "none": []}, "t", tmp_path / "a.png")
    rows = [{"epoch": 0, "val_loss": 3.0}]
    PROJECT.plots.plot_curves({"after": rows}, None, 3.0, "t", tmp_path / "b.png")
    own = {"top1": 0.0, "top5": 0.0, "top1_interval": [0.0, 0.0]}
    own |= {"by_kind": {"link": {"tokens": 1, "top1": 0.0}}}
    PROJECT.plots.plot_accuracy({"before": own, "after": own}, "t", tmp_path / "c.png")
    other = own | {"by_kind": {}}
    PROJECT.plots.plot_accuracy({"before": other, "after": other}, "t", tmp_path / "d.png")
    assert len(list(tmp_path.glob("*.png"))) == 4


# --- whole runs -------------------------------------------------------------------------------


def numbers_of(folder: Path) -> dict:
    report = json.loads((folder / "metrics.json").read_text())
    return report["metrics"] | report["headline"]


@pytest.fixture(scope="module")
def run_folder() -> Path:
    return tiny_run("bert_mlm")[0]


@pytest.mark.parametrize(
    ("checkpoints", "minutes"), [(1, 0), (5, 0), (2, 60)]
)  # in pretraining, in fine-tuning, in scratch where each stage has one checkpoint, its last
def test_a_killed_run_ends_like_an_unbroken_one(tmp_path, run_folder, checkpoints, minutes):
    flags = [*TINY, "--data_dir", tmp_path / "data", "--out_dir", tmp_path]
    train_until("bert_mlm", checkpoints, *flags, "--checkpoint_minutes", minutes)
    (folder,) = (path for path in tmp_path.iterdir() if path.name != "data")
    assert not (folder / "metrics.json").exists()
    assert numbers_of(train("bert_mlm", "--resume", folder)) == numbers_of(run_folder)
    assert (folder / "history.csv").read_text().count("\n") == 10  # a header; 3 stages of 3


def test_the_folder_loads_in_a_pipeline(run_folder):
    best = pipeline("fill-mask", str(run_folder / "model"))("we need [MASK] now")
    assert len(best) == 5 and best[0]["score"] > 0


def test_the_network_exports(start):
    net, tokens = copy.deepcopy(start.model).eval(), torch.randint(5, 200, (2, 7))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    exported = torch.export.export(net, (), inputs).module()
    assert torch.allclose(exported(**inputs).logits, net(**inputs).logits, atol=1e-6)


def test_only_the_method_with_two_seeds(tmp_path, run_folder):
    assert (run_folder / "pretrain.pt").exists()  # the small BERT is kept from here on
    flags = [*TINY, "--compare", "false", "--seeds", "2", "--out_dir", tmp_path / "my runs"]
    *_, use, last = call(load_project("bert_mlm").train, *flags).splitlines()
    folder = Path(last)
    assert shlex.split(use)[4] == last  # a command to copy
    numbers = numbers_of(folder)
    assert "scratch_perplexity_after" not in numbers and "scratch_minus_after" not in numbers
    assert (
        "scratch" not in numbers["test"] and "scratch" not in (folder / "history.csv").read_text()
    )
    one, other = numbers["test_loss_of_seeds"]["after"]
    assert one == numbers["test"]["after"]["loss"] != other
    with (folder / "history.csv").open() as file:
        assert {row["stage"] for row in csv.DictReader(file)} >= {
            "finetune-seed0",
            "finetune-seed1",
        }
    assert (folder / "curves.png").exists() and (folder / "accuracy.png").exists()


# --- predict.py ---------------------------------------------------------------------------------


def predict(run_folder: Path, out: Path, *inputs: object) -> tuple[str, list[dict], list[dict]]:
    """What predict.py prints, the rows of fillings.csv, the rows of surprise.csv."""
    output = call(PROJECT.predict, run_folder, *inputs, "--out_dir", out, "--device", "cpu")
    folder = Path(output.splitlines()[-1])
    assert folder.parent == out and not list(folder.glob("*.unsorted"))
    tables = []
    for name in ("fillings.csv", "surprise.csv"):
        with (folder / name).open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file)))
    return output, *tables


def test_predict_fills_gaps_as_train_py_does(tmp_path, run_folder):
    net, tokenizer, _ = data.load_pretrained(str(run_folder / "model"), local=True)
    tweets = T.load_tweets(settings(), 0)
    masking = model.Masking(tokenizer, 0.15, False)
    start = T.Start(net, tokenizer, masking, 1.0, {})
    trial = T.Trial(tweets, {"after": net}, {}, None, 0.0, {})
    gaps = T.fill_tweets(trial, start, settings())
    texts = ["[MASK]".join(gap["text"]) for gap in gaps]
    (tmp_path / "gaps.txt").write_text("\n".join(texts), encoding="utf-8")
    output, rows, others = predict(run_folder, tmp_path, tmp_path / "gaps.txt", "a [MASK] [MASK]")
    assert not others and [row["text"] for row in rows] == [*texts, *2 * ["a [MASK] [MASK]"]]
    assert [row["gap"] for row in rows[-2:]] == ["1", "2"]
    for row, gap in zip(rows, gaps, strict=False):
        found = [(row[f"word_{n}"], float(row[f"probability_{n}"])) for n in range(1, 6)]
        assert [word for word, _ in found] == [word for word, _ in gap["best"]["after"]]
        assert [p for _, p in found] == pytest.approx(
            [p for _, p in gap["best"]["after"]], rel=1e-4
        )
    assert gaps[0]["best"]["after"][0][0] in output
    assert [path.name for path in Path(output.splitlines()[-1]).glob("*.png")] == ["fillings.png"]


def test_predict_sorts_whole_texts_by_surprise(tmp_path, run_folder):
    net, tokenizer, _ = data.load_pretrained(str(run_folder / "model"), local=True)
    texts = [f"{text} https://t.co/x {n}" for n, text in enumerate(some_texts(3, 20))]
    texts[3] = 'two\nlines, "quoted"'
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([n, text] for n, text in enumerate(texts))])
        file.write("a,b,c\n,\n")
    _, gaps, rows = predict(run_folder, tmp_path, tmp_path / "a.csv", "--text_column", "text")
    assert not gaps and sorted(row["text"] for row in rows) == sorted(texts)
    values = [float(row["per_token"]) for row in rows]
    assert values == sorted(values) and values[0] < values[-1]
    for row in (rows[0], rows[-1]):
        clean = data.normalise(row["text"], "remove", "word")
        terms = model.log_likelihoods(net, tokenizer, tokenizer(clean)["input_ids"])
        assert float(row["log_likelihood"]) == pytest.approx(sum(terms), rel=1e-5)
        assert int(row["tokens"]) == len(terms)
        assert float(row["per_token"]) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_predict_reads_stdin_and_names_what_it_leaves_out(tmp_path, run_folder, monkeypatch):
    long = 100 * "water " + "[MASK]"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"we need [MASK]\nwhole text\n雪\n\n{long}\n"))
    output, gaps, rows = predict(run_folder, tmp_path)
    assert [row["text"] for row in gaps] == ["we need [MASK]"]
    assert [row["text"] for row in rows] == ["whole text"]
    assert "texts left out: 3, the first: '雪' (no word in it)" in output
    for bad, complaint in (
        ("no.csv", "no.csv"),
        ("no.txt", "no.txt"),
        (tmp_path / "w.txt", "w.txt"),
        (tmp_path, "found a folder"),
        ("雪", "there is no text to work on; '雪'"),
    ):
        (tmp_path / "w.txt").write_bytes(b"sch\xf6n")
        with pytest.raises(data.DataError, match=complaint):
            predict(run_folder, tmp_path, bad)


def test_predict_takes_texts_that_are_no_paths(tmp_path, run_folder):
    texts = ["~nobody needs water", "water " * 60, "a/b\0c"]
    _, _, rows = predict(run_folder, tmp_path, *texts)
    assert {row["text"] for row in rows} == set(texts)


# --- starts that fail -----------------------------------------------------------------------------


def test_a_failed_start_leaves_no_folder(tmp_path):
    flags = ["--dataset", "csv", "--csv_file", "no.csv", "--out_dir", tmp_path]
    with pytest.raises(data.DataError, match=r"no.csv: there is no such file"):
        call(PROJECT.train, *flags)
    assert not list(tmp_path.iterdir())


def test_a_model_that_brings_code_or_is_damaged_is_refused_in_one_line(tmp_path, run_folder):
    folder = tmp_path / "checkpoints" / "own"
    shutil.copytree(run_folder / "model", folder)
    assert data.find_model("own", tmp_path)[2] == []  # by its name in data_dir/checkpoints
    config = json.loads((folder / "config.json").read_text())
    code = {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForMaskedLM": "code.M"},
    }
    (folder / "config.json").write_text(json.dumps(config | code))
    (folder / "code.py").write_text("raise SystemExit('its code ran')")
    with pytest.raises(data.DataError, match=r"own: no masked language model: .*"):
        data.find_model("own", tmp_path)
    (folder / "config.json").write_text(json.dumps(config))
    for content in (b"", b"<html>not found</html>"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(data.DataError, match=r"own: no masked language model: .*"):
            data.find_model("own", tmp_path)


def test_a_model_that_cannot_be_had_says_what_was_tried(tmp_path, monkeypatch, capsys):
    def load_pretrained(name, *, local, dropout):
        raise data.DataError(f"{name}: {'not kept here' if local else 'no connection'}")

    monkeypatch.setattr(data, "load_pretrained", load_pretrained)
    hand = re.escape(str(tmp_path / "checkpoints" / "some/bert"))
    with pytest.raises(
        data.DataError, match=rf"could not download .*no connection; by hand: {hand}"
    ):
        data.find_model("some/bert", tmp_path)
    assert capsys.readouterr().err.startswith("downloading some/bert from https://")


def test_a_small_bert_that_is_damaged_or_cannot_be_kept_is_named(tmp_path, start, monkeypatch):
    folder = tmp_path / "small-bert-x"
    T.keep(start.model, start.tokenizer, {"a": 1}, folder)
    assert T.read_kept(folder, 0.1)[3] == {"a": 1} and [*tmp_path.iterdir()] == [folder]
    T.keep(start.model, start.tokenizer, {"a": 2}, folder)  # another run was first
    assert T.read_kept(folder, 0.1)[3] == {"a": 1} and [*tmp_path.iterdir()] == [folder]
    (folder / "pretraining.json").write_text("{")
    with pytest.raises(data.DataError, match="small-bert-x is damaged; remove it and start again"):
        T.read_kept(folder, 0.1)

    def full(*_):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(start.model, "save_pretrained", full)
    with pytest.raises(data.DataError, match="other could not be written: No space left"):
        T.keep(start.model, start.tokenizer, {}, tmp_path / "other")
    assert [*tmp_path.iterdir()] == [folder]


def test_masks_that_choose_nothing_are_refused(start):
    texts = model.encode(start.tokenizer, ["water"], 64)
    never = model.Masking(start.tokenizer, 1e-12, False)
    with pytest.raises(data.DataError, match="mask_probability: not one token"):
        T.several_masks(texts, never, 0, 2)


def test_numbers_that_cannot_be_meant_are_refused():
    for flag, value in [("mask_probability", 1e-300), ("vocabulary", 10**12), ("seed", 10**31),
                        ("batch_size", 10**12), ("seeds", 10**9), ("lr", 1e30), ("width", 100),
                        ("max_length", 10**6), ("masks", 1), ("dropout", 1)]:  # fmt: skip
        with pytest.raises(ValueError, match=flag):
            settings(**{flag: value})
