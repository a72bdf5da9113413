"""The pocket world: a small language whose distribution is known exactly, and models trained on it.

world = World(sharing=1.0)                          # the knobs, as one frozen record
train_world(world, Recipe(seed=0), out="pocket")    # an ordinary GPT-2 in pocket/model/
Reader(world).posterior("Bon Pason lives in")       # what an ideal reader would answer
"""
