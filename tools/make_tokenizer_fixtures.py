"""Makes tests/fixtures/tokenizer: what Hugging Face tokenizers and sentencepiece make of awkward strings.

- demo.json: [{text, ids}] by the demo model's own tokenizer. GGUF has no field for its NFC normaliser and llama.cpp
  applies none, so `ids` are without it; where the normaliser would matter, `nfc_ids` are the ids with it.
- llama-spm.gguf, llama-spm.json: a small SentencePiece BPE with byte fallback and Llama's settings, and its cases
  (without bos).
- pretokenize.json: {pre: [{text, pieces}]}, how each of llama.cpp's pre-tokenizer types that our architectures use cuts
  a text, by the regular expression of the original model.

    python tools/make_tokenizer_fixtures.py --tokenizer HF/tokenizer.json --text SOME.txt --out tests/fixtures/tokenizer
"""

import argparse
import json
import tempfile
from pathlib import Path

import gguf
import sentencepiece
from tokenizers import PreTokenizedString, Regex, Tokenizer, pre_tokenizers

TEXTS = [
    "",
    " ",
    "  ",
    "     ",
    "\n",
    "\n\n\n",
    "\r\n",
    "\t",
    "a",
    "Hello, world!",
    " Hello",
    "Hello ",
    "  two spaces, then   three",
    "trailing spaces   ",
    "line one\nline two\n\nparagraph",
    "windows\r\nline\r\n ends",
    " \n  \n\t mixed \t\n white",
    "non\u00a0breaking\u2003spaces\u3000here",
    "It was the best of times, it was the worst of times.",
    "I'm sure they'll say it's what we've done; you'd don't they're",
    "I'M SURE THEY'LL SAY IT'S WHAT WE'VE DONE",
    "'tis the rock 'n' roll 's 'S ''s",
    "0 1 12 123 1234 12345678901234567890",
    "3.14159, 1,000,000 and -17e-3 at 50%",
    "½ ² Ⅷ ٣٤٥ १२३",
    "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, ¿no há mucho tiempo?",
    "Longtemps, je me suis couché de bonne heure. Où êtes-vous, garçon ? L'été à l'œuvre.",
    "Quel ramo del lago di Como, che volge a mezzogiorno: perché così è più bello.",
    "Größe, Straße, über ÄÖÜ; naïve café",
    "def main(argv=None):\n    for i in range(10):\n        print(f'{i:>4}', end=\"\\n\")\n",
    "if (a[i] != b->c && !d) { return x ? 0x1F : ~y; } // comment",
    "SELECT * FROM t WHERE a>=1;--",
    "https://example.org/path?query=1&other=%20two#fragment",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE",
    "\t\tindented\twith\ttabs",
    "...!!!???---***===",
    "“Curly quotes” — dashes – and… ellipsis",
    "emoji 🙂👍🏽 family 👨‍👩‍👧‍👦 flag 🇪🇸",
    "日本語のテキスト、漢字かな交じり。",
    "中文字符，没有空格。",
    "한국어 텍스트",
    "Русский текст и Ελληνικά",
    "שלום עולם مرحبا بالعالم",
    "ไทยไม่มีช่องว่าง",
    "precomposed é, combining e\u0301 and n\u0303",
    "zalgo Z\u0351\u036b\u0343a\u0363\u0369l\u0360go",
    "ligature ﬁ, full width ＡＢＣ１２３",
    "zero\u200bwidth\u200djoin\ufeffer and \u0000 nul",
    "private \ue000 and astral 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈",
    "<|endoftext|>",
    "<|im_start|>user\nWho goes there?<|im_end|>\n<|im_start|>assistant\n",
    "no<|endoftext|>space <|endoftext|> around <|endoftext",
    "<s>not special here</s> <unk> <0x41>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "the the the the The THE tHe",
]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `pre` -> the expressions applied one after the other, as in llama.cpp's src/llama-vocab.cpp.
PRE = {
    "gpt-2": [GPT2],
    "olmo": [GPT2],
    "qwen2": [LLAMA3.replace("{1,3}", "")],
    "llama-bpe": [LLAMA3],
    "dbrx": [LLAMA3],
    # What llama.cpp falls back to when it does not know the type, or there is none.
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]"],
}


def demo_cases(path):
    with_nfc = Tokenizer.from_file(str(path))
    raw = json.loads(path.read_text())
    raw["normalizer"] = None
    without = Tokenizer.from_str(json.dumps(raw))
    for text in TEXTS:
        ids, nfc_ids = (t.encode(text, add_special_tokens=False).ids for t in (without, with_nfc))
        yield {"text": text, "ids": ids} | ({"nfc_ids": nfc_ids} if nfc_ids != ids else {})


def pieces(text, patterns):
    cut = PreTokenizedString(text)
    for pattern in patterns:
        pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize(cut)
    return [piece for piece, _, _ in cut.get_splits()]


def train_sentencepiece(text_path, n_bytes):
    """Llama's settings: identity normalisation, digits split, every space kept, unknown characters as bytes."""
    with tempfile.TemporaryDirectory() as directory:
        sample = Path(directory) / "sample.txt"
        sample.write_text(text_path.read_text(encoding="utf-8")[:n_bytes], encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(sample), model_prefix=str(Path(directory) / "spm"), model_type="bpe", vocab_size=768,
            byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, character_coverage=0.9995,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
            num_threads=1, minloglevel=2,
        )  # fmt: skip
        return sentencepiece.SentencePieceProcessor(model_file=str(Path(directory) / "spm.model"))


def write_spm_gguf(path, processor):
    """Vocabulary only, with the few sizes that llama.cpp insists on reading."""
    ids = range(processor.get_piece_size())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("SentencePiece test vocabulary")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(ids))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([processor.id_to_piece(i) for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    writer.add_token_types([token_type(processor, i) for i in ids])
    writer.add_bos_token_id(processor.bos_id())
    writer.add_eos_token_id(processor.eos_id())
    writer.add_unk_token_id(processor.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def token_type(processor, i):
    if processor.is_unknown(i):
        return gguf.TokenType.UNKNOWN
    if processor.is_control(i):
        return gguf.TokenType.CONTROL
    return gguf.TokenType.BYTE if processor.is_byte(i) else gguf.TokenType.NORMAL


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=True, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="the demo model's tokenizer.json")
    parser.add_argument("--text", type=Path, required=True, help="text to train the SentencePiece model on")
    parser.add_argument("--text-chars", type=int, default=400_000, help="how much of it")
    parser.add_argument("--out", type=Path, required=True, help="directory of the fixtures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    write_json(args.out / "demo.json", list(demo_cases(args.tokenizer)))
    write_json(
        args.out / "pretokenize.json",
        {pre: [{"text": t, "pieces": pieces(t, patterns)} for t in TEXTS if t] for pre, patterns in PRE.items()},
    )
    processor = train_sentencepiece(args.text, args.text_chars)
    write_spm_gguf(args.out / "llama-spm.gguf", processor)
    # sentencepiece takes control tokens for text, as llama.cpp does when not told to parse them; NUL ends its input.
    write_json(
        args.out / "llama-spm.json",
        [{"text": t, "ids": processor.encode(t)} for t in TEXTS if "\0" not in t],
    )


if __name__ == "__main__":
    main()
