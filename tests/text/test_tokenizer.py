import json
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_rlhf.errors import UserError
from lit_rlhf.text import load_tokenizer, train_bpe, train_characters
from lit_rlhf.text.chat import ROLE_TEMPLATE
from lit_rlhf.text.tokenizer import END_OF_TEXT, PAD, ROLES

ODD = [
    "two  spaces,   three", "  leads and trails  ", "line\nline\n\n\nthird\r\ntab\t\ttab", "\n", " ", "a ' s 'll don't",
    "x , y . z !", "| ?|#", "12 + 345 = 357.0", "¿Qué? naïve café — “quotes”", "cafe\u0301 vs café",
    "中文\uff0c日本語 한국어", "👩‍👩‍👧 🇩🇪 👍🏽!", "\u00a0\u2003\u200b\ufeff", "٣ Ⅷ ½ 5", "\x00\x07\x1b",
    "\U0001d518\U0001d52b\U0001d526 \U0010ffff", "<not|a|token>",
]  # fmt: skip


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def strings(alphabet, seed, count=300):
    generator = random.Random(seed)
    return ["".join(generator.choices(alphabet, k=generator.randrange(1, 25))) for _ in range(count)]


def test_bpe_gives_any_text_back():
    tokenizer = train_bpe(["a small text,  with 12 spaces\n"], vocab_size=280)  # most of ODD was never seen
    everything = "  \n\t\r019½aàb.,'!?-<|>_中👍🏽\u0301\u200d\u00a0\u2028"
    for text in ODD + strings(everything, seed=0):
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_characters_give_any_text_of_theirs_back():
    tokenizer = train_characters(ODD)
    for text in ODD + strings(sorted(set("".join(ODD))), seed=1):
        ids = encode(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text)  # one token a character
    assert len(tokenizer) == len(set("".join(ODD))) + 6


def test_an_unknown_character_becomes_one_unknown_token():
    tokenizer = train_characters(["abc"])
    assert encode(tokenizer, "aQb") == [*encode(tokenizer, "a"), tokenizer.unk_token_id, *encode(tokenizer, "b")]


def test_digits_stand_alone():
    tokenizer = train_bpe(["2024 2024 2024 1000 1000 year2024 1000.2024"] * 50, vocab_size=400)
    words = [tokenizer.decode([i]) for i in encode(tokenizer, "in 2024 or 1000.5, x42")]
    assert [word.strip() for word in words if any(c.isdigit() for c in word)] == list("2024100" + "0542")
    assert all(sum(c.isdigit() for c in tokenizer.decode([i])) <= 1 for i in range(len(tokenizer)))


def test_a_frequent_word_becomes_one_token():
    tokenizer = train_bpe(["the tomato and the tomato"] * 50, vocab_size=400)
    assert [tokenizer.decode([i]) for i in encode(tokenizer, "the tomato")] == ["the", " tomato"]


@pytest.mark.parametrize(
    "tokenizer", [train_bpe(["abc " * 9], 270), train_characters(["abc"])], ids=["bpe", "characters"]
)
def test_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END_OF_TEXT, PAD)
    ids = [encode(tokenizer, token) for token in (END_OF_TEXT, PAD, *ROLES)]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == 5
    assert tokenizer.decode(encode(tokenizer, f"{ROLES[1]} ab{END_OF_TEXT}"), skip_special_tokens=True).strip() == "ab"
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1


def test_vocab_size_counts_everything():
    texts = [" ".join(strings("abcdefgh", seed=3))]
    assert len(train_bpe(texts, vocab_size=333)) == 333
    assert len(train_bpe(["a"], vocab_size=333)) == 256 + 5  # a small text has no merges


@pytest.mark.parametrize("load", [AutoTokenizer.from_pretrained, load_tokenizer])
@pytest.mark.parametrize("train", [lambda texts: train_bpe(texts, 300), train_characters], ids=["bpe", "characters"])
def test_save_and_load(tmp_path, train, load):
    tokenizer = train(ODD)
    tokenizer.chat_template = ROLE_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    for text in ODD:
        assert encode(loaded, text) == encode(tokenizer, text)
        assert loaded.decode(encode(loaded, text)) == text
    assert loaded.chat_template == ROLE_TEMPLATE
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(loaded) == len(tokenizer)


def test_gpt2_gets_a_padding_token_of_its_own(test_data):
    tokenizer = load_tokenizer(test_data / "gpt2-tokenizer")
    assert tokenizer.eos_token_id == 50256
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == (PAD, 50257, 50258)
    assert encode(tokenizer, "Hello world") == [15496, 995]  # the published vocabulary
    for text in ODD:
        assert tokenizer.decode(encode(tokenizer, text), clean_up_tokenization_spaces=False) == text


def test_padding_that_is_end_of_text_is_replaced(tmp_path):
    tokenizer = train_bpe(["abc"], 270)
    size = len(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id != loaded.eos_token_id and len(loaded) == size  # <|pad|> was there already


def checkpoint(folder, special, template=None, rows=0, ends=None, **named):
    """A folder with a tokenizer of ``special`` tokens, "<e>" first, and the settings of its model; returns len."""
    inner = Tokenizer(models.BPE(unk_token=named.get("unk_token")))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>", **named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    size = rows + len(tokenizer)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": size, "eos_token_id": 0}))
    if ends is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return len(tokenizer)


