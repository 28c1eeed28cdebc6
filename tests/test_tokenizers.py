"""Tokenizers: the ids of the tokenizers library, or a refusal that says why; where texts begin and end."""

import json
from functools import partial

import pytest
from conftest import GOLDEN, ROOT, random_model

import convert
from loopus import InputError

FAMILIES = ["gpt2", "llama3", "qwen3", "smollm2", "llama2"]


def golden(name):
    return json.loads((GOLDEN / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))


# ---- the ids of the tokenizers library


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_text_of_the_tokenizers_library(family):
    tokenizer = convert.Tokenizer(golden(family))
    expected = golden(f"{family}.expected")
    assert len(expected) > 5
    for row in expected:
        assert tokenizer.encode(row["text"]) == row["ids"]
        assert tokenizer.decode(row["ids"]) == row["decoded"]
    assert tokenizer.n_vocab == (703 if family in ("gpt2", "llama3", "qwen3") else 700)


def varied(variant):
    """A golden tokenizer.json with the changes of an entry of variants.json."""
    spec = golden(variant["base"]) | variant["changes"]
    model = spec["model"] | variant["model"]
    merges = [merge for i, merge in enumerate(model["merges"]) if i % variant["leave_out"] != 1]
    if variant["reverse"]:
        merges.reverse()
    lacked = set(variant["lacks"])
    tokens = [*variant["first"], *(token for token in model["vocab"] if not lacked & set(token))]
    model["vocab"] = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    model["merges"] = [merge for merge in merges if "".join(merge) in model["vocab"]]
    spec["added_tokens"] = []
    ids = dict(model["vocab"])
    for token in golden(variant["base"])["added_tokens"] + variant["added"]:
        spec["added_tokens"].append(token | dict(id=ids.setdefault(token["content"], len(ids))))
    return spec | dict(model=model)


VARIANTS = golden("variants")


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_of_other_kinds_of_files(name):
    tokenizer = convert.Tokenizer(varied(VARIANTS[name]))
    for row in VARIANTS[name]["rows"]:
        assert tokenizer.encode(row["text"]) == row["ids"]
        pieces = tokenizer.pieces(row["text"], 10)
        assert "".join(pieces) == row["text"]
        assert sum(map(tokenizer.encode, pieces), []) == row["ids"]


def test_bytes_are_their_own_tokens():
    tokenizer = convert.byte_tokenizer()
    text = "def f():\n\treturn 'ü€'  # \x00\n\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<|endoftext|>") == [97, 256]
    assert tokenizer.end_of_text == 256


def byte_spec(merges=(), more=(), **changes):
    """A byte-level tokenizer.json: id = byte, then what the merges make, then the tokens `more`."""
    vocab = {character: b for b, character in convert.ALPHABET.items()}
    for token in ["".join(pair) for pair in merges] + list(more):
        vocab.setdefault(token, len(vocab))
    level = dict(type="ByteLevel", add_prefix_space=False, use_regex=True)
    model = dict(type="BPE", vocab=vocab, merges=[list(pair) for pair in merges])
    return dict(pre_tokenizer=level, model=model | changes.pop("model", {})) | changes


def test_a_token_is_made_by_its_listed_merges_alone():
    merges = [("a", "b"), ("c", "d"), ("b", "cd"), ("a", "bcd")]  # a b c d → ab cd, which no pair of the list joins
    tokenizer = convert.Tokenizer(byte_spec(merges))
    ab, cd, bcd, abcd = 256, 257, 258, 259
    assert tokenizer.encode("abcd") == [ab, cd]
    assert tokenizer.encode("xabcd bcd") == [120, ab, cd, 32, bcd]
    assert tokenizer.bytes_of[abcd] == b"abcd"
    tokenizer = convert.Tokenizer(byte_spec([("a", "a"), ("a", "aa")]))  # aaa → aa a: (a, aa) never comes about
    assert tokenizer.encode("aaa aaaaa") == [256, 97, 32, 256, 256, 97]


def test_the_rank_of_a_token_with_several_merges_is_that_of_the_last_one():
    merges = [("b", "c"), ("ab", "c"), ("x", "a"), ("a", "bc")]  # abc is made by its second pair, after xa
    tokenizer = convert.Tokenizer(byte_spec(merges, more=["ab"]))
    bc, abc, xa = 256, 257, 258
    assert tokenizer.encode("abc xabc") == [abc, 32, xa, bc]


