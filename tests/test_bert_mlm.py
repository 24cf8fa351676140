"""bert_mlm: which pieces are masked, what is summed and divided, bad data, and killed runs."""

import copy
import json
import math
import re
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from projects import call, load_project, tiny_run, train, train_until
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
        for name in ("input_ids", "labels", "kinds"):
            assert torch.equal(one[name], other[name])


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
        answer = model.summary(model.evaluate(net, masked, 0, batch_size))
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
    assert model.summary(model.evaluate(net, masked, 0))["loss"] == 0


def test_scores_by_hand():
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2], [3.0, 2, 1, 0, -1, -2], [0.0, 0, 9, 0, 0, 0]])
    first = model.piece_scores(logits, torch.tensor([0, 5, 2]))
    second = model.piece_scores(logits[:1], torch.tensor([4]))
    texts = [
        {"labels": torch.tensor([-100, 0, 5, 2]), "kinds": torch.tensor([0, 0, 0, 3]), "place": 1},
        {"labels": torch.tensor([4]), "kinds": torch.tensor([3]), "place": 0},
    ]
    sums = model.no_sums(texts)
    model.add_scores(sums, texts, torch.cat((first, second)))
    answer = model.summary(sums)
    assert (answer["pieces"], answer["top1"], answer["top5"]) == (4, 0.5, 0.75)
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
    pieces, expected = text["input_ids"], []
    for place, special in enumerate(text["special_tokens_mask"]):
        if not special:
            hidden = torch.tensor([pieces])
            hidden[0, place] = tokenizer.mask_token_id
            logits = net(hidden).logits.detach()[0, place]
            expected.append(float(logits.log_softmax(-1)[pieces[place]]))
    terms = model.log_likelihoods(net, tokenizer, pieces, batch_size=3)
    assert terms == pytest.approx(expected, rel=1e-5)
    mask = tokenizer.mask_token_id
    gaps = [[*pieces[:2], mask, *pieces[3:]], [2, mask, 50, mask, 3]]
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


def test_near_duplicates_come_into_one_part(tmp_path):
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
    assert re.search(r"2 rows left out, the first: .*a.csv: line 27 has 3 cells", tweets.note)


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
def run_folder() -> Path:
    return tiny_run("bert_mlm")[0]


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


def test_only_the_method_with_two_seeds(tmp_path):
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
