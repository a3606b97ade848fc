"""Fine-R1's two measures of an open-world answer (arXiv 2602.07605, section 5.1).

    python eval.py --model out/kinds-tapo/checkpoint-30 --reward tagged --data birds.parquet
    python -m fine_r1.measures out/kinds-tapo/checkpoint-30/eval-birds.jsonl
    python -m fine_r1.measures birds.jsonl --encoder google/siglip-base-patch16-256 --category bird

They forgive an answer that eval.py's accuracy, which wants the name and nothing else, does not:

    text inclusion        the label is contained in the answer. It is the paper's accuracy in the
                          closed world, too. Whoever lists every name is always right
    relative similarity   max(0, (Sim(c, c*) - Sim(c', c*)) / (1 - Sim(c', c*))), Eq. (5), with the
                          cosine of a text encoder's features; c the answer, c* the label, and c'
                          the category of all labels: who answers "bird" scores 0
"""

import torch

from fine_r1.triplets import load_encoder
from plumbing.base.common import Parser, fail, first_line
from plumbing.report.responses import aligned, by_question, interval, percent, read
from reward import tagged


class TextEncoder:
    """Features of texts, of length 1: those that a SigLIP or CLIP compares with pictures, or, of an
    encoder of texts alone, such as E5, the mean of its last layer over the tokens."""

    def __init__(self, name, device):
        from transformers import AutoTokenizer

        self.model = load_encoder(name, device)
        try:
            self.tok = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # of many kinds, depending on what is wrong with which file
            fail(f"--encoder {name} has no usable tokenizer ({first_line(error)})")
        text = self.model.config.get_text_config()
        self.longest = min(text.max_position_embeddings, 512)
        self.with_pictures = hasattr(self.model, "get_text_features")

    @torch.no_grad()
    def __call__(self, texts, together=64):
        """[text] -> (n, D); longer texts are cut off. SigLIP was trained on texts that are filled
        up to the full length, and takes the last token for the whole."""
        how = dict(padding="max_length" if self.with_pictures else True, truncation=True)
        how |= dict(max_length=self.longest, return_tensors="pt")
        found = []
        for start in range(0, len(texts), together):
            batch = self.tok(texts[start : start + together], **how).to(self.model.device)
            if self.with_pictures:
                x = self.model.get_text_features(**batch).pooler_output
            else:
                own = batch["attention_mask"][..., None]
                x = (self.model(**batch).last_hidden_state * own).sum(1) / own.sum(1)
            found.append(torch.nn.functional.normalize(x, dim=-1).cpu())
        return torch.cat(found)


def included(text, label):
    """Is the label contained in the text? Upper case and _ for a space make no difference."""
    said, name = (x.casefold().replace("_", " ") for x in (text, label))
    return name in said


def relative_similarity(encode, answers, labels, category):
    """Eq. (5) of each answer -> [float]. Ends with a sentence where a label is the category."""
    texts = list(dict.fromkeys([*answers, *labels, category]))
    features = dict(zip(texts, encode(texts)))
    answer, label = (torch.stack([features[x] for x in column]) for column in (answers, labels))
    similarity, least = (answer * label).sum(-1), label @ features[category]
    if (least > 1 - 1e-6).any():
        fail(f"--category {category} is a label; give what all labels are kinds of")
    return ((similarity - least) / (1 - least)).clamp(min=0).tolist()


def main():
    """Print the mean over questions, and its 95 % interval, of each measure on each set."""
    p = Parser(__doc__)
    p.add_argument("file", help="the responses that eval.py wrote")
    p.add_argument("--encoder", help="a SigLIP or CLIP, or an encoder of texts: folder or hub name")
    p.add_argument("--category", help="what all labels are kinds of, such as bird")
    args = p.parse_args()
    if bool(args.encoder) != bool(args.category):
        fail("--encoder and --category go together: a similarity is relative to a category's")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encode = TextEncoder(args.encoder, device) if args.encoder else None
    names, rows = ["accuracy", "inclusion", *["similarity"] * bool(encode)], []
    for key, records in read(args.file).items():
        # Without <answer> a response is taken as a whole, as in the released evaluation.
        answers = [tagged(r["predict"]) or r["predict"] for r in records]
        labels, row = [r["label"] for r in records], [key]
        values = {"inclusion": map(float, map(included, answers, labels))}
        if encode:
            values["similarity"] = relative_similarity(encode, answers, labels, args.category)
        measured = [r | dict(zip(values, x)) for r, x in zip(records, zip(*values.values()))]
        for name in names:
            means = [sum(v) / len(v) for v in by_question(measured, name).values()]
            row += [percent(sum(means) / len(means)), percent(*interval(means))]
        rows.append(row)
    heads = [text for name in names for text in (name, "95 % interval")]
    print("\n".join(aligned([["set", *heads], *rows])))


if __name__ == "__main__":
    main()