def test_whole_words_with_ignore_merges():
    merges = [("a", "b")]
    tokenizer = convert.Tokenizer(byte_spec(merges, more=["abab", "Ġabab"], model=dict(ignore_merges=True)))
    assert tokenizer.encode("abab ababab") == [257, 32, 256, 256, 256]
    assert tokenizer.encode("abab abab") == [257, 258]
    assert convert.Tokenizer(byte_spec(merges, more=["abab"])).encode("abab") == [256, 256]


def test_sentencepiece_puts_a_space_where_the_file_says():
    words = dict(type="Metaspace", replacement="▁", split=False)
    text = "the<s>the <s> the"
    wanted = {"always": " the<s> the <s> the", "first": " the<s>the <s> the", "never": "the<s>the <s> the"}
    for scheme, spaced in wanted.items():
        spec = golden("llama2") | dict(normalizer=None, pre_tokenizer=words | dict(prepend_scheme=scheme))
        tokenizer = convert.Tokenizer(spec)
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == spaced
        assert tokenizer.decode(tokenizer.encode("the the")) == "the the"
    tokenizer = convert.Tokenizer(golden("llama2"))  # the older kind puts one before every part
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == " the<s> the <s>  the"


def test_tokens_that_join_words():
    spec = golden("llama2")
    spec["model"]["vocab"] |= {"e▁t": 700}
    spec["model"]["merges"].insert(0, ["e", "▁t"])
    assert 700 in convert.Tokenizer(spec).encode("the tee")


# ---- texts of any kind


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_do_not_change_the_ids(family):
    tokenizer = convert.Tokenizer(golden(family))
    verse = "".join(f"Line {i} of it,\nit's; {i * i}\n" for i in range(300)) + "x\r\ny\n\n\n z.\n9\n'll _\n_"
    text = verse + (ROOT / "loopus.py").read_text(encoding="utf-8")
    pieces = tokenizer.pieces(text, 100)
    if family == "llama2":  # which puts a space in front of each text, so that none can be cut
        assert pieces == [text]
    else:
        assert len(pieces) > 50
    assert "".join(pieces) == text
    assert sum(map(tokenizer.encode, pieces), []) == tokenizer.encode(text)


def test_pieces_are_not_cut_within_an_added_token():
    text = "first.\nsecond.\nthird.\n"
    assert len(convert.Tokenizer(byte_spec()).pieces(text, 3)) == 3
    for content, strip in ((".\nsecond", {}), ("second", dict(lstrip=True))):
        spec = byte_spec(added_tokens=[dict(id=256, content=content) | strip])
        tokenizer = convert.Tokenizer(spec)
        pieces = tokenizer.pieces(text, 3)
        assert len(pieces) == 2
        assert sum(map(tokenizer.encode, pieces), []) == tokenizer.encode(text)


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("gap", [" ", slow("\n"), slow("\t"), slow("\r\n"), slow("中")])
def test_a_million_characters_without_a_word(gap):
    """tiktoken's regex panics at such a run of spaces."""
    tokenizer = convert.byte_tokenizer()
    text = "begin" + gap * 1_000_000 + "end"
    assert tokenizer.encode(text) == list(text.encode())
    spec = byte_spec([("Ġ", "Ġ")])
    assert convert.Tokenizer(spec).encode("a" + " " * 1_000_001 + "b") == [97, *[256] * 500_000, 32, 98]
    digits = dict(type="Split", pattern=dict(Regex=r"\p{N}+"), behavior="Isolated", invert=False)
    level = dict(type="ByteLevel", add_prefix_space=False, use_regex=False)
    tokenizer = convert.Tokenizer(byte_spec(pre_tokenizer=dict(type="Sequence", pretokenizers=[digits, level])))
    assert tokenizer.encode(text) == list(text.encode())


def test_half_a_surrogate_pair_is_replaced():
    tokenizer = convert.byte_tokenizer()
    assert tokenizer.encode("a\ud83db") == list("a\ufffdb".encode())
    assert tokenizer.encode("\ud83d\ude00\ufeff") == list("😀\ufeff".encode())


def test_ids_that_no_token_has():
    spec = byte_spec(added_tokens=[dict(id=300, content="<|endoftext|>")])
    tokenizer = convert.Tokenizer(spec)
    assert tokenizer.n_vocab == 301
    assert tokenizer.bytes_of[256:] == [b""] * 44 + [b"<|endoftext|>"]
    assert tokenizer.token_bytes(97) == b"a"
    assert tokenizer.token_bytes(320) == b""
    assert tokenizer.decode([97, 299, 320, 98]) == "ab"


# ---- where a text begins and ends


