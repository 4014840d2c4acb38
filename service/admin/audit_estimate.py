"""An audit's cost, known before it starts."""

from functools import cached_property

import torch
from torch import nn

from model_store.errors import StoreError
from model_store.library import Library, open_library
from model_store.ticket import Ticket
from service.admin.audit_process import CpuShare
from service.admin.audit_store import Cost
from service.audit import baselines
from service.audit.attack_runner import crafting_precision
from service.audit.config import Audit
from service.audit.cost import (
    check_giga_multiply_adds,
    estimated_seconds,
    expected_rivals,
    giga_multiply_adds,
    multiply_adds_of,
    rivals_giga_multiply_adds,
)
from service.audit.epsilons import epsilons_of
from service.audit.errors import AuditConflict, CostRejected
from service.audit.evaluation.members import Member, candidates_of
from service.audit.plan import attacked_epsilons, plan
from service.audit.profiles import PROFILES
from service.audit.rivals import rival_size
from service.settings import Settings


class CostEstimator:
    """Plans an audit without any network, and prices the plan."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cpu = CpuShare(settings.audits_threads)

    def cost(self, audit: Audit, library: Library) -> Cost:
        """Raises CostRejected beyond the configured hours, AuditRejected for a plan that cannot be made."""
        epsilons = epsilons_of(audit, library.input.numel)
        candidates = candidates_of(library, outside=self.outside, build=planning_stub)
        each = multiply_adds_of(library, self.outside)
        rivals = baselines.claimed_rivals(candidates, baselines.strengths(library))
        compared = baselines.compared_systems(candidates, rivals, each)
        known = baselines.known_draws(candidates, audit.seed, PROFILES[audit.profile].thetas)
        steps = plan(audit, epsilons, candidates, compared, known)
        singles = (baselines.single(candidates, index) for index in range(len(candidates.members)))
        by_name = {system.name: system for system in (*compared, *singles, *known)}
        exact = self.settings.int8_images is not None  # 8 bits are attacked in float32
        bfloat16 = not exact and crafting_precision(audit, library, candidates) == "bfloat16"
        giga = sum(giga_multiply_adds(step, by_name[step.system], each, bfloat16=bfloat16) for step in steps)
        giga += check_giga_multiply_adds(audit, each, bfloat16=bfloat16)
        if candidates.tickets > 1:  # whether there are training images is not known before the data set is listed
            size, own = rival_size(candidates), each[: candidates.tickets]
            giga += rivals_giga_multiply_adds(expected_rivals(audit), own, size, bfloat16=bfloat16)
        seconds = estimated_seconds(giga, self.settings.audits_threads)
        if seconds > 3600 * self.settings.audits_max_hours:
            raise CostRejected(
                f"about {seconds / 3600:.1f} hours ({giga:,.0f} giga-multiply-adds); at most "
                f"{self.settings.audits_max_hours:g}. Ask for fewer images, attacks or epsilons, or another profile"
            )
        share = self.cpu.update()
        return Cost(
            attacks=len(steps),
            giga_multiply_adds=round(giga, 1),
            seconds=round(seconds),
            cpu_share=round(share, 2),
            seconds_now=round(seconds / share),
            epsilons=attacked_epsilons(steps, epsilons),
            headline=epsilons.headline,
            epsilons_about=epsilons.about,
        )

    @cached_property
    def outside(self) -> Library | None:
        """The attacker's own library, verified once. Raises AuditConflict if it cannot be opened."""
        if self.settings.audit_surrogate_library is None:
            return None
        try:
            return open_library(self.settings.audit_surrogate_library)
        except StoreError as error:
            raise AuditConflict(f"the configured outside library cannot be used: {error}") from None


def planning_stub(_ticket: Ticket, name: str, _device: torch.device) -> Member:
    """A member without its network: enough to plan on."""
    return Member(name, nn.Identity(), 1.0)
