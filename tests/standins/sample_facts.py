"""Ten hand-written facts: multi-token targets, shared first tokens, non-ASCII subjects."""

from __future__ import annotations

from hijacklens.facts.fact import Fact, FactSet

ROWS = [
    ("P131", "Eiffel Tower", "The {} is in the city of", "Paris", "Guam", "France", None),
    ("P131", "Colosseum", "The {} is in the city of", "Rome", "London", "Italy", "England"),
    ("P103", "Danielle Darrieux", "The mother tongue of {} is", "French", "English", None, None),
    ("P36", "Italy", "The capital of {} is", "Rome", "Tokyo", None, None),
    ("P36", "Côte d'Ivoire", "The capital of {} is", "Yamoussoukro", "Paris", None, None),
    ("P190", "São Paulo", "The twin city of {} is", "New York", "New Delhi", None, None),
    ("P190", "北京", "What is the twin city of {}? It is", "Tokyo", "Rome", "Japan", "Italy"),
    ("P103", "Zoë Müller", "{} is a native speaker of", "English", "French", "England", "France"),
    ("P641", "{odd} <s> name", "{} plays", "tennis", "chess", "racket", "pawn"),
    ("P131", "Big Ben", "{} can be found in", "London", "Berlin", "England", "Germany"),
]


def sample_facts() -> FactSet:
    """The ten facts, case ids 0 to 9."""
    return FactSet(
        tuple(
            Fact(
                case_id=i,
                relation_id=relation,
                subject=subject,
                template=template,
                target_true=true,
                target_false=false,
                near_true=near_true,
                near_false=near_false,
            )
            for i, (relation, subject, template, true, false, near_true, near_false) in enumerate(
                ROWS
            )
        ),
        name="sample",
    )