def template(*items, ids):
    single = [
        dict(Sequence=dict(id="A", type_id=0)) if item == "A" else dict(SpecialToken=dict(id=item)) for item in items
    ]
    tokens = {name: dict(id=name, ids=[i]) for name, i in ids.items()}
    return dict(type="TemplateProcessing", single=single, special_tokens=tokens)


def test_what_stands_before_each_text():
    level = dict(type="ByteLevel")
    llama = template("<s>", "A", "</s>", ids={"<s>": 1, "</s>": 2})
    roberta = dict(type="RobertaProcessing", cls=["<s>", 1], sep=["</s>", 2])
    processors = [
        llama,
        dict(type="Sequence", processors=[level, llama]),
        roberta,
        roberta | dict(type="BertProcessing"),
    ]
    for processor in processors:
        assert convert.Tokenizer(golden("llama2") | dict(post_processor=processor)).begin == [1]
    for processor in (None, level, template("A", "</s>", ids={"</s>": 2})):
        assert convert.Tokenizer(golden("llama2") | dict(post_processor=processor)).begin == []
    twice = dict(type="Sequence", processors=[llama, template("<unk>", "A", ids={"<unk>": 0})])
    assert convert.Tokenizer(golden("llama2") | dict(post_processor=twice)).begin == [0, 1]
    with pytest.raises(InputError, match=r"post_processor: what it puts first is \[1, 700\], expected known ids"):
        convert.Tokenizer(golden("llama2") | dict(post_processor=template("<s>", "x", "A", ids={"<s>": 1, "x": 700})))


def test_a_text_begins_once():
    tokenizer = convert.Tokenizer(golden("llama2") | dict(post_processor=template("<s>", "A", ids={"<s>": 1})))
    the = tokenizer.encode("the")
    assert tokenizer.start("the") == [1, *the]
    assert tokenizer.start("<s>the") == [1, *the]
    assert tokenizer.start("") == [1]
    assert convert.Tokenizer(golden("llama2")).start("the") == the


def write_tokenizer(directory, spec, **configs):
    """A directory with a tokenizer.json and, of name=content, name.json beside it."""
    directory.mkdir(exist_ok=True)
    for name, content in (dict(config={}) | configs | dict(tokenizer=spec)).items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    "configs, end_of_text, ends",
    [
        ({}, 700, {700}),
        (dict(config=dict(eos_token_id=702)), 702, {702}),
        (dict(config=dict(base_config_dict=dict(eos_token_id=702))), 702, {702}),
        (dict(config=dict(eos_token_id=700), generation_config=dict(eos_token_id=[702, 701])), 702, {700, 701, 702}),
        (
            dict(generation_config=dict(eos_token_id=700), tokenizer_config=dict(eos_token="<|im_end|>")),
            702,
            {700, 702},
        ),
        (dict(tokenizer_config=dict(eos_token=dict(content="<|im_end|>", lstrip=False))), 702, {702}),
        (dict(config=dict(eos_token_id=None), tokenizer_config=dict(eos_token=None)), 700, {700}),
        (dict(config=dict(eos_token_id=[703, -1, 702]), tokenizer_config=dict(eos_token="<eos>")), 702, {702}),
    ],
)
def test_where_a_text_ends(tmp_path, configs, end_of_text, ends):
    tokenizer = convert.load_tokenizer(write_tokenizer(tmp_path, golden("gpt2"), **configs))
    assert tokenizer.end_of_text == end_of_text
    assert tokenizer.ends == ends


@pytest.mark.parametrize(
    "configs, prefix",
    [
        ({}, 700),  # the end of a text
        (dict(config=dict(bos_token_id=702)), 702),
        (dict(config=dict(base_config_dict=dict(bos_token_id=702))), 702),
        (dict(config=dict(bos_token_id=700), generation_config=dict(bos_token_id=702)), 702),
        (dict(config=dict(bos_token_id=0)), 0),
        (dict(config=dict(bos_token_id=999)), 700),
        (dict(config=dict(bos_token_id=701), tokenizer_config=dict(bos_token="<|im_end|>")), 702),
        (dict(config=dict(bos_token_id=701), tokenizer_config=dict(bos_token=None, eos_token="<|im_end|>")), 702),
    ],
)
def test_what_stands_before_a_text(tmp_path, configs, prefix):
    tokenizer = convert.load_tokenizer(write_tokenizer(tmp_path, golden("gpt2"), **configs))
    assert tokenizer.prefix == prefix


def test_what_stands_before_a_text_is_kept_in_a_checkpoint(tmp_path):
    tokenizer = convert.load_tokenizer(
        write_tokenizer(tmp_path, golden("gpt2"), tokenizer_config=dict(bos_token=None, eos_token="<|im_end|>"))
    )
    convert.save(random_model(vocab_size=703, base=dict(bos_token_id=700)), tokenizer, tmp_path / "looped")
    assert convert.load_tokenizer(tmp_path / "looped").prefix == tokenizer.prefix == 702


