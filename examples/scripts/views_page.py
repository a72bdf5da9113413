"""Write circuitsvis views of a hijacked fact to one page that opens with no network.

python examples/scripts/views_page.py --model smollm2-135m --layer 23 --out attention.html
"""

import argparse

import hijacklens as hl
from hijacklens import views
from probes import attention

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a hub id")
parser.add_argument("--case", type=int, default=57, help="the case id of a fact of the atlas")
parser.add_argument("--layer", type=int, default=-1, help="the layer to show; -1 is the last")
parser.add_argument("--out", default="attention.html", help="the page")
parser.add_argument("--picture", help="a PNG, SVG or PDF file for a picture of the layer")
options = parser.parse_args()

model = hl.load_model(options.model)
fact = hl.atlas().where(case_ids=[options.case])[0]
layer = options.layer % model.cfg.n_layers
run = views.run(model, fact, scheme="do-not-think", dose=1)
blind = attention.knock_out("last", "hijack", layers=layer)
blinded = views.run(model, fact, scheme="do-not-think", dose=1, probes=[blind])
sheet = views.Sheet(
    (
        run.attended("last", layers=layer, without="at:0"),
        run.heads(layers=layer),
        blinded.heads(layers=layer, folded=True),
        run.heads(heading="All heads", folded=True),
    ),
    title=f"{options.model}: {run.text}",
    note="Rows attend to columns. The folded views open at a click.",
)
print("written:", sheet.save(options.out))
if options.picture:
    print("written:", run.heads(layers=layer).save(options.picture))
