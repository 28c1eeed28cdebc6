"""Tokenizers: the ids of the tokenizers package, what tiktoken runs, where texts begin and end, and templates."""

import json
import random
import sys
import unicodedata

import pytest
from conftest import GOLDEN, random_model

import convert
from convert import ByteLevel, InputError, Tokenizer, load_tokenizer


def golden(name):
    return json.loads((GOLDEN / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))


def read(spec):
    """The Tokenizer of a tokenizer.json; the test is skipped where that needs the tokenizers package."""
    try:
        return Tokenizer(spec)
    except InputError:
        pytest.importorskip("tokenizers")
        raise


def byte_spec(merges=(), more=(), **changes):
    """A byte-level tokenizer.json: id = byte, then what the merges make, then the tokens `more`."""
    tokens = dict.fromkeys([*convert.BYTE_OF, *map("".join, merges), *more])
    vocab = convert.BYTE_OF | {token: i for i, token in enumerate(tokens) if i >= 256}
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    model = dict(type="BPE", vocab=vocab, merges=[list(pair) for pair in merges]) | changes.pop("model", {})
    return dict(pre_tokenizer=level, model=model, added_tokens=[]) | changes


# ---- The ids of the tokenizers package
@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen3", "smollm2", "llama2"])
def test_ids_and_text_of_the_tokenizers_library(family):
    tokenizer = read(golden(family))
    for row in golden(f"{family}.expected"):
        assert tokenizer.encode(row["text"]) == row["ids"]
        assert tokenizer.decode(row["ids"]) == row["decoded"]


def varied(variant):
    """A golden tokenizer.json with the changes of an entry of variants.json. leave_out n: every n-th merge; 0: none."""
    spec = golden(variant["base"]) | variant["changes"]
    model = spec["model"] | variant["model"]
    if variant["leave_out"]:
        del model["merges"][1 :: variant["leave_out"]]
    if variant["reverse"]:
        model["merges"].reverse()
    lacked = set(variant["lacks"])
    tokens = [*variant["first"], *(token for token in model["vocab"] if not lacked & set(token))]
    model["vocab"] = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) in model["vocab"]]
    ids = dict(model["vocab"])
    added = spec["added_tokens"] + variant["added"]
    added = [token | dict(id=ids.setdefault(token["content"], len(ids))) for token in added]
    return spec | dict(model=model, added_tokens=added)


VARIANTS = golden("variants")


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_of_other_kinds_of_files(name):
    tokenizer = read(varied(VARIANTS[name]))
    for row in VARIANTS[name]["rows"]:
        assert tokenizer.encode(row["text"]) == row["ids"]


KNOWN = {name: golden(name) for name in ("gpt2", "smollm2", "llama3", "qwen3")}
KNOWN["phi4"] = varied(VARIANTS["Split, Removed, inverted (Phi-4)"])
KNOWN["o200k"] = golden("llama3")
KNOWN["o200k"]["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = convert.O200K_SPLIT
PARTS = list("abehtnqz'sTHEI019,.!-_/()<|>éßİſﬁÅΩ中が한😀²½٣\u0301\n\n\t\x00\x04\x1c\x85\xa0\u3000\u2028\u200d\ufeff")
PARTS += " ~ ~ ~ ~ ~ ~ ~ ~\r\n~e\u0301~'S~👨‍👩‍👧~🇩🇪~ the~ing~don't~<|endoftext|>~<|im_end|>".split("~")


def assert_reads_as_the_package(spec):
    tokenizer = Tokenizer(spec)
    assert isinstance(tokenizer.model, ByteLevel)
    reader = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(spec))
    chance = random.Random(0)
    for _ in range(2000):
        text = "".join(chance.choices(PARTS, k=chance.randrange(40)))
        text = unicodedata.normalize(chance.choice(["NFC", "NFD"]), text)
        ids = tokenizer.encode(text)
        assert ids == reader.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize("name", KNOWN)
def test_tiktoken_runs_the_byte_level_families_with_the_ids_of_the_package(name):
    assert_reads_as_the_package(KNOWN[name])


