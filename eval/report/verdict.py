"""The evaluation in a sentence or two, with the figures that decide it."""

from collections.abc import Mapping
from typing import Any

from common.webpage import Markup
from eval.report.figures import estimate, figure, joined
from eval.results import missed


def headline(results: Mapping[str, Any]) -> str:
    """Whether the run was accepted, or which gates it missed."""
    gates = results["accept"]["gates"]
    if not gates:
        return "Measured; the recipe sets no gates, so nothing was accepted or turned down."
    broken = missed(results)
    if broken:
        return f"Not accepted: {len(broken)} of {len(gates)} gates missed. {'; '.join(broken)}."
    return (
        "Accepted: the gate holds."
        if len(gates) == 1
        else f"Accepted: all {len(gates)} gates hold."
    )


def summary(results: Mapping[str, Any]) -> Markup:
    """What was won back, what is still refused, and how far the healed model is from the original."""
    said = [_recovery(results["pooled"])]
    if results["refusal"]:
        refused = joined([_refusal(row) for row in results["refusal"]], " and ")
        said.append(joined(["the healed model refuses ", refused], ""))
    said += [_divergence(row) for row in results["divergence"]]
    return joined([joined(said, "; "), "."], "")


def instrument(results: Mapping[str, Any]) -> dict[str, str]:
    """How far the count of refusals can be trusted, where that was measured."""
    about = results.get("refusal_instrument")
    if about is None:
        return {}
    if about.get("agreement") is None:
        return {"What counts refusals": f"{about['name']}: not yet held against people"}
    agreement, error, kappa = (
        figure(f"refusal_instrument.{key}", about.get(key), form)
        for key, form in (("agreement", ".1%"), ("rate_error", ".1%"), ("kappa", ".2f"))
    )
    words = [about["name"], ": agrees with people on ", agreement, " of answers (kappa ", kappa]
    words += ["), and a model's rate of refusals errs by up to ", error]
    words += ["; measured on ", about["measured_on"]]
    return {"What counts refusals": joined(words, "")}


def _recovery(pooled: Mapping[str, Any]) -> Markup:
    if pooled["recovery"] is None:
        return Markup("The edit did no damage that this many items could show")
    share = estimate("pooled.recovery", pooled["recovery"], ".1%")
    n = figure("pooled.n", pooled["n"], "d")
    return joined(["Of what the edit broke, ", share, " was won back (", n, " items)"], "")


def _refusal(row: Mapping[str, Any]) -> Markup:
    path = f"refusal[{row['name']}]"
    healed = estimate(f"{path}.healed", row["healed"], ".1%")
    original = figure(f"{path}.original.value", row["original"]["value"], ".1%")
    which = f" of the harmless prompts {row['name']}" if row["harmless"] else f" of {row['name']}"
    return joined([healed, which, " (original: ", original, ")"], "")


def _divergence(row: Mapping[str, Any]) -> Markup:
    healed, abliterated = (
        figure(f"divergence[{row['name']}].{model}.mean_kl", row[model]["mean_kl"], ".4f")
        for model in ("healed", "abliterated")
    )
    words = ["it lies ", healed, " nats per token from the original on ", row["name"]]
    return joined([*words, " (abliterated: ", abliterated, ")"], "")
