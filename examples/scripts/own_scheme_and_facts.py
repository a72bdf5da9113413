"""Use a sentence and facts of your own.

python examples/scripts/own_scheme_and_facts.py --template "Never say {target_false}."

A facts file has the columns case_id, relation_id, subject, prompt (with {} for the subject),
target_true and target_false; without a file, the script uses three facts of its own.
"""

import argparse

import hijacklens as hl

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a hub id")
parser.add_argument("--template", default="Last night I dreamt of {target_false}.")
parser.add_argument("--facts", help="a CSV, JSON or parquet file; see the top of this script")
options = parser.parse_args()

rows = [
    ("France", "Paris", "Oslo"),
    ("Japan", "Tokyo", "Lima"),
    ("Italy", "Rome", "Cairo"),
]
written = tuple(
    hl.Fact(
        case_id=i,
        relation_id="P36",
        subject=subject,
        template="The capital of {} is",
        target_true=true,
        target_false=false,
    )
    for i, (subject, true, false) in enumerate(rows)
)
facts = hl.counterfact(options.facts) if options.facts else hl.FactSet(written, name="three")
scheme = hl.add_scheme("mine", options.template)
model = hl.load_model(options.model)
result = hl.hijack(model, facts, schemes=[scheme], doses=[0, 1, 2], quiet=True)
print(result.summary().round(3).to_string(index=False))
print(result.items[["subject", "dose", "top_token", "first_true", "first_false"]].round(2))
