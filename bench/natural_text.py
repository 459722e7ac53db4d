"""A text of several that people wrote, in the form of WikiText-2, for `train_table.py --other`.

    python bench/natural_text.py --squad train-v1.1.json --brown DIR --abc DIR --out other.jsonl

SQuAD 1.1 gives articles of Wikipedia (a file that is cut off is read as far as it goes), the Brown corpus and ABC come
from nltk_data. WikiText-2 is split into tokens, its hyphens and separators inside words are written ` @-@ `, ` @,@ `
and ` @.@ `, and rare words are `<unk>`: here those seen fewer than six times in all texts together. The articles come
first, then the others in a random order that is always the same.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

RARE_BELOW = 6
FIELD = re.compile(r'"(title|context)":\s*("(?:[^"\\]|\\.)*")')
TAGGED = re.compile(r"(\S+)/[^/\s]+")


def squad(path: Path) -> list[str]:
    """One text per article: its title as a heading, then its paragraphs, a line each."""
    articles: list[list[str]] = []
    for field in FIELD.finditer(path.read_text("utf-8", "ignore")):
        value = json.loads(field.group(2), strict=False)
        if field.group(1) == "title":
            articles.append([f"= {value.replace('_', ' ')} =", ""])
        else:
            articles[-1].append(value.replace("\n", " "))
    return ["\n".join(lines) for lines in articles]


def brown(folder: Path) -> list[str]:
    """One text per file, without the tags."""
    paths = sorted(path for path in folder.iterdir() if re.fullmatch(r"c[a-r]\d\d", path.name))
    texts = (" ".join(TAGGED.findall(path.read_text("utf-8", "ignore"))) for path in paths)
    return [text.replace("``", '"').replace("''", '"') for text in texts]


def abc(folder: Path) -> list[str]:
    """Reports; a headline stands before an empty line or starts the file."""
    texts = [(folder / name).read_text("latin-1") for name in ("science.txt", "rural.txt")]
    return [" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text) if part.strip()]


def split(text: str) -> list[str]:
    """Tokens as WikiText-2 has them."""
    text = re.sub(r"(?<=\d)([,.])(?=\d)", r" @\1@ ", text)
    text = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", text)
    text = re.sub(r"(?<=\w)('s|'re|'ve|'ll|'d|'m|n't)\b", r" \1", text)
    return re.findall(r"@[-,.]@|'(?:s|re|ve|ll|d|m)\b|(?:[A-Z]\.)+|(?:Mr|Mrs|Dr|St)\.|\w+|[^\w\s]|\n", text)


def in_form(texts: list[str]) -> list[str]:
    tokens = [split(text) for text in texts]
    seen = Counter(token for text in tokens for token in text)
    known = {token for token, count in seen.items() if count >= RARE_BELOW or not token.isalpha()}
    return [" ".join(token if token in known else "<unk>" for token in text) for text in tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--brown", type=Path, required=True)
    parser.add_argument("--abc", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    articles, others = squad(args.squad), brown(args.brown) + abc(args.abc)
    random.Random(0).shuffle(others)
    texts = in_form(articles + others)
    args.out.write_text("".join(json.dumps({"text": f" {text} \n"}) + "\n" for text in texts), "utf-8")
    print(f"{len(texts)} texts, {sum(len(text.split()) for text in texts)} tokens as WikiText-2 has them")


if __name__ == "__main__":
    main()
