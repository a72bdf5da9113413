"""Reproduce a figure or statement of the paper at the quick scale, with its checks.

python examples/scripts/reproduce_figure.py lemma5 --out figure.png
"""

import argparse
from pathlib import Path

from analyses.reproduction.catalogue import CATALOGUE
from analyses.reproduction.reproduction import reproduce
from hijacklens import plots

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("id", nargs="?", default="lemma5", help="`hijacklens reproduce --list`")
parser.add_argument("--out", help="a PNG or SVG file for the figure")
options = parser.parse_args()

print("There are", ", ".join(CATALOGUE))
result = reproduce(options.id, scale="quick")
entry = CATALOGUE[options.id]
print(f"\n{entry.reference}: {entry.question}")
print(result.checks[["claim", "value", "low", "high", "allowed", "state"]].to_string(index=False))
if options.out:
    plots.write(result.plot(), Path(options.out))