@pytest.mark.parametrize("name", ["<｜end▁of▁sentence｜>", "<|eot_id|>", "</s>", "<|end_of_text|>", "<eos>"])
def test_names_of_the_end(name):
    tokenizer = convert.Tokenizer(byte_spec(added_tokens=[dict(id=256, content=name)]))
    assert tokenizer.end_of_text == (None if name == "<eos>" else 256)
    assert tokenizer.ends == (set() if name == "<eos>" else {256})


# ---- what is refused


def test_a_directory_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert convert.load_tokenizer(tmp_path) is None


def sequence(*steps):
    return dict(pre_tokenizer=dict(type="Sequence", pretokenizers=list(steps)))


def splits(pattern, behavior="Isolated", invert=False):
    kind = "Regex" if isinstance(pattern, str) else "Other"
    return dict(pre_tokenizer=dict(type="Split", pattern={kind: pattern}, behavior=behavior, invert=invert))


LEVEL = dict(type="ByteLevel", add_prefix_space=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pre_tokenizer=dict(type="Whitespace")), 'pre_tokenizer "Whitespace" is not supported; expected "Split"'),
        (sequence(LEVEL, dict(type="Digits", individual_digits=True)), "Digits after ByteLevel is not supported"),
        (dict(pre_tokenizer=dict(type="Metaspace", replacement="_")), 'Metaspace.replacement "_" is not supported'),
        (splits("a", "MergedWithNext"), r'Split behavior, invert \["MergedWithNext", false\] is not supported'),
        (splits("a", "Removed"), r'Split behavior, invert \["Removed", false\] is not supported'),
        (splits(3), r'Split.pattern \["Other"\] is not supported'),
        (splits(r"\w+"), r"\\w in the Split pattern '\\\\w\+' is not supported"),
        (splits(r"a$|b"), r"\$ in the Split pattern"),
        (splits(r"\p{N}{1,3}+"), r"}\+ in the Split pattern"),
        (splits(r"\p{Han}+"), r"\\p\{Han\} in the Split pattern"),
        (splits("(?m:a)"), r"\(\?m in the Split pattern"),
        (splits("(a"), r"unterminated subpattern at position .* in the Split pattern '\(a' is not supported"),
        (splits(r"(?=\p{N})"), "Split pattern .* matches empty text"),
        (dict(normalizer=dict(type="Lowercase")), 'normalizer "Lowercase" is not supported; expected "NFC"'),
        (dict(normalizer=dict(type="Replace", pattern=dict(Regex="a"), content="")), "Replace.pattern .* is not"),
        (dict(post_processor=dict(type="Other")), 'post_processor "Other" is not supported'),
        (dict(model=dict(type="Unigram")), 'model.type "Unigram" is not supported; expected "BPE"'),
        (dict(model=dict(dropout=0.1)), "model.dropout 0.1 is not supported; expected null or 0"),
        (dict(model=dict(continuing_subword_prefix="##")), 'model.continuing_subword_prefix "##" is not supported'),
        (dict(model=dict(end_of_word_suffix="</w>")), 'model.end_of_word_suffix "</w>" is not supported'),
        (dict(model=dict(ignore_merges="yes")), 'model.ignore_merges "yes" is not supported'),
        (dict(model=dict(vocab={"a": 0, "<0x0A>": 1})), "model.vocab has some of <0x00> … <0xFF> for byte_fallback"),
        (dict(model=dict(merges=[["▁", "☃"]])), "model.merges has '☃', which model.vocab lacks"),
        (dict(model=dict(merges=["<0x41> <0x42>"], vocab=golden("llama2")["model"]["vocab"] | {"<0x41><0x42>": 700})),
            "model.merges has merges of <0x00> … <0xFF>"),
        (dict(model=dict(merges=["#version: 0.2"])), "model.merges has '#version:', which model.vocab lacks"),
        (dict(added_tokens=[dict(id=10**12, content="<x>")]), "the id of '<x>' is 1000000000000, expected one id"),
        (dict(added_tokens=[dict(id=-1, content="<x>")]), "the id of '<x>' is -1, expected one id for each token"),
        (dict(added_tokens=[dict(id=5, content="<x>")]), "the id of '<x>' is 5, expected one id for each token"),
        (dict(added_tokens=[dict(id=700, content="<s>")]), "the id of '<s>' is (1|700), expected one id"),
        (dict(added_tokens=[dict(id=700, content="<x>"), dict(id=700, content="<y>")]), "the id of '<y>' is 700"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(change, message):
    spec = golden("llama2") | change
    spec["model"] = golden("llama2")["model"] | change.get("model", {})
    with pytest.raises(InputError, match=f"^tokenizer.json: .*{message}") as e:
        convert.Tokenizer(spec)
    assert "\n" not in str(e.value)


def test_added_tokens_that_normalization_makes_one():
    more = [dict(id=256 + i, content=content, normalized=True) for i, content in enumerate(("<é>", "<e\u0301>"))]
    assert convert.Tokenizer(byte_spec(added_tokens=more)).encode("<é><e\u0301>") == [256, 257]
    with pytest.raises(InputError, match="added_tokens are not told apart once they are normalized"):
        convert.Tokenizer(byte_spec(added_tokens=more, normalizer=dict(type="NFC")))


def test_characters_without_a_token_and_without_an_unknown_token():
    spec = golden("llama2")
    spec["model"] |= dict(byte_fallback=False, unk_token="<nothing>")
    tokenizer = convert.Tokenizer(spec)
    assert tokenizer.encode("the")
    with pytest.raises(InputError, match="'☃' is not in model.vocab, nor is model.unk_token '<nothing>'"):
        tokenizer.encode("the ☃")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"{", "is damaged .*: expected JSON; fetch or write it again"),
        (b'{"a": "\xff"}', "is damaged .*: expected JSON"),
        (b"[" * 100_000, "is damaged .*: expected JSON"),
        (b"[1, 2]", "holds a JSON list, expected an object"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "generation_config", "config"])
