"""The stage's report filled in: from findings, choice and export to what the page shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from abliteration import export, report, search, selection
from abliteration.findings import Findings
from abliteration.geometry import (
    cosine_between_layers,
    projections,
    relative_difference,
    separation,
)
from common.architecture import PlacedWriter
from common.edits import Edit

# Bars of a histogram need no more prompts than this.
MAX_PROMPTS = 128


def write(
    path: Path,
    *,
    name: str,
    findings: Findings,
    chosen: selection.Candidate,
    reason: str,
    candidates: Sequence[selection.Candidate],
    max_kl: float | None,
    searched: report.Search | None,
    edit: Edit,
    writers: Sequence[PlacedWriter],
    exported: export.Report,
    streams: Mapping[str, Tensor],
) -> None:
    """Write the report.

    Args:
        path: of the page.
        name: of the run.
        findings: the candidate directions.
        chosen: the place of the direction.
        reason: why it was chosen.
        candidates: all that were scored.
        max_kl: divergence above which a candidate was dropped.
        searched: a search and its result.
        edit: what was applied.
        writers: of the model.
        exported: what was measured of the export.
        streams: resid_pre of held-out prompts [prompts, layers, d_model] at the chosen position, by set; may be
            empty.
    """
    directions, index = findings.directions[:, :, 0], chosen.position
    around = round(chosen.layer)
    sets = list(streams.values())
    report.write(
        path,
        report.Report(
            name=name,
            model=str(edit.about["base_model"]),
            layer=chosen.layer,
            position=chosen.position,
            norms=directions.norm(dim=-1).tolist(),
            relative=relative_difference(findings.target, findings.harmless),
            cosines=cosine_between_layers(directions)[index],
            separation=separation(sets[0], sets[1], directions[:, index]) if streams else (),
            projections={
                kind: projections(part, directions[:, index])[:, around].tolist()
                for kind, part in streams.items()
            },
            scores=[scored_of(candidate) for candidate in candidates if len(candidates) > 1],
            max_kl=max_kl,
            search=searched,
            strengths=_strengths(edit, writers),
            residuals=_residuals(exported, writers),
            left_alone=edit.left_alone,
            noise_floor=exported.noise,
            facts=_facts(edit, exported, reason),
        ),
    )


def scored_of(candidate: selection.Candidate) -> report.Scored:
    """A candidate as the report shows it."""
    return report.Scored(
        int(candidate.layer),
        candidate.position,
        candidate.bypass,
        candidate.induce,
        candidate.kl,
        candidate.dropped,
    )


def search_of(
    trials: Sequence[search.Trial], chosen: search.Trial, max_refusal: float
) -> report.Search:
    """A search as the report shows it."""
    shown = [report.Trial(t.number, t.refusal, t.kl, t.rate, t.params, t.complete) for t in trials]
    return report.Search(shown, chosen.number, max_refusal)


def _strengths(edit: Edit, writers: Sequence[PlacedWriter]) -> dict[str, dict[int, float]]:
    strengths: dict[str, dict[int, float]] = {}
    for writer in writers:
        if writer.name in edit.removals and writer.block is not None:
            by_block = strengths.setdefault(writer.component, {})
            by_block[writer.block] = edit.removals[writer.name].strengths[0]
    return strengths


def _residuals(exported: export.Report, writers: Sequence[PlacedWriter]) -> list[report.Residual]:
    return [
        report.Residual(
            writer.name, writer.component, writer.block, exported.residuals[writer.name]
        )
        for writer in writers
        if writer.name in exported.residuals
    ]


def _facts(edit: Edit, exported: export.Report, reason: str) -> dict[str, str]:
    settings = ", ".join(
        f"{key} {value}" for key, value in edit.about["settings"].items() if key != "weights"
    )
    facts = {
        "Edit": f"{edit.about['edit']} ({settings})",
        "Why this direction": reason,
        "Estimator": str(edit.about["estimator"]),
    }
    if edit.about["target"] == "falsely_refused":
        facts["What was removed"] = "false refusals only: orthogonal to the direction of true ones"
    if exported.mismatch is not None:
        facts["Export scored again"] = f"KL {exported.mismatch:.1e} from what was scored"
    return facts


def stack_at(samples: Tensor, position: int) -> Tensor:
    """Every prompt's resid_pre at one position: from [prompts, layers, positions, d_model]."""
    return samples[:MAX_PROMPTS, :, position].to(torch.float64)