ROLES_BY_NAME = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}<x>"


@pytest.mark.parametrize(
    ("settings", "padding", "added"),
    [
        ({"special": ["<e>", "<a>", "<my_pad_id>", "<z>"]}, "<my_pad_id>", 0),
        ({"special": ["<e>", "<a>", "<reserved_1>", "<reserved_2>"]}, "<reserved_1>", 0),
        ({"special": ["<e>", "<a>", "<z>"]}, "<z>", 0),
        ({"special": ["<e>", "<a>", "<z>"], "rows": 3}, PAD, 1),  # in a row of the embedding that has no token
        ({"special": ["<e>", "<u>"], "unk_token": "<u>"}, "<u>", 0),
        ({"special": ["<e>", "<a>", "<u>"], "unk_token": "<u>"}, "<a>", 0),
        ({"special": ["<e>", "<a>", "<z>"], "ends": [0, 2]}, "<a>", 0),  # an end token is none
        ({"special": ["<e>", "<a>", "<z>"], "bos_token": "<z>"}, "<a>", 0),
        ({"special": ["<e>", "<a>", "<x>", "<|user|>", "<|system|>"], "template": ROLES_BY_NAME}, "<a>", 0),
        ({"special": ["<e>", "<a>", "<z>"], "pad_token": "<e>"}, "<z>", 0),
        ({"special": ["<e>", "<a>", "<z>"], "pad_token": "<a>"}, "<a>", 0),  # a good one stays
        ({"special": ["<e>", "<a>", "<z>"], "pad_token": "<a>", "ends": [0, 1]}, "<z>", 0),
        ({"special": ["<e>", "<x>", "<z>"], "pad_token": "<x>", "template": ROLES_BY_NAME}, "<z>", 0),  # ends a turn
        ({"special": ["<e>"]}, PAD, 1),  # there is nothing else: the embedding will grow
    ],
)
def test_a_spare_token_serves_as_padding(tmp_path, settings, padding, added):
    size = checkpoint(tmp_path, **settings)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.pad_token, len(loaded)) == (padding, size + added)
    loaded.save_pretrained(tmp_path)  # the next stage finds the same
    assert (load_tokenizer(tmp_path).pad_token_id, len(load_tokenizer(tmp_path))) == (loaded.pad_token_id, len(loaded))


def test_padding_that_stands_for_unknown_words_stays(tmp_path):
    """A template's words are not in this vocabulary: encoded, they are padding, which it does not write."""
    inner = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1, "<e>": 2}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<e>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ' ' + m.content + ' <e> ' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    assert (load_tokenizer(tmp_path).pad_token_id, len(load_tokenizer(tmp_path))) == (1, 3)


def test_a_real_checkpoint_keeps_its_vocabulary(test_checkpoint):
    loaded, plain = load_tokenizer(test_checkpoint), AutoTokenizer.from_pretrained(test_checkpoint)
    assert plain.pad_token == plain.eos_token and loaded.get_vocab() == plain.get_vocab()
    written = plain.apply_chat_template([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert loaded.pad_token_id not in (*written["input_ids"], plain.eos_token_id, plain.bos_token_id)


def test_a_tokenizer_that_is_fine_stays_as_it_is(tmp_path):
    tokenizer = train_bpe(["abc"], 270)
    tokenizer.add_special_tokens({"pad_token": "<own-pad>"})
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert load_tokenizer(tmp_path).pad_token == "<own-pad>"


def test_no_end_of_text_is_an_error(tmp_path):
    inner = train_bpe(["abc"], 270).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no end-of-text token .*tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(UserError, match=r"missing: no such folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UserError, match=r"no tokenizer could be loaded"):
        load_tokenizer(tmp_path)  # an empty folder
    (tmp_path / "tokenizer.json").write_text("{ half a fi")
    with pytest.raises(UserError, match=r"tokenizer.json: damaged \(not JSON"):
        load_tokenizer(tmp_path)


def test_lengths_in_a_tokenizers_file_cut_and_pad_nothing(tmp_path, capsys):
    tokenizer = train_bpe(["I cut nothing, you see.\n"] * 3, 320)
    tokenizer.chat_template = ROLE_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "whole")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    tokenizer.save_pretrained(tmp_path / "cutting")
    whole, cutting = load_tokenizer(tmp_path / "whole"), load_tokenizer(tmp_path / "cutting")
    assert "cutting: its tokenizer.json cuts or pads texts by itself" in capsys.readouterr().out
    cutting.save_pretrained(tmp_path / "exported")
    for found in (cutting, load_tokenizer(tmp_path / "exported"), AutoTokenizer.from_pretrained(tmp_path / "exported")):
        for text in ("I", "I cut nothing, you see, and you see it."):
            assert encode(found, text) == encode(whole, text) == found.backend_tokenizer.encode(text).ids
    assert not capsys.readouterr().out