def test_damaged_files_are_named(tmp_path, name, data, message):
    directory = write_tokenizer(tmp_path, golden("gpt2"))
    (directory / f"{name}.json").write_bytes(data)
    with pytest.raises(InputError, match=f"{name}.json {message}") as e:
        convert.load_tokenizer(directory)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model=None), "is no tokenizer.json as we know it"),
        (dict(model=dict(type="BPE", merges=[])), "is no tokenizer.json as we know it .KeyError.'vocab'"),
        (dict(normalizer=dict(form="NFC")), "is no tokenizer.json as we know it .KeyError.'type'"),
        (dict(normalizer=dict(type="Prepend", prepend=3)), "is no tokenizer.json as we know it"),
        (dict(normalizer=dict(type="Replace", pattern=dict(String=3), content="")), "is no tokenizer.json as we"),
        (dict(pre_tokenizer=3), "is no tokenizer.json as we know it"),
        (dict(added_tokens=[3]), "is no tokenizer.json as we know it"),
        (dict(added_tokens=[dict(id="a", content="<x>")]), "is no tokenizer.json as we know it"),
        (dict(added_tokens=[dict(id=1.5, content="<x>")]), "is no tokenizer.json as we know it"),
        (dict(added_tokens=[dict(id=700, content=3)]), "is no tokenizer.json as we know it"),
        (
            dict(added_tokens=[dict(id=700, content="<x>", lstrip="no")]),
            ": an added token is .*, expected true or false",
        ),
        (dict(model=dict(vocab=["a"], merges=[])), "is no tokenizer.json as we know it"),
        (dict(model=dict(vocab={"a": "0"}, merges=[])), "is no tokenizer.json as we know it"),
        (dict(model=dict(vocab={"a": 1.0}, merges=[])), "is no tokenizer.json as we know it"),
        (dict(model=dict(vocab={"a": 0, "b": 0}, merges=[])), ": the id of 'b' is 0, expected one id for each token"),
        (dict(model=dict(vocab={}, merges="a b")), "is no tokenizer.json as we know it"),
        (dict(model=dict(vocab={}, merges=["a b c"])), "is no tokenizer.json as we know it"),
        (dict(model=dict(vocab={}, merges=[], unk_token=[3])), r": model.unk_token is \[3\], expected a string"),
    ],
)
def test_files_of_another_form_are_named(tmp_path, change, message):
    with pytest.raises(InputError, match=f"{tmp_path}/tokenizer.json ?{message}"):
        convert.load_tokenizer(write_tokenizer(tmp_path, golden("gpt2") | change))


@pytest.mark.parametrize("configs", [dict(config=dict(eos_token_id="2")), dict(tokenizer_config=dict(eos_token=2))])
def test_ends_of_another_type_are_named(tmp_path, configs):
    with pytest.raises(InputError, match="config.json: eos_token(_id)? is .*, expected (an id|a string)"):
        convert.load_tokenizer(write_tokenizer(tmp_path, golden("gpt2"), **configs))