def test_a_token_is_made_by_its_listed_merges_alone():
    merges = [("a", "b"), ("c", "d"), ("b", "cd"), ("a", "bcd")]  # a b c d → ab cd, which no pair of the list joins
    ab, cd, bcd = 256, 257, 258
    tokenizer = Tokenizer(byte_spec(merges))
    assert tokenizer.encode("xabcd bcd") == [120, ab, cd, 32, bcd]
    tokenizer = Tokenizer(byte_spec([("a", "a"), ("a", "aa")]))  # aaa → aa a: (a, aa) never comes about
    assert tokenizer.encode("aaa aaaaa") == [256, 97, 32, 256, 256, 97]


def test_with_ignore_merges_a_whole_word_that_is_a_token_is_one():
    tokenizer = Tokenizer(byte_spec([("a", "b")], ["abcab", "Ġabcab"], model=dict(ignore_merges=True)))
    assert tokenizer.encode("abcab abcab abcabc") == [257, 258, 32, 256, 99, 256, 99]
    halves = byte_spec([("a", "b")], ["abab"], model=dict(ignore_merges=True))  # tiktoken would merge ab ab in a word
    assert read(halves).encode("abab ababab") == [257, 32, 256, 256, 256]


def test_added_tokens_may_take_the_spaces_around_them_and_be_normalized():
    for token, text, ids in (
        (dict(content="<x>", lstrip=True), "a <x> b", [97, 256, 32, 98]),
        (dict(content="<x>", rstrip=True), "a <x> b", [97, 32, 256, 98]),
        (dict(content="<e\u0301>", normalized=True), "<é>", [256]),
    ):
        spec = byte_spec(added_tokens=[convert.ADDED | token | dict(id=256)], normalizer=dict(type="NFC"))
        assert read(spec).encode(text) == ids


def test_bytes_that_a_vocabulary_lacks_are_left_out():
    vocab = {token: i for token, i in convert.BYTE_OF.items() if token != "x"} | {"ab": 256}
    tokenizer = Tokenizer(byte_spec([("a", "b")], model=dict(vocab=vocab)))
    assert tokenizer.encode("xx axb 1") == [32, 256, 32, 49]
    assert_reads_as_the_package(varied(VARIANTS["bytes that vanish"]))


def test_every_text_has_ids_and_all_ids_have_a_text():
    tokenizer = convert.byte_tokenizer()
    text = "def f():\n\treturn 'ü€'  # \x00\n\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.encode("a\ud83db<|endoftext|>\ud83d\ude00") == [*"a\ufffdb".encode(), 256, *"😀".encode()]
    tokenizer = Tokenizer(byte_spec(added_tokens=[dict(id=300, content="<|endoftext|>")]))
    assert tokenizer.n_vocab == 301
    assert tokenizer.decode([97, 299, 320, 98, 300]) == "ab<|endoftext|>"  # 299 and 320 are no tokens
    assert read(golden("llama2")).decode(read(golden("llama2")).encode("\ufeffa\ud83db")) == "\ufeffa\ufffdb"


def test_without_the_package_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r'tokenizer.json.* pip install "\.\[tokenizers\]"'):
        load_tokenizer(directory_of(tmp_path, golden("llama2")))


# ---- What stands beside a tokenizer.json
def directory_of(directory, spec, **beside):
    """A directory with a tokenizer.json and, of name=content, name.json beside it."""
    for name, content in (dict(config={}, tokenizer=spec) | beside).items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.mark.parametrize("ids", [("704", "703"), ("1000", "999")])  # in their order: each gets the next free id
def test_added_tokens_may_stand_in_tokenizer_config_json_alone(tmp_path, ids):
    added = dict(added_tokens_decoder=dict(zip(ids, (dict(content="<y>"), dict(content="<x>")))))
    tokenizer = load_tokenizer(directory_of(tmp_path, golden("gpt2"), tokenizer_config=added))
    assert tokenizer.encode("<x><|im_end|><y>") == [703, 702, 704]


def test_added_tokens_beyond_the_models_vocabulary_are_text_and_others_are_refused(tmp_path, capsys):
    added = [dict(id=256, content="<|endoftext|>"), dict(id=257, content="<pad>")]  # of Llama 2, say
    convert.save(random_model(), None, tmp_path, "hf")
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_spec(added_tokens=added)))
    _, tokenizer = convert.load(tmp_path)
    assert tokenizer.encode("a<pad><|endoftext|>") == [*b"a<pad>", 256]
    assert "the model lacks 1 of the added tokens" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_text(json.dumps(golden("gpt2")))
    with pytest.raises(InputError, match="tokenizer.json.* 700 tokens, and the model 257"):
        convert.load(tmp_path)


def test_a_text_begins_once_with_what_tokenizer_json_puts_there():
    single = [dict(SpecialToken=dict(id="<s>")), dict(Sequence=dict(id="A")), dict(SpecialToken=dict(id="</s>"))]
    tokens = {"<s>": dict(id="<s>", ids=[701]), "</s>": dict(id="</s>", ids=[700])}
    template = dict(type="TemplateProcessing", single=single, special_tokens=tokens)
    steps = dict(type="Sequence", processors=[dict(type="ByteLevel"), template])
    tokenizer = Tokenizer(golden("llama3") | dict(post_processor=steps))
    assert tokenizer.start("the") == tokenizer.start("<|im_start|>the") == [701, *tokenizer.encode("the")]


OTHER = dict(eos_token_id=[702, 701], bos_token_id=702)


@pytest.mark.parametrize(
    "beside, end_of_text, ends, prefix",
    [
        ({}, 700, {700}, 700),  # by the name <|endoftext|>
        (dict(config=OTHER), 702, {702, 701}, 702),
        (dict(config=dict(base_config_dict=OTHER)), 702, {702, 701}, 702),  # of a looped checkpoint
        (dict(config=dict(eos_token_id=700, bos_token_id=700), generation_config=OTHER), 702, {700, 701, 702}, 702),
        (dict(config=OTHER, tokenizer_config=dict(eos_token="<|endoftext|>")), 700, {700, 701, 702}, 700),
        (dict(tokenizer_config=dict(bos_token=dict(content="<|im_end|>"))), 700, {700}, 702),
        (dict(config=dict(eos_token_id=[703, -1, None], bos_token_id=999)), 700, {700}, 700),  # of no token
    ],
)
def test_where_texts_begin_and_end_is_what_the_configs_state(tmp_path, beside, end_of_text, ends, prefix):
    tokenizer = load_tokenizer(directory_of(tmp_path, golden("gpt2"), **beside))
    assert (tokenizer.end_of_text, tokenizer.ends, tokenizer.prefix) == (end_of_text, ends, prefix)


TOKENS = "<|start_header_id|> <|end_header_id|> <|eot_id|> <|im_start|> <|im_sep|> <|im_end|>".split()


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("family, tokens", [(0, TOKENS[:3]), (1, TOKENS[3:]), (2, TOKENS[3::2])])
def test_the_template_is_the_stated_one_or_else_by_the_special_tokens(tmp_path, family, tokens, stated):
    template = convert.TEMPLATES[family]
    added = [dict(id=256 + i, content=name) for i, name in enumerate(TOKENS if stated else tokens)]
    directory_of(tmp_path, byte_spec(added_tokens=added))
    (tmp_path / "chat_template.jinja").write_text(template.opening + template.end if stated else "")
    assert load_tokenizer(tmp_path).template == template


def test_a_stated_template_that_is_none_of_ours_is_refused_in_training(tmp_path):
    stated = dict(tokenizer_config=dict(chat_template="[INST] {{ message }} [/INST]"))
    tokenizer = load_tokenizer(directory_of(tmp_path, golden("gpt2"), **stated))
    with pytest.raises(InputError, match="chat template is none of ChatML, Llama 3's and Phi-4's"):
        convert.segments_of(dict(messages=[dict(role="user", content="a")]), tokenizer)
